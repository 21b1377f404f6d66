"""The training loop: one compact loop on accelerate, used by search, train and compare alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, islice
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor, nn

from rankscope.adapters import apply_allocation
from rankscope.allocation import RankAllocation
from rankscope.budget import ParameterBudget
from rankscope.control import ControllerConfig, RankController
from rankscope.exceptions import TrainingError
from rankscope.tasks import Batch, Task, evaluate

if TYPE_CHECKING:
    from peft import PeftModel

CHECK_EVERY = 10  # steps between looks at the loss: each look waits for the device


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """How an allocation is fine-tuned: AdamW with linear warm-up and decay.

    Attributes:
        steps: Optimizer steps.
        learning_rate: Peak learning rate, of adapters and head alike.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingResult:
    """What one run gave.

    Attributes:
        metrics: Validation metrics at the end; they hold the task's metric and `"loss"`.
        history: Validation metrics by step, where they were taken on the way, the last included.
        train_loss: Mean training loss over the last tenth of the steps.
        parameters: Adapter parameters trained, at the end of the run.
        steps: Optimizer steps done.
        wall_seconds: Time of the run, evaluation included.
        decisions: The controller's, one row each; None without one.
    """

    metrics: Mapping[str, float]
    history: Mapping[int, Mapping[str, float]]
    train_loss: float
    parameters: int
    steps: int
    wall_seconds: float
    decisions: pd.DataFrame | None = None


def train(
    task: Task,
    allocation: RankAllocation,
    config: TrainingConfig,
    *,
    seed: int = 0,
    controller: ControllerConfig | None = None,
    on_model: Callable[[PeftModel], None] | None = None,
    on_evaluation: Callable[[int, Mapping[str, float]], None] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> tuple[nn.Module, TrainingResult]:
    """Fine-tunes the task's model with LoRA of the allocation's ranks.

    Args:
        task: Where model, data, loss and metric come from.
        allocation: The ranks.
        config: The schedule.
        seed: Of the adapters' initial values, dropout and the order of the data. The global generators are left alone.
        controller: Moves ranks during the run, within the allocation's budget, starting from its ranks; None: they stay.
        on_model: Called with the PEFT model before the first step, as to put hooks on it.
        on_evaluation: Called with step and validation metrics; may raise to stop the run (a pruner does).
        on_step: Called with the step.

    Returns:
        The PEFT model, and the result.

    Raises:
        TrainingError: The loss or the metric is not finite.
        AllocationError: The allocation is not for this model.

    >>> import rankscope as rs
    >>> task = rs.load_task("digits-shift")
    >>> targets = rs.find_targets(task.build_model())
    >>> uniform = rs.allocate("uniform", targets=targets, budget=rs.ParameterBudget.uniform(targets, 1))
    >>> model, result = rs.train(task, uniform, rs.TrainingConfig(steps=2, learning_rate=0.01))
    >>> result.parameters, sorted(result.metrics)
    (6912, ['accuracy', 'loss'])
    """
    from accelerate import Accelerator
    from transformers import get_linear_schedule_with_warmup

    started = time.perf_counter()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        accelerator = Accelerator(
            mixed_precision=_precision(), gradient_accumulation_steps=config.gradient_accumulation
        )
        model: nn.Module = apply_allocation(
            task.build_model(),
            allocation,
            dormant=controller is not None,
            scaling=config.scaling,
            lora_dropout=config.lora_dropout,
            modules_to_save=list(getattr(task, "head_modules", ())) or None,
        )
        if on_model:
            on_model(model)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
        schedule = get_linear_schedule_with_warmup(
            optimizer, round(config.warmup_fraction * config.steps), config.steps
        )
        model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
        mover = controller and _start_controller(controller, model, optimizer, allocation, config, seed)
        losses: list[Tensor] = []
        history: dict[int, Mapping[str, float]] = {}
        model.train()
        batches = _stream(task, seed)
        for step in range(1, config.steps + 1):
            losses.append(_step(task, model, batches, optimizer, schedule, accelerator, config))
            if mover:
                mover.step(losses[-1])
            if step % CHECK_EVERY == 0 or step == config.steps:
                _check_finite(losses[-CHECK_EVERY:], step, config)
            if on_step:
                on_step(step)
            if step == config.steps or (config.evaluate_every and step % config.evaluate_every == 0):
                history[step] = _finite_metrics(task, model, step)
                if on_evaluation:
                    on_evaluation(step, history[step])
    result = TrainingResult(
        metrics=history[config.steps],
        history=history,
        train_loss=float(torch.stack(losses[-max(1, len(losses) // 10) :]).mean()),
        parameters=mover.allocation.parameters if mover else allocation.parameters,
        steps=config.steps,
        wall_seconds=time.perf_counter() - started,
        decisions=mover.decisions if mover else None,
    )
    return accelerator.unwrap_model(model), result


def _step(
    task: Task,
    model: nn.Module,
    batches: Iterator[Batch],
    optimizer: Any,
    schedule: Any,
    accelerator: Any,
    config: TrainingConfig,
) -> Tensor:
    """One optimizer step over `gradient_accumulation` batches; the mean loss, still on the device."""
    from accelerate.utils import send_to_device

    losses = []
    for batch in islice(batches, config.gradient_accumulation):
        with accelerator.accumulate(model), accelerator.autocast():
            loss = task.loss(model, send_to_device(batch, accelerator.device))
            accelerator.backward(loss)
            if accelerator.sync_gradients and config.max_grad_norm:
                accelerator.clip_grad_norm_(_trained(optimizer), config.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(loss.detach().float())
    return torch.stack(losses).mean()


def _trained(optimizer: Any) -> list[nn.Parameter]:
    """The parameters of the moment: a controller puts others in their place."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _start_controller(
    controller: ControllerConfig,
    model: nn.Module,
    optimizer: Any,
    allocation: RankAllocation,
    config: TrainingConfig,
    seed: int,
) -> RankController:
    return RankController(
        model,
        optimizer,
        budget=ParameterBudget(allocation.budget or allocation.parameters),
        total_steps=config.steps,
        every=controller.every,
        freeze_fraction=controller.freeze_fraction,
        samples=controller.samples,
        policy=controller.policy,
        seed=seed,
    )


def _check_finite(losses: list[Tensor], step: int, config: TrainingConfig) -> None:
    if not bool(torch.isfinite(torch.stack(losses)).all()):
        raise TrainingError(
            f"the loss must be finite, but is not by step {step} of {config.steps}; lower `learning_rate`, "
            f"now {config.learning_rate:g}."
        )


def _finite_metrics(task: Task, model: nn.Module, step: int) -> Mapping[str, float]:
    metrics = evaluate(task, model, "validation")
    if not math.isfinite(metrics[task.metric]):
        raise TrainingError(
            f"`{task.metric}` must be finite, but is {metrics[task.metric]} at step {step}; lower `learning_rate`."
        )
    return metrics


def _stream(task: Task, seed: int) -> Iterator[Batch]:
    """Epoch after epoch, each in an order of its own that the seed fixes."""
    for epoch in count():
        empty = True
        for batch in task.train_batches(seed + 1_000_003 * epoch):
            empty = False
            yield batch
        if empty:
            raise TrainingError(f"`{task.name}` must give at least one training batch, but gave none; check its data.")


def _precision() -> str:
    """bf16 on a GPU that has it, else full precision; on a CPU autocast would be slower."""
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
