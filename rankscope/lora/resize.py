"""Live resize: new ranks for a PEFT LoRA model while it trains; the function, the optimizer and the config follow."""

from __future__ import annotations

import copy
import difflib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, NamedTuple

import torch
from peft import LoraConfig, PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from rankscope.distributed import n_processes
from rankscope.errors import ModelError, SettingsError
from rankscope.lora.config import alpha_for, name_fields, rank_fields
from rankscope.lora.factors import (
    RankMap,
    Resized,
    Selection,
    add_components,
    drop_components,
    kaiming_rows,
    truncate_svd,
)
from rankscope.lora.optimizer import Replacement, replace_parameters
from rankscope.targets import plain_name, unwrapped

logger = logging.getLogger(__name__)

Shrink = Literal["svd", "drop"]
_SHRINKS = {"drop": drop_components, "svd": truncate_svd}


@dataclass(frozen=True, slots=True, kw_only=True)
class Resize:
    """One module's new rank.

    Attributes:
        name: Full dotted name in the base model (`TargetModule.name`).
        rank: The new rank; 0 deactivates the module's adapter, and a later resize activates it again.
        directions: (added ranks, inputs) rows to append to A, scaled as they are to be used; None: drawn as PEFT draws A.
    """

    name: str
    rank: int
    directions: Tensor | None = None


