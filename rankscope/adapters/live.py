"""The live adapter inside a PEFT model: its layers, its parts, and what forbids changing them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from rankscope.adapters.dormant import entry_of, is_dormant
from rankscope.adapters.patterns import alpha_for, most_common, name_fields, value_patterns
from rankscope.adapters.requests import Room
from rankscope.exceptions import AdapterError
from rankscope.targets import plain_name


class Part(NamedTuple):
    """Where one parameter of an adapter is kept: `layer.<container>[adapter].<attribute>`, or the entry itself."""

    container: str
    attribute: str | None

    def of(self, layer: LoraLayer, adapter: str) -> nn.Parameter | None:
        """The parameter; None where the adapter has no such part."""
        entry = entry_of(layer, self.container, adapter)
        value: nn.Parameter | None = getattr(entry, self.attribute, None) if self.attribute else entry
        return value

    def install(self, layer: LoraLayer, adapter: str, parameter: nn.Parameter) -> None:
        """Swaps the parameter inside its module, whose hooks survive."""
        if self.attribute is None:
            getattr(layer, self.container)[adapter] = parameter
        else:
            setattr(getattr(layer, self.container)[adapter], self.attribute, parameter)


EMBEDDING_FACTORS = Part("lora_embedding_A", None), Part("lora_embedding_B", None)
FACTORS = Part("lora_A", "weight"), Part("lora_B", "weight")
BIAS = Part("lora_B", "bias")
MAGNITUDE = Part("lora_magnitude_vector", "weight")


def factor_parts(layer: LoraLayer, adapter: str) -> tuple[Part, Part]:
    """Where A (rank first) and B (rank second) are."""
    embedding = entry_of(layer, "lora_embedding_A", adapter) is not None
    return EMBEDDING_FACTORS if embedding else FACTORS


def factors(layer: LoraLayer, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    """A of shape (rank, inputs) and B of shape (outputs, rank); a convolution's kernel in further dimensions.

    Raises:
        AdapterError: The layer keeps its adapter in another form.
    """
    a, b = (part.of(layer, adapter) for part in factor_parts(layer, adapter))
    if not isinstance(a, nn.Parameter) or not isinstance(b, nn.Parameter):
        raise AdapterError(f"a layer of type {type(layer).__name__} must hold LoRA factors, but holds none.")
    return a, b


def rank_of(layer: LoraLayer, adapter: str) -> int:
    """The layer's true rank, 0 included."""
    return factors(layer, adapter)[0].shape[0]


def room_of(layer: LoraLayer, adapter: str) -> Room:
    """The layer's rank, and the largest that its update can have."""
    a, b = factors(layer, adapter)
    inputs = a.shape[1:].numel()
    return Room(rank=len(a), largest=max(min(inputs, len(b)), len(a)), inputs=inputs)


def unwrap_peft_model(model: nn.Module) -> PeftModel:
    """The PEFT model inside `torch.compile`'s wrapper.

    Raises:
        AdapterError: It is no PEFT model, or is wrapped for several processes.
    """
    inner = model._modules.get("_orig_mod", model)
    if isinstance(inner, PeftModel):
        return inner
    kind = type(inner).__name__
    if isinstance(inner, DistributedDataParallel) or kind == "FullyShardedDataParallel":
        raise AdapterError(
            f"`model` must be a peft.PeftModel, but is wrapped in {kind}, which fixes parameters when it wraps; "
            "mask ranks instead (RankMasks, made before wrapping)."
        )
    raise AdapterError(f"`model` must be a peft.PeftModel, but is a {kind}; wrap it with get_peft_model.")


def choose_adapter(model: PeftModel, adapter_name: str | None) -> str:
    """The adapter that is meant.

    Raises:
        AdapterError: There are several and none is named, there is none of that name, or it is not LoRA.
    """
    names = sorted(model.peft_config)
    if adapter_name is None and len(names) > 1:
        raise AdapterError(f"`adapter_name` must say which of the adapters {names} is meant, but is None.")
    adapter = adapter_name or names[0]
    if adapter not in model.peft_config:
        raise AdapterError(f"`adapter_name` must be among the model's adapters {names}, but got {adapter!r}.")
    if (kind := model.peft_config[adapter].peft_type) != PeftType.LORA:
        raise AdapterError(f"adapter {adapter!r} must be LoRA for its ranks to change, but is {kind.value}.")
    return adapter


