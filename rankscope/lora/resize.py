"""Live resize: new ranks for a PEFT LoRA model while it trains; the function, the optimizer and the config follow."""

from __future__ import annotations

import copy
import difflib
import logging
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, NamedTuple

import torch
from peft import LoraConfig, PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from rankscope.errors import ModelError
from rankscope.lora.factors import (
    RankMap,
    Resized,
    Selection,
    add_components,
    drop_components,
    kaiming_rows,
    truncate_svd,
)
from rankscope.lora.optimizer import Replacement, carry_state, replace_parameters, unwrap_optimizer
from rankscope.targets import plain_name

logger = logging.getLogger(__name__)


def alpha_for(rank: int, scaling: float, *, rslora: bool) -> float:
    """The alpha at which PEFT's scaling (alpha / r, or alpha / sqrt(r)) is `scaling`; an int where it is one.

    >>> alpha_for(3, 2.0, rslora=False), alpha_for(4, 0.7, rslora=True)
    (6, 1.4)
    """
    alpha = scaling * (math.sqrt(rank) if rslora else rank)
    return int(alpha) if float(alpha).is_integer() else alpha


def most_common(values: Mapping[str, Any]) -> Any:
    """The most frequent value, which becomes the config's own; among equals the first."""
    return Counter(values.values()).most_common(1)[0][0]


def name_fields(names: Collection[str]) -> dict[str, Any]:
    r"""`target_modules` and `exclude_modules` that adapt exactly the modules of these full names, on every model.

    The last parts of the names select, and a regex excludes all modules but those named: the one form that PEFT leaves as it is
    on mixture-of-experts models, and that matches in linear time.

    >>> name_fields(["h.0.q", "h.1.q"])
    {'target_modules': ['q'], 'exclude_modules': '(?!h\\.(?:0|1)\\.q$).*'}
    """
    last_parts = dict.fromkeys(name.rsplit(".", 1)[-1] for name in names)
    return {"target_modules": list(last_parts), "exclude_modules": f"(?!{names_regex(names)}$).*"}


def value_patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    r"""A `rank_pattern` or `alpha_pattern`: one regex for the names of each value that is not the default.

    >>> value_patterns({"a": 2, "b.c": 8, "d": 2, "b.e": 8}, default=2)
    {'^b\\.(?:c|e)': 8}
    """
    names: dict[Any, list[str]] = {}
    for name, value in values.items():
        if value != default:
            names.setdefault(value, []).append(name)
    return {f"^{names_regex(members)}": value for value, members in names.items()}  # PEFT appends `$`


def names_regex(names: Iterable[str]) -> str:
    r"""A regex that matches these dotted names, and no other, in full; common parts are written once.

    >>> names_regex(["h.0.q", "h.0.k", "h.1.q", "h.1.k", "head"])
    '(?:h\\.(?:0|1)\\.(?:q|k)|head)'
    """
    return _factored([name.split(".") for name in names])


def _factored(paths: Iterable[Sequence[str]]) -> str:
    following: dict[str, list[Sequence[str]]] = {}
    for first, *rest in paths:
        following.setdefault(first, []).append(rest)
    alike: dict[str, list[str]] = {}
    for part, rests in following.items():
        longer = [rest for rest in rests if rest]
        regex = rf"\.{_factored(longer)}" if longer else ""
        if longer and len(longer) < len(rests):
            regex = f"(?:{regex})?"
        alike.setdefault(regex, []).append(re.escape(part))
    return _either([_either(parts) + regex for regex, parts in alike.items()])


