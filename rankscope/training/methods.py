"""What `train` can run: LoRA of an allocation, static or under a controller, and the baselines it is compared with."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, cast

from torch import Tensor, nn

from rankscope.allocation import RankAllocation
from rankscope.budget import ParameterBudget
from rankscope.control import RankController, schedule_of
from rankscope.distributed import n_processes
from rankscope.errors import ModelError, TrainingError
from rankscope.lora import apply_allocation, ranks_of_adalora, wrap_with_adalora, wrap_with_config, wrap_with_eva
from rankscope.settings import ControllerSettings, TrainingSettings
from rankscope.targets import TargetModule
from rankscope.tasks import Task


@dataclass(frozen=True, slots=True)
class Running:
    """A method at work on one model. `RankController` is another."""

    ranks: Callable[[], RankAllocation | None] = lambda: None
    step: Callable[[Tensor], object] = lambda loss: None  # follows an optimizer step; gradients are not zeroed yet
    close: Callable[[], object] = lambda: None  # the training is over, or raised: leave no hooks

    decisions = None

    @property
    def allocation(self) -> RankAllocation | None:
        """The present ranks; None without adapters."""
        return self.ranks()


class Method(ABC):
    """A way to fine-tune a model."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The name in tables and plots."""

    rate_factor: float = 1.0  # of the learning rates that it is tuned over, which suit LoRA

    @property
    def variant(self) -> str:
        """What tells variants of one name apart."""
        return ""

    def check(self, task: Task, settings: TrainingSettings) -> None:
        """Raise an error if no run can begin. Called before anything is trained."""
        return

    @abstractmethod
    def adapt(self, model: nn.Module, task: Task, settings: TrainingSettings, seed: int) -> nn.Module:
        """Return the model with its adapters, if any. What requires gradients is trained. torch is seeded."""

    def follow(self, model: nn.Module, optimizer: Any, settings: TrainingSettings, seed: int) -> Any:
        """Return what goes along with the training that begins now, a `Running` or a `RankController`."""
        return Running()


def _peft_options(task: Task, settings: TrainingSettings) -> dict[str, Any]:
    return {"lora_dropout": settings.lora_dropout, "modules_to_save": list(getattr(task, "head_modules", ())) or None}


@dataclass(frozen=True, slots=True)
class Lora(Method):
    """LoRA of an allocation's ranks, which a controller may move within the allocation's budget.

    If `rank_stabilised`, updates are scaled by `alpha / sqrt(r)` (rsLoRA, Kalajdzievski, arXiv 2312.03732), with the alpha
    that gives `settings.scaling` at the mean rank in LoRA.
    """

    allocation: RankAllocation
    controller: ControllerSettings | None = None
    rank_stabilised: bool = False

    @property
    def name(self) -> str:
        """The allocation's strategy, and the controller if there is one."""
        stabilised = ", rank-stabilised" if self.rank_stabilised else ""
        return ("controller from " if self.controller else "") + self.allocation.strategy + stabilised

    def check(self, task: Task, settings: TrainingSettings) -> None:
        """Raise a SettingsError if the run is too short for the controller to decide anything."""
        if self.controller is not None:
            schedule_of(self.controller, settings.steps)

    def adapt(self, model: nn.Module, task: Task, settings: TrainingSettings, seed: int) -> nn.Module:
        """Add adapters of these ranks; under a controller, inactive ones on modules of rank 0."""
        options = self.options(task, settings)
        return cast(nn.Module, apply_allocation(model, self.allocation, dormant=bool(self.controller), **options))

    def options(self, task: Task, settings: TrainingSettings) -> dict[str, Any]:
        """What `to_lora_config` takes beside the ranks."""
        options: dict[str, Any] = {"scaling": settings.scaling}
        if self.rank_stabilised:
            ranks = [rank for rank in self.allocation.vector if rank]
            options = {"use_rslora": True, "lora_alpha": settings.scaling * sum(ranks) / len(ranks)}
        return options | _peft_options(task, settings)

    def follow(self, model: nn.Module, optimizer: Any, settings: TrainingSettings, seed: int) -> Any:
        """Start the controller, if there is one."""
        if self.controller is None:
            return Running(lambda: self.allocation)
        budget = ParameterBudget.of(self.allocation)
        options: Any = {"settings": self.controller, "total_steps": settings.steps, "seed": seed}
        return RankController(model, optimizer, budget=budget, replicated=n_processes() > 1, **options)


