"""What `train` can run: the `Method` protocol, and LoRA of an allocation, with ranks that stay or that a controller moves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import pandas as pd
from torch import Tensor, nn

from rankscope.adapters import apply_allocation
from rankscope.allocation import RankAllocation
from rankscope.budget import ParameterBudget
from rankscope.control import ControllerConfig, RankController
from rankscope.tasks import Task
from rankscope.training.config import TrainingConfig


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
            ControlError: It is not.
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
