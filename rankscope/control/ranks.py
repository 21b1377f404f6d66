"""The ranks of a live adapter, really resized or masked: one view for the controller."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rankscope.adapters import RankMasks, Resize, from_peft_model, masks_on, resize_adapters
from rankscope.adapters.agreement import n_processes
from rankscope.adapters.live import (
    adapter_layers,
    check_changeable,
    check_whole,
    choose_adapter,
    factors,
    unwrap_peft_model,
)
from rankscope.adapters.optimizer_state import check_known, unwrap_optimizer
from rankscope.allocation import RankAllocation
from rankscope.budget import ParameterBudget
from rankscope.devices import whole
from rankscope.exceptions import ControlError
from rankscope.profiling import Profile
from rankscope.profiling.layers import is_compiled
from rankscope.strategies import allocate
from rankscope.targets import unwrapped

logger = logging.getLogger(__name__)

Mode = Literal["resize", "mask", "auto"]


class LiveRanks:
    """Reads and changes ranks.

    Args:
        model: A PEFT model, also in DistributedDataParallel or compiled.
        optimizer: That trains the adapter.
        mode: `"resize"`, `"mask"`, or `"auto"`: masks under several processes, DistributedDataParallel and `torch.compile`, and
            where the model carries some already.
        adapter_name: Which adapter; may be left out where there is only one.

    Attributes:
        model: The PEFT model, unwrapped.
        masks: In mask mode: those that the model carries, or new ones from `begin` on.
        compiled: Whether `torch.compile` has compiled the model, or a part of it.

    Raises:
        AdapterError: The model cannot have its ranks changed.
        OptimizerError: An optimizer whose state cannot be carried.
        ControlError: The optimizer does not own the adapter's parameters, or the mode is not the model's.
    """

    def __init__(self, model: Any, optimizer: Any, *, mode: Mode, adapter_name: str | None) -> None:
        if mode not in ("resize", "mask", "auto"):
            raise ControlError(f"`mode` must be 'resize', 'mask' or 'auto', but got {mode!r}.")
        if mode == "resize" and _is_ddp(model):
            raise ControlError(
                "`mode` must be 'mask' for a model in DistributedDataParallel, which keeps the parameters that it wrapped, but "
                "is 'resize'; pass mode='mask', or control the model before it is wrapped."
            )
        self.model = unwrap_peft_model(unwrapped(model))
        self.adapter = choose_adapter(self.model, adapter_name)
        self.masks = masks_on(self.model)
        if self.masks is not None and (mode == "resize" or self.masks.adapter != self.adapter):
            raise ControlError(
                f"`model` must not carry rank masks to be controlled in mode {mode!r}, but carries those of adapter "
                f"{self.masks.adapter!r}; `compress` them, or go on in mode 'mask'."
            )
        self.compiled = is_compiled(model)
        if mode == "auto":
            fixed = self.masks is not None or n_processes() > 1 or self.compiled or _is_ddp(model)
            mode = "mask" if fixed else "resize"
        self._optimizer = optimizer
        layers = adapter_layers(self.model, self.adapter)
        check_changeable(self.model, layers, self.adapter)
        if mode == "resize":
            check_whole(layers, self.adapter)
        check_known(optimizer)
        self._check_trained([factor for layer in layers.values() for factor in factors(layer, self.adapter)])
        self._full = from_peft_model(self.model, adapter_name=self.adapter)
        self._masked = mode == "mask"

    def begin(self, ranks: RankAllocation, *, generator: torch.Generator) -> None:
        """Put the masks on, or else cut what is above full rank, and give the adapter its first ranks; all of it or nothing."""
        new = self._masked and self.masks is None
        if new:
            self.masks = RankMasks(self.model, adapter_name=self.adapter)
        elif not self._masked:
            self._cut()
        changed = ranks.difference(self.allocation)
        try:
            if changed:
                self.change({name: ranks.ranks[name] for name in changed}, {}, generator=generator)
        except BaseException:
            if new and self.masks is not None:
                self.masks.remove()
            raise

    def _cut(self) -> None:
        """Bring ranks above full rank down to it, which leaves the function as it is."""
        above = [Resize(name=t.name, rank=t.full_rank) for t in self._full.targets if t.existing_rank is not None]
        if above:
            resize_adapters(self.model, self._optimizer, above, adapter_name=self.adapter, shrink="svd")
            logger.warning(
                "%d modules had ranks above their smaller side (`%s`: %d above %d), which no update needs: cut to it, "
                "they compute the same, and what that saves can go to others",
                *(len(above), above[0].name, self._full.ranks[above[0].name], above[0].rank),
            )
        self._full = from_peft_model(self.model, adapter_name=self.adapter)

    @property
    def allocation(self) -> RankAllocation:
        """The present ranks, sleeping modules included."""
        if self.masks is not None:
            return RankAllocation.from_ranks(self._full.targets, self.masks.ranks)
        return from_peft_model(self.model, self._full.targets, adapter_name=self.adapter)

    @property
    def capacity(self) -> Mapping[str, int] | None:
        """The most ranks of each module; None: its full rank."""
        return self._full.ranks if self._masked else None

    @property
    def lowest(self) -> int:
        """The rank below which no module may fall: 1 where its trained bias, or its DoRA magnitude under masks, must stay."""
        config = self.model.peft_config[self.adapter]
        return int(config.bias != "none" or (self._masked and (config.use_dora or config.lora_bias)))

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A, (r, in), and B, (out, r), of the active ranks of each module."""
        found = {}
        chosen = {} if self.masks is None else self.masks.active
        for name, layer in adapter_layers(self.model, self.adapter).items():
            a, b = (whole(factor).detach().flatten(1) for factor in factors(layer, self.adapter))
            if name in chosen:
                active = list(chosen[name])
                a, b = a[active], b[:, active]
            found[name] = a, b
        return found

    def change(self, ranks: Mapping[str, int], directions: Mapping[str, Tensor], *, generator: torch.Generator) -> None:
        """Gives modules new ranks, all or none; new rows of A are the directions, or drawn where there are none.

        Raises:
            AdapterError: A rank that a module cannot have.
            OptimizerError: An optimizer whose state cannot be carried.
        """
        resizes: Sequence[Resize] = [
            Resize(name=name, rank=rank, directions=directions.get(name)) for name, rank in ranks.items()
        ]
        if self.masks is not None:
            self.masks.resize(resizes, self._optimizer, generator=generator)
        else:
            resize_adapters(self.model, self._optimizer, resizes, adapter_name=self.adapter, generator=generator)

    def _check_trained(self, parameters: Sequence[Tensor]) -> None:
        if not any(parameter.requires_grad for parameter in parameters):
            raise ControlError(
                f"adapter {self.adapter!r} must be trained, but its parameters are frozen; load it with is_trainable=True, or "
                "make it the active one (`set_adapter`)."
            )
        groups = unwrap_optimizer(self._optimizer).param_groups
        owned = {id(parameter) for group in groups for parameter in group["params"]}
        if missing := sum(id(parameter) not in owned for parameter in parameters):
            raise ControlError(
                f"`optimizer` must own the adapter's parameters, but lacks {missing} of {len(parameters)}; build it from "
                "the PEFT model's parameters, after wrapping."
            )