def _either(choices: Sequence[str]) -> str:
    return choices[0] if len(choices) == 1 else f"(?:{'|'.join(choices)})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Resize:
    """One module's new rank.

    Attributes:
        name: Full dotted name in the base model (`TargetModule.name`).
        rank: The new rank; 0 puts the module's adapter to sleep, a later resize wakes it.
        directions: (added, inputs) rows for the new part of A, as they are meant to be scaled; None: drawn as PEFT draws A.
    """

    name: str
    rank: int
    directions: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What a module has and can have.

    Attributes:
        rank: Its present rank.
        largest: The largest rank it can have.
        inputs: The width of a row of A.
    """

    rank: int
    largest: int
    inputs: int


def check_resizes(resizes: Sequence[Resize], rooms: Mapping[str, Room]) -> None:
    """Refuses modules that are unknown or named twice, ranks that are impossible, and directions that do not fit.

    A row of zeros does not fit: with zeros in B it would never get a gradient.

    Raises:
        ModelError: The first that is wrong.
    """
    seen: set[str] = set()
    for resize in resizes:
        name = resize.name
        rank: Any = resize.rank
        if name not in rooms:
            raise _unknown(name, rooms)
        if name in seen:
            raise ModelError(f"`resizes` must name each module once, but names `{name}` twice.")
        seen.add(name)
        room = rooms[name]
        if not isinstance(rank, Integral) or not 0 <= int(rank) <= room.largest:
            raise ModelError(
                f"the rank of `{name}` must be a whole number between 0 and {room.largest}, but got {rank!r}."
            )
        if resize.directions is not None:
            _check_directions(resize.directions, name, max(int(rank) - room.rank, 0), room.inputs)


def _check_directions(directions: Tensor, name: str, added: int, inputs: int) -> None:
    if tuple(directions.shape) != (added, inputs):
        raise ModelError(
            f"`directions` of `{name}` must be of shape ({added}, {inputs}), one row for each added rank, "
            f"but are of shape {tuple(directions.shape)}."
        )
    if not torch.isfinite(directions).all() or not directions.any(dim=1).all():
        raise ModelError(f"`directions` of `{name}` must be finite and without a row of zeros; leave them out to draw.")


def _unknown(name: str, rooms: Mapping[str, Room]) -> ModelError:
    close = difflib.get_close_matches(name, rooms, n=2)
    remedy = f"did you mean {' or '.join(repr(c) for c in close)}" if close else "adapt it when the model is wrapped"
    return ModelError(f"`resizes` must name modules that carry the adapter, but {name!r} does not; {remedy}.")


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
        ModelError: The layer keeps its adapter in another form.
    """
    a, b = (part.of(layer, adapter) for part in factor_parts(layer, adapter))
    if not isinstance(a, nn.Parameter) or not isinstance(b, nn.Parameter):
        raise ModelError(f"a layer of type {type(layer).__name__} must hold LoRA factors, but holds none.")
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
        ModelError: It is no PEFT model, or is wrapped for several processes.
    """
    inner = model._modules.get("_orig_mod", model)
    if isinstance(inner, PeftModel):
        return inner
    kind = type(inner).__name__
    if isinstance(inner, DistributedDataParallel) or kind == "FullyShardedDataParallel":
        raise ModelError(
            f"`model` must be a peft.PeftModel, but is wrapped in {kind}, which fixes parameters when it wraps; "
            "mask ranks instead (RankMasks, made before wrapping)."
        )
    raise ModelError(f"`model` must be a peft.PeftModel, but is a {kind}; wrap it with get_peft_model.")


def choose_adapter(model: PeftModel, adapter_name: str | None) -> str:
    """The adapter that is meant.

    Raises:
        ModelError: There are several and none is named, there is none of that name, or it is not LoRA.
    """
    names = sorted(model.peft_config)
    if adapter_name is None and len(names) > 1:
        raise ModelError(f"`adapter_name` must say which of the adapters {names} is meant, but is None.")
    adapter = adapter_name or names[0]
    if adapter not in model.peft_config:
        raise ModelError(f"`adapter_name` must be among the model's adapters {names}, but got {adapter!r}.")
    if (kind := model.peft_config[adapter].peft_type) != PeftType.LORA:
        raise ModelError(f"adapter {adapter!r} must be LoRA for its ranks to change, but is {kind.value}.")
    return adapter


def adapter_layers(model: PeftModel, adapter: str) -> dict[str, LoraLayer]:
    """The LoRA layers that carry the adapter, dormant ones included, by their names in the base model.

    Adapters on parameters (`target_parameters`: fused experts) are not among them; their ranks stay.

    Raises:
        ModelError: There is none.
    """
    if not (layers := lora_layers(model, adapter)):
        raise ModelError(f"`model` must carry LoRA layers of adapter {adapter!r}, but has none.")
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
        ModelError: The first such name.
    """
    for name in names:
        block, wrapper, _ = name.partition("._orig_mod")
        if wrapper:
            raise ModelError(
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
        ModelError: An initialisation or variant that changes the base weights, adapters that are tied, or a variant of LoRA.
    """
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(_CHANGE_THE_BASE):
        raise ModelError(
            f"`init_lora_weights` must leave the base weights as they are where ranks change, but {init!r} takes a part of the "
            "initial rank off them, and PEFT takes off another when it loads the adapter; use True, 'gaussian' or 'eva'."
        )
    for variant in _VARIANTS:
        if getattr(config, variant, None):
            raise ModelError(
                f"the adapter must be plain LoRA or DoRA for its ranks to change, but has `{variant}`; leave it out."
            )
    if init == "mica":
        raise ModelError(
            "the adapter must be plain LoRA or DoRA for its ranks to change, but is MiCA; use another init."
        )
    if getattr(config, "target_modules_to_tie", None):
        raise ModelError(
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
        ModelError: `bias` is not `"none"`.
    """
    if config.bias != "none":
        raise ModelError(
            f'`bias` must be "none" for modules to have rank 0 while they train, but is {config.bias!r}, and PEFT would lose '
            "their trained biases; keep rank 1 at least."
        )


def check_changeable(model: PeftModel, layers: Mapping[str, LoraLayer], adapter: str) -> None:
    """Refuses adapters whose ranks cannot change at all.

    Raises:
        ModelError: Merged adapters, forms of LoRA whose factors mean something else, shared factors, or DeepSpeed ZeRO-3.
    """
    for name, layer in layers.items():
        if layer.merged:
            raise ModelError(
                f"adapters must not be merged, but {layer.merged_adapters} are in `{name}`; unmerge first."
            )
        if unsupported := _unsupported(layer, adapter):
            raise ModelError(f"the adapter of `{name}` must be plain LoRA or DoRA, but it {unsupported}.")
        if is_offloaded(layer):
            raise ModelError(
                f"the weights of `{name}` must be in memory for its rank to change, but are offloaded; load the model without."
            )
        for parameter in factors(layer, adapter):
            if hasattr(parameter, "ds_id"):
                raise ModelError(
                    "the adapter's parameters must be whole in this process, but DeepSpeed ZeRO-3 partitions them and keeps "
                    "its own flat copies; use DDP or FSDP2 with masked ranks (RankMasks), or one process."
                )
    if layers:
        check_config(model.peft_config[adapter])
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        if (other := owners.setdefault(id(factors(layer, adapter)[0]), name)) != name:
            raise ModelError(f"adapters must have factors of their own, but `{name}` shares them with `{other}`.")


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps a module's weights elsewhere between calls; PEFT would make adapters without values there."""
    return any(parameter.is_meta for parameter in module.parameters())


def check_whole(layers: Mapping[str, LoraLayer], adapter: str) -> None:
    """Refuses parameters that cannot be swapped since FSDP2 shards them; masks leave them in place.

    Raises:
        ModelError: Sharded parameters.
    """
    if any(isinstance(factor, DTensor) for layer in layers.values() for factor in factors(layer, adapter)):
        raise ModelError(
            "the adapter's parameters must be whole in this process, but are sharded over several (DTensor); "
            "mask ranks instead (RankMasks)."
        )


def check_single_process() -> None:
    """Refuses where other processes hold copies that would not follow.

    Raises:
        ModelError: torch.distributed runs several processes.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        n_processes = torch.distributed.get_world_size()
        if n_processes > 1:
            raise ModelError(
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


Shrink = Literal["svd", "drop"]
_SHRINKS = {"drop": drop_components, "svd": truncate_svd}


def resize_adapters(
    model: PeftModel,
    optimizer: Optimizer | None,
    resizes: Sequence[Resize],
    *,
    adapter_name: str | None = None,
    shrink: Shrink = "drop",
    generator: torch.Generator | None = None,
) -> None:
    """Gives modules of a live LoRA model new ranks: all of them, or, on any error, none.

    Growing leaves the function as it is: new components have a row in A and zeros in B (in an embedding, as PEFT has
    it, the other way round unless directions are given). Scaling stays what it is at every rank. `r`, `lora_alpha` and
    the config's `target_modules`, `rank_pattern` and `alpha_pattern` follow, so that `save_pretrained` writes what plain PEFT
    loads. A module at rank 0 is, to PEFT, one without an adapter; it comes back when a later resize asks for it, with
    DoRA's magnitude and LoRA's bias at the values where they do nothing.

    Parameters are replaced, not written to: whoever else holds them (an EMA, tensor hooks on the parameter) holds the
    old ones; hooks on modules survive. Gradients are carried like first moments. In a model that `torch.compile` wraps,
    every call means a recompilation, and torch gives up after a few: change ranks rarely there, or mask them. Call it between
    steps, never between a forward pass and its backward pass (gradient checkpointing would compute another function again).

    Args:
        model: Not wrapped by DDP or FSDP, adapters not merged.
        optimizer: The one that trains the adapter, also as accelerate wraps it; None where there is none yet. Parameters are
            replaced in the same group at the same place, moments carried; learning-rate schedulers notice nothing.
        resizes: One for each module that changes.
        adapter_name: Which adapter; may be left out where there is only one.
        shrink: `"drop"` removes the components of least `||b_i|| ||a_i||` and leaves the others, with their moments, to the bit.
            `"svd"` finds the closest factors, which mixes components; moments are mixed alike, second moments approximately.
            Halving rank 4 in the middle of a run on digits-shift raised the loss by 0.09 and 0.02 (learning rate 0.003, 6
            seeds); mixed moments served the next steps better than moments reset to 0 (0.35 and 0.38; at 0.01: 0.40 and 0.42).
        generator: For rows of A that are drawn.

    Raises:
        ModelError: The model, or a resize that it cannot follow.
        ModelError: An optimizer that does not own the parameters, or whose state cannot be carried.

    >>> from peft import LoraConfig, get_peft_model
    >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), LoraConfig(target_modules=["0", "1"], r=2))
    >>> resize_adapters(model, None, [Resize(name="0", rank=3), Resize(name="1", rank=0)])
    >>> [tuple(parameter.shape) for parameter in model.parameters() if parameter.requires_grad]
    [(3, 8), (8, 3), (0, 8), (4, 0)]
    """
    if shrink not in _SHRINKS:
        raise ModelError(f"`shrink` must be among {sorted(_SHRINKS)}, but got {shrink!r}.")
    model = unwrap_peft_model(model)
    adapter = choose_adapter(model, adapter_name)
    layers = adapter_layers(model, adapter)
    check_resizes(resizes, {name: room_of(layer, adapter) for name, layer in layers.items()})
    resized_layers = {resize.name: layers[resize.name] for resize in resizes}
    check_changeable(model, resized_layers, adapter)
    if any(resize.rank == 0 for resize in resizes):
        check_may_sleep(model.peft_config[adapter])
    check_whole(resized_layers, adapter)
    if optimizer is not None:
        check_single_process()
    resized = {}
    for resize in resizes:
        layer = layers[resize.name]
        if resize.rank != rank_of(layer, adapter):
            resized[resize.name] = _new_factors(layer, adapter, resize, shrink, generator)
    replace_factors(model, optimizer, resized, adapter=adapter)


def replace_factors(
    model: PeftModel,
    optimizer: Optimizer | None,
    resized: Mapping[str, Resized],
    *,
    adapter: str,
) -> None:
    """Puts new factors into the layers, and makes parameters, optimizer, layer attributes and config agree with them.

    Raises:
        ModelError: No module would keep a rank above 0.
        ModelError: An optimizer that does not own the parameters, or whose state cannot be carried.
    """
    layers = adapter_layers(model, adapter)
    ranks = {
        name: len(resized[name].a) if name in resized else rank_of(layer, adapter) for name, layer in layers.items()
    }
    if not any(ranks.values()):
        raise ModelError(
            "`resizes` must leave at least one module a rank above 0; PEFT has no adapter without modules."
        )
    plans = {name: _plan(layers[name], adapter, new) for name, new in resized.items()}
    replacements = [replacement for plan in plans.values() for _, replacement in plan]
    states = []
    if optimizer is not None:
        optimizer = unwrap_optimizer(optimizer)
        states = carry_state(optimizer, replacements)

    for name, plan in plans.items():
        _install(layers[name], adapter, plan, ranks[name])
    if optimizer is not None:
        replace_parameters(optimizer, replacements, states)
    model.peft_config[adapter] = config_of(model, adapter, ranks)
    logger.debug("resized %s", ", ".join(f"{name} to {ranks[name]}" for name in plans))


# --- what it takes -------------------------------------------------------------------------------------------------


def _new_factors(
    layer: LoraLayer, adapter: str, resize: Resize, shrink: Shrink, generator: torch.Generator | None
) -> Resized:
    """The layer's factors at the new rank, as matrices."""
    a, b = (factor.detach().flatten(1) for factor in factors(layer, adapter))
    added = resize.rank - len(a)
    if added < 0:
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise ModelError(
                f"the factors of `{resize.name}` must be finite to be shrunk, but are not; go back to a checkpoint."
            )
        return _SHRINKS[shrink](a, b, resize.rank)
    columns = b.new_zeros(len(b), added)
    if resize.directions is not None:
        return add_components(a, b, resize.directions, columns)
    if factor_parts(layer, adapter) == EMBEDDING_FACTORS:
        device = b.device if generator is None else generator.device
        columns = torch.randn(len(b), added, generator=generator, device=device)
        return add_components(a, b, a.new_zeros(added, a.shape[1]), columns)
    return add_components(a, b, kaiming_rows(added, a, generator), columns)


