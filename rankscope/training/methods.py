"""What rank allocation is compared with, as methods for `train`: PEFT's AdaLoRA and EVA, full fine-tuning, the head alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import pandas as pd
from torch import Tensor, nn

from rankscope.allocation import RankAllocation
from rankscope.budget import ParameterBudget
from rankscope.control import ControllerConfig, RankController
from rankscope.errors import TrainingError
from rankscope.lora import (
    apply_allocation,
    check_adalora_steps,
    ranks_of_adalora,
    step_adalora,
    wrap_with_adalora,
    wrap_with_eva,
)
from rankscope.targets import TargetModule
from rankscope.tasks import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """How an allocation is fine-tuned: AdamW with linear warm-up and decay.

    Attributes:
        steps: Optimizer steps.
        learning_rate: Peak learning rate, of adapters and, unless it has its own, of the head.
        head_learning_rate: Peak rate of the task's head: fresh, it wants another than adapters do. None: `learning_rate`.
        warmup_fraction: Share of the steps over which the rate rises from zero.
        weight_decay: Of AdamW.
        max_grad_norm: Gradients are clipped to this norm; 0 turns it off.
        gradient_accumulation: Batches an optimizer step.
        scaling: The factor on every module's update, whatever its rank.
        lora_dropout: Dropout before A.
        evaluate_every: Steps between intermediate evaluations; None: only at the end.

    >>> TrainingConfig(steps=300, learning_rate=5e-4).warmup_fraction
    0.1
    """

    steps: int = 100
    learning_rate: float = 1e-3
    head_learning_rate: float | None = None
    warmup_fraction: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_accumulation: int = 1
    scaling: float = 2.0
    lora_dropout: float = 0.0
    evaluate_every: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "learning_rate", "gradient_accumulation", "scaling"):
            if not getattr(self, name) > 0:
                raise TrainingError(f"`{name}` must be above 0, but got {getattr(self, name)}.")
        if self.head_learning_rate is not None and not self.head_learning_rate > 0:
            raise TrainingError(f"`head_learning_rate` must be above 0 or None, but got {self.head_learning_rate}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingResult:
    """What one run gave.

    Attributes:
        metrics: Validation metrics at the end; they hold the task's metric and `"loss"`.
        history: Validation metrics by step, where they were taken on the way, the last included.
        train_loss: Mean training loss over the last tenth of the steps.
        parameters: Adapter parameters at the end of the run; all that is trained outside the head where there are no adapters.
        steps: Optimizer steps done.
        wall_seconds: Time of the run, evaluation included.
        allocation: The ranks at the end of the run; None where there are no adapters.
        decisions: The controller's, one row each; None without one.
    """

    metrics: Mapping[str, float]
    history: Mapping[int, Mapping[str, float]]
    train_loss: float
    parameters: int
    steps: int
    wall_seconds: float
    allocation: RankAllocation | None = None
    decisions: pd.DataFrame | None = None


class Running(Protocol):
    """A method at work on one model."""

    @property
    def allocation(self) -> RankAllocation | None:
        """The present ranks; None where the method has none."""
        ...

    @property
    def decisions(self) -> pd.DataFrame | None:
        """A controller's decisions; None without one."""
        ...

    def step(self, loss: Tensor) -> None:
        """The optimizer has made a step on this loss; gradients are still there."""
        ...


class Method(Protocol):
    """A way to fine-tune a model.

    A method may also have `check(task, config)`, which raises where no run could begin; it is called before anything is trained.
    """

    @property
    def name(self) -> str:
        """As tables and plots show it."""
        ...

    @property
    def variant(self) -> str:
        """What tells variants of one name apart, for tables; empty where there is one only."""
        ...

    def adapt(self, model: nn.Module, task: Task, config: TrainingConfig, seed: int) -> nn.Module:
        """The model with trainable adapters on it; torch's generator is seeded."""
        ...

    def follow(self, model: nn.Module, optimizer: Any, config: TrainingConfig, seed: int) -> Running:
        """Watches over the training that begins now."""
        ...


@dataclass(frozen=True, slots=True)
class Static:
    """Ranks that stay."""

    allocation: RankAllocation | None
    decisions: None = None

    def step(self, loss: Tensor) -> None:
        """Nothing follows."""