def adapter_layers(model: PeftModel, adapter: str) -> dict[str, LoraLayer]:
    """The LoRA layers that carry the adapter, dormant ones included, by their names in the base model.

    Adapters on parameters (`target_parameters`: fused experts) are not among them; their ranks stay.

    Raises:
        AdapterError: There is none.
    """
    if not (layers := lora_layers(model, adapter)):
        raise AdapterError(f"`model` must carry LoRA layers of adapter {adapter!r}, but has none.")
    return layers


def lora_layers(model: PeftModel, adapter: str) -> dict[str, LoraLayer]:
    """As `adapter_layers`; empty where there is none."""
    return {n: layer for n, layer in _all_layers(model, adapter).items() if not isinstance(layer, ParamWrapper)}


def adapted_parameters(model: PeftModel, adapter: str) -> dict[str, ParamWrapper]:
    """The adapters on parameters, by the parameters' names in the base model."""
    return {
        f"{name.replace('.base_layer', '')}.{layer.parameter_name}": layer
        for name, layer in _all_layers(model, adapter).items()
        if isinstance(layer, ParamWrapper)
    }


def _all_layers(model: PeftModel, adapter: str) -> dict[str, LoraLayer]:
    found = {}
    for path, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer) and (adapter in layer.r or is_dormant(layer, adapter)):
            check_block_names([path])
            found[plain_name(path)] = layer
    return found


def check_block_names(names: Iterable[str]) -> None:
    """Refuses models whose blocks torch.compile wraps: their adapters would be saved under names that no other model has.

    Raises:
        AdapterError: The first such name.
    """
    for name in names:
        block, wrapper, _ = name.partition("._orig_mod")
        if wrapper:
            raise AdapterError(
                f"blocks must be compiled in place, but `{block}` is wrapped by `torch.compile`, whose name PEFT would save; "
                "call its `compile()` instead."
            )


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Takes `torch.compile`'s wrapper off a base model, so that PEFT saves the names of one that is not compiled."""
    wrapped = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is not None and "_orig_mod" in child._modules
    ]
    for parent, name, child in wrapped:
        parent._modules[name] = child._modules["_orig_mod"]
    try:
        yield
    finally:
        for parent, name, child in wrapped:
            parent._modules[name] = child


def config_of(model: PeftModel, adapter: str, ranks: Mapping[str, int]) -> LoraConfig:
    """A copy of the adapter's config that names exactly these modules, ranks and present scalings; ranks of 0 are left out.

    A copy, since the object may be another adapter's, too: trainers add a reference adapter with the config of the first.
    """
    config = copy.deepcopy(model.peft_config[adapter])
    layers = adapter_layers(model, adapter)
    adapted = {name: rank for name, rank in ranks.items() if rank > 0}
    alphas = {
        name: alpha_for(rank, entry_of(layers[name], "scaling", adapter), rslora=config.use_rslora)
        for name, rank in adapted.items()
    }
    fixed = adapted_parameters(model, adapter)
    config.r, config.lora_alpha = most_common(adapted), most_common(alphas)
    config.rank_pattern = value_patterns(adapted | {name: layer.r[adapter] for name, layer in fixed.items()}, config.r)
    config.alpha_pattern = value_patterns(
        alphas | {name: layer.lora_alpha[adapter] for name, layer in fixed.items()}, config.lora_alpha
    )
    fields = name_fields(adapted)
    config.target_modules, config.exclude_modules = set(fields["target_modules"]), fields["exclude_modules"]
    config.layers_to_transform = config.layers_pattern = None
    if config.init_lora_weights == "orthogonal":  # which takes even ranks only; weights are loaded over it
        config.init_lora_weights = True
    return config