def resize_adapters(
    model: PeftModel,
    optimizer: Optimizer | None,
    resizes: Sequence[Resize],
    *,
    adapter_name: str | None = None,
    shrink: Shrink = "drop",
    generator: torch.Generator | None = None,
) -> None:
    """Give modules of a live LoRA model new ranks: all of them or, on any error, none.

    Growing does not change the function: new components have a row in A and zeros in B (in embeddings, as in PEFT, the other
    way round unless directions are given). The scaling stays the same at every rank. The config follows, so that
    `save_pretrained` writes what plain PEFT loads. To PEFT, a module at rank 0 has no adapter; when a later resize activates
    it, DoRA's magnitude and LoRA's bias start at the values where they do nothing.

    Parameters are replaced. Other references, such as an EMA copy or tensor hooks, keep pointing at the old ones; hooks on
    modules survive. Call it between steps, never between a forward pass and its backward pass. A model that `torch.compile`
    wraps is recompiled at every call, and torch gives up after a few: use `RankMasks` there.

    Args:
        model: Not wrapped by DDP or FSDP, adapters not merged.
        optimizer: The one that trains the adapter, also as accelerate wraps it; None if there is none yet.
        resizes: One for each module that changes.
        adapter_name: May be left out if there is only one.
        shrink: `"drop"` removes the components of least `||b_i|| ||a_i||` and leaves the others unchanged to the bit.
            `"svd"` finds the closest factors, which mixes components and their moments; second moments are approximate.
            Halving rank 4 in the middle of a run on digits-shift raised the loss by 0.09 with `"drop"` and 0.02 with `"svd"`
            (learning rate 0.003, 6 seeds).
        generator: For rows of A that are drawn.

    Raises:
        ModelError: The model, a resize that it cannot follow, or an optimizer whose state cannot be carried.

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
    rooms = {}
    for name, layer in layers.items():
        a, b = factors(layer, adapter)
        inputs = a.shape[1:].numel()
        rooms[name] = (len(a), max(min(inputs, len(b)), len(a)), inputs)
    check_resizes(resizes, rooms)
    to_zero = any(resize.rank == 0 for resize in resizes)
    check_changeable(model, {resize.name: layers[resize.name] for resize in resizes}, adapter, to_zero=to_zero)
    if optimizer is not None and n_processes() > 1:
        raise ModelError(
            f"a live resize must run in one process, but there are {n_processes()}, whose wrappers (DDP, FSDP, ZeRO) fix the "
            "parameters; mask ranks instead (RankMasks)."
        )
    resized = {
        resize.name: _new_factors(layers[resize.name], adapter, resize, shrink, generator)
        for resize in resizes
        if resize.rank != rooms[resize.name][0]
    }
    replace_factors(model, optimizer, resized, adapter=adapter)


def replace_factors(
    model: PeftModel, optimizer: Optimizer | None, resized: Mapping[str, Resized], *, adapter: str
) -> None:
    """Put new factors into the layers; parameters, optimizer, layer attributes and config follow.

    Raises:
        ModelError: No module would keep a rank above 0, or the optimizer's state cannot be carried.
    """
    layers = adapter_layers(model, adapter)
    ranks = ranks_of(model, adapter) | {name: len(new.a) for name, new in resized.items()}
    if not any(ranks.values()):
        raise ModelError(
            "`resizes` must leave at least one module a rank above 0; PEFT has no adapter without modules."
        )
    plans = {name: _replacements(layers[name], adapter, new) for name, new in resized.items()}
    replace_parameters(optimizer, [replacement for plan in plans.values() for replacement in plan.values()])
    for name, plan in plans.items():
        _install(layers[name], adapter, plan, ranks[name])
    model.peft_config[adapter] = config_of(model, adapter, ranks)
    logger.debug("resized %s", ", ".join(f"{name} to {ranks[name]}" for name in plans))


def check_resizes(resizes: Sequence[Resize], rooms: Mapping[str, tuple[int, int, int]]) -> None:
    """Check names, ranks and directions; a row of zeros, with zeros in B, would never get a gradient.

    `rooms` holds each module's present rank, the largest that it can have, and the width of a row of A.

    Raises:
        ModelError: The first that is wrong.
    """
    seen: set[str] = set()
    for resize in resizes:
        name = resize.name
        rank: Any = resize.rank
        if name not in rooms:
            close = difflib.get_close_matches(name, rooms, n=2)
            remedy = f"did you mean {' or '.join(map(repr, close))}" if close else "adapt it when the model is wrapped"
            raise ModelError(f"`resizes` must name modules that carry the adapter, but {name!r} does not; {remedy}.")
        if name in seen:
            raise ModelError(f"`resizes` must name each module once, but names `{name}` twice.")
        seen.add(name)
        present, largest, inputs = rooms[name]
        if not isinstance(rank, Integral) or not 0 <= int(rank) <= largest:
            raise ModelError(f"the rank of `{name}` must be a whole number between 0 and {largest}, but got {rank!r}.")
        if (rows := resize.directions) is None:
            continue
        if tuple(rows.shape) != (shape := (max(int(rank) - present, 0), inputs)):
            raise ModelError(
                f"`directions` of `{name}` must be of shape {shape}, one row for each added rank, but are of shape "
                f"{tuple(rows.shape)}."
            )
        if not torch.isfinite(rows).all() or not rows.any(dim=1).all():
            raise ModelError(
                f"`directions` of `{name}` must be finite and without a row of zeros; leave them out to draw."
            )


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
    rows, columns = resize.directions, b.new_zeros(len(b), added)
    if rows is None and factor_parts(layer, adapter) == EMBEDDING_FACTORS:
        device = b.device if generator is None else generator.device
        rows, columns = a.new_zeros(added, a.shape[1]), torch.randn(len(b), added, generator=generator, device=device)
    elif rows is None:
        rows = kaiming_rows(added, a, generator)
    return add_components(a, b, rows, columns)


def _replacements(layer: LoraLayer, adapter: str, new: Resized) -> dict[Part, Replacement]:
    """The new parameters of one layer; nothing is changed yet. What activates starts with a neutral bias and magnitude."""
    a, b = factors(layer, adapter)
    part_a, part_b = factor_parts(layer, adapter)
    rank = len(new.a)
    plan = {
        part_a: _replacement(a, new.a.reshape(rank, *a.shape[1:]), 0, new.a_map),
        part_b: _replacement(b, new.b.reshape(b.shape[0], rank, *b.shape[2:]), 1, new.b_map),
    }
    if not is_inactive(layer, adapter):
        return plan
    if (bias := BIAS.of(layer, adapter)) is not None:
        plan[BIAS] = _replacement(bias, torch.zeros_like(bias), 0, Selection(kept=(), added=len(bias)))
    if (dora := entry_of(layer, MAGNITUDE.container, adapter)) is not None:
        weight = dequantize_module_weight(layer.get_base_layer()).detach().to(dora.weight)
        norm = dora.get_weight_norm(weight, 0.0, scaling=1.0)
        dim = norm.shape.index(norm.numel()) if norm.numel() > 1 else 0  # (1, outputs, 1, 1) in convolutions
        plan[MAGNITUDE] = _replacement(dora.weight, norm, dim, Selection(kept=(), added=norm.numel()))
    return plan


def _replacement(old: nn.Parameter, value: Tensor, dim: int, rank_map: RankMap) -> Replacement:
    new = nn.Parameter(value.contiguous(), requires_grad=old.requires_grad)
    if old.grad is not None:
        new.grad = rank_map.carry(old.grad, dim).contiguous()
    return Replacement(old=old, new=new, dim=dim, map=rank_map)


def _install(layer: LoraLayer, adapter: str, plan: Mapping[Part, Replacement], rank: int) -> None:
    if is_inactive(layer, adapter):
        _activate(layer, adapter)
    for part, replacement in plan.items():
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
        _deactivate(layer, adapter)


# --- the adapter inside a PEFT model ------------------------------------------------------------------------------


class Part(NamedTuple):
    """Where one parameter of an adapter is kept: `layer.<container>[adapter].<attribute>`, or the entry itself."""

    container: str
    attribute: str | None

    def of(self, layer: LoraLayer, adapter: str) -> nn.Parameter | None:
        """The parameter; None if the adapter has no such part."""
        entry = entry_of(layer, self.container, adapter)
        value: nn.Parameter | None = getattr(entry, self.attribute, None) if self.attribute else entry
        return value

    def install(self, layer: LoraLayer, adapter: str, parameter: nn.Parameter) -> None:
        """Swap the parameter inside its module, whose hooks survive."""
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
    return FACTORS if entry_of(layer, "lora_embedding_A", adapter) is None else EMBEDDING_FACTORS


def factors(layer: LoraLayer, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    """A of shape (rank, inputs) and B of shape (outputs, rank); a convolution's kernel in further dimensions.

    Raises:
        ModelError: The layer keeps its adapter in another form.
    """
    a, b = (part.of(layer, adapter) for part in factor_parts(layer, adapter))
    if not isinstance(a, nn.Parameter) or not isinstance(b, nn.Parameter):
        raise ModelError(f"a layer of type {type(layer).__name__} must hold LoRA factors, but holds none.")
    return a, b


def ranks_of(model: PeftModel, adapter: str) -> dict[str, int]:
    """The adapter's true ranks, 0 included."""
    return {name: len(factors(layer, adapter)[0]) for name, layer in adapter_layers(model, adapter).items()}


