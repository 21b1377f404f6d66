"""Values of a run: its schedule, and what it gave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from rankscope.allocation import RankAllocation
from rankscope.exceptions import TrainingError


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