def first_ranks(
    ranks: LiveRanks, start: RankAllocation | str | None, budget: ParameterBudget, profile: Profile | None
) -> RankAllocation:
    """The ranks to begin with.

    Raises:
        ControlError: They cost more than the budget, or are for other modules.
    """
    if start is not None and not isinstance(start, str | RankAllocation):
        raise ControlError(f"`start` must be a RankAllocation or a strategy's name, but is a {type(start).__name__}.")
    present = ranks.allocation
    if ranks.capacity is None:  # `begin` cuts what is above the full rank
        cut = {t.name: min(rank, t.full_rank) for t, rank in zip(present.targets, present.vector, strict=True)}
        present = RankAllocation.from_ranks(present.targets, cut, strategy=present.strategy)
    if isinstance(start, str):
        start = allocate(start, targets=present.targets, budget=budget, profile=profile, max_rank=ranks.capacity)
    begin = present
    if start is not None:
        given = {name: rank for name, rank in start.ranks.items() if rank}
        if unknown := set(given) - set(present.ranks):
            raise ControlError(
                f"`start` must give ranks to adapted modules only, but gives `{min(unknown)}` some; adapt it when the model "
                "is wrapped."
            )
        begin = RankAllocation.from_ranks(present.targets, given)
    if not begin.parameters:
        raise ControlError("`start` must give at least one module a rank, but gives none; PEFT has no empty adapter.")
    if begin.parameters > budget.limit:
        raise ControlError(
            f"`budget` must cover the ranks to begin with ({begin.parameters:,} parameters), but got {budget.limit:,}; "
            "raise it, or pass `start`."
        )
    if ranks.capacity is not None and ranks.masks is None and begin == present:
        raise ControlError(
            "masked ranks must have room to grow, but every module begins at its capacity, the rank it was wrapped with; "
            "wrap the model at a larger rank, and pass `start`."
        )
    return begin


def _is_ddp(model: nn.Module) -> bool:
    return any(isinstance(each, DistributedDataParallel) for each in (model, getattr(model, "_orig_mod", model)))