def unwrap_peft_model(model: nn.Module) -> PeftModel:
    """The PEFT model inside `torch.compile`'s wrapper.

    Raises:
        ModelError: It is no PEFT model, or is wrapped for several processes.
    """
    inner = unwrapped(model)
    kind = "DistributedDataParallel" if is_ddp(model) else type(inner).__name__
    if kind in ("DistributedDataParallel", "FullyShardedDataParallel"):
        raise ModelError(
            f"`model` must be a peft.PeftModel, but is wrapped in {kind}, which fixes parameters when it wraps; "
            "mask ranks instead (RankMasks, made before wrapping)."
        )
    if not isinstance(inner, PeftModel):
        raise ModelError(f"`model` must be a peft.PeftModel, but is a {kind}; wrap it with get_peft_model.")
    return inner


def is_ddp(model: nn.Module) -> bool:
    """Whether DistributedDataParallel wraps the model, inside `torch.compile` or not."""
    return any(isinstance(module, DistributedDataParallel) for module in model.modules())


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
    """The LoRA layers that carry the adapter, inactive ones included, by their names in the base model.

    Adapters on parameters (`target_parameters`: fused experts) are not among them; their ranks stay.

    Raises:
        ModelError: There is none.
    """
    layers, _ = lora_layers(model, adapter)
    if not layers:
        raise ModelError(f"`model` must carry LoRA layers of adapter {adapter!r}, but has none.")
    return layers


def lora_layers(model: PeftModel, adapter: str) -> tuple[dict[str, LoraLayer], dict[str, ParamWrapper]]:
    """The layers of an adapter on modules, and those on parameters (fused experts), by the names of what they adapt."""
    modules, parameters = {}, {}
    for path, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer) and (adapter in layer.r or is_inactive(layer, adapter)):
            check_block_names([path])
            name = plain_name(path)
            if isinstance(layer, ParamWrapper):
                parameters[f"{name.replace('.base_layer', '')}.{layer.parameter_name}"] = layer
            else:
                modules[name] = layer
    return modules, parameters


