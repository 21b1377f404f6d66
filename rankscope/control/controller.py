"""`RankController`: moves ranks between the modules of a LoRA model while it trains, at no more parameters than the budget."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankscope.allocation import RankAllocation
from rankscope.budget import ParameterBudget
from rankscope.control.decisions import (
    Decision,
    EffectModel,
    LossHistory,
    describe,
    effect_of_move,
    screen,
    summary,
    tabulate_decisions,
    write_decisions,
)
from rankscope.control.policy import Policy, Proposal, propose
from rankscope.control.signals import GradientWindow, Measured
from rankscope.distributed import check_same, from_first_process, gathered, is_first, n_processes, whole
from rankscope.errors import ModelError, SettingsError
from rankscope.lora import (
    RankMasks,
    Resize,
    adapter_layers,
    check_changeable,
    check_known,
    choose_adapter,
    factors,
    is_ddp,
    masks_on,
    resize_adapters,
    unwrap_optimizer,
    unwrap_peft_model,
)
from rankscope.performance import PerformanceModel, rank_features
from rankscope.profiling import Profile, bytes_of_weights, is_compiled, largest_sketch_size
from rankscope.strategies import allocate
from rankscope.targets import fingerprint_targets, unwrapped

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Decisions after each `every` steps until the freeze, each resting on the gradients of the `samples` steps before it.

    >>> schedule = Schedule(every=50, total_steps=1000, freeze_fraction=0.3, samples=8)
    >>> schedule.last_decision, schedule.samples_at(43), schedule.decides_at(50)
    (300, True, True)
    """

    every: int
    total_steps: int
    freeze_fraction: float
    samples: int

    def __post_init__(self) -> None:
        for name in ("every", "total_steps", "samples"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ModelError(f"`{name}` must be a whole number above 0, but got {value!r}.")
        if not 0 < self.freeze_fraction <= 1:
            raise ModelError(
                f"`freeze_fraction` must be above 0 and at most 1, but got {self.freeze_fraction}; for ranks that "
                "stay, train without a controller."
            )
        if self.last_decision == 0:
            raise ModelError(
                f"`every` must leave a decision before the ranks freeze at step {self.freeze_step} of {self.total_steps}, "
                f"but got {self.every}; lower it, or raise `freeze_fraction`."
            )

    @property
    def freeze_step(self) -> int:
        """The last step after which ranks may change."""
        return int(self.freeze_fraction * self.total_steps + 1e-9)

    @property
    def last_decision(self) -> int:
        """The step of the last decision."""
        return self.freeze_step // self.every * self.every

    @property
    def last_look(self) -> int:
        """The step at which the last decision's effect is measured."""
        return min(self.last_decision + self.every, self.total_steps)

    def decides_at(self, step: int) -> bool:
        """Whether there is a decision after this step."""
        return step % self.every == 0 and 0 < step <= self.last_decision

    def samples_at(self, step: int) -> bool:
        """Whether this step's gradients are seen."""
        return 0 < step <= self.last_decision and -step % self.every < self.samples

    def is_coarse(self, step: int, coarse_fraction: float) -> bool:
        """Whether a decision may move all modules together: in the first part of the time until the freeze."""
        return step <= coarse_fraction * self.freeze_step


MOST_EVERY = 50
DECISIONS = 4  # before the freeze, of a run too short for MOST_EVERY


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerConfig:
    """The settings of a `RankController` for `rankscope.train`.

    Attributes:
        every: Optimizer steps between decisions; None: 50, or less in short runs, so that four decisions come before the freeze.
        freeze_fraction: Share of the run after which ranks stay.
        samples: Steps before each decision whose gradients are seen.
        policy: How bold.
        performance_model: A study's, which refuses moves that it believes to be harmful.

    >>> ControllerConfig().every_of(1000), ControllerConfig().every_of(100), ControllerConfig(every=10).every_of(100)
    (50, 7, 10)
    """

    every: int | None = None
    freeze_fraction: float = 0.3
    samples: int = 8
    policy: Policy = field(default_factory=Policy)
    performance_model: PerformanceModel | None = None

    def every_of(self, steps: int) -> int:
        """Optimizer steps between decisions in a run of so many."""
        return self.every or max(1, min(MOST_EVERY, int(self.freeze_fraction * steps) // DECISIONS))

    def schedule(self, steps: int) -> Schedule:
        """When a run of so many steps looks and decides.

        Raises:
            ModelError: It would never decide anything.
        """
        return Schedule(
            every=self.every_of(steps),
            total_steps=steps,
            freeze_fraction=self.freeze_fraction,
            samples=self.samples,
        )


class StepReminder:
    """Warns where the optimizer steps and the controller is not told.

    Args:
        optimizer: Whose steps are counted, not wrapped.
        after: How many may pass.
    """

    def __init__(self, optimizer: Optimizer, *, after: int) -> None:
        self._left = after
        self._handle = optimizer.register_step_post_hook(self._count)

    def stop(self) -> None:
        """The controller was told, or is closed."""
        self._handle.remove()

    def _count(self, *_: Any) -> None:
        self._left -= 1
        if self._left < 0:
            self.stop()
            logger.warning(
                "the optimizer has stepped, but `RankController.step` was never called, so no rank can move; call it after each "
                "`optimizer.step()` and before `zero_grad()`"
            )


def warn_if_blind(decisions: Sequence[Decision]) -> None:
    """Says so where there were decisions and none had a gradient to rest on."""
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
        ModelError: The model cannot have its ranks changed.
        ModelError: An optimizer whose state cannot be carried.
        ModelError: The optimizer does not own the adapter's parameters, or the mode is not the model's.
    """

    def __init__(self, model: Any, optimizer: Any, *, mode: Mode, adapter_name: str | None) -> None:
        if mode not in ("resize", "mask", "auto"):
            raise ModelError(f"`mode` must be 'resize', 'mask' or 'auto', but got {mode!r}.")
        if mode == "resize" and is_ddp(model):
            raise ModelError(
                "`mode` must be 'mask' for a model in DistributedDataParallel, which keeps the parameters that it wrapped, but "
                "is 'resize'; pass mode='mask', or control the model before it is wrapped."
            )
        self.model = unwrap_peft_model(unwrapped(model))
        self.adapter = choose_adapter(self.model, adapter_name)
        self.masks = masks_on(self.model)
        if self.masks is not None and (mode == "resize" or self.masks.adapter != self.adapter):
            raise ModelError(
                f"`model` must not carry rank masks to be controlled in mode {mode!r}, but carries those of adapter "
                f"{self.masks.adapter!r}; `compress` them, or go on in mode 'mask'."
            )
        self.compiled = is_compiled(model)
        if mode == "auto":
            fixed = self.masks is not None or n_processes() > 1 or self.compiled or is_ddp(model)
            mode = "mask" if fixed else "resize"
        self._optimizer = optimizer
        layers = adapter_layers(self.model, self.adapter)
        check_changeable(self.model, layers, self.adapter, in_place=mode == "mask")
        check_known(optimizer)
        self._check_trained([factor for layer in layers.values() for factor in factors(layer, self.adapter)])
        self._full = RankAllocation.from_peft_model(self.model, adapter_name=self.adapter)
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
        self._full = RankAllocation.from_peft_model(self.model, adapter_name=self.adapter)

    @property
    def allocation(self) -> RankAllocation:
        """The present ranks, sleeping modules included."""
        if self.masks is not None:
            return RankAllocation.from_ranks(self._full.targets, self.masks.ranks)
        return RankAllocation.from_peft_model(self.model, self._full.targets, adapter_name=self.adapter)

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
            ModelError: A rank that a module cannot have.
            ModelError: An optimizer whose state cannot be carried.
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
            raise ModelError(
                f"adapter {self.adapter!r} must be trained, but its parameters are frozen; load it with is_trainable=True, or "
                "make it the active one (`set_adapter`)."
            )
        groups = unwrap_optimizer(self._optimizer).param_groups
        owned = {id(parameter) for group in groups for parameter in group["params"]}
        if missing := sum(id(parameter) not in owned for parameter in parameters):
            raise ModelError(
                f"`optimizer` must own the adapter's parameters, but lacks {missing} of {len(parameters)}; build it from "
                "the PEFT model's parameters, after wrapping."
            )


def first_ranks(
    ranks: LiveRanks, start: RankAllocation | str | None, budget: ParameterBudget, profile: Profile | None
) -> RankAllocation:
    """The ranks to begin with.

    Raises:
        ModelError: They cost more than the budget, or are for other modules.
    """
    if start is not None and not isinstance(start, str | RankAllocation):
        raise ModelError(f"`start` must be a RankAllocation or a strategy's name, but is a {type(start).__name__}.")
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
            raise ModelError(
                f"`start` must give ranks to adapted modules only, but gives `{min(unknown)}` some; adapt it when the model "
                "is wrapped."
            )
        begin = RankAllocation.from_ranks(present.targets, given)
    if not begin.parameters:
        raise ModelError("`start` must give at least one module a rank, but gives none; PEFT has no empty adapter.")
    if begin.parameters > budget.limit:
        raise ModelError(
            f"`budget` must cover the ranks to begin with ({begin.parameters:,} parameters), but got {budget.limit:,}; "
            "raise it, or pass `start`."
        )
    if ranks.capacity is not None and ranks.masks is None and begin == present:
        raise ModelError(
            "masked ranks must have room to grow, but every module begins at its capacity, the rank it was wrapped with; "
            "wrap the model at a larger rank, and pass `start`."
        )
    return begin


ROW_NORM = 1.0 / math.sqrt(3.0)  # of a new row of A: what PEFT's Kaiming draw gives on average
LEAST_SKETCH = 16  # columns
SCHEMA = 1
_STATE_KEYS = {"targets", "step", "ranks", "sketch", "active", "moved_at", "decisions", "window", "losses", "effects"}


class RankController:
    """Moves ranks while a LoRA model trains.

    Call `step` once an optimizer step, after `optimizer.step()` (and a GradScaler's `update()`) and before `zero_grad()`.
    Gradients of a few steps before each decision are sketched by hooks; each decision projects what ranks are worth onto the
    budget, lets the performance models refuse, and resizes the adapters, whose function, optimizer state and config follow.
    After the freeze nothing is left on the model but its new ranks.

    Args:
        model: A PEFT model with LoRA, not merged; also in DistributedDataParallel or compiled, whole or by blocks. Only adapted
            modules can get ranks: give sleeping adapters to those that start at rank 0
            (`rankscope.lora.apply_allocation(..., dormant=True)`), or pass `start`.
        optimizer: The one that trains the adapter, also as accelerate wraps it.
        budget: The most adapter parameters at any time.
        every: Optimizer steps between decisions.
        total_steps: Of the run.
        freeze_fraction: Share of the run after which ranks stay.
        start: Ranks to begin with: an allocation or the name of a strategy. None: as the model is.
        profile: For strategies that need one.
        performance_model: A study's; it refuses moves that it believes to be harmful.
        mode: `"resize"`, `"mask"` (fixed capacity: the model's ranks when it is passed), or `"auto"`: masks under several
            processes, DistributedDataParallel and `torch.compile`, and where the model carries some already.
        policy: How bold.
        samples: Steps before each decision whose gradients are seen.
        sketch_size: Columns of the gradient sketches, which find as many singular values; what lies beyond is estimated from the
            energy that they leave. Default: twice the largest rank, but 16 at least, and no more than fit a quarter of the
            memory of the model's weights, or 1 GiB where that is more.
        adapter_name: Which adapter; may be left out where there is only one.
        scaler: The `torch.amp.GradScaler` that scales the loss; accelerate's is found by itself.
        out: Folder for `decisions.parquet`, written after each decision.
        seed: Of the sketches, and of new rows that are drawn.

    Raises:
        ModelError: A schedule without a decision, a budget below the ranks in place, masks without room to grow, or an
            optimizer that does not own the adapter's parameters; nothing is changed.
        ModelError: A model without LoRA, with merged adapters, or with several adapters and none named.
        ModelError: An optimizer whose state cannot be carried.

    >>> from peft import LoraConfig, get_peft_model
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
    >>> model = get_peft_model(net, LoraConfig(target_modules=["0", "2"], r=2))
    >>> optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    >>> controller = RankController(model, optimizer, budget=ParameterBudget(56), every=2, total_steps=12, freeze_fraction=0.5)
    >>> for _ in range(12):
    ...     loss = model(torch.ones(4, 8)).square().mean()
    ...     loss.backward()
    ...     optimizer.step()
    ...     controller.step(loss)
    ...     optimizer.zero_grad()
    >>> controller.decisions["step"].tolist(), controller.allocation.parameters <= 56
    ([2, 4, 6], True)
    """

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        *,
        budget: ParameterBudget,
        every: int = 50,
        total_steps: int = 1000,
        freeze_fraction: float = 0.3,
        start: RankAllocation | str | None = None,
        profile: Profile | None = None,
        performance_model: PerformanceModel | None = None,
        mode: Mode = "auto",
        policy: Policy | None = None,
        samples: int = 8,
        sketch_size: int | None = None,
        adapter_name: str | None = None,
        scaler: Any = None,
        out: str | os.PathLike[str] | None = None,
        seed: int = 0,
    ) -> None:
        self._schedule = Schedule(
            every=every, total_steps=total_steps, freeze_fraction=freeze_fraction, samples=samples
        )
        check_types(budget=budget, policy=policy, profile=profile, performance_model=performance_model)
        _check_whole(sketch_size=sketch_size, seed=seed)
        self._budget, self._policy, self._seed = budget, policy or Policy(), seed
        self._ranks = LiveRanks(model, optimizer, mode=mode, adapter_name=adapter_name)
        targets = self._ranks.allocation.targets
        begin = first_ranks(self._ranks, start, budget, profile)
        self._effects = EffectModel(rank_features(targets, budget))
        self._offline = performance_model
        if performance_model is not None and {t.name for t in performance_model.features.targets} != set(begin.ranks):
            raise ModelError(
                "`performance_model` must be of the adapted modules, but is of others; fit it on this model's."
            )
        self._scaler = scaler if scaler is not None else getattr(optimizer, "scaler", None)
        if self._scaler is not None and not hasattr(self._scaler, "get_scale"):
            raise ModelError(f"`scaler` must be a torch.amp.GradScaler, but is a {type(scaler).__name__}.")
        self._sketch_size = sketch_size or _sketch_size(self._ranks.model, begin)
        self._window = self._new_window(self._sketch_size, seed)
        self._out = None if out is None else _decisions_file(out)
        self._decisions: list[Decision] = []
        self._moved_at: dict[str, int] = {}
        self._step, self._closed = 0, False
        self._ranks.begin(begin, generator=self._generator())
        # Nothing may fail from here on, where hooks are put on.
        self._losses = LossHistory(self._ranks.model)
        self._reminder = StepReminder(unwrap_optimizer(optimizer), after=every)
        self._watch()

    @property
    def allocation(self) -> RankAllocation:
        """The present ranks."""
        return self._ranks.allocation

    @property
    def decisions(self) -> pd.DataFrame:
        """One row a decision so far, with the columns of `rankscope.control.decisions.Decision`."""
        return tabulate_decisions(self._decisions)

    @property
    def frozen(self) -> bool:
        """Whether ranks stay from now on."""
        return self._closed or self._step >= self._schedule.last_decision

    @property
    def n_decisions(self) -> int:
        """Decisions so far."""
        return len(self._decisions)

    @property
    def adapter_name(self) -> str:
        """Of the adapter whose ranks move."""
        return self._ranks.adapter

    @property
    def masks(self) -> RankMasks | None:
        """In mask mode; as long as they are on, `model.save_pretrained` writes the adapter at its true ranks."""
        return self._ranks.masks

    def scalars(self) -> dict[str, float]:
        """The last decision in numbers, for a logger; empty before the first."""
        return summary(self._decisions[-1]) if self._decisions else {}

    def step(self, loss: Tensor | float | None = None) -> None:
        """The optimizer has made a step.

        Args:
            loss: The one that is minimised, by which the effect of moves is measured. None: what the model returned as `loss`,
                averaged over the step's forward passes; where that is not what is minimised, pass the loss.
        """
        self._step += 1
        self._reminder.stop()
        if self._closed:
            return
        self._window.end_step()
        self._losses.end_step(loss)
        if self._schedule.decides_at(self._step):
            self._decide()
        elif self._step == self._schedule.last_look:
            self._settle()
        if self._step == self._schedule.last_look:
            self.close()
        else:
            self._watch()

    def close(self) -> None:
        """Takes all hooks off; ranks stay from now on. Warns where no decision had a gradient to rest on."""
        if not self._closed:
            warn_if_blind(self._decisions)
        self._reminder.stop()
        self._window.close()
        self._losses.close()
        self._closed = True

    def state_dict(self) -> dict[str, Any]:
        """All that later decisions depend on: numbers, lists and tensors. Every process must call it."""
        masks = self._ranks.masks
        return {
            "schema": SCHEMA,
            "targets": fingerprint_targets(self.allocation.targets),
            "step": self._step,
            "ranks": dict(self.allocation.ranks),
            "sketch": [self._sketch_size, self._seed],
            "active": None if masks is None else {name: list(active) for name, active in masks.active.items()},
            "moved_at": dict(self._moved_at),
            "decisions": [asdict(decision) for decision in self._decisions],
            "window": self._window.state_dict(),
            "losses": list(self._losses.values()),
            "effects": self._effects.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume where another controller was. The model gets its ranks, so that its weights, and the optimizer's state, fit.

        Raises:
            ModelError: The state is damaged, of another version, of other modules, or of the other mode; nothing is changed.
        """
        self._check_state(state)
        effects = EffectModel(rank_features(self.allocation.targets, self._budget))
        try:
            ranks = RankAllocation.from_ranks(self.allocation.targets, state["ranks"])
            active = {name: [int(index) for index in indices] for name, indices in (state["active"] or {}).items()}
            step, moved_at = int(state["step"]), dict(state["moved_at"])
            decisions = [Decision(**decision) for decision in state["decisions"]]
            sketch_size, seed = (int(value) for value in state["sketch"])
            losses = [float(loss) for loss in state["losses"]]
            window = self._new_window(sketch_size, seed)
            window.load_state_dict(state["window"])
            effects.load_state_dict(state["effects"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, SettingsError) as error:
            raise ModelError(
                f"the controller's state must be what `state_dict` returned, but cannot be read ({type(error).__name__}); it was "
                "edited or cut short: resume from another checkpoint."
            ) from error
        if self._ranks.masks is not None:
            self._ranks.masks.restore(active)
        elif ranks != self.allocation:
            self._change(ranks, None)
        self._window.close()
        self._step, self._moved_at, self._decisions = step, moved_at, decisions
        self._sketch_size, self._seed, self._window, self._effects = sketch_size, seed, window, effects
        self._losses.restore(losses)
        if self._step >= self._schedule.last_look:
            self.close()
        else:
            self._watch()

    def _check_state(self, state: Mapping[str, Any]) -> None:
        """Raise unless the state is of this version, these modules and this mode."""
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
        if (state["active"] is None) != (self._ranks.masks is None):
            theirs, ours = ("resize", "mask") if state["active"] is None else ("mask", "resize")
            processes = " and use one process" if theirs == "resize" else ""
            raise ModelError(
                f"the controller's state must be of mode {ours!r}, but is of mode {theirs!r}; pass mode={theirs!r}{processes}."
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

    # --- a decision --------------------------------------------------------------------------------------------------

    def _decide(self) -> None:
        self._settle()
        before = self.allocation
        coarse = self._schedule.is_coarse(self._step, self._policy.coarse_fraction)
        measured = self._window.measure(self._ranks.factors())
        proposal = None if measured is None else self._propose(measured, coarse)
        if measured is not None:
            self._losses.say_which()
        self._window.clear()
        verdict = from_first_process(screen(proposal, before, self._offline, self._effects))
        after = before
        if verdict.action == "moved" and proposal is not None and measured is not None:
            after = proposal.allocation
            check_same(after.vector, what="the ranks")
            self._change(after, measured.directions)
            self._moved_at.update(dict.fromkeys(after.difference(before), self._step))
        decision = describe(
            step=self._step,
            phase="coarse" if coarse else "fine",
            verdict=verdict,
            before=before,
            after=after,
            proposal=proposal,
            measured=measured,
            broken=sum(gathered(self._window.broken)),
            loss=float(np.mean(self._losses.values()[-self._schedule.every :])),
        )
        self._decisions.append(decision)
        logger.info(
            "step %d: %s, %s; %d ranks went elsewhere, %s of %s parameters in use",
            *(self._step, verdict.action, verdict.reason, decision.n_moved),
            *(f"{after.parameters:,}", f"{self._budget.limit:,}"),
        )
        self._write()

    def _propose(self, measured: Measured, coarse: bool) -> Proposal:
        """The policy's proposal for the modules that are watched; the first process's, on every process."""
        ranks = dict(self.allocation.ranks)
        watched = {s.target.name for s in measured.signals}
        fixed = sum(t.rank_cost * ranks[t.name] for t in self.allocation.targets if t.name not in watched)
        cooled = self._step - (self._policy.cooldown + 1) * self._schedule.every
        found = propose(
            measured.signals,
            ParameterBudget(max(self._budget.limit - fixed, 1)),
            self._policy,
            coarse=coarse,
            signal_share=measured.signal_share,
            energy=measured.energy,
            cooling=[name for name, step in self._moved_at.items() if step > cooled],
            capacity=self._ranks.capacity,
            lowest=self._ranks.lowest,
        )
        ranks |= found.allocation.ranks
        allocation = RankAllocation.from_ranks(
            self.allocation.targets, ranks, strategy="controller", budget=self._budget.limit
        )
        return from_first_process(replace(found, allocation=allocation))

    def _change(self, after: RankAllocation, directions: Callable[[str], Tensor] | None) -> None:
        """New ranks, with rows of A along the directions where there are enough."""
        before = self.allocation.ranks
        changed = after.difference(self.allocation)
        rows = {}
        for name, more in changed.items():
            if directions and more > 0 and len(found := directions(name)) >= more:
                rows[name] = found[:more] * ROW_NORM
        ranks = {name: before[name] + more for name, more in changed.items()}
        self._ranks.change(ranks, rows, generator=self._generator())

    def _settle(self) -> None:
        """Measures what the decision before did, now that as many steps lie after it as before."""
        every = self._schedule.every
        if not self._decisions or self._decisions[-1].step != self._step - every:
            return
        losses = self._losses.values()
        effect = effect_of_move(losses[-2 * every :]) if len(losses) >= 2 * every else None
        if effect is None:
            return
        last = self._decisions[-1]
        self._decisions[-1] = replace(last, realised=effect.mean, realised_error=effect.error)
        if last.action == "moved":
            targets = self.allocation.targets
            self._effects.add(
                RankAllocation(targets, last.ranks_before), RankAllocation(targets, last.ranks_after), effect
            )
        self._write()

    def _watch(self) -> None:
        """Hooks for the next step, if it is one of those that are sampled."""
        if self._schedule.samples_at(self._step + 1):
            scale = 1.0 if self._scaler is None else float(self._scaler.get_scale())
            self._window.watch(scale)

    def _write(self) -> None:
        if self._out is not None and is_first():
            write_decisions(self.decisions, self._out)


def _sketch_size(model: nn.Module, ranks: RankAllocation) -> int:
    """Twice the largest rank and 16 at least, as far as the memory bound allows; one more copy is kept at sampled steps."""
    wanted = max(LEAST_SKETCH, min(2 * max(ranks.vector), max(target.full_rank for target in ranks.targets)))
    return largest_sketch_size(ranks.targets, wanted, bytes_of_weights(model), copies=2)


def check_types(**settings: Any) -> None:
    """Raise for a setting of another type than its own; all but the budget may be None."""
    kinds: dict[str, type] = {
        "budget": ParameterBudget,
        "policy": Policy,
        "profile": Profile,
        "performance_model": PerformanceModel,
    }
    for name, value in settings.items():
        if not isinstance(value, kinds[name]) and (value is not None or name == "budget"):
            raise ModelError(f"`{name}` must be a {kinds[name].__name__}, but is {value!r:.60}.")


def _check_whole(*, sketch_size: Any, seed: Any) -> None:
    if sketch_size is not None and (type(sketch_size) is not int or sketch_size < 2):
        raise ModelError(f"`sketch_size` must be a whole number above 1, but got {sketch_size!r}.")
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise ModelError(f"`seed` must be a whole number from 0 to {2**32 - 1:,}, but got {seed!r}.")


def _decisions_file(folder: str | os.PathLike[str]) -> Path:
    """The file of decisions, its folder made at once: a run should not find out after hours that it cannot write."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"`out` must be a folder that can be written to, but {folder} is not: {error}.") from error
    return Path(folder) / "decisions.parquet"