_Plan = list[tuple[Part, Replacement]]


def _plan(layer: LoraLayer, adapter: str, new: Resized) -> _Plan:
    """The new parameters of one layer; nothing is changed yet."""
    a, b = factors(layer, adapter)
    part_a, part_b = factor_parts(layer, adapter)
    rank = len(new.a)
    plan = [
        (part_a, _replacement(a, new.a.reshape(rank, *a.shape[1:]), 0, new.a_map)),
        (part_b, _replacement(b, new.b.reshape(b.shape[0], rank, *b.shape[2:]), 1, new.b_map)),
    ]
    if is_dormant(layer, adapter):
        plan += _neutral(layer, adapter)
    return plan


def _neutral(layer: LoraLayer, adapter: str) -> _Plan:
    """Bias and magnitude at which a layer that wakes computes what its base layer computes."""
    plan = []
    if (bias := BIAS.of(layer, adapter)) is not None:
        plan.append((BIAS, _restart(bias, torch.zeros_like(bias))))
    if (dora := entry_of(layer, MAGNITUDE.container, adapter)) is not None:
        weight = dequantize_module_weight(layer.get_base_layer()).detach().to(dora.weight)
        plan.append((MAGNITUDE, _restart(dora.weight, dora.get_weight_norm(weight, 0.0, scaling=1.0))))
    return plan


