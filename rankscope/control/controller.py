"""`RankController`: moves ranks between the modules of a LoRA model while it trains, at no more parameters than the budget."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from rankscope.allocation import RankAllocation
from rankscope.budget import ParameterBudget, RankLimits
from rankscope.control.decisions import (
    Decision,
    LossHistory,
    effect_of_move,
    predict_effect,
    screen,
    write_decisions,
)
from rankscope.control.policy import Effect, Proposal, propose
from rankscope.control.signals import GradientWindow, Signals
from rankscope.distributed import check_same, from_first_process, gathered, is_first, n_processes, whole
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
from rankscope.performance import PerformanceModel, rank_features
from rankscope.profiling import bytes_of_weights, is_compiled, largest_sketch_size
from rankscope.settings import ControllerSettings
from rankscope.strategies import allocate
from rankscope.targets import TargetModule, fingerprint_targets, unwrapped

logger = logging.getLogger(__name__)

ROW_NORM = 1.0 / math.sqrt(3.0)  # of a new row of A: what PEFT's Kaiming draw gives on average
MIN_SKETCH_SIZE = 16
SCHEMA = 1
_STATE_KEYS = {"targets", "step", "ranks", "sketch", "active", "moved_at", "decisions", "window", "losses"}


def schedule_of(settings: ControllerSettings, total_steps: int) -> tuple[int, int]:
    """Steps between decisions, and the step after which ranks stay, of a run of so many steps.

    Raises:
        SettingsError: No decision comes before the freeze.
    """
    if type(total_steps) is not int or total_steps < 1:
        raise SettingsError(f"`total_steps` must be a whole number above 0, but got {total_steps!r}.")
    every, freeze = settings.every_of(total_steps), int(settings.freeze_fraction * total_steps + 1e-9)
    if freeze < every:
        raise SettingsError(
            f"`every` must leave a decision before the ranks freeze at step {freeze} of {total_steps}, but got {every}; lower "
            "it, or raise `freeze_fraction`."
        )
    return every, freeze


def check_budget(budget: Any) -> None:
    """Raise a SettingsError unless it is a budget."""
    if not isinstance(budget, ParameterBudget):
        raise SettingsError(f"`budget` must be a ParameterBudget, but is {budget!r:.60}.")


class RankController:
    """Moves ranks while a LoRA model trains.

    Call `step` once an optimizer step, after `optimizer.step()` (and a GradScaler's `update()`) and before `zero_grad()`.
    Gradients of a few steps before each decision are sketched by hooks. Each decision projects what ranks are worth onto the
    budget, lets the performance models refuse, and resizes the adapters; function, optimizer state and config follow. After
    the freeze, or at the end of a `with` block, nothing is left on the model but its new ranks.

    Args:
        model: A PEFT model with LoRA, not merged; also in DistributedDataParallel or compiled. Only adapted modules can get
            ranks. For modules that start at rank 0, pass `start` or use `apply_allocation(..., dormant=True)`.
        optimizer: The one that trains the adapter, also as accelerate wraps it.
        budget: The most adapter parameters at any time.
        settings: How ranks move.
        total_steps: Optimizer steps of the run.
        start: Initial ranks: an allocation, or the name of a strategy that needs no profile. None: those of the model.
        performance_model: A study's. It refuses moves that it expects to do harm.
        scaler: The `torch.amp.GradScaler` that scales the loss; accelerate's is found on the optimizer.
        out: Folder for `decisions.parquet`, written after each decision.
        **overrides: Single `ControllerSettings`.

    Raises:
        SettingsError: A value is out of range, no decision comes before the freeze, or the budget is below the initial ranks.
        ModelError: The model, its adapter or the optimizer cannot be controlled. Nothing is changed.

    >>> from peft import LoraConfig, get_peft_model
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
    >>> model = get_peft_model(net, LoraConfig(target_modules=["0", "2"], r=2))
    >>> optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    >>> with RankController(model, optimizer, budget=ParameterBudget(56), every=2, total_steps=20) as controller:
    ...     for _ in range(20):
    ...         loss = model(torch.ones(4, 8)).square().mean()
    ...         loss.backward()
    ...         optimizer.step()
    ...         controller.step(loss)
    ...         optimizer.zero_grad()
    >>> controller.decisions["step"].tolist(), controller.allocation.parameters <= 56
    ([2, 4, 6], True)
    """

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        *,
        budget: ParameterBudget,
        settings: ControllerSettings | None = None,
        total_steps: int = 1000,
        start: RankAllocation | str | None = None,
        performance_model: PerformanceModel | None = None,
        scaler: Any = None,
        out: str | os.PathLike[str] | None = None,
        **overrides: Any,
    ) -> None:
        self._settings = ControllerSettings.of(settings, **overrides)
        self._every, self._freeze = schedule_of(self._settings, total_steps)
        self._last_decision = self._freeze // self._every * self._every
        self._last_look = min(self._last_decision + self._every, total_steps)  # at the effect of the last decision
        check_budget(budget)
        self._budget, self._seed = budget, self._settings.seed
        self._ranks = _LiveRanks(model, optimizer, self._settings)
        begin = self._ranks.initial(start, budget)
        self._features, self._offline = rank_features(begin.targets, budget), performance_model
        if performance_model and {target.name for target in performance_model.features.targets} != set(begin.ranks):
            raise ModelError(
                "`performance_model` must be of the adapted modules, but is of others; fit it on this model's."
            )
        self._scaler = scaler if scaler is not None else getattr(optimizer, "scaler", None)
        if self._scaler is not None and not hasattr(self._scaler, "get_scale"):
            raise SettingsError(f"`scaler` must be a torch.amp.GradScaler, but is a {type(scaler).__name__}.")
        self._sketch_size = self._settings.sketch_size or _sketch_size(self._ranks.model, begin)
        self._window = self._new_window(self._sketch_size, self._seed)
        self._out = None if out is None else _decisions_file(out)
        self._decisions: list[Decision] = []
        self._moved_at: dict[str, int] = {}
        self._step, self._closed = 0, False
        self._ranks.begin(begin, generator=self._generator())
        # Nothing may fail from here on, where hooks are registered; `close` removes them.
        self._losses = LossHistory(self._ranks.model)
        self._reminder = _remind_of_steps(unwrap_optimizer(optimizer), after=self._every)
        self._watch()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def allocation(self) -> RankAllocation:
        """The present ranks."""
        return self._ranks.allocation

    @property
    def decisions(self) -> pd.DataFrame:
        """One row for each decision so far; the columns are the attributes of `Decision`."""
        return pd.DataFrame([decision.to_row() for decision in self._decisions], columns=list(Decision.__slots__))

    @property
    def last_decision(self) -> Decision | None:
        """The latest decision; None before the first."""
        return self._decisions[-1] if self._decisions else None

    @property
    def frozen(self) -> bool:
        """Whether ranks stay from now on."""
        return self._closed or self._step >= self._last_decision

    @property
    def adapter_name(self) -> str:
        """The adapter whose ranks move."""
        return self._ranks.adapter

    @property
    def masks(self) -> RankMasks | None:
        """The masks, if ranks are masked. While they are on, `model.save_pretrained` writes the adapter at its true ranks."""
        return self._ranks.masks

    def step(self, loss: Tensor | float | None = None) -> None:
        """Tell the controller that the optimizer has stepped.

        Args:
            loss: The loss that is minimised, by which the effect of moves is measured. None: what the model returned as `loss`,
                averaged over the step's forward passes.
        """
        self._step += 1
        self._reminder.remove()
        if self._closed:
            return
        self._window.end_step()
        self._losses.end_step(loss)
        if self._step % self._every == 0 and self._step <= self._last_decision:
            self._decide()
        elif self._step == self._last_look:
            self._settle()
        if self._step == self._last_look:
            self.close()
        else:
            self._watch()

    def close(self) -> None:
        """Remove all hooks; ranks stay from now on. Warns if no decision had a gradient to rest on."""
        if not self._closed:
            _warn_if_blind(self._decisions)
        self._closed = True
        self._reminder.remove()
        self._window.close()
        self._losses.close()

    def state_dict(self) -> dict[str, Any]:
        """All that later decisions depend on: numbers, lists and tensors. Every process must call it."""
        masks = self.masks
        return {
            "schema": SCHEMA,
            "targets": fingerprint_targets(self.allocation.targets),
            "step": self._step,
            "ranks": dict(self.allocation.ranks),
            "sketch": [self._sketch_size, self._seed],
            "active": None if masks is None else {name: list(active) for name, active in masks.active.items()},
            "moved_at": dict(self._moved_at),
            "decisions": [decision.to_row() for decision in self._decisions],
            "window": self._window.state_dict(),
            "losses": list(self._losses.values()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume where another controller stopped. The model gets its ranks, so that its weights and optimizer state fit.

        Raises:
            ModelError: The state is damaged, of another version, of other modules, or of the other kind of rank change; nothing
                is changed.
        """
        self._check_state(state)
        try:
            ranks = RankAllocation.from_ranks(self.allocation.targets, state["ranks"])
            active = {name: [int(index) for index in indices] for name, indices in (state["active"] or {}).items()}
            step, moved_at = int(state["step"]), dict(state["moved_at"])
            decisions = [Decision(**row) for row in state["decisions"]]
            sketch_size, seed = (int(value) for value in state["sketch"])
            losses = [float(loss) for loss in state["losses"]]
            window = self._new_window(sketch_size, seed)
            window.load_state_dict(state["window"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise ModelError(
                f"the controller's state must be what `state_dict` returned, but cannot be read ({type(error).__name__}); it was "
                "edited or cut short: resume from another checkpoint."
            ) from error
        if self.masks is not None:
            self.masks.restore(active)
        elif ranks != self.allocation:
            self._change(ranks, None)
        self._window.close()
        self._step, self._moved_at, self._decisions = step, moved_at, decisions
        self._sketch_size, self._seed, self._window = sketch_size, seed, window
        self._losses.restore(losses)
        if self._step >= self._last_look:
            self.close()
        else:
            self._watch()

    def _check_state(self, state: Mapping[str, Any]) -> None:
        """Raise unless the state is of this version, these modules and this kind of rank change."""
        if not isinstance(state, Mapping):
            raise ModelError(f"the controller's state must be a dict, but is a {type(state).__name__}.")
        if state.get("schema") != SCHEMA:
            raise ModelError(f"the controller's state must have schema {SCHEMA}, but has {state.get('schema')!r}.")
        if missing := sorted(_STATE_KEYS - set(state)):
            raise ModelError(
                f"the controller's state must hold `{missing[0]}`, but does not ({len(missing)} such); it was edited: resume "
                "from another checkpoint."
            )
        if not isinstance(state["ranks"], Mapping):
            raise ModelError(f"the ranks in the controller's state must be a dict, but are {state['ranks']!r}.")
        if odd := sorted(set(state["ranks"]) ^ set(self.allocation.ranks)):
            where = "state" if odd[0] in state["ranks"] else "model"
            raise ModelError(
                f"the controller's state must be of this model's adapted modules, but `{odd[0]}` is in the {where} only "
                f"({len(odd)} such); wrap the base model as for the first run, since PeftModel.from_pretrained leaves modules of "
                "rank 0 out."
            )
        if state["targets"] != fingerprint_targets(self.allocation.targets):
            raise ModelError("the controller's state must be of this model's adapted modules, but is of others.")
        if (state["active"] is None) != (self.masks is None):
            theirs, ours = ("resize", "mask") if state["active"] is None else ("mask", "resize")
            processes = " and use one process" if theirs == "resize" else ""
            raise ModelError(
                f"the controller's state must be of mode {ours!r}, but is of mode {theirs!r}; pass "
                f"rank_change={theirs!r}{processes}."
            )

    def _new_window(self, sketch_size: int, seed: int) -> GradientWindow:
        return GradientWindow(
            self._ranks.model,
            self.allocation.targets,
            sketch_size=sketch_size,
            seed=seed,
            compiled=self._ranks.compiled
            or self._ranks.capacity is not None,  # the Trainer compiles later, and masks then
        )

    def _generator(self) -> torch.Generator:
        """For rows of A that are drawn at this step."""
        return torch.Generator().manual_seed(self._seed * 1_000_003 + self._step)

    def _watch(self) -> None:
        """Register the hooks for the next step if it is one of those before a decision."""
        step = self._step + 1
        if step <= self._last_decision and -step % self._every < self._settings.samples:
            self._window.watch(1.0 if self._scaler is None else float(self._scaler.get_scale()))

    # --- a decision --------------------------------------------------------------------------------------------------

    def _decide(self) -> None:
        self._settle()
        before = after = self.allocation
        coarse = self._step <= self._settings.coarse_fraction * self._freeze
        signals = self._window.measure(self._ranks.factors())
        if signals is None:
            reason = "no finite gradient to decide on"
            proposal = Proposal(allocation=before, action="skipped", reason=reason, predicted=math.nan)
        else:
            proposal = self._propose(signals, coarse)
            self._losses.say_which()
        self._window.clear()
        if proposal.action == "moved" and signals is not None:
            after = proposal.allocation
            check_same(after.vector, what="the ranks")
            self._change(after, signals.directions)
            self._moved_at.update(dict.fromkeys(after.difference(before), self._step))
        found = {each.target.name: each for each in signals.modules} if signals else {}
        decision = Decision(
            step=self._step,
            phase="coarse" if coarse else "fine",
            action=proposal.action,
            reason=proposal.reason,
            parameters=after.parameters,
            batches=signals.batches if signals else 0,
            broken=sum(gathered(self._window.broken)),
            signal_share=signals.signal_share if signals else math.nan,
            loss=float(np.mean(self._losses.values()[-self._every :])),
            predicted=proposal.predicted,
            offline=proposal.offline.mean,
            offline_error=proposal.offline.error,
            online=proposal.online.mean,
            online_error=proposal.online.error,
            modules=tuple(before.ranks),
            ranks_before=before.vector,
            ranks_after=after.vector,
            ranks_proposed=proposal.allocation.vector,
            values=tuple((found[name].values or (0.0,))[-1] if name in found else math.nan for name in before.ranks),
            gains=tuple((found[name].gains or (0.0,))[0] if name in found else math.nan for name in before.ranks),
        )
        self._decisions.append(decision)
        logger.info(
            "step %d: %s, %s; %d ranks went elsewhere, %s of %s parameters in use",
            *(self._step, decision.action, decision.reason, decision.n_moved),
            *(f"{after.parameters:,}", f"{self._budget.limit:,}"),
        )
        self._write()

    def _propose(self, signals: Signals, coarse: bool) -> Proposal:
        """The policy's proposal, which performance models may refuse. Modules that cannot be watched keep their ranks."""
        ranks = dict(self.allocation.ranks)
        watched = [each.target for each in signals.modules]
        fixed = self.allocation.parameters - sum(target.rank_cost * ranks[target.name] for target in watched)
        cooled = self._step - (self._settings.cooldown + 1) * self._every
        cooling = [name for name, step in self._moved_at.items() if step > cooled]
        found = propose(
            signals.modules,
            ParameterBudget(max(self._budget.limit - fixed, 1)),
            self._settings,
            coarse=coarse,
            signal_share=signals.signal_share,
            energy=signals.energy,
            limits=self._ranks.limits(watched, cooling),
        )
        ranks |= found.allocation.ranks
        after = RankAllocation.from_ranks(
            self.allocation.targets, ranks, strategy="controller", budget=self._budget.limit
        )
        found = replace(found, allocation=after)
        if found.action == "moved":
            moves = [
                (each.ranks_before, each.ranks_after, Effect(each.realised, each.realised_error))
                for each in self._decisions
                if each.action == "moved" and not math.isnan(each.realised)
            ]
            online = predict_effect(self._features, moves, self.allocation.vector, after.vector)
            found = screen(found, self.allocation, self._offline, online)
        return from_first_process(found)

    def _change(self, after: RankAllocation, directions: Callable[[str], Tensor] | None) -> None:
        """Resize; new rows of A lie along the directions if there are enough, and are drawn otherwise."""
        rows = {}
        for name, more in after.difference(self.allocation).items():
            if directions and more > 0 and len(found := directions(name)) >= more:
                rows[name] = found[:more] * ROW_NORM
        self._ranks.change(after, rows, generator=self._generator())

    def _settle(self) -> None:
        """Measure what the previous decision did, once as many steps lie after it as before."""
        every = self._every
        if not self._decisions or self._decisions[-1].step != self._step - every:
            return
        losses = self._losses.values()
        effect = effect_of_move(losses[-2 * every :]) if len(losses) >= 2 * every else None
        if effect is None:
            return
        self._decisions[-1] = replace(self._decisions[-1], realised=effect.mean, realised_error=effect.error)
        self._write()

    def _write(self) -> None:
        if self._out is not None and is_first():
            write_decisions(self.decisions, self._out)


class _LiveRanks:
    """The ranks of a live adapter, resized or masked.

    Attributes:
        model: The PEFT model, unwrapped.
        adapter: The adapter's name.
        masks: In mask mode: those that the model carries, or new ones from `begin` on.
        compiled: Whether `torch.compile` has compiled the model, or a part of it.
    """

    def __init__(self, model: Any, optimizer: Any, settings: ControllerSettings) -> None:
        mode = settings.rank_change
        if mode == "resize" and is_ddp(model):
            raise ModelError(
                "`rank_change` must be 'mask' for a model in DistributedDataParallel, which keeps the parameters that it wraps, "
                "but is 'resize'; pass rank_change='mask', or control the model before it is wrapped."
            )
        self._live = LiveAdapter(unwrapped(model), settings.adapter_name)
        self.model, self.adapter = self._live.model, self._live.name
        self.masks = masks_on(self.model)
        if self.masks is not None and (mode == "resize" or self.masks.adapter != self.adapter):
            raise ModelError(
                f"`model` must not carry rank masks to be controlled in mode {mode!r}, but carries those of adapter "
                f"{self.masks.adapter!r}; `compress` them, or go on in mode 'mask'."
            )
        self.compiled = is_compiled(model)
        fixed = self.masks is not None or n_processes() > 1 or self.compiled or is_ddp(model)
        self._masked = mode == "mask" or (mode == "auto" and fixed)
        self._optimizer = optimizer
        self._live.check_changeable(in_place=self._masked)
        check_known(optimizer)
        self._check_trained([factor for module in self._live.modules.values() for factor in module.factors])
        self._full = RankAllocation.from_peft_model(self.model, adapter_name=self.adapter)

    def _check_trained(self, parameters: Sequence[Tensor]) -> None:
        if not any(parameter.requires_grad for parameter in parameters):
            raise ModelError(
                f"adapter {self.adapter!r} must be trained, but its parameters are frozen; load it with is_trainable=True, or "
                "make it the active one (`set_adapter`)."
            )
        owned = {id(p) for group in unwrap_optimizer(self._optimizer).param_groups for p in group["params"]}
        if missing := sum(id(parameter) not in owned for parameter in parameters):
            raise ModelError(
                f"`optimizer` must own the adapter's parameters, but lacks {missing} of {len(parameters)}; build it from "
                "the PEFT model's parameters, after wrapping."
            )

    def initial(self, start: RankAllocation | str | None, budget: ParameterBudget) -> RankAllocation:
        """The ranks to begin with; nothing is changed yet.

        Raises:
            SettingsError: They cost more than the budget, are none, or are for other modules.
        """
        if start is not None and not isinstance(start, str | RankAllocation):
            raise SettingsError(
                f"`start` must be a RankAllocation or a strategy's name, but is a {type(start).__name__}."
            )
        present = begin = self.allocation
        if not self._masked:  # `begin` cuts what is above the full rank
            cut = {t.name: min(rank, t.full_rank) for t, rank in zip(present.targets, present.vector, strict=True)}
            present = begin = RankAllocation.from_ranks(present.targets, cut)
        if isinstance(start, str):
            start = allocate(start, targets=present.targets, budget=budget, max_rank=self.capacity)
        if start is not None:
            given = {name: rank for name, rank in start.ranks.items() if rank}
            if unknown := set(given) - set(present.ranks):
                raise ModelError(
                    f"`start` must give ranks to adapted modules only, but gives `{min(unknown)}` some; adapt it when the model "
                    "is wrapped."
                )
            begin = RankAllocation.from_ranks(present.targets, given)
        if not begin.parameters:
            raise SettingsError(
                "`start` must give at least one module a rank, but gives none; PEFT has no empty adapter."
            )
        if begin.parameters > budget.limit:
            raise SettingsError(
                f"`budget` must cover the ranks to begin with ({begin.parameters:,} parameters), but got {budget.limit:,}; "
                "raise it, or pass `start`."
            )
        if self._masked and self.masks is None and begin == present:
            raise ModelError(
                "masked ranks must have room to grow, but every module begins at its capacity, the rank it was wrapped with; "
                "wrap the model at a larger rank, and pass `start`."
            )
        return begin

    def begin(self, ranks: RankAllocation, *, generator: torch.Generator) -> None:
        """Put the masks on, or cut ranks above full rank, and set the initial ranks: all of it or nothing."""
        new = self._masked and self.masks is None
        if new:
            self.masks = RankMasks(self.model, adapter_name=self.adapter)
        elif not self._masked:
            self._cut()
        try:
            self.change(ranks, {}, generator=generator)
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
        self._full = RankAllocation.from_peft_model(self.model, adapter_name=self.adapter)

    @property
    def allocation(self) -> RankAllocation:
        """The present ranks, dormant modules included."""
        if self.masks is not None:
            return RankAllocation.from_ranks(self._full.targets, self.masks.ranks)
        return RankAllocation.from_peft_model(self.model, self._full.targets, adapter_name=self.adapter)

    @property
    def capacity(self) -> Mapping[str, int] | None:
        """The largest masked rank of each module; None where ranks are resized."""
        return self._full.ranks if self._masked else None

    def limits(self, targets: Sequence[TargetModule], cooling: Collection[str]) -> RankLimits:
        """The ranks that modules may have now; those that cool down keep theirs."""
        config = self.model.peft_config[self.adapter]
        stays = config.bias != "none" or (self._masked and (config.use_dora or config.lora_bias))
        ranks, capacity = self.allocation.ranks, self.capacity or {}
        min_rank, max_rank = {}, {}
        for target in targets:
            name, full, rank = target.name, target.full_rank, ranks[target.name]
            min_rank[name] = min(
                rank, full if name in cooling else int(stays)
            )  # 1 where a bias or masked magnitude stays
            max_rank[name] = rank if name in cooling else capacity.get(name, full)
        return RankLimits(min_rank, max_rank)

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A, (r, in), and B, (out, r), of the active ranks of each module."""
        found = {}
        chosen = {} if self.masks is None else self.masks.active
        for name, module in self._live.modules.items():
            a, b = (whole(factor).detach().flatten(1) for factor in module.factors)
            if name in chosen:
                active = list(chosen[name])
                a, b = a[active], b[:, active]
            found[name] = a, b
        return found

    def change(self, after: RankAllocation, directions: Mapping[str, Tensor], *, generator: torch.Generator) -> None:
        """Set new ranks, all or none. New rows of A are the directions, or drawn."""
        ranks = {name: after.ranks[name] for name in after.difference(self.allocation)}
        resizes = [Resize(name=name, rank=rank, directions=directions.get(name)) for name, rank in ranks.items()]
        if not resizes:
            return
        if self.masks is not None:
            self.masks.resize(resizes, self._optimizer, generator=generator)
        else:
            resize_adapters(self.model, self._optimizer, resizes, adapter_name=self.adapter, generator=generator)


def _sketch_size(model: nn.Module, ranks: RankAllocation) -> int:
    """Twice the largest rank and 16 at least, as far as the memory bound allows; one more copy is kept at sampled steps."""
    wanted = max(MIN_SKETCH_SIZE, min(2 * max(ranks.vector), max(target.full_rank for target in ranks.targets)))
    return largest_sketch_size(ranks.targets, wanted, bytes_of_weights(model), copies=2)


def _decisions_file(folder: str | os.PathLike[str]) -> Path:
    """The file of decisions. Its folder is made at once: a run should not find out after hours that it cannot write."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"`out` must be a folder that can be written to, but {folder} is not: {error}.") from error
    return Path(folder) / "decisions.parquet"


def _remind_of_steps(optimizer: Optimizer, *, after: int) -> RemovableHandle:
    """Warn once if the optimizer steps more often than this before the hook is removed."""
    left = count(after - 1, -1)

    def stepped(*_: Any) -> None:
        if next(left) < 0:
            handle.remove()
            logger.warning(
                "the optimizer has stepped, but `RankController.step` was never called, so no rank can move; call it after each "
                "`optimizer.step()` and before `zero_grad()`"
            )

    handle = optimizer.register_step_post_hook(stepped)
    return handle


def _warn_if_blind(decisions: Sequence[Decision]) -> None:
    """Warn if there were decisions and none had a gradient to rest on."""
    if not decisions or any(decision.action != "skipped" for decision in decisions):
        return
    broken = decisions[-1].broken
    cause = (
        f"the gradients of {broken} sampled steps were not finite; lower the learning rate or the loss scale"
        if broken
        else "no training forward pass of the PEFT model was seen, or none with gradients; train the model that was passed, and "
        "with reentrant checkpointing call its `enable_input_require_grads()`"
    )
    logger.warning(
        "no rank was moved, for none of the %d decisions had gradients to rest on: %s", len(decisions), cause
    )
