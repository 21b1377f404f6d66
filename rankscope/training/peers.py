"""What other tools do with the same budget, as methods for `train`: PEFT's AdaLoRA."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rankscope.adapters import ranks_of_adalora, step_adalora, wrap_with_adalora
from rankscope.allocation import RankAllocation
from rankscope.targets import TargetModule
from rankscope.tasks import Task
from rankscope.training.config import TrainingConfig
from rankscope.training.method import Running


@dataclass(frozen=True, slots=True)
class AdaLora:
    """PEFT's AdaLoRA: begins at one and a half times the rank, as its authors do, and masks down to a mean of `rank`.

    Attributes:
        targets: What to adapt.
        rank: Mean rank at the end; that is AdaLoRA's budget, in ranks and not in parameters.
        alpha: The update's scaling is `alpha` over the initial rank; PEFT's default is 8, best tuned.

    >>> AdaLora((), rank=2, alpha=32.0).initial_rank
    3
    """

    targets: tuple[TargetModule, ...]
    rank: int
    alpha: float

    name = "AdaLoRA"

    @property
    def initial_rank(self) -> int:
        """Of every module at the beginning."""
        return math.ceil(1.5 * self.rank)

    def adapt(self, model: nn.Module, task: Task, config: TrainingConfig, seed: int) -> nn.Module:
        """Adapters of the initial rank."""
        adapted: nn.Module = wrap_with_adalora(
            model,
            self.targets,
            rank=self.rank,
            initial_rank=self.initial_rank,
            alpha=self.alpha,
            steps=config.steps,
            dropout=config.lora_dropout,
            modules_to_save=getattr(task, "head_modules", ()),
        )
        return adapted

    def follow(self, model: nn.Module, optimizer: Any, config: TrainingConfig, seed: int) -> Running:
        """Scores ranks and masks the least."""
        return _RunningAdaLora(model, self.targets)


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
