"""Live resize: new ranks for a PEFT LoRA model while it trains; the function, the optimizer and the config follow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, NamedTuple, cast

import torch
from peft import LoraConfig, PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from rankscope.distributed import copy_from_first, n_processes
from rankscope.errors import ModelError, did_you_mean
from rankscope.lora.config import alpha_for, check_block_names, check_config, with_ranks
from rankscope.lora.factors import SHRINKS, RankMap, Replacement, Resized, Selection, grow, replace_parameters
from rankscope.targets import plain_name, unwrapped

Part = tuple[str, str | None]  # `layer.<container>[adapter].<attribute>`, or the entry itself

FACTORS: tuple[Part, Part] = ("lora_A", "weight"), ("lora_B", "weight")
EMBEDDING_FACTORS: tuple[Part, Part] = ("lora_embedding_A", None), ("lora_embedding_B", None)
BIAS: Part = ("lora_B", "bias")
MAGNITUDE: Part = ("lora_magnitude_vector", "weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Resize:
    """One module's new rank; 0 deactivates its adapter, and a later resize activates it again."""

    name: str  # in the base model
    rank: int
    directions: Tensor | None = None  # (added ranks, inputs) rows for A, scaled as they are to be used; None: drawn


def resize_adapters(
    model: PeftModel,
    optimizer: Optimizer | None,
    resizes: Sequence[Resize],
    *,
    adapter_name: str | None = None,
    shrink: Literal["svd", "drop"] = "drop",
    generator: torch.Generator | None = None,
    replicated: bool = False,
) -> None:
    """Give modules of a live LoRA model new ranks: all of them or, on any error (a ModelError), none.

    Growing does not change the function: new components are zero in B (in embeddings without directions, in A). The scaling
    stays, and the config follows, so that `save_pretrained` writes what plain PEFT loads; rank 0 is no adapter there.

    Parameters are replaced, in the optimizer too. Other references, such as an EMA copy, keep pointing at the old ones; hooks on
    modules survive. Call it between steps. Under `torch.compile`, which would recompile, DDP or FSDP use `RankMasks`.

    `shrink="drop"` removes the components of least `||b_i|| ||a_i||` and leaves the others unchanged to the bit; `"svd"` finds
    the closest factors, which mixes components and their moments. The generator is for rows of A that are drawn.

    `replicated` says that every process of torch.distributed makes this call on an equal model; the first one's factors are
    copied.

    >>> from peft import LoraConfig, get_peft_model
    >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), LoraConfig(target_modules=["0", "1"], r=2))
    >>> resize_adapters(model, None, [Resize(name="0", rank=3), Resize(name="1", rank=0)])
    >>> [tuple(parameter.shape) for parameter in model.parameters() if parameter.requires_grad]
    [(3, 8), (8, 3), (0, 8), (4, 0)]
    """
    if shrink not in SHRINKS:
        raise ModelError(f"`shrink` must be among {sorted(SHRINKS)}, but got {shrink!r}.")
    adapter = LiveAdapter(model, adapter_name)
    check_resizes(resizes, {name: module.room for name, module in adapter.modules.items()})
    adapter.check_changeable([r.name for r in resizes], to_zero=any(r.rank == 0 for r in resizes))
    if optimizer is not None and not replicated and (n := n_processes()) > 1:
        raise ModelError(f"a live resize must run in one process, but there are {n}; mask ranks instead (RankMasks).")
    resized = {}
    for resize in resizes:
        name, module = resize.name, adapter.modules[resize.name]
        a, b = (factor.detach().flatten(1) for factor in module.factors)
        if resize.rank > len(a):
            rows = resize.rank - len(a) if resize.directions is None else resize.directions
            resized[name] = grow(a, b, rows, generator, embedding=module.parts == EMBEDDING_FACTORS)
        elif resize.rank < len(a):
            if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
                must = f"the factors of `{name}` must be finite to be shrunk"
                raise ModelError(f"{must}, but are not; go back to a checkpoint.")
            resized[name] = SHRINKS[shrink](a, b, resize.rank)
    adapter.replace_factors(optimizer, resized)
    if replicated:
        copy_from_first(each.data for name in resized for each in adapter.modules[name].factors)