def from_peft_model(model: PeftModel, *, adapter_name: str | None = None) -> dict[str, int]:
    """The ranks that a PEFT model really carries, read from its LoRA layers and not from its config.

    Adapters on parameters (fused experts, PEFT's `target_parameters`) are left out.

    Args:
        model: A `peft.PeftModel` with a LoRA adapter, also as `torch.compile` or DDP wraps it.
        adapter_name: Default: the active one.

    Raises:
        SettingsError: The model has no such LoRA adapter, or several active ones and none is named.
    """
    model = unwrapped(model)
    if not isinstance(model, PeftModel):
        raise SettingsError(
            f"`model` must be a peft.PeftModel, but is a {type(model).__name__}; wrap it with get_peft_model."
        )
    active = [adapter_name] if adapter_name else model.active_adapters
    if len(active) > 1:
        raise SettingsError(f"`adapter_name` must say which of the active adapters {active} is meant, but is None.")
    adapter = next(iter(active), "default")
    if adapter in model.peft_config and (kind := model.peft_config[adapter].peft_type) != PeftType.LORA:
        raise SettingsError(f"adapter {adapter!r} must be LoRA to be read as ranks, but is {kind.value}.")
    layers, fused = lora_layers(model, adapter)
    if attention := [name for name, layer in layers.items() if isinstance(layer, MultiheadAttention)]:
        raise SettingsError(
            f"`model` must carry adapters on modules of one weight, but `{attention[0]}` is an nn.MultiheadAttention; "
            "adapt others."
        )
    if not layers:
        only = f" on modules, only on parameters such as `{min(fused)}`" if fused else ""
        raise SettingsError(
            f"`model` must carry a LoRA adapter {adapter!r}, but has none{only}; it has {sorted(model.peft_config)}."
        )
    return ranks_of(model, adapter)


def config_of(model: PeftModel, adapter: str, ranks: Mapping[str, int]) -> LoraConfig:
    """A copy of the adapter's config with exactly these modules, ranks and present scalings; ranks of 0 are left out.

    It is a copy because the object may be another adapter's, too: trainers add a reference adapter with the first one's config.
    """
    config = copy.deepcopy(model.peft_config[adapter])
    layers, fused = lora_layers(model, adapter)
    adapted = {name: rank for name, rank in ranks.items() if rank > 0}
    alphas = {
        name: alpha_for(rank, entry_of(layers[name], "scaling", adapter), rslora=config.use_rslora)
        for name, rank in adapted.items()
    }
    fields = name_fields(adapted) | rank_fields(
        adapted | {name: layer.r[adapter] for name, layer in fused.items()},
        alphas | {name: layer.lora_alpha[adapter] for name, layer in fused.items()},
    )
    for field, value in fields.items():
        setattr(config, field, value)
    config.layers_to_transform = config.layers_pattern = None
    if config.init_lora_weights == "orthogonal":  # takes even ranks only; weights are loaded over it
        config.init_lora_weights = True
    return config


# --- adapters of rank 0 -------------------------------------------------------------------------------------------

_INACTIVE = "dormant_adapters"


class InactiveAdapter(nn.Module):
    """A LoRA layer's entries of an adapter at rank 0: hidden from PEFT, still owned by the optimizer.

    PEFT has no rank 0, so the layer must look as if it had no such adapter: forward passes, `save_pretrained` and `state_dict`
    leave it out. Its parameters (of size zero) keep their place in `parameters()`, and its inner modules their hooks.
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
        """Nothing is saved."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is loaded, and no key is missing."""


def is_inactive(layer: LoraLayer, adapter: str) -> bool:
    """Whether the layer's adapter is at rank 0."""
    return adapter in getattr(layer, _INACTIVE, ()) and adapter not in layer.r  # in both: deleted and added again


def _deactivate(layer: LoraLayer, adapter: str) -> None:
    """Move the adapter's entries out of the layer's containers, in the order in which torch lists their parameters."""
    entries = {}
    for name in dict.fromkeys((*layer.adapter_layer_names, *layer.other_param_names, "lora_variant")):
        container: Any = getattr(layer, name, None)
        if hasattr(container, "keys") and adapter in container:
            entries[name] = container[adapter]
            del container[adapter]
    if not hasattr(layer, _INACTIVE):
        setattr(layer, _INACTIVE, nn.ModuleDict())
    getattr(layer, _INACTIVE)[adapter] = InactiveAdapter(entries)


def _activate(layer: LoraLayer, adapter: str) -> None:
    """The inverse of `_deactivate`."""
    inactive = getattr(layer, _INACTIVE)
    entries = inactive[adapter].entries
    del inactive[adapter]
    for name, entry in entries.items():
        getattr(layer, name)[adapter] = entry
        if isinstance(entry, nn.Module):
            entry.train(layer.training)