@dataclass(frozen=True, slots=True)
class Lora:
    """LoRA of an allocation's ranks.

    Attributes:
        allocation: The ranks; a controller starts from them and keeps to the allocation's budget.
        controller: Moves ranks during the run; None: they stay.
        rank_stabilised: Scaling `alpha / sqrt(r)` at the alpha that `config.scaling` means, instead of a constant one (rsLoRA,
            Kalajdzievski, arXiv 2312.03732).

    >>> Lora(RankAllocation((), (), strategy="uniform"), ControllerConfig()).name
    'controller from uniform'
    """

    allocation: RankAllocation
    controller: ControllerConfig | None = None
    rank_stabilised: bool = False

    variant = ""

    @property
    def name(self) -> str:
        """The allocation's strategy, and the controller if there is one."""
        stabilised = ", rank-stabilised" if self.rank_stabilised else ""
        return ("controller from " if self.controller else "") + self.allocation.strategy + stabilised

    def adapt(self, model: nn.Module, task: Task, config: TrainingConfig, seed: int) -> nn.Module:
        """Adapters of these ranks; under a controller, sleeping ones on the modules of rank 0."""
        adapted: nn.Module = apply_allocation(
            model,
            self.allocation,
            dormant=self.controller is not None,
            **self._scaling(config),
            lora_dropout=config.lora_dropout,
            modules_to_save=list(getattr(task, "head_modules", ())) or None,
        )
        return adapted

    def check(self, task: Task, config: TrainingConfig) -> None:
        """Checks that the run is long enough for the controller to decide anything.

        Raises:
            ModelError: It is not.
        """
        if self.controller is not None:
            self.controller.schedule(config.steps)

    def _scaling(self, config: TrainingConfig) -> dict[str, Any]:
        """As `to_lora_config` takes it; the one alpha of rsLoRA is that of the mean rank."""
        if not self.rank_stabilised:
            return {"scaling": config.scaling}
        adapted = [rank for rank in self.allocation.vector if rank]
        return {"use_rslora": True, "lora_alpha": config.scaling * sum(adapted) / len(adapted)}

    def follow(self, model: nn.Module, optimizer: Any, config: TrainingConfig, seed: int) -> Running:
        """The controller, if there is one."""
        if self.controller is None:
            return Static(self.allocation)
        return RankController(
            model,
            optimizer,
            budget=ParameterBudget(self.allocation.budget or self.allocation.parameters),
            total_steps=config.steps,
            every=self.controller.every_of(config.steps),
            freeze_fraction=self.controller.freeze_fraction,
            performance_model=self.controller.performance_model,
            samples=self.controller.samples,
            policy=self.controller.policy,
            seed=seed,
        )


SETTLED = 0.7  # share of the steps, on AdaLoRA's usual schedule


@dataclass(frozen=True, slots=True)
class AdaLora:
    """PEFT's AdaLoRA: begins at one and a half times the rank, as its authors do, and masks down to a mean of `rank`.

    Attributes:
        targets: What to adapt.
        rank: Mean rank at the end; that is AdaLoRA's budget, in ranks and not in parameters.
        alpha: The update's scaling is `alpha` over the initial rank; PEFT's default is 8, best tuned.
        share: Of the ranks that a mean of `rank` gives, how many are kept at the end.
        settled: Share of the steps after which no rank falls any more.

    >>> AdaLora((), rank=2, alpha=32.0).initial_rank
    3
    """

    targets: tuple[TargetModule, ...]
    rank: int
    alpha: float
    share: float = 1.0
    settled: float = SETTLED

    name = "AdaLoRA"

    @property
    def variant(self) -> str:
        """Alpha, the share of ranks kept, and when they settle, if not at seven tenths of the run."""
        early = "" if self.settled == SETTLED else f", settled at {self.settled:.0%}"
        return f"alpha {self.alpha:g}, {self.share:.0%} of ranks{early}"

    @property
    def initial_rank(self) -> int:
        """Of every module at the beginning."""
        return math.ceil(1.5 * self.rank)

    def check(self, task: Task, config: TrainingConfig) -> None:
        """Checks that the run is long enough.

        Raises:
            ModelError: It is not.
        """
        check_adalora_steps(config.steps)

    def adapt(self, model: nn.Module, task: Task, config: TrainingConfig, seed: int) -> nn.Module:
        """Adapters of the initial rank."""
        adapted: nn.Module = wrap_with_adalora(
            model,
            self.targets,
            rank=self.rank,
            initial_rank=self.initial_rank,
            alpha=self.alpha,
            steps=config.steps,
            share=self.share,
            settled=self.settled,
            lora_dropout=config.lora_dropout,
            modules_to_save=list(getattr(task, "head_modules", ())) or None,
        )
        return adapted

    def follow(self, model: nn.Module, optimizer: Any, config: TrainingConfig, seed: int) -> Running:
        """Scores ranks and masks the least."""
        return _RunningAdaLora(model, self.targets)


