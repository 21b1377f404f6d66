"""The ranks of a live adapter, resized or masked."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rankscope.allocation import RankAllocation
from rankscope.budget import ParameterBudget, RankLimits
from rankscope.distributed import n_processes, whole
from rankscope.errors import ModelError, SettingsError
from rankscope.lora import (
    LiveAdapter,
    RankMasks,
    Resize,
    check_known,
    is_ddp,
    masks_on,
    resize_adapters,
    unwrap_optimizer,
)
from rankscope.profiling import bytes_of_weights, is_compiled, largest_sketch_size
from rankscope.settings import ControllerSettings
from rankscope.strategies import allocate
from rankscope.targets import TargetModule, unwrapped

logger = logging.getLogger(__name__)

ROW_NORM = 1.0 / math.sqrt(3.0)  # of a new row of A: what PEFT's Kaiming draw gives on average


class LiveRanks:
    """The ranks of an adapter: resized, or masked by masks that the model carries or that `begin` puts on."""

    def __init__(self, model: Any, optimizer: Any, settings: ControllerSettings, *, replicated: bool = False) -> None:
        mode, self._replicated = settings.rank_change, replicated
        if mode == "resize" and is_ddp(model):
            raise ModelError("`rank_change` must be 'mask' in DistributedDataParallel, but is 'resize'; change it.")
        self._live = LiveAdapter(unwrapped(model), settings.adapter_name)
        self.model, self.adapter = self._live.model, self._live.name
        self.masks = masks_on(self.model)
        if self.masks is not None and (mode == "resize" or self.masks.adapter != self.adapter):
            raise ModelError(
                f"`model` must not carry rank masks to be controlled in mode {mode!r}, but carries those of adapter "
                f"{self.masks.adapter!r}; `compress` them, or go on in mode 'mask'."
            )
        self.compiled = is_compiled(model)
        apart = n_processes() > 1 and not replicated
        fixed = self.masks is not None or apart or self.compiled or is_ddp(model)
        self.masked = mode == "mask" or (mode == "auto" and fixed)
        self._live.check_changeable(in_place=self.masked)
        check_known(optimizer)
        self._optimizer = optimizer
        parameters = [factor for module in self._live.modules.values() for factor in module.factors]
        if not any(parameter.requires_grad for parameter in parameters):
            raise ModelError(
                f"adapter {self.adapter!r} must be trained, but its parameters are frozen; load it with is_trainable=True, or "
                "make it the active one (`set_adapter`)."
            )
        owned = {id(p) for group in unwrap_optimizer(optimizer).param_groups for p in group["params"]}
        if missing := sum(id(parameter) not in owned for parameter in parameters):
            raise ModelError(
                f"`optimizer` must own the adapter's parameters, but lacks {missing} of {len(parameters)}; build it from "
                "the PEFT model's parameters, after wrapping."
            )
        self._full = RankAllocation.from_peft_model(self.model, adapter_name=self.adapter)

    def initial(self, start: RankAllocation | str | None, budget: ParameterBudget) -> RankAllocation:
        """The ranks to begin with; nothing is changed yet."""
        present = self.allocation
        if isinstance(start, str):
            start = allocate(start, targets=present.targets, budget=budget, max_rank=self.capacity)
        given = {name: rank for name, rank in (start or present).ranks.items() if rank}
        if unknown := set(given) - set(present.ranks):
            raise ModelError(
                f"`start` must give ranks to adapted modules only, but gives `{min(unknown)}` some; adapt it as well."
            )
        if not self.masked:  # `begin` cuts what is above the full rank
            given = {t.name: min(given.get(t.name, 0), t.full_rank) for t in present.targets}
        begin = RankAllocation.from_ranks(present.targets, given)
        if not begin.parameters:
            raise SettingsError("`start` must give at least one module a rank, but gives none; raise one.")
        budget.require(begin, "the ranks to begin with", or_else="pass `start`")
        if self.masked and self.masks is None and begin == present:
            raise ModelError(
                "masked ranks must have room to grow, but every module begins at its capacity, the rank it was wrapped with; "
                "wrap the model at a larger rank, and pass `start`."
            )
        return begin

    def begin(self, ranks: RankAllocation, generator: torch.Generator) -> None:
        """Cut ranks above full rank, which changes no function, or put masks on, and set the initial ranks: all or nothing."""
        above = [Resize(name=t.name, rank=t.full_rank) for t in self._full.targets if t.existing_rank is not None]
        if above and not self.masked:
            options: Any = {"shrink": "svd", "replicated": self._replicated}
            resize_adapters(self.model, self._optimizer, above, adapter_name=self.adapter, **options)
            logger.warning(
                "%d modules had ranks above their smaller side (`%s`: %d above %d), which no update needs: cut to it, "
                "they compute the same, and what that saves can go to others",
                *(len(above), above[0].name, self._full.ranks[above[0].name], above[0].rank),
            )
            self._full = RankAllocation.from_peft_model(self.model, adapter_name=self.adapter)
        new = RankMasks(self.model, adapter_name=self.adapter) if self.masked and self.masks is None else None
        self.masks = self.masks or new
        try:
            self.change(ranks, generator)
        except BaseException:
            if new is not None:
                new.remove()
            raise

    @property
    def allocation(self) -> RankAllocation:
        """The present ranks, inactive adapters included."""
        if self.masks is not None:
            return RankAllocation.from_ranks(self._full.targets, self.masks.ranks)
        return RankAllocation.from_peft_model(self.model, self._full.targets, adapter_name=self.adapter)

    @property
    def capacity(self) -> Mapping[str, int] | None:
        """The largest masked rank of each module; None where ranks are resized."""
        return self._full.ranks if self.masked else None

    def sketch_size(self, ranks: RankAllocation) -> int:
        """Twice the largest rank, at least 16, as far as the memory bound allows; sampled steps keep one more copy."""
        wanted = max(16, min(2 * max(ranks.vector), max(target.full_rank for target in ranks.targets)))
        return largest_sketch_size(ranks.targets, wanted, bytes_of_weights(self.model), copies=2)

    def limits(self, targets: Sequence[TargetModule], cooling: Collection[str]) -> RankLimits:
        """The ranks that modules may have now; those that cool down keep theirs."""
        config = self.model.peft_config[self.adapter]
        stays = config.bias != "none" or (self.masked and (config.use_dora or config.lora_bias))  # and needs rank 1
        ranks, highest = self.allocation.ranks, self.capacity or {t.name: t.full_rank for t in targets}
        return RankLimits(
            {t.name: min(ranks[t.name], t.full_rank if t.name in cooling else int(stays)) for t in targets},
            {t.name: ranks[t.name] if t.name in cooling else highest[t.name] for t in targets},
        )

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A, (r, in), and B, (out, r), of the active ranks of each module."""
        found, active = {}, {} if self.masks is None else self.masks.active
        for name, module in self._live.modules.items():
            a, b = (whole(factor).detach().flatten(1) for factor in module.factors)
            chosen = list(active.get(name, range(len(a))))
            found[name] = a[chosen], b[:, chosen]
        return found

    def change(
        self, after: RankAllocation, generator: torch.Generator, directions: Callable[[str], Tensor] | None = None
    ) -> None:
        """Set new ranks, all or none. New rows of A lie along a module's directions if there are enough, else are drawn."""
        resizes = []
        for name, more in after.difference(self.allocation).items():
            rows = directions(name)[:more] * ROW_NORM if directions and more > 0 else None
            enough = rows is not None and len(rows) == more
            resizes.append(Resize(name=name, rank=after.ranks[name], directions=rows if enough else None))
        if self.masks is not None and resizes:
            self.masks.resize(resizes, self._optimizer, generator=generator)
        elif resizes:
            options: Any = {"generator": generator, "replicated": self._replicated}
            resize_adapters(self.model, self._optimizer, resizes, adapter_name=self.adapter, **options)