# What makes these adapters takes a part off the base weight that depends on the rank, and does so again on loading.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_config(config: LoraConfig) -> None:
    """Refuses configs of adapters whose ranks cannot change.

    Raises:
        AdapterError: An initialisation or variant that changes the base weights, adapters that are tied, or a variant of LoRA.
    """
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(_CHANGE_THE_BASE):
        raise AdapterError(
            f"`init_lora_weights` must leave the base weights as they are where ranks change, but {init!r} takes a part of the "
            "initial rank off them, and PEFT takes off another when it loads the adapter; use True, 'gaussian' or 'eva'."
        )
    for variant in _VARIANTS:
        if getattr(config, variant, None):
            raise AdapterError(
                f"the adapter must be plain LoRA or DoRA for its ranks to change, but has `{variant}`; leave it out."
            )
    if init == "mica":
        raise AdapterError(
            "the adapter must be plain LoRA or DoRA for its ranks to change, but is MiCA; use another init."
        )
    if getattr(config, "target_modules_to_tie", None):
        raise AdapterError(
            f"adapters must have factors of their own for their ranks to change, but `ensure_weight_tying` ties those of "
            f"{sorted(config.target_modules_to_tie)}; adapt other modules only."
        )


_VARIANTS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)


def check_may_sleep(config: LoraConfig) -> None:
    """Refuses rank 0 where biases are trained: PEFT does not load the bias of a module that has no adapter.

    Raises:
        AdapterError: `bias` is not `"none"`.
    """
    if config.bias != "none":
        raise AdapterError(
            f'`bias` must be "none" for modules to have rank 0 while they train, but is {config.bias!r}, and PEFT would lose '
            "their trained biases; keep rank 1 at least."
        )


def check_changeable(model: PeftModel, layers: Mapping[str, LoraLayer], adapter: str) -> None:
    """Refuses adapters whose ranks cannot change at all.

    Raises:
        AdapterError: Merged adapters, forms of LoRA whose factors mean something else, shared factors, or DeepSpeed ZeRO-3.
    """
    for name, layer in layers.items():
        if layer.merged:
            raise AdapterError(
                f"adapters must not be merged, but {layer.merged_adapters} are in `{name}`; unmerge first."
            )
        if unsupported := _unsupported(layer, adapter):
            raise AdapterError(f"the adapter of `{name}` must be plain LoRA or DoRA, but it {unsupported}.")
        if is_offloaded(layer):
            raise AdapterError(
                f"the weights of `{name}` must be in memory for its rank to change, but are offloaded; load the model without."
            )
        for parameter in factors(layer, adapter):
            if hasattr(parameter, "ds_id"):
                raise AdapterError(
                    "the adapter's parameters must be whole in this process, but DeepSpeed ZeRO-3 partitions them and keeps "
                    "its own flat copies; use DDP or FSDP2 with masked ranks (RankMasks), or one process."
                )
    if layers:
        check_config(model.peft_config[adapter])
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        if (other := owners.setdefault(id(factors(layer, adapter)[0]), name)) != name:
            raise AdapterError(f"adapters must have factors of their own, but `{name}` shares them with `{other}`.")


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps a module's weights elsewhere between calls; PEFT would make adapters without values there."""
    return any(parameter.is_meta for parameter in module.parameters())


def check_whole(layers: Mapping[str, LoraLayer], adapter: str) -> None:
    """Refuses parameters that cannot be swapped since FSDP2 shards them; masks leave them in place.

    Raises:
        AdapterError: Sharded parameters.
    """
    if any(isinstance(factor, DTensor) for layer in layers.values() for factor in factors(layer, adapter)):
        raise AdapterError(
            "the adapter's parameters must be whole in this process, but are sharded over several (DTensor); "
            "mask ranks instead (RankMasks)."
        )


def check_single_process() -> None:
    """Refuses where other processes hold copies that would not follow.

    Raises:
        AdapterError: torch.distributed runs several processes.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        n_processes = torch.distributed.get_world_size()
        if n_processes > 1:
            raise AdapterError(
                f"a live resize must run in one process, but there are {n_processes}, whose wrappers (DDP, FSDP, ZeRO) fix "
                "the parameters; mask ranks instead (RankMasks)."
            )


def _unsupported(layer: LoraLayer, adapter: str) -> str | None:
    variant: Any = entry_of(layer, "lora_variant", adapter)
    if variant is not None and "Dora" not in type(variant).__name__:
        return f"is of variant {type(variant).__name__}"
    if getattr(layer.get_base_layer(), "groups", 1) > 1:
        return "is on a convolution with groups"
    if type(layer).__name__ == "MultiheadAttention":
        return "is a MultiheadAttention"
    return None