def check_resizes(resizes: Sequence[Resize], rooms: Mapping[str, tuple[int, int, int]]) -> None:
    """Raise a ModelError for a wrong name, rank or directions; `rooms` holds `LoraModule.room` of each module."""
    if twice := [name for name, n in Counter(resize.name for resize in resizes).items() if n > 1]:
        raise ModelError(f"`resizes` must name each module once, but names `{twice[0]}` twice.")
    for resize in resizes:
        name, rank, rows = resize.name, cast(Any, resize.rank), resize.directions
        if name not in rooms:
            hint = did_you_mean(name, rooms, "adapt it when the model is wrapped.")
            raise ModelError(f"`resizes` must name modules that carry the adapter, but {name!r} does not; {hint}")
        present, largest, inputs = rooms[name]
        if not isinstance(rank, Integral) or not 0 <= int(rank) <= largest:
            raise ModelError(f"the rank of `{name}` must be a whole number between 0 and {largest}, but got {rank!r}.")
        must = f"`directions` of `{name}` must be"
        if rows is not None and (got := tuple(rows.shape)) != (shape := (max(int(rank) - present, 0), inputs)):
            raise ModelError(f"{must} of shape {shape}, one row for each added rank, but are of shape {got}.")
        if rows is not None and not (torch.isfinite(rows).all() and rows.any(dim=1).all()):  # zeros would stay zeros
            raise ModelError(f"{must} finite and without a row of zeros; leave them out to draw.")


# --- one module's adapter -----------------------------------------------------------------------------------------

_INACTIVE = "dormant_adapters"


class InactiveAdapter(nn.Module):
    """A layer's adapter at rank 0: hidden from PEFT and `state_dict`, but its parameters keep their place in the model."""

    def __init__(self, entries: dict[str, Any]) -> None:
        super().__init__()
        self.entries = entries  # a dict, so that torch registers none of the modules in it
        for container, entry in entries.items():
            for name, value in entry.named_parameters() if isinstance(entry, nn.Module) else [("", entry)]:
                if isinstance(value, nn.Parameter):
                    self.register_parameter(f"{container}_{name}".replace(".", "_"), value)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None: ...

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None: ...


