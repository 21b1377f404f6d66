"""Masked ranks: adapters of fixed capacity whose components are switched on and off; for DDP, FSDP2 and torch.compile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from rankscope.distributed import check_same, gathered, is_first, whole
from rankscope.errors import ModelError
from rankscope.files import AnyPath
from rankscope.lora.config import PEFT_PREFIX, check_config
from rankscope.lora.factors import Replacement, component_norms, kaiming_rows, keep_components, replace_parameters
from rankscope.lora.resize import BIAS, FACTORS, MAGNITUDE, LiveAdapter, Resize, check_resizes
from rankscope.targets import plain_name, unwrapped


class RankMasks:
    """The active ranks of a model's adapters, whose parameters keep their shapes: the present ranks are their capacity.

    A mask multiplies A's output, so that inactive components get no gradient, and their columns of B are zero: the function is
    that of a resized adapter. A component that is switched on starts as in `resize_adapters`, with moments of 0.

    DDP and FSDP2 may wrap the model before or after, and `torch.compile` does not recompile. On several processes the first
    one's plan is broadcast. While the masks are on, `model.save_pretrained` writes the adapter at its true ranks.

    Modules that `ranks` does not name begin at their capacity; `adapter_name` may be left out if there is only one adapter. A
    ModelError if the model carries masks already or adapts an embedding, a resize cannot be followed, or processes differ.

    >>> from torch import nn
    >>> from peft import LoraConfig, get_peft_model
    >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), LoraConfig(target_modules=["0", "1"], r=4))
    >>> masks = RankMasks(model, {"0": 1})
    >>> masks.resize([Resize(name="0", rank=2), Resize(name="1", rank=0)])
    >>> dict(masks.ranks)
    {'0': 2, '1': 0}
    """

    def __init__(
        self, model: PeftModel, ranks: Mapping[str, int] | None = None, *, adapter_name: str | None = None
    ) -> None:
        self.live = LiveAdapter(model, adapter_name)
        self.adapter = self.live.name
        if (other := masks_on(self.live.model)) is not None:
            but = f"but carries those of adapter {other.adapter!r}; go on with them (masks_on), or `compress` them."
            raise ModelError(f"`model` must not carry rank masks yet, {but}")
        self.live.check_changeable(in_place=True)
        self._modules = {name: module for name, module in self.live.modules.items() if module.active}
        if embeddings := [name for name, module in self._modules.items() if module.parts != FACTORS]:
            but = f"but `{embeddings[0]}` is an embedding."
            raise ModelError(f"masked ranks must be of linear or convolution layers, {but}")
        asked = [Resize(name=name, rank=rank) for name, rank in (ranks or {}).items()]
        self._check(asked, self.live.ranks)
        self._inner: dict[str, Any] = {name: module.entry("lora_A") for name, module in self._modules.items()}
        self._hooks = []
        for name, inner in self._inner.items():
            a, _ = self._modules[name].factors
            inner.register_buffer("rank_mask", torch.ones(len(a), device=a.device), persistent=False)
            self._hooks.append(inner.register_forward_hook(_mask_output))
        self.live.model.rank_masks, self.live.model.save_pretrained = self, self.save_pretrained
        self.resize(asked)

    def remove(self) -> None:
        """Take the masks off; adapters keep their capacity, and all components get gradients again."""
        for inner, hook in zip(self._inner.values(), self._hooks, strict=True):
            hook.remove()
            del inner.rank_mask
        del self.live.model.rank_masks, self.live.model.save_pretrained

    @property
    def ranks(self) -> Mapping[str, int]:
        """The active rank of each module, by name; read-only."""
        return MappingProxyType({name: len(active) for name, active in self.active.items()})

    @property
    def active(self) -> dict[str, tuple[int, ...]]:
        """The indices of the active components of each module."""
        return {name: tuple(inner.rank_mask.nonzero().flatten().tolist()) for name, inner in self._inner.items()}

    def resize(
        self, resizes: Sequence[Resize], optimizer: Optimizer | None = None, *, generator: torch.Generator | None = None
    ) -> None:
        """As `resize_adapters`, within the capacity. Every process must call it at the same step."""
        on_cpu = [r if r.directions is None else replace(r, directions=r.directions.cpu()) for r in resizes]
        asked = gathered(on_cpu)[0]  # other processes have other devices
        self._check(asked, self.ranks)
        drawn = gathered([self._with_rows(resize, generator) for resize in asked])[0]
        plan = [(resize, *self._modules[resize.name].factors, *self._switched(resize)) for resize in drawn]
        check_same([mask.tolist() for *_, mask, _ in plan], what="the masks")
        carried = [Replacement(f, f, dim, keep) for _, a, b, _, keep in plan for dim, f in enumerate((a, b))]
        replace_parameters(optimizer, carried)
        with torch.no_grad():
            for resize, a, b, mask, keep in plan:
                if resize.directions is not None and (born := mask & ~keep.stays).any():
                    rows = whole(a).clone()
                    rows[born] = resize.directions.to(rows).reshape(-1, *rows.shape[1:])
                    a.copy_(_like(rows, a))
                b.copy_(keep.carry(b, 1))
                self._inner[resize.name].rank_mask.copy_(mask)
            for factor in carried:
                if factor.new.grad is not None:
                    factor.new.grad.copy_(factor.carry(factor.new.grad))

    def restore(self, active: Mapping[str, Sequence[int]]) -> None:
        """Set the masks alone, to what `active` was in a checkpoint of this capacity whose weights are loaded."""
        if active.keys() != self._modules.keys():
            raise ModelError("`active` must name exactly the modules that are masked; it is of another model.")
        for name, indices in active.items():
            self._inner[name].rank_mask.zero_()[list(indices)] = 1

    def compress(self, optimizer: Optimizer | None = None) -> None:
        """Take the masks off and give the adapters their true ranks; in one process, with nothing wrapped."""
        self.live.check_changeable(self._modules)
        resized = {}
        for name, active in self.active.items():
            a, b = (factor.detach().flatten(1) for factor in self._modules[name].factors)
            resized[name] = keep_components(a, b, active)
        self.live.replace_factors(optimizer, resized)
        self.remove()

    def save_pretrained(
        self, folder: AnyPath, *, state_dict: Mapping[str, Tensor] | None = None, **options: Any
    ) -> None:
        """Write the adapter at its true ranks, for plain PEFT; the model stays masked. `model.save_pretrained` is this, too.

        `state_dict` is the model's, its tensors whole; None: it is taken, which every process must do under FSDP2.
        """
        if not any(self.ranks.values()):
            why = "PEFT has no adapter without modules."
            raise ModelError(f"at least one module must have a rank above 0 to be saved; {why}")
        model, tuner = self.live.model, self.live.model.base_model
        state = self.true_state_dict(model.state_dict() if state_dict is None else state_dict)
        config, compiled = model.peft_config[self.adapter], tuner.model
        model.peft_config[self.adapter] = self.live.config(self.ranks)
        tuner.model = unwrapped(compiled)  # PEFT saves the names of a model that is not compiled
        try:
            options = {"is_main_process": is_first()} | options
            type(model).save_pretrained(model, str(folder), state_dict=state, **options)
        finally:
            model.peft_config[self.adapter], tuner.model = config, compiled

    def true_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state with active components only; trained tensors that FSDP2 shards are gathered."""
        trained = {name for name, parameter in self.live.model.named_parameters() if parameter.requires_grad}
        state = {plain_name(name): whole(tensor) if name in trained else tensor for name, tensor in state.items()}
        for name, active in self.active.items():
            for dim, (container, attribute) in enumerate(FACTORS):
                key = f"{PEFT_PREFIX}{name}.{container}.{self.adapter}.{attribute}"
                full = state.pop(key)
                if active:
                    state[key] = full.index_select(dim, torch.tensor(active, device=full.device))
        return state

    def _check(self, resizes: Sequence[Resize], ranks: Mapping[str, int]) -> None:
        rows = {name: module.factors[0] for name, module in self._modules.items()}
        if any(a.ndim < 2 for a in rows.values()):
            raise ModelError("masked ranks need whole parameters, but FSDP1 flattens them; use FSDP2 (fully_shard).")
        check_resizes(resizes, {name: (ranks[name], len(a), a.shape[1:].numel()) for name, a in rows.items()})
        for name in (resize.name for resize in resizes if resize.rank == 0):
            check_config(self.live.model.peft_config[self.adapter], to_zero=True)
            if any(self._modules[name].parameter(part) is not None for part in (BIAS, MAGNITUDE)):
                why = "for its bias or DoRA magnitude stays, but got 0."
                raise ModelError(f"the masked rank of `{name}` must be at least 1, {why}")

    def _with_rows(self, resize: Resize, generator: torch.Generator | None) -> Resize:
        """The resize with the rows of A that it adds."""
        a, _ = self._modules[resize.name].factors
        added = resize.rank - int(self._inner[resize.name].rank_mask.sum())
        if resize.directions is not None or added <= 0:
            return resize
        return replace(resize, directions=kaiming_rows(added, torch.empty(0, a.shape[1:].numel()), generator))

    def _switched(self, resize: Resize) -> tuple[Tensor, _Keep]:
        """A module's next mask, and the map for B, gradients and moments; nothing is changed yet."""
        before: Tensor = self._inner[resize.name].rank_mask.bool()
        if (added := resize.rank - int(before.sum())) > 0:
            born = (~before).nonzero().flatten()[:added]
            return before.index_fill(0, born, True), _Keep(before)
        a, b = (whole(factor.detach()).flatten(1) for factor in self._modules[resize.name].factors)
        norms = component_norms(a, b).masked_fill(~before, -1.0)
        largest = torch.argsort(norms, descending=True, stable=True)[: resize.rank]
        after = torch.zeros_like(before).index_fill(0, largest, True)
        return after, _Keep(after)


def masks_on(model: PeftModel) -> RankMasks | None:
    """The masks that a model carries; None if there are none."""
    masks: RankMasks | None = vars(unwrapped(model)).get("rank_masks")
    return masks


class _Keep(NamedTuple):
    """A `RankMap` that zeroes all components but some, and keeps shapes."""

    stays: Tensor

    def carry(self, tensor: Tensor, dim: int, *, squared: bool = False) -> Tensor:
        values = whole(tensor)
        stays = self.stays.to(values.device).reshape([-1 if index == dim else 1 for index in range(values.ndim)])
        return _like(torch.where(stays, values, torch.zeros_like(values)), tensor)


def _mask_output(inner: Any, _: Any, output: Tensor) -> Tensor:
    """Components stand last in a linear's output, and second in a convolution's."""
    mask: Tensor = inner.rank_mask.to(output.dtype)
    return output * mask.reshape(-1, *[1] * len(getattr(inner, "kernel_size", ())))


def _like(value: Tensor, reference: Tensor) -> Tensor:
    """A whole tensor, sharded as another one is."""
    if not isinstance(reference, DTensor):
        return value
    return distribute_tensor(value, reference.device_mesh, reference.placements)
