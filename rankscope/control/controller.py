"""`RankController`: moves ranks between the modules of a LoRA model while it trains, at no more parameters than the budget."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from itertools import count
from statistics import fmean
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from rankscope.allocation import RankAllocation
from rankscope.budget import ParameterBudget
from rankscope.control.decisions import Decision, ModuleSignals, Proposal, propose
from rankscope.control.ranks import LiveRanks
from rankscope.control.signals import GradientWindow, Signals
from rankscope.distributed import gathered
from rankscope.errors import ModelError, SettingsError, checked, one_line
from rankscope.lora import RankMasks, unwrap_optimizer
from rankscope.performance import prior_gains
from rankscope.settings import ControllerSettings
from rankscope.targets import fingerprint_targets

logger = logging.getLogger(__name__)

SCHEMA = 2
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


class RankController:
    """Moves ranks while a LoRA model trains.

    Call `step` after each `optimizer.step()` (and a GradScaler's `update()`) and before `zero_grad()`. Hooks sketch the gradients
    of a few steps before each decision, which projects what ranks are worth onto the budget and resizes the adapters. Function,
    optimizer state and config follow. After the freeze, or a `with` block, only the new ranks are left on the model.

    Args:
        model: A PEFT model with LoRA, not merged; also in DistributedDataParallel or compiled. Only adapted modules can get
            ranks: for those that start at rank 0, pass `start` or use `apply_allocation(..., dormant=True)`.
        optimizer: The one that trains the adapter, also as accelerate wraps it.
        start: Initial ranks: an allocation, or the name of a strategy that needs no profile. None: those of the model.
        scaler: The `torch.amp.GradScaler` that scales the loss; accelerate's is found on the optimizer.
        replicated: Whether several processes hold equal models, unwrapped, each with its rows of one batch, and gradients are
            summed before the optimizer steps. Ranks are then resized and decided as in one process.

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

    @checked
    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: Any,
        *,
        budget: ParameterBudget | int,
        settings: ControllerSettings | Mapping[str, Any] | None = None,
        total_steps: int = 1000,
        start: RankAllocation | str | None = None,
        scaler: Any = None,
        replicated: bool = False,
        **overrides: Any,
    ) -> None:
        self._settings = settings = ControllerSettings.of(settings, **overrides)
        self._every, self._freeze = schedule_of(settings, total_steps)
        self._last_decision = self._freeze // self._every * self._every
        self._budget, self._seed = (budget := ParameterBudget.of(budget)), settings.seed
        self._ranks = LiveRanks(model, optimizer, settings, replicated=replicated)
        begin = self._ranks.initial(start, budget)
        self._scaler = scaler if scaler is not None else getattr(optimizer, "scaler", None)
        if self._scaler is not None and not hasattr(self._scaler, "get_scale"):
            raise SettingsError(f"`scaler` must be a torch.amp.GradScaler, but is a {type(scaler).__name__}.")
        self._sketch_size = settings.sketch_size or self._ranks.sketch_size(begin)
        compiled = self._ranks.compiled or self._ranks.masked  # the Trainer compiles later, and masks then
        kind: Any = {"compiled": compiled, "shared": replicated}
        self._new_window = partial(GradientWindow, self._ranks.model, begin.targets, **kind)
        self._window = self._new_window(sketch_size=self._sketch_size, seed=self._seed)
        self._decisions: list[Decision] = []
        self._moved_at: dict[str, int] = {}
        self._losses: list[Tensor | float] = []  # since the last decision
        self._step, self._closed = 0, False
        self._ranks.begin(begin, self._generator())
        # Nothing may fail from here on, where hooks are registered; `close` removes them.
        self._reminder = _remind_of_steps(unwrap_optimizer(optimizer), after=self._every)
        self._go_on()

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
        return pd.DataFrame(map(asdict, self._decisions), columns=[field.name for field in fields(Decision)])

    @property
    def last_decision(self) -> Decision | None:
        """The latest decision; None before the first."""
        return self._decisions[-1] if self._decisions else None

    @property
    def frozen(self) -> bool:
        """Whether ranks stay from now on."""
        return self._closed or self._step >= self._last_decision

    @property
    def masks(self) -> RankMasks | None:
        """The masks, if ranks are masked. While they are on, `model.save_pretrained` writes the adapter at its true ranks."""
        return self._ranks.masks

    def step(self, loss: Tensor | float | None = None) -> None:
        """Tell the controller that the optimizer has stepped.

        Args:
            loss: For the record: a decision's row holds the mean since the one before.
        """
        if self._closed:
            must = "the controller must be open to step, but was closed"
            raise ModelError(f"{must} after step {self._step}; make a new one for another training.")
        self._step += 1
        self._reminder.remove()
        if self._step > self._last_decision:
            return
        self._window.end_step()
        if loss is not None:
            self._losses.append(torch.as_tensor(loss).detach())
        if self._step % self._every == 0:
            self._decide()
        self._go_on()

    def close(self) -> None:
        """Remove all hooks; ranks stay, and there are no further steps."""
        if not self.frozen:
            self._end()
        self._closed = True

    def _end(self) -> None:
        """Remove all hooks. Warns if no decision had a gradient to rest on."""
        if self._decisions and all(each.action == "skipped" for each in self._decisions):
            broken = self._decisions[-1].broken
            logger.warning(
                "no rank was moved, for none of the %d decisions had gradients to rest on: %s",
                *(len(self._decisions), _NOT_FINITE.format(broken) if broken else _NOT_SEEN),
            )
        self._reminder.remove()
        self._window.close()

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
            "decisions": [asdict(decision) for decision in self._decisions],
            "window": self._window.state_dict(),
            "losses": self._mean_losses(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume where another controller stopped. The model gets its ranks, so that its weights and optimizer state fit.

        Raises:
            ModelError: The state is damaged, or of another version, model or `rank_change`; nothing is changed.
        """
        if not isinstance(state, Mapping):
            raise ModelError(f"the controller's state must be a dict, but is a {type(state).__name__}.")
        try:
            self._check_state(state)
            ranks = RankAllocation.from_ranks(self.allocation.targets, dict(state["ranks"]))
            active = {name: [int(index) for index in indices] for name, indices in (state["active"] or {}).items()}
            step, moved_at = int(state["step"]), dict(state["moved_at"])
            decisions = [Decision(**row) for row in state["decisions"]]
            sketch_size, seed = (int(value) for value in state["sketch"])
            losses: list[Tensor | float] = [float(loss) for loss in state["losses"]]
            window = self._new_window(sketch_size=sketch_size, seed=seed)
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
        self._step, self._moved_at, self._decisions, self._losses = step, moved_at, decisions, losses
        self._sketch_size, self._seed, self._window = sketch_size, seed, window
        self._go_on()

    def _check_state(self, state: Mapping[str, Any]) -> None:
        """Raise unless the state is of this version, these modules and this way to change ranks."""
        if state.get("schema") != SCHEMA:
            problem = f"have schema {SCHEMA}, but has {state.get('schema')!r}."
        elif odd := sorted(set(state["ranks"]) ^ set(self.allocation.ranks)):
            problem = (
                f"be of this model's adapted modules, but `{odd[0]}` is in the "
                f"{'state' if odd[0] in state['ranks'] else 'model'} only ({len(odd)} such); wrap the base model as for the "
                "first run, since PeftModel.from_pretrained leaves modules of rank 0 out."
            )
        elif state["targets"] != fingerprint_targets(self.allocation.targets):
            problem = "be of this model's adapted modules, but is of others."
        elif state["active"] is None and self.masks is not None:
            problem = "be of mode 'mask', but is of mode 'resize'; pass rank_change='resize' and use one process."
        elif state["active"] is not None and self.masks is None:
            problem = "be of mode 'resize', but is of mode 'mask'; pass rank_change='mask'."
        else:
            return
        raise ModelError(f"the controller's state must {problem}")

    def _generator(self) -> torch.Generator:
        """For rows of A that are drawn at this step."""
        return torch.Generator().manual_seed(self._seed * 1_000_003 + self._step)

    def _go_on(self) -> None:
        """Remove the hooks after the last decision; else register them if the next step is one of those before a decision."""
        if self.frozen:
            self._end()
        elif -(self._step + 1) % self._every < self._settings.samples:
            self._window.watch(1.0 if self._scaler is None else float(self._scaler.get_scale()))

    # --- a decision --------------------------------------------------------------------------------------------------

    def _decide(self) -> None:
        before = after = self.allocation
        coarse = self._step <= self._settings.coarse_fraction * self._freeze
        signals = self._window.measure(self._ranks.factors())
        proposal = gathered(self._propose(signals, coarse))[0]
        if proposal.action == "moved":
            ranks = {**before.ranks, **proposal.ranks}  # modules that are not watched keep theirs
            limits: Any = {"budget": self._budget.limit, "tower_bounds": self._budget.bounds}
            after = RankAllocation.from_ranks(before.targets, ranks, strategy="controller", **limits)
            self._moved_at.update(dict.fromkeys(after.difference(before), self._step))
            self._ranks.change(after, self._generator(), signals.directions)
        edges = {s.target.name: (s.worth[s.rank - 1] if s.rank else 0.0, s.gain(s.rank + 1)) for s in signals.modules}
        values, gains = zip(*(edges.get(name, (math.nan, math.nan)) for name in before.ranks), strict=True)
        decision = Decision(
            step=self._step,
            phase="coarse" if coarse else "fine",
            action=proposal.action,
            reason=proposal.reason,
            parameters=after.parameters,
            batches=signals.batches,
            broken=sum(gathered(self._window.broken)),
            signal_share=signals.signal_share,
            loss=fmean(self._mean_losses() or [math.nan]),
            predicted=proposal.predicted,
            modules=tuple(before.ranks),
            ranks_before=before.vector,
            ranks_after=after.vector,
            values=values,
            gains=gains,
        )
        self._decisions.append(decision)
        self._losses = []
        logger.info(
            "step %d: %s, %s; %d ranks went elsewhere, %s of %s parameters in use",
            *(self._step, decision.action, decision.reason, decision.n_moved),
            *(f"{after.parameters:,}", f"{self._budget.limit:,}"),
        )

    def _propose(self, signals: Signals, coarse: bool) -> Proposal:
        """What this process would do with the modules that are watched."""
        if not signals.batches:
            return Proposal({}, "skipped", "no finite gradient to decide on")
        present, watched = self.allocation, [each.target for each in signals.modules]
        fixed = present.parameters_by_tower  # those of modules that are not watched
        for target in watched:
            fixed[target.tower] -= target.rank_cost * present.ranks[target.name]
        cooled = self._step - (self._settings.cooldown + 1) * self._every
        return propose(
            self._scaled(signals.modules),
            self._budget.beside(fixed),
            self._settings,
            coarse=coarse,
            signal_share=signals.signal_share,
            limits=self._ranks.limits(watched, {name for name, step in self._moved_at.items() if step > cooled}),
        )

    def _scaled(self, signals: Sequence[ModuleSignals]) -> list[ModuleSignals]:
        """The signals, with ranks worth their energy sigma^2, over the largest; one-shot's depth does not count here."""
        spectra = {s.target.name: np.sqrt(s.worth) for s in signals}
        worth = prior_gains(spectra, [s.target for s in signals], power=2.0, depth=0.0)
        return [replace(s, worth=tuple(worth[s.target.name].tolist())) for s in signals]

    def _mean_losses(self) -> list[float]:
        """Of the losses given since the last decision, each the mean over all processes."""
        found: list[float] = np.mean(gathered([float(loss) for loss in self._losses]), axis=0).tolist()
        return found


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