@dataclass(frozen=True, slots=True)
class AdaLora(Method):
    """PEFT's AdaLoRA. It starts at one and a half times the rank, as its authors do, and masks down to a mean of `rank`."""

    targets: tuple[TargetModule, ...]
    rank: int
    alpha: float  # the update is scaled by alpha over the initial rank; PEFT's default is 8, best tuned
    share: float = 1.0  # fraction of the budget to use
    settled: float = 0.7  # fraction of the steps after which ranks stay fixed

    name = "AdaLoRA"

    @property
    def variant(self) -> str:
        """Alpha, the share of ranks kept, and when they settle, if not as usual."""
        early = "" if self.settled == 0.7 else f", settled at {self.settled:.0%}"
        return f"alpha {self.alpha:g}, {self.share:.0%} of ranks{early}"

    @property
    def initial_rank(self) -> int:
        """Rank of every module at the start."""
        return math.ceil(1.5 * self.rank)

    def check(self, task: Task, settings: TrainingSettings) -> None:
        """Raise a ModelError if the run is too short for ranks to be scored before they fall."""
        if settings.steps < 10:
            raise ModelError(f"`steps` must be at least 10 for AdaLoRA, but got {settings.steps}; train longer.")

    def adapt(self, model: nn.Module, task: Task, settings: TrainingSettings, seed: int) -> nn.Module:
        """Add adapters of the initial rank."""
        options: Any = {"alpha": self.alpha, "steps": settings.steps, "share": self.share, "settled": self.settled}
        options |= {"rank": self.rank, "initial_rank": self.initial_rank, **_peft_options(task, settings)}
        return cast(nn.Module, wrap_with_adalora(model, self.targets, **options))

    def follow(self, model: nn.Module, optimizer: Any, settings: TrainingSettings, seed: int) -> Running:
        """Score ranks at each step, and mask the least important."""
        steps, tuner = count(1), cast(Any, model).base_model

        def score(loss: Tensor) -> None:
            # PEFT multiplies by gradients, which modules outside the loss have none of.
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = parameter.new_zeros(parameter.shape)
            tuner.update_and_allocate(next(steps))

        return Running(
            ranks=lambda: RankAllocation.from_ranks(self.targets, ranks_of_adalora(model), strategy=self.name),
            step=score,
        )


@dataclass(frozen=True, slots=True)
class Eva(Method):
    """PEFT's EVA: ranks of mean `rank` and initial rows of A follow the principal directions of the modules' inputs."""

    targets: tuple[TargetModule, ...]
    rank: int
    rho: float = 2.0  # the largest rank is rho * rank; 1: all ranks are equal

    name = "EVA"

    @property
    def variant(self) -> str:
        """Rho, on which the ranks depend."""
        return f"rho {self.rho:g}"

    def adapt(self, model: nn.Module, task: Task, settings: TrainingSettings, seed: int) -> nn.Module:
        """Add adapters along the principal directions."""
        batches = list(islice(task.train_batches(seed), 32))
        options: Any = {"scaling": settings.scaling, "rho": self.rho, **_peft_options(task, settings)}
        return cast(nn.Module, wrap_with_eva(model, self.targets, batches, rank=self.rank, **options))

    def follow(self, model: nn.Module, optimizer: Any, settings: TrainingSettings, seed: int) -> Running:
        """Keep the ranks that EVA gave."""
        return Running(lambda: RankAllocation.from_peft_model(model, self.targets).renamed(self.name))


@dataclass(frozen=True, slots=True)
class PeftAdapter(Method):
    """Any adapter of PEFT, such as VeRA, (IA)³ or DoRA, at its own size: what `get_peft_model(model, config)` gives.

    The task's head is trained as well. For ranks that differ between modules, use `Lora`.
    """

    config: Any  # a peft.PeftConfig
    name: str
    variant: str = ""
    rate_factor: float = 1.0

    def adapt(self, model: nn.Module, task: Task, settings: TrainingSettings, seed: int) -> nn.Module:
        """Add the adapters."""
        return cast(nn.Module, wrap_with_config(model, self.config, getattr(task, "head_modules", ())))

    def follow(self, model: nn.Module, optimizer: Any, settings: TrainingSettings, seed: int) -> Running:
        """Let an adapter that asks for it, such as PEFT's AdaLoRA, see each step."""
        update, steps = getattr(cast(Any, model).base_model, "update_and_allocate", None), count(1)
        return Running(step=lambda loss: update(next(steps))) if update else Running()


@dataclass(frozen=True, slots=True)
class FullFineTuning(Method):
    """All weights are trained, without adapters."""

    name = "full fine-tuning"
    rate_factor = 1 / 30  # all weights want far lower rates than adapters

    def adapt(self, model: nn.Module, task: Task, settings: TrainingSettings, seed: int) -> nn.Module:
        """Unfreeze the model."""
        return model.requires_grad_(True)


@dataclass(frozen=True, slots=True)
class HeadOnly(Method):
    """Only the task's head is trained, on the frozen body."""

    name = "head only"

    def check(self, task: Task, settings: TrainingSettings) -> None:
        """Raise a TrainingError if the task has no head."""
        if not getattr(task, "head_modules", ()):
            raise TrainingError(f"`{task.name}` must have `head_modules` to train them, but has none; leave it out.")

    def adapt(self, model: nn.Module, task: Task, settings: TrainingSettings, seed: int) -> nn.Module:
        """Freeze all but the head."""
        model.requires_grad_(False)
        for name in getattr(task, "head_modules", ()):
            model.get_submodule(name).requires_grad_(True)
        return model
