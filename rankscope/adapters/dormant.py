"""Adapters at rank 0: out of PEFT's sight, in the optimizer's."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

_CONTAINER = "dormant_adapters"


class DormantAdapter(nn.Module):
    """What a LoRA layer holds of an adapter whose rank is 0.

    PEFT has no rank 0; to it, such a layer must look like one without the adapter: forward passes skip it, `save_pretrained` and
    `state_dict` leave it out. But its parameters (of size zero) must keep their place in the optimizer, whenever
    that is built, and its inner modules their hooks, until the rank comes back. So the entries are taken out of the
    layer's own containers and kept here; the parameters are listed by `parameters()` and never saved or loaded.
    """

    def __init__(self, entries: dict[str, Any]) -> None:
        super().__init__()
        self.entries = entries  # a dict, so that torch registers none of the modules in it
        for container, entry in entries.items():
            named = entry.named_parameters() if isinstance(entry, nn.Module) else [("", entry)]
            for name, value in named:
                if isinstance(value, nn.Parameter):
                    self.register_parameter(f"{container}_{name}".replace(".", "_"), value)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing of it is saved."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing of it is loaded, and nothing is missed."""


def is_dormant(layer: LoraLayer, adapter: str) -> bool:
    """Whether the layer's adapter is at rank 0."""
    return adapter in getattr(layer, _CONTAINER, ()) and adapter not in layer.r  # in both: deleted and added again


def put_to_sleep(layer: LoraLayer, adapter: str) -> None:
    """Takes every trace of the adapter out of the layer's own containers."""
    entries = {}
    for name in _containers(layer):
        container = getattr(layer, name)
        if adapter in container:
            entries[name] = container[adapter]
            del container[adapter]
    if not hasattr(layer, _CONTAINER):
        setattr(layer, _CONTAINER, nn.ModuleDict())
    getattr(layer, _CONTAINER)[adapter] = DormantAdapter(entries)


def wake(layer: LoraLayer, adapter: str) -> None:
    """The inverse of `put_to_sleep`."""
    dormant = getattr(layer, _CONTAINER)[adapter]
    del getattr(layer, _CONTAINER)[adapter]
    for name, entry in dormant.entries.items():
        getattr(layer, name)[adapter] = entry
        if isinstance(entry, nn.Module):
            entry.train(layer.training)


def entry_of(layer: LoraLayer, container: str, adapter: str) -> Any:
    """`layer.<container>[adapter]`, wherever it is kept; None where there is none."""
    if is_dormant(layer, adapter):
        return getattr(layer, _CONTAINER)[adapter].entries.get(container)
    entries = getattr(layer, container)
    present: bool = adapter in entries
    return entries[adapter] if present else None  # a ModuleDict has no `get`


def _containers(layer: LoraLayer) -> tuple[str, ...]:
    """The layer's containers that are keyed by adapter, in the order in which torch lists their parameters."""
    names = dict.fromkeys((*layer.adapter_layer_names, *layer.other_param_names, "lora_variant"))
    return tuple(name for name in names if hasattr(getattr(layer, name, None), "keys"))