@dataclass(frozen=True, slots=True)
class Eva:
    """PEFT's EVA: ranks and the first rows of A along the principal directions of the modules' inputs.

    Attributes:
        targets: What to adapt.
        rank: Mean rank; that is EVA's budget, in ranks and not in parameters.
        rho: The largest rank is `rho * rank`; 1: no redistribution.
        n_batches: Of the training data, whose inputs are seen.
    """

    targets: tuple[TargetModule, ...]
    rank: int
    rho: float = 2.0
    n_batches: int = 32

    name = "EVA"

    @property
    def variant(self) -> str:
        """Rho, on which the ranks depend."""
        return f"rho {self.rho:g}"

    def adapt(self, model: nn.Module, task: Task, config: TrainingConfig, seed: int) -> nn.Module:
        """Adapters along the inputs' directions."""
        adapted: nn.Module = wrap_with_eva(
            model,
            self.targets,
            list(islice(task.train_batches(seed), self.n_batches)),
            rank=self.rank,
            scaling=config.scaling,
            rho=self.rho,
            lora_dropout=config.lora_dropout,
            modules_to_save=list(getattr(task, "head_modules", ())) or None,
        )
        return adapted

    def follow(self, model: nn.Module, optimizer: Any, config: TrainingConfig, seed: int) -> Running:
        """The ranks that EVA gave stay."""
        return Static(RankAllocation.from_peft_model(model, self.targets).renamed(self.name))


@dataclass(frozen=True, slots=True)
class FullFineTuning:
    """All weights are trained, without adapters."""

    name = "full fine-tuning"
    variant = ""

    def adapt(self, model: nn.Module, task: Task, config: TrainingConfig, seed: int) -> nn.Module:
        """The model as it is."""
        return model.requires_grad_(True)

    def follow(self, model: nn.Module, optimizer: Any, config: TrainingConfig, seed: int) -> Running:
        """Nothing follows."""
        return Static(None)


@dataclass(frozen=True, slots=True)
class HeadOnly:
    """The task's head alone is trained: what the frozen body gives without adapters."""

    name = "head only"
    variant = ""

    def check(self, task: Task, config: TrainingConfig) -> None:
        """Checks that there is a head.

        Raises:
            TrainingError: The task has none.
        """
        if not getattr(task, "head_modules", ()):
            raise TrainingError(
                f"`{task.name}` must have `head_modules` to train the head only, but has none; leave it out."
            )

    def adapt(self, model: nn.Module, task: Task, config: TrainingConfig, seed: int) -> nn.Module:
        """Everything but the head frozen.

        Raises:
            TrainingError: The task has no head.
        """
        self.check(task, config)
        model.requires_grad_(False)
        for name in getattr(task, "head_modules", ()):
            model.get_submodule(name).requires_grad_(True)
        return model

    def follow(self, model: nn.Module, optimizer: Any, config: TrainingConfig, seed: int) -> Running:
        """Nothing follows."""
        return Static(None)


class _RunningAdaLora:
    decisions = None

    def __init__(self, model: nn.Module, targets: tuple[TargetModule, ...]) -> None:
        self._model, self._targets, self._step = model, targets, 0

    @property
    def allocation(self) -> RankAllocation:
        """The ranks that are not masked."""
        return RankAllocation.from_ranks(self._targets, ranks_of_adalora(self._model), strategy="AdaLoRA")

    def step(self, loss: Tensor) -> None:
        self._step += 1
        step_adalora(self._model, self._step)