class LoraModule(NamedTuple):
    """One module's adapter: PEFT's layer, and the name under which the layer's containers keep the adapter."""

    layer: LoraLayer
    adapter: str

    @property
    def active(self) -> bool:
        """Whether the rank is above 0; an adapter that was deleted and added again is in both places."""
        return self.adapter in self.layer.r or self.adapter not in getattr(self.layer, _INACTIVE, ())

    def entry(self, container: str) -> Any:
        """`layer.<container>[adapter]`, active or not; None if there is none."""
        if not self.active:
            return getattr(self.layer, _INACTIVE)[self.adapter].entries.get(container)
        entries = getattr(self.layer, container)
        return entries[self.adapter] if self.adapter in entries else None  # noqa: SIM401 (a ModuleDict has no `get`)

    def parameter(self, part: Part) -> Any:
        """The parameter; None if the adapter has no such part."""
        container, attribute = part
        value = self.entry(container)
        return getattr(value, attribute, None) if attribute else value

    @property
    def parts(self) -> tuple[Part, Part]:
        """Where A (rank first) and B (rank second) are."""
        return FACTORS if self.entry("lora_embedding_A") is None else EMBEDDING_FACTORS

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A of shape (rank, inputs) and B of shape (outputs, rank); a convolution's kernel in further dimensions."""
        part_a, part_b = self.parts
        return self.parameter(part_a), self.parameter(part_b)

    @property
    def room(self) -> tuple[int, int, int]:
        """The rank, the largest that the update can have, and the width of a row of A."""
        a, b = self.factors
        inputs = a.shape[1:].numel()
        return len(a), max(min(inputs, len(b)), len(a)), inputs

    def replacements(self, new: Resized) -> dict[Part, Replacement]:
        """The parameters at another rank; nothing is changed yet. An activated bias or magnitude starts neutral."""
        (a, b), rank = self.factors, len(new.a)
        part_a, part_b = self.parts
        plan = {
            part_a: _replacement(a, new.a.reshape(rank, *a.shape[1:]), 0, new.a_map),
            part_b: _replacement(b, new.b.reshape(b.shape[0], rank, *b.shape[2:]), 1, new.b_map),
        }
        if self.active:
            return plan
        if (bias := self.parameter(BIAS)) is not None:
            plan[BIAS] = _replacement(bias, torch.zeros_like(bias), 0, Selection(kept=(), added=len(bias)))
        if (dora := self.entry(MAGNITUDE[0])) is not None:
            weight = dequantize_module_weight(self.layer.get_base_layer()).detach().to(dora.weight)
            norm = dora.get_weight_norm(weight, 0.0, scaling=1.0)
            dim = norm.shape.index(norm.numel()) if norm.numel() > 1 else 0  # (1, outputs, 1, 1) in convolutions
            plan[MAGNITUDE] = _replacement(dora.weight, norm, dim, Selection(kept=(), added=norm.numel()))
        return plan

    def install(self, plan: Mapping[Part, Replacement], rank: int) -> None:
        """Swap parameters inside their modules, whose hooks survive, and set the rank; 0 deactivates."""
        layer, adapter = self
        if not self.active:  # back into PEFT's containers
            for name, entry in getattr(layer, _INACTIVE).pop(adapter).entries.items():
                getattr(layer, name)[adapter] = entry
                if isinstance(entry, nn.Module):
                    entry.train(layer.training)
        for (container, attribute), replacement in plan.items():
            if attribute:
                setattr(self.entry(container), attribute, replacement.new)
            else:
                getattr(layer, container)[adapter] = replacement.new
        for container, side in (("lora_A", "out"), ("lora_B", "in")):
            inner = self.entry(container)
            for attribute in (f"{side}_features", f"{side}_channels"):
                if hasattr(inner, attribute):
                    setattr(inner, attribute, rank)
        layer.r[adapter] = rank
        layer.lora_alpha[adapter] = alpha_for(rank, layer.scaling[adapter], rslora=layer.use_rslora.get(adapter, False))
        if rank == 0:
            self._deactivate()

    def _deactivate(self) -> None:
        entries, layer = {}, self.layer
        for name in dict.fromkeys((*layer.adapter_layer_names, *layer.other_param_names, "lora_variant")):
            container: Any = getattr(layer, name, None)  # in the order in which torch lists their parameters
            if hasattr(container, "keys") and self.adapter in container:
                entries[name] = container[self.adapter]
                del container[self.adapter]
        if not hasattr(layer, _INACTIVE):
            setattr(layer, _INACTIVE, nn.ModuleDict())
        getattr(layer, _INACTIVE)[self.adapter] = InactiveAdapter(entries)

    def obstacles(self, name: str, *, in_place: bool) -> Iterator[str]:
        """Why the rank of this module, called `name`, cannot change."""
        layer, variant = self.layer, type(self.entry("lora_variant")).__name__
        if layer.merged:
            yield f"adapters must not be merged, but {layer.merged_adapters} are in `{name}`; unmerge first."
        form = f"the adapter of `{name}` must be plain LoRA or DoRA, but it is"
        if variant != "NoneType" and "Dora" not in variant:
            yield f"{form} of variant {variant}."
        if getattr(layer.get_base_layer(), "groups", 1) > 1:
            yield f"{form} on a convolution with groups."
        if isinstance(layer, MultiheadAttention):
            yield f"{form} a MultiheadAttention."
        if any(parameter.is_meta for parameter in layer.parameters()):
            yield f"the weights of `{name}` must be in memory, but are offloaded; load the model without."
        whole, remedy = "the adapter's parameters must be whole in this process, but", "masked ranks (RankMasks)"
        if any(hasattr(parameter, "ds_id") for parameter in self.factors):
            why = "DeepSpeed ZeRO-3 partitions them and keeps its own flat copies"
            yield f"{whole} {why}; use DDP or FSDP2 with {remedy}, or one process."
        if not in_place and any(isinstance(parameter, DTensor) for parameter in self.factors):
            yield f"{whole} are sharded over several (DTensor); use {remedy}."


def _replacement(old: nn.Parameter, value: Tensor, dim: int, rank_map: RankMap) -> Replacement:
    new = nn.Parameter(value.contiguous(), requires_grad=old.requires_grad)
    if old.grad is not None:
        new.grad = rank_map.carry(old.grad, dim).contiguous()
    return Replacement(old, new, dim, rank_map)


# --- the adapter of a model ---------------------------------------------------------------------------------------


