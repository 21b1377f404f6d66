"""`RankController`: moves ranks between the modules of a LoRA model while it trains, at no more parameters than the budget."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from rankscope.allocation import RankAllocation
from rankscope.budget import ParameterBudget, RankLimits
from rankscope.control.decisions import Decision, LossHistory, effect_of_move, predict_effect, screen
from rankscope.control.policy import Proposal, propose
from rankscope.control.signals import GradientWindow, Signals
from rankscope.distributed import from_first_process, gathered, n_processes, whole
from rankscope.errors import ModelError, SettingsError, one_line
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
_NO_LOSS = (
    "no loss was passed to `step` and the model returned none, so the effect of moves is not measured; pass the loss that is "
    "minimised, or in a Trainer call `RankControllerCallback.bind(trainer)`"
)
_NOT_FINITE = "the gradients of {} sampled steps were not finite; lower the learning rate or the loss scale"
_NOT_SEEN = (
    "no training forward pass of the PEFT model was seen, or none with gradients; train the model that was passed, and with "
    "reentrant checkpointing call its `enable_input_require_grads()`"
)


def schedule_of(settings: ControllerSettings, total_steps: int) -> tuple[int, int]:
    """Steps between decisions, and the step after which ranks stay; a SettingsError if there is no decision before it."""
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

    Call `step` after each `optimizer.step()` (and a GradScaler's `update()`) and before `zero_grad()`. Hooks sketch the gradients
    of a few steps before each decision, which projects what ranks are worth onto the budget and resizes the adapters. Function,
    optimizer state and config follow. After the freeze, or a `with` block, only the new ranks are left on the model.

    Args:
        model: A PEFT model with LoRA, not merged; also in DistributedDataParallel or compiled. Only adapted modules can get
            ranks: for those that start at rank 0, pass `start` or use `apply_allocation(..., dormant=True)`.
        optimizer: The one that trains the adapter, also as accelerate wraps it.
        budget: The most adapter parameters at any time.
        total_steps: Optimizer steps of the run.
        start: Initial ranks: an allocation, or the name of a strategy that needs no profile. None: those of the model.
        performance_model: A study's. It refuses moves that it expects to do harm.
        scaler: The `torch.amp.GradScaler` that scales the loss; accelerate's is found on the optimizer.
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
        **overrides: Any,
    ) -> None:
        self._settings = settings = ControllerSettings.of(settings, **overrides)
        self._every, self._freeze = schedule_of(settings, total_steps)
        self._last_decision = self._freeze // self._every * self._every
        self._last_look = min(self._last_decision + self._every, total_steps)  # at what the last decision did
        check_budget(budget)
        self._budget, self._seed = budget, settings.seed
        self._ranks = _LiveRanks(model, optimizer, settings)
        begin = self._ranks.initial(start, budget)
        self._features, self._offline = rank_features(begin.targets, budget), performance_model
        if performance_model and {target.name for target in performance_model.features.targets} != set(begin.ranks):
            raise ModelError(
                "`performance_model` must be of the adapted modules, but is of others; fit it on this model's."
            )
        self._scaler = scaler if scaler is not None else getattr(optimizer, "scaler", None)
        if self._scaler is not None and not hasattr(self._scaler, "get_scale"):
            raise SettingsError(f"`scaler` must be a torch.amp.GradScaler, but is a {type(scaler).__name__}.")
        self._sketch_size = settings.sketch_size or self._ranks.sketch_size(begin)
        self._window = self._new_window(self._sketch_size, self._seed)
        self._decisions: list[Decision] = []
        self._moved_at: dict[str, int] = {}
        self._step, self._closed = 0, False
        self._ranks.begin(begin, self._generator())
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
            loss: The loss that is minimised, by which moves are judged. None: the mean of what the model returned as `loss`.
        """
        self._step += 1
        self._reminder.remove()
        if self._closed:
            return
        self._window.end_step()
        self._losses.end_step(loss)
        if self._step % self._every == 0 or self._step == self._last_look:
            self._measure_last_move()
        if self._step % self._every == 0 and self._step <= self._last_decision:
            self._decide()
        if self._step == self._last_look:
            self.close()
        else:
            self._watch()

    def close(self) -> None:
        """Remove all hooks; ranks stay from now on. Warns if no decision had a gradient to rest on."""
        if not self._closed and self._decisions and all(each.action == "skipped" for each in self._decisions):
            broken = self._decisions[-1].broken
            logger.warning(
                "no rank was moved, for none of the %d decisions had gradients to rest on: %s",
                *(len(self._decisions), _NOT_FINITE.format(broken) if broken else _NOT_SEEN),
            )
        self._closed = True
        self._reminder.remove()
        self._window.close()
        self._losses.close()

    def state_dict(self) -> dict[str, Any]:
        """All that later decisions depend on: numbers, lists and tensors. Every process must call it."""
        return {
            "schema": SCHEMA,
            "targets": fingerprint_targets(self.allocation.targets),
            "step": self._step,
            "ranks": dict(self.allocation.ranks),
            "sketch": [self._sketch_size, self._seed],
            "active": self.masks and {name: list(active) for name, active in self.masks.active.items()},
            "moved_at": dict(self._moved_at),
            "decisions": [decision.to_row() for decision in self._decisions],
            "window": self._window.state_dict(),
            "losses": list(self._losses.values()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume where another controller stopped. The model gets its ranks, so that its weights and optimizer state fit.

        Raises:
            ModelError: The state is damaged, or of another version, model or `rank_change`; nothing is changed.
        """
        try:
            self._check_state(state)
            ranks = RankAllocation.from_ranks(self.allocation.targets, dict(state["ranks"]))
            active = {name: [int(index) for index in indices] for name, indices in (state["active"] or {}).items()}
            step, moved_at = int(state["step"]), dict(state["moved_at"])
            decisions = [Decision(**row) for row in state["decisions"]]
            sketch_size, seed = (int(value) for value in state["sketch"])
            losses = [float(loss) for loss in state["losses"]]
            window = self._new_window(sketch_size, seed)
            window.load_state_dict(state["window"])
        except ModelError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise ModelError(
                f"the controller's state must be what `state_dict` returned, but cannot be read ({type(error).__name__}: "
                f"{one_line(error)}); it was edited or cut short: resume from another checkpoint."
            ) from error
        if self.masks is not None:
            self.masks.restore(active)
        else:
            self._ranks.change(ranks, self._generator())
        self._window.close()
        self._step, self._moved_at, self._decisions = step, moved_at, decisions
        self._sketch_size, self._seed, self._window = sketch_size, seed, window
        self._losses.restore(losses)
        if self._step >= self._last_look:
            self.close()
        else:
            self._watch()

    def _check_state(self, state: Mapping[str, Any]) -> None:
        """Raise unless the state is of this version, these modules and this way to change ranks."""
        the_state = "the controller's state must"
        if not isinstance(state, Mapping):
            raise ModelError(f"{the_state} be a dict, but is a {type(state).__name__}.")
        if state.get("schema") != SCHEMA:
            raise ModelError(f"{the_state} have schema {SCHEMA}, but has {state.get('schema')!r}.")
        if odd := sorted(set(state["ranks"]) ^ set(self.allocation.ranks)):
            where = "state" if odd[0] in state["ranks"] else "model"
            raise ModelError(
                f"{the_state} be of this model's adapted modules, but `{odd[0]}` is in the {where} only ({len(odd)} such); wrap "
                "the base model as for the first run, since PeftModel.from_pretrained leaves modules of rank 0 out."
            )
        if state["targets"] != fingerprint_targets(self.allocation.targets):
            raise ModelError(f"{the_state} be of this model's adapted modules, but is of others.")
        if (state["active"] is None) != (self.masks is None):
            theirs, ours = ("resize", "mask") if state["active"] is None else ("mask", "resize")
            processes = " and use one process" if theirs == "resize" else ""
            raise ModelError(
                f"{the_state} be of mode {ours!r}, but is of mode {theirs!r}; pass rank_change={theirs!r}{processes}."
            )

    def _new_window(self, sketch_size: int, seed: int) -> GradientWindow:
        model, targets = self._ranks.model, self.allocation.targets
        compiled = self._ranks.compiled or self._ranks.masked  # the Trainer compiles later, and masks then
        return GradientWindow(model, targets, sketch_size=sketch_size, seed=seed, compiled=compiled)

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
        before = after = self.allocation
        coarse = self._step <= self._settings.coarse_fraction * self._freeze
        signals = self._window.measure(self._ranks.factors())
        if signals is None:
            reason = "no finite gradient to decide on"
            proposal = Proposal(allocation=before, action="skipped", reason=reason, predicted=math.nan)
        else:
            proposal = self._propose(signals, coarse)
        self._window.clear()
        losses = self._losses.values()
        if self._losses.watching and signals and not self._decisions and np.isnan(losses).all():
            logger.warning(_NO_LOSS)
        if proposal.action == "moved" and signals is not None:
            after = proposal.allocation
            self._moved_at.update(dict.fromkeys(after.difference(before), self._step))
            self._ranks.change(after, self._generator(), signals.directions)
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
            loss=float(np.mean(losses[-self._every :])),
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

    def _propose(self, signals: Signals, coarse: bool) -> Proposal:
        """The first process's proposal, which performance models may refuse. Modules that are not watched keep their ranks."""
        present = self.allocation
        watched = [each.target for each in signals.modules]
        fixed = present.parameters - sum(target.rank_cost * present.ranks[target.name] for target in watched)
        cooled = self._step - (self._settings.cooldown + 1) * self._every
        proposal = propose(
            signals.modules,
            ParameterBudget(max(self._budget.limit - fixed, 1)),
            self._settings,
            coarse=coarse,
            signal_share=signals.signal_share,
            energy=signals.energy,
            limits=self._ranks.limits(watched, {name for name, step in self._moved_at.items() if step > cooled}),
        )
        ranks = {**present.ranks, **proposal.allocation.ranks}
        after = RankAllocation.from_ranks(present.targets, ranks, strategy="controller", budget=self._budget.limit)
        proposal = replace(proposal, allocation=after)
        if proposal.action == "moved":
            online = predict_effect(self._features, self._decisions, present.vector, after.vector)
            proposal = screen(proposal, present, self._offline, online)
        return from_first_process(proposal)

    def _measure_last_move(self) -> None:
        """Measure what the previous decision did to the loss, now that as many steps lie after it as before."""
        if not self._decisions or self._decisions[-1].step != self._step - self._every:
            return
        losses = self._losses.values()[-2 * self._every :]
        effect = effect_of_move(losses) if len(losses) == 2 * self._every else None
        if effect is not None:
            self._decisions[-1] = replace(self._decisions[-1], realised=effect.mean, realised_error=effect.error)


class _LiveRanks:
    """The ranks of a live adapter, resized or masked: by masks that the model carries, or by new ones from `begin` on."""

    def __init__(self, model: Any, optimizer: Any, settings: ControllerSettings) -> None:
        mode = settings.rank_change
        if mode == "resize" and is_ddp(model):
            raise ModelError(
                "`rank_change` must be 'mask' in DistributedDataParallel, which keeps its parameters, but is 'resize'; change it."
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
        if not self.masked:  # `begin` cuts what is above the full rank
            cut = {t.name: min(rank, t.full_rank) for t, rank in zip(present.targets, present.vector, strict=True)}
            present = RankAllocation.from_ranks(present.targets, cut)
        if isinstance(start, str):
            start = allocate(start, targets=present.targets, budget=budget, max_rank=self.capacity)
        if start is not None and not isinstance(start, RankAllocation):
            raise SettingsError(
                f"`start` must be a RankAllocation or a strategy's name, but is a {type(start).__name__}."
            )
        given = {name: rank for name, rank in (start or present).ranks.items() if rank}
        if unknown := set(given) - set(present.ranks):
            raise ModelError(
                f"`start` must give ranks to adapted modules only, but gives `{min(unknown)}` some; adapt it when the model is "
                "wrapped."
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
            resize_adapters(self.model, self._optimizer, above, adapter_name=self.adapter, shrink="svd")
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
        wanted = max(MIN_SKETCH_SIZE, min(2 * max(ranks.vector), max(target.full_rank for target in ranks.targets)))
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
        found = {}
        active = {} if self.masks is None else self.masks.active
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
            found = directions(name)[:more] * ROW_NORM if directions and more > 0 else ()
            rows = found if isinstance(found, Tensor) and len(found) == more else None
            resizes.append(Resize(name=name, rank=after.ranks[name], directions=rows))
        if self.masks is not None and resizes:
            self.masks.resize(resizes, self._optimizer, generator=generator)
        elif resizes:
            resize_adapters(self.model, self._optimizer, resizes, adapter_name=self.adapter, generator=generator)


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
