"""What rank allocation is compared with, as methods for `train`: PEFT's AdaLoRA and EVA, full fine-tuning, the head alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor, nn

from rankscope.adapters import (
    check_adalora_steps,
    from_peft_model,
    ranks_of_adalora,
    step_adalora,
    wrap_with_adalora,
    wrap_with_eva,
)
from rankscope.allocation import RankAllocation
from rankscope.exceptions import TrainingError
from rankscope.targets import TargetModule
from rankscope.tasks import Task
from rankscope.training.config import TrainingConfig
from rankscope.training.method import Running, Static

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
            AdapterError: It is not.
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
            dropout=config.lora_dropout,
            modules_to_save=getattr(task, "head_modules", ()),
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
            dropout=config.lora_dropout,
            modules_to_save=getattr(task, "head_modules", ()),
        )
        return adapted

    def follow(self, model: nn.Module, optimizer: Any, config: TrainingConfig, seed: int) -> Running:
        """The ranks that EVA gave stay."""
        return Static(from_peft_model(model, self.targets).renamed(self.name))


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
        return ranks_of_adalora(self._model, self._targets)

    def step(self, loss: Tensor) -> None:
        self._step += 1
        step_adalora(self._model, self._step)