class LiveAdapter:
    """A LoRA adapter inside a PEFT model, which `torch.compile` may wrap, but not DDP or FSDP.

    `modules` holds the adapted modules by their names in the base model, those of rank 0 included; `parameters` the layers on
    parameters (`target_parameters`: fused experts), whose ranks stay.
    """

    def __init__(self, model: nn.Module, adapter_name: str | None = None) -> None:
        inner = unwrapped(model)
        kind = "DistributedDataParallel" if is_ddp(model) else type(inner).__name__
        if kind in ("DistributedDataParallel", "FullyShardedDataParallel"):
            why = "which fixes parameters when it wraps; mask ranks instead (RankMasks, made before wrapping)."
            raise ModelError(f"`model` must be a peft.PeftModel, but is wrapped in {kind}, {why}")
        if not isinstance(inner, PeftModel):
            raise ModelError(f"`model` must be a peft.PeftModel, but is a {kind}; wrap it with get_peft_model.")
        names = sorted(inner.peft_config)
        if adapter_name is None and len(names) > 1:
            raise ModelError(f"`adapter_name` must say which of the adapters {names} is meant, but is None.")
        self.model, self.name = inner, adapter_name or names[0]
        if self.name not in names:
            raise ModelError(f"`adapter_name` must be among the model's adapters {names}, but got {self.name!r}.")
        if (peft_type := inner.peft_config[self.name].peft_type) != PeftType.LORA:
            raise ModelError(f"adapter {self.name!r} must be LoRA for its ranks to change, but is {peft_type.value}.")
        self.modules, self.parameters = lora_modules(inner, self.name)
        if not self.modules:
            only = f" on modules, only on parameters such as `{min(self.parameters)}`" if self.parameters else ""
            raise ModelError(f"`model` must carry a LoRA adapter {self.name!r}, but has none{only}; it has {names}.")

    @property
    def ranks(self) -> dict[str, int]:
        """The true rank of each module."""
        return {name: len(module.factors[0]) for name, module in self.modules.items()}

    def config(self, ranks: Mapping[str, int]) -> LoraConfig:
        """A copy of the adapter's config with exactly these ranks and the present scalings."""
        scalings = {name: module.layer.scaling[self.name] for name, module in self.modules.items() if ranks.get(name)}
        others = {name: (layer.r[self.name], layer.lora_alpha[self.name]) for name, layer in self.parameters.items()}
        return with_ranks(self.model.peft_config[self.name], ranks, scalings, others)

    def replace_factors(self, optimizer: Optimizer | None, resized: Mapping[str, Resized]) -> None:
        """Put new factors into the layers; parameters, optimizer, layer attributes and config follow."""
        ranks = self.ranks | {name: len(new.a) for name, new in resized.items()}
        if not any(ranks.values()):
            must = "`resizes` must leave at least one module a rank above 0"
            raise ModelError(f"{must}; PEFT has no adapter without modules.")
        plans = {name: self.modules[name].replacements(new) for name, new in resized.items()}
        replace_parameters(optimizer, [replacement for plan in plans.values() for replacement in plan.values()])
        for name, plan in plans.items():
            self.modules[name].install(plan, ranks[name])
        self.model.peft_config[self.name] = self.config(ranks)

    def check_changeable(
        self, names: Collection[str] | None = None, *, to_zero: bool = False, in_place: bool = False
    ) -> None:
        """Raise a ModelError unless the ranks of these modules (default: all) can change, `to_zero` or `in_place` by masks."""
        owners: dict[int, str] = {}
        for name in self.modules if names is None else names:
            for obstacle in self.modules[name].obstacles(name, in_place=in_place):
                raise ModelError(obstacle)
            if (other := owners.setdefault(id(self.modules[name].factors[0]), name)) != name:
                raise ModelError(f"adapters must have factors of their own, but `{name}` shares them with `{other}`.")
        if owners:
            check_config(self.model.peft_config[self.name], to_zero=to_zero)


def lora_modules(model: PeftModel, adapter: str) -> tuple[dict[str, LoraModule], dict[str, ParamWrapper]]:
    """An adapter's modules and its layers on parameters (fused experts), by the names of what they adapt."""
    modules, parameters = {}, {}
    for path, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer) and (adapter in layer.r or adapter in getattr(layer, _INACTIVE, ())):
            check_block_names([path])
            name = plain_name(path)
            if isinstance(layer, ParamWrapper):
                parameters[f"{name.replace('.base_layer', '')}.{layer.parameter_name}"] = layer
            else:
                modules[name] = LoraModule(layer, adapter)
    return modules, parameters


def from_peft_model(model: nn.Module, *, adapter_name: str | None = None) -> dict[str, int]:
    """The ranks that a PEFT model carries in an adapter, read from its LoRA layers; by default the only active one's."""
    model = unwrapped(model)
    if adapter_name is None and isinstance(model, PeftModel):
        if len(active := model.active_adapters) > 1:
            raise ModelError(f"`adapter_name` must say which of the active adapters {active} is meant, but is None.")
        adapter_name = next(iter(active), "default")
    adapter = LiveAdapter(model, adapter_name)
    if attention := [name for name, found in adapter.modules.items() if isinstance(found.layer, MultiheadAttention)]:
        but = f"but `{attention[0]}` is an nn.MultiheadAttention; adapt others."
        raise ModelError(f"`model` must carry adapters on modules of one weight, {but}")
    return adapter.ranks


def is_ddp(model: nn.Module) -> bool:
    """Whether DistributedDataParallel wraps the model, inside `torch.compile` or not."""
    return any(isinstance(module, DistributedDataParallel) for module in model.modules())
