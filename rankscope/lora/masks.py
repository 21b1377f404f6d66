"""Mask mode: adapters of fixed capacity whose ranks are switched on and off; for DDP, FSDP and torch.compile."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from rankscope.distributed import check_same, from_first_process, n_processes, whole
from rankscope.errors import ModelError
from rankscope.lora.factors import Resized, Selection, component_norms, kaiming_rows
from rankscope.lora.optimizer import Replacement, carry_state, replace_parameters, unwrap_optimizer
from rankscope.lora.resize import (
    BIAS,
    FACTORS,
    MAGNITUDE,
    Resize,
    Room,
    adapter_layers,
    check_changeable,
    check_may_sleep,
    check_resizes,
    check_whole,
    choose_adapter,
    config_of,
    entry_of,
    factor_parts,
    factors,
    is_dormant,
    replace_factors,
    uncompiled,
    unwrap_peft_model,
)
from rankscope.targets import plain_name

_BUFFER = "rank_mask"


class RankMasks:
    """The active ranks of a model's adapters, whose parameters keep their shapes.

    Each adapter's present rank becomes its capacity. A mask (a buffer of zeros and ones, not saved) multiplies A's
    output, so that an inactive component gets no gradient; its column of B is zero, so that it adds nothing, masked or
    not: the function is that of an adapter truly resized, also where the model is saved as it is. A component that is
    switched on starts as a new one does in `resize_adapters`, and has moments of 0.

    Nothing changes its shape, so DDP and FSDP2 may wrap the model, before or afterwards, and `torch.compile` does not recompile.
    On several processes, the first one's plan is broadcast, and all assert that they switch the same components. What
    optimizers compute over a whole parameter (Adafactor's root mean squares) is over the capacity.

    As long as the masks are on, `model.save_pretrained` writes the adapter at its true ranks, for plain PEFT.

    Args:
        model: The PEFT model itself, also one that is wrapped.
        ranks: The active rank of each module; modules not named keep their capacity.
        adapter_name: Which adapter; may be left out where there is only one.

    Raises:
        ModelError: The model, one that carries masks already, a module that is not adapted, a rank beyond its capacity, or
            an embedding's adapter, which has no module to hook.

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
        self._model = unwrap_peft_model(model)
        self._adapter = choose_adapter(self._model, adapter_name)
        if (other := masks_on(self._model)) is not None:
            raise ModelError(
                f"`model` must not carry rank masks yet, but carries those of adapter {other.adapter!r}; go on with them "
                "(masks_on), or `compress` them."
            )
        layers = adapter_layers(self._model, self._adapter)
        check_changeable(self._model, layers, self._adapter)
        self._layers = {name: layer for name, layer in layers.items() if not is_dormant(layer, self._adapter)}
        for name, layer in self._layers.items():
            if factor_parts(layer, self._adapter) != FACTORS:
                raise ModelError(f"masked ranks must be of linear or convolution layers, but `{name}` is an embedding.")
        asked = [Resize(name=name, rank=rank) for name, rank in (ranks or {}).items()]
        self._check(asked, {name: len(factors(layer, self._adapter)[0]) for name, layer in self._layers.items()})
        self._hooks = [
            _install(self._inner(name), len(factors(layer, self._adapter)[0])) for name, layer in self._layers.items()
        ]
        self._model.save_pretrained = self.save_pretrained
        self.resize(asked)

    @property
    def adapter(self) -> str:
        """The adapter whose ranks are masked."""
        return self._adapter

    @property
    def ranks(self) -> Mapping[str, int]:
        """The active rank of each module, by name; read-only."""
        return MappingProxyType({name: len(active) for name, active in self.active.items()})

    @property
    def capacity(self) -> Mapping[str, int]:
        """The most ranks that each module can have, by name; read-only."""
        return MappingProxyType({name: len(self._mask(name)) for name in self._layers})

    @property
    def active(self) -> dict[str, tuple[int, ...]]:
        """The indices of the active components of each module."""
        return {name: tuple(self._mask(name).nonzero().flatten().tolist()) for name in self._layers}

    def resize(
        self,
        resizes: Sequence[Resize],
        optimizer: Optimizer | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        """As `resize_adapters`, within the capacity: all of the resizes happen or none.

        Shrinking switches off the components of least norm. Every process must call it at the same step; what the first one
        asks is what happens.

        Raises:
            ModelError: A resize that cannot be followed, or processes that have diverged.
            ModelError: An optimizer that does not own the parameters, or whose state cannot be carried.
        """
        asked = from_first_process(_portable(resizes))
        self._check(asked, self.ranks)
        drawn = from_first_process(_portable([self._with_rows(resize, generator) for resize in asked]))
        switches = {resize.name: self._plan(resize) for resize in drawn}
        check_same({name: switch.mask.tolist() for name, switch in switches.items()}, what="the masks")
        replacements = [r for name, switch in switches.items() for r in self._replacements(name, switch)]
        states = []
        if optimizer is not None:
            optimizer = unwrap_optimizer(optimizer)
            states = carry_state(optimizer, replacements)

        for name, switch in switches.items():
            self._commit(name, switch)
        if optimizer is not None:
            replace_parameters(optimizer, replacements, states)

    def restore(self, active: Mapping[str, Sequence[int]]) -> None:
        """Sets the masks and nothing else, for weights that are loaded from a checkpoint of this capacity.

        Args:
            active: What `active` was when the checkpoint was written.

        Raises:
            ModelError: It is of other modules, or names components beyond the capacity.
        """
        if set(active) != set(self._layers):
            raise ModelError("`active` must name exactly the modules that are masked; it is of another model.")
        capacity = self.capacity
        for name, indices in active.items():
            if not all(0 <= index < capacity[name] for index in indices):
                raise ModelError(
                    f"`active` must hold components of `{name}` below {capacity[name]}, but holds {indices}."
                )
        for name, indices in active.items():
            self._mask(name).zero_()[list(indices)] = 1

    def compress(self, optimizer: Optimizer | None = None) -> None:
        """Takes the masks off and gives the adapters their true ranks; in one process, with nothing wrapped.

        Raises:
            ModelError: No module has an active rank, or parameters are sharded.
            ModelError: An optimizer that does not own the parameters, or whose state cannot be carried.
        """
        check_changeable(self._model, self._layers, self._adapter)
        check_whole(self._layers, self._adapter)
        resized = {}
        for name, active in self.active.items():
            a, b = (factor.detach().flatten(1) for factor in factors(self._layers[name], self._adapter))
            selection = Selection(kept=active)
            resized[name] = Resized(a=selection.carry(a, 0), b=selection.carry(b, 1), a_map=selection, b_map=selection)
        replace_factors(self._model, optimizer, resized, adapter=self._adapter)
        self.remove()

    def remove(self) -> None:
        """Take the masks off; the adapters keep their capacity, and components that were off get gradients again."""
        for name, hook in zip(self._layers, self._hooks, strict=True):
            hook.remove()
            delattr(self._inner(name), _BUFFER)
        self._hooks.clear()
        del self._model.save_pretrained

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, state_dict: Mapping[str, Tensor] | None = None, **options: Any
    ) -> None:
        """Writes the adapter at its true ranks, for plain PEFT; the model stays masked. `model.save_pretrained` is this, too.

        Args:
            folder: Where to.
            state_dict: The model's, its tensors whole. None: it is taken, which every process must do under FSDP2.
            **options: As `PeftModel.save_pretrained` takes them.

        Raises:
            ModelError: No module has an active rank.
        """
        if not any(self.ranks.values()):
            raise ModelError(
                "at least one module must have a rank above 0 to be saved; PEFT has no adapter without modules."
            )
        state = self._true_state_dict(self._model.state_dict() if state_dict is None else state_dict)
        options.setdefault("is_main_process", n_processes() == 1 or torch.distributed.get_rank() == 0)
        masked = self._model.peft_config[self._adapter]
        self._model.peft_config[self._adapter] = config_of(self._model, self._adapter, self.ranks)
        try:
            with uncompiled(self._model):
                type(self._model).save_pretrained(self._model, str(folder), state_dict=state, **options)
        finally:
            self._model.peft_config[self._adapter] = masked

    # --- one module ------------------------------------------------------------------------------------------------

    def _inner(self, name: str) -> nn.Module:
        inner: nn.Module = entry_of(self._layers[name], "lora_A", self._adapter)
        return inner

    def _mask(self, name: str) -> Tensor:
        mask: Tensor = getattr(self._inner(name), _BUFFER)
        return mask

    def _check(self, resizes: Sequence[Resize], ranks: Mapping[str, int]) -> None:
        rooms = {}
        for name, layer in self._layers.items():
            a = factors(layer, self._adapter)[0]
            if a.ndim < 2:
                raise ModelError(
                    "masked ranks need parameters of their own shape, which FSDP1 flattens; use FSDP2 (fully_shard)."
                )
            rooms[name] = Room(rank=ranks[name], largest=len(a), inputs=a.shape[1:].numel())
        check_resizes(resizes, rooms)
        for resize in resizes:
            layer = self._layers[resize.name]
            if resize.rank == 0:
                check_may_sleep(self._model.peft_config[self._adapter])
            if resize.rank == 0 and any(part.of(layer, self._adapter) is not None for part in (BIAS, MAGNITUDE)):
                raise ModelError(
                    f"the masked rank of `{resize.name}` must be at least 1, for its bias or DoRA magnitude stays, but got 0."
                )

    def _with_rows(self, resize: Resize, generator: torch.Generator | None) -> Resize:
        """The resize with the rows of A that it adds."""
        a = factors(self._layers[resize.name], self._adapter)[0]
        added = resize.rank - int(self._mask(resize.name).sum())
        if resize.directions is not None or added <= 0:
            return resize
        like = torch.empty(0, a.shape[1:].numel(), device=a.device)
        return replace(resize, directions=kaiming_rows(added, like, generator))

    def _plan(self, resize: Resize) -> _Switch:
        """What is switched on and off, and the factors afterwards; nothing is changed yet."""
        mask = self._mask(resize.name).bool()
        a, b = (whole(factor.detach()) for factor in factors(self._layers[resize.name], self._adapter))
        if resize.directions is not None and resize.rank > mask.sum():
            born = (~mask).nonzero().flatten()[: len(resize.directions)]
            a = a.clone()
            a[born] = resize.directions.to(a).reshape(-1, *a.shape[1:])
            after = mask.clone()
            after[born] = True
            stays = mask
        else:
            norms = component_norms(a.flatten(1), b.flatten(1)).masked_fill(~mask, -1.0)
            after = torch.zeros_like(mask)
            after[torch.argsort(norms, descending=True, stable=True)[: resize.rank]] = True
            stays = after
        return _Switch(mask=after, a=a, b=_Keep(stays=stays).carry(b, 1), stays=stays)

    def _replacements(self, name: str, switch: _Switch) -> list[Replacement]:
        """The parameters in their own place, with moments only of what stays active."""
        keep = _Keep(stays=switch.stays)
        return [
            Replacement(old=factor, new=factor, dim=dim, map=keep)
            for dim, factor in enumerate(factors(self._layers[name], self._adapter))
        ]

    def _commit(self, name: str, switch: _Switch) -> None:
        with torch.no_grad():
            for factor, value in zip(factors(self._layers[name], self._adapter), (switch.a, switch.b), strict=True):
                factor.copy_(_like(value, factor))
            for dim, factor in enumerate(factors(self._layers[name], self._adapter)):
                if factor.grad is not None:
                    factor.grad.copy_(_Keep(stays=switch.stays).carry(factor.grad, dim))
            self._mask(name).copy_(switch.mask)

    def _true_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The adapter's active components; what FSDP2 shards of all that is trained is gathered."""
        trained = {name for name, parameter in self._model.named_parameters() if parameter.requires_grad}
        state = {plain_name(name): whole(tensor) if name in trained else tensor for name, tensor in state.items()}
        for name, active in self.active.items():
            for dim, part in enumerate(FACTORS):
                key = f"base_model.model.{name}.{part.container}.{self._adapter}.{part.attribute}"
                if active:
                    state[key] = Selection(kept=active).carry(state[key], dim)
                else:
                    del state[key]
        return state


def masks_on(model: PeftModel) -> RankMasks | None:
    """The masks that a model carries; None where there are none."""
    owner = getattr(unwrap_peft_model(model).save_pretrained, "__self__", None)
    return owner if isinstance(owner, RankMasks) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Switch:
    """One module's next mask, its factors under it, and the components that are active before and after."""

    mask: Tensor
    a: Tensor
    b: Tensor
    stays: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Keep:
    """A `RankMap` that zeroes all but some components, in place of shape changes."""

    stays: Tensor

    def carry(self, tensor: Tensor, dim: int, *, squared: bool = False) -> Tensor:
        values = whole(tensor)
        shape = [1] * values.ndim
        shape[dim] = -1
        zero = torch.zeros((), dtype=values.dtype, device=values.device)
        return _like(torch.where(self.stays.to(values.device).reshape(shape), values, zero), tensor)


def _portable(resizes: Sequence[Resize]) -> Sequence[Resize]:
    """Resizes that can be sent to other processes, whose devices are others."""
    if n_processes() == 1:
        return resizes
    return [replace(r, directions=None if r.directions is None else r.directions.cpu()) for r in resizes]


def _install(inner: nn.Module, capacity: int) -> RemovableHandle:
    weight = next(inner.parameters())
    inner.register_buffer(_BUFFER, torch.ones(capacity, device=weight.device), persistent=False)
    return inner.register_forward_hook(_mask_output)


def _mask_output(inner: nn.Module, _: Any, output: Tensor) -> Tensor:
    """Components stand last in a linear's output, and second in a convolution's."""
    mask: Tensor = getattr(inner, _BUFFER).to(output.dtype)
    if isinstance(inner, nn.modules.conv._ConvNd):
        mask = mask.reshape(-1, *[1] * len(inner.kernel_size))
    return output * mask


def _like(value: Tensor, reference: Tensor) -> Tensor:
    """A whole tensor sharded as another one is."""
    if not isinstance(reference, DTensor):
        return value
    return distribute_tensor(value, reference.device_mesh, reference.placements)