def _replacement(old: nn.Parameter, value: Tensor, dim: int, rank_map: RankMap) -> Replacement:
    new = nn.Parameter(value.contiguous(), requires_grad=old.requires_grad)
    if old.grad is not None:
        new.grad = rank_map.carry(old.grad, dim).contiguous()
    return Replacement(old=old, new=new, dim=dim, map=rank_map)


def _restart(old: nn.Parameter, value: Tensor) -> Replacement:
    """A parameter of the same shape with another value, whose moments begin at zero again."""
    dim = old.shape.index(old.numel()) if old.numel() > 1 else 0  # magnitudes of convolutions: (1, outputs, 1, 1)
    return _replacement(old, value, dim, Selection(kept=(), added=old.shape[dim]))


def _install(layer: LoraLayer, adapter: str, plan: _Plan, rank: int) -> None:
    if is_dormant(layer, adapter):
        wake(layer, adapter)
    for part, replacement in plan:
        part.install(layer, adapter, replacement.new)
    for container, attributes in (
        ("lora_A", ("out_features", "out_channels")),
        ("lora_B", ("in_features", "in_channels")),
    ):
        inner = entry_of(layer, container, adapter)
        for attribute in attributes:
            if hasattr(inner, attribute):
                setattr(inner, attribute, rank)
    layer.r[adapter] = rank
    layer.lora_alpha[adapter] = alpha_for(rank, layer.scaling[adapter], rslora=layer.use_rslora.get(adapter, False))
    if rank == 0:
        put_to_sleep(layer, adapter)