def entry_of(layer: LoraLayer, container: str, adapter: str) -> Any:
    """`layer.<container>[adapter]`, active or not; None if there is none."""
    if is_inactive(layer, adapter):
        return getattr(layer, _INACTIVE)[adapter].entries.get(container)
    entries = getattr(layer, container)
    return entries[adapter] if adapter in entries else None  # noqa: SIM401 (a ModuleDict has no `get`)


# --- models and configs whose ranks cannot change -----------------------------------------------------------------

# These take a part of the initial rank off the base weights, and another part when PEFT loads the adapter.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_VARIANTS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)


def check_changeable(
    model: PeftModel,
    layers: Mapping[str, LoraLayer],
    adapter: str,
    *,
    to_zero: bool = False,
    in_place: bool = False,
) -> None:
    """Check that the ranks of these layers can change.

    Args:
        model: The PEFT model.
        layers: By their names in the base model.
        adapter: Its name.
        to_zero: Ranks may fall to 0.
        in_place: Parameters keep their shapes, as under masks, and may be sharded.

    Raises:
        ModelError: Merged adapters, forms of LoRA whose factors mean something else, shared factors, offloaded or
            partitioned weights.
    """
    owners: dict[int, str] = {}
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
        if any(hasattr(parameter, "ds_id") for parameter in factors(layer, adapter)):
            raise ModelError(
                "the adapter's parameters must be whole in this process, but DeepSpeed ZeRO-3 partitions them and keeps "
                "its own flat copies; use DDP or FSDP2 with masked ranks (RankMasks), or one process."
            )
        if (other := owners.setdefault(id(factors(layer, adapter)[0]), name)) != name:
            raise ModelError(f"adapters must have factors of their own, but `{name}` shares them with `{other}`.")
        if not in_place and any(isinstance(factor, DTensor) for factor in factors(layer, adapter)):
            raise ModelError(
                "the adapter's parameters must be whole in this process, but are sharded over several (DTensor); "
                "mask ranks instead (RankMasks)."
            )
    if layers:
        check_config(model.peft_config[adapter], to_zero=to_zero)


def check_config(config: LoraConfig, *, to_zero: bool) -> None:
    """Check that the ranks of an adapter with this config can change, and fall to 0.

    Raises:
        ModelError: An initialisation or variant that changes the base weights, tied adapters, a variant of LoRA, or trained
            biases, which PEFT does not load for a module that has no adapter.
    """
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(_CHANGE_THE_BASE):
        raise ModelError(
            f"`init_lora_weights` must leave the base weights as they are where ranks change, but {init!r} takes a part of the "
            "initial rank off them, and PEFT takes off another when it loads the adapter; use True, 'gaussian' or 'eva'."
        )
    variants = [f"has `{variant}`; leave it out" for variant in _VARIANTS if getattr(config, variant, None)]
    if init == "mica":
        variants.append("is MiCA; use another init")
    if variants:
        raise ModelError(f"the adapter must be plain LoRA or DoRA for its ranks to change, but {variants[0]}.")
    if tied := getattr(config, "target_modules_to_tie", None):
        raise ModelError(
            f"adapters must have factors of their own for their ranks to change, but `ensure_weight_tying` ties those of "
            f"{sorted(tied)}; adapt other modules only."
        )
    if to_zero and config.bias != "none":
        raise ModelError(
            f'`bias` must be "none" for modules to have rank 0 while they train, but is {config.bias!r}, and PEFT would lose '
            "their trained biases; keep rank 1 at least."
        )


def _unsupported(layer: LoraLayer, adapter: str) -> str | None:
    variant = entry_of(layer, "lora_variant", adapter)
    if variant is not None and "Dora" not in type(variant).__name__:
        return f"is of variant {type(variant).__name__}"
    if getattr(layer.get_base_layer(), "groups", 1) > 1:
        return "is on a convolution with groups"
    return "is a MultiheadAttention" if isinstance(layer, MultiheadAttention) else None


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps a module's weights elsewhere between calls; PEFT would make adapters without values there."""
    return any(parameter.is_meta for parameter in module.parameters())


def check_block_names(names: Iterable[str]) -> None:
    """Check that `torch.compile` wraps no blocks: PEFT would save their adapters under names that no other model has.

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
