"""Fine-tuning in one plain torch loop, whatever the method, and saving what was trained."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from rankscope.allocation import RankAllocation
from rankscope.distributed import (
    batch_device,
    by_first,
    everywhere,
    failing_together,
    join_processes,
    make_replicas,
    mixed_precision,
    n_processes,
    placed,
    process_index,
    seeded,
    sum_gradients,
    sum_over_processes,
)
from rankscope.errors import TrainingError, checked
from rankscope.settings import ControllerSettings, TrainingSettings
from rankscope.tasks import Batch, Task, TrainerTask, evaluate, load_task
from rankscope.training.methods import Lora, Method
from rankscope.training.sharding import Shards
from rankscope.training.trainers import Run
from rankscope.training.watching import tell

_CHECK_EVERY = 10  # steps between checks of the loss, each of which waits for the device


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """The result of one run."""

    history: Mapping[int, Mapping[str, float]]  # validation metrics by step, those at the end last
    parameters: int  # of adapters at the end of the run; without adapters, what is trained outside the head
    wall_seconds: float  # evaluation included
    allocation: RankAllocation | None  # ranks at the end of the run; None without adapters
    decisions: pd.DataFrame | None  # the controller's, one row each; None without one

    @property
    def metrics(self) -> Mapping[str, float]:
        """Validation metrics at the end."""
        return self.history[max(self.history)]


@checked
def train(
    task: Task | str | Mapping[str, Any],
    method: RankAllocation | Method,
    settings: TrainingSettings | Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    controller: ControllerSettings | Mapping[str, Any] | None = None,
    on_evaluation: Callable[[int, Mapping[str, float]], None] | None = None,
    on_step: Callable[[int], None] | None = None,
    **overrides: Any,
) -> tuple[nn.Module, TrainingResult]:
    """Fine-tune the task's model, and return it with the result; raise a TrainingError if loss or metric is not finite.

    The model runs where the task has placed it, else on the best device, in mixed precision where that supports bfloat16. A
    `controller` moves an allocation's ranks during the run, within its budget. `seed` is for the initial adapters, dropout and
    the order of the data; the global generators are left alone. `on_step` is called with the step, `on_evaluation` with step
    and validation metrics; it may raise to stop the run, as a pruner does.

    Under torchrun or accelerate launch every process calls it with the same arguments. Each takes its share of the rows of
    every batch, so that the result is that of one process; the first one evaluates, and calls the functions.

    >>> import rankscope as rs
    >>> task = rs.load_task("digits-shift")
    >>> targets = rs.find_targets(task.build_model())
    >>> uniform = rs.allocate("uniform", targets=targets, budget=rs.ParameterBudget.uniform(targets, 1))
    >>> rs.train(task, uniform, steps=2, learning_rate=0.01)[1].parameters
    6912
    """
    join_processes()
    task, settings = load_task(task), TrainingSettings.of(settings, **overrides)
    if isinstance(method, RankAllocation):
        moving = None if controller is None else ControllerSettings.of(controller)
        method = Lora(method, None if moving and moving.mode == "off" else moving)
    elif controller is not None:
        raise TrainingError("`controller` moves an allocation's ranks, but `method` is none; pass an allocation.")
    method.check(task, settings)
    local = {"on_evaluation": on_evaluation, "on_step": on_step}
    return everywhere(_train, task, method, settings, seed, local=local)


def _train(
    task: Task,
    method: Method,
    settings: TrainingSettings,
    seed: int,
    *,
    on_evaluation: Callable[[int, Mapping[str, float]], None] | None,
    on_step: Callable[[int], None] | None,
) -> tuple[nn.Module, TrainingResult]:
    """Train on this process and on the others of its group."""
    if isinstance(task, TrainerTask):
        run = Run(task, method, settings, seed=seed, on_evaluation=on_evaluation, on_step=on_step)
        return _finished(task, run.model, run.history, run.wall_seconds, run.allocation, run.decisions)
    started = time.perf_counter()
    with seeded(seed):
        with failing_together():
            model = method.adapt(placed(task.build_model()), task, settings, seed)
        make_replicas(model)
        if process_index():  # rows of one batch that meet on different processes get other dropout
            torch.manual_seed(seed + 1_000_003 * process_index())
        with _trained_in_float32(model):
            optimizer = torch.optim.AdamW(_groups(task, model, settings), weight_decay=settings.weight_decay)
            history = {}
            with closing(method.follow(model, optimizer, settings, seed)) as running:
                for step in _steps(task, model, optimizer, running, settings, seed):
                    tell("step", step, settings.steps)
                    if on_step:
                        with failing_together():
                            on_step(step)
                    if step == settings.steps or (settings.evaluate_every and step % settings.evaluate_every == 0):
                        tell("evaluating after step", step, settings.steps)
                        history[step] = by_first(lambda: evaluate(task, model))
                        if not math.isfinite(value := history[step][task.metric]):
                            must = f"`{task.metric}` must be finite, but is {value} at step {step}"
                            raise TrainingError(f"{must}; lower `learning_rate`.")
                        if on_evaluation:
                            with failing_together():
                                on_evaluation(step, history[step])
    return _finished(task, model, history, time.perf_counter() - started, running.allocation, running.decisions)


def _finished(
    task: Task,
    model: nn.Module,
    history: Mapping[int, Mapping[str, float]],
    seconds: float,
    allocation: RankAllocation | None,
    decisions: pd.DataFrame | None,
) -> tuple[nn.Module, TrainingResult]:
    """The model, whose adapter knows how it is loaded, and the result."""
    for adapter in getattr(model, "peft_config", {}).values():
        adapter.task_type = getattr(task, "task_type", None)  # goes into the saved adapter, as the next
        adapter.revision = getattr(task, "revision", None)
    parameters = allocation.parameters if allocation else sum(p.numel() for p in _body_and_head(task, model)[0])
    return model, TrainingResult(history, parameters, seconds, allocation, decisions)


def _steps(
    task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, running: Any, settings: TrainingSettings, seed: int
) -> Iterator[int]:
    """Take optimizer steps over `gradient_accumulation` batches each, and yield their numbers from 1."""
    from accelerate.utils import send_to_device
    from transformers import get_linear_schedule_with_warmup

    warmup_steps = round(settings.warmup_fraction * settings.steps)
    schedule = get_linear_schedule_with_warmup(optimizer, warmup_steps, settings.steps)
    batches, losses, device, shards = _stream(task, seed), [], batch_device(model), Shards(task, model)
    if n_processes() > 1:
        shards.check(model, next(_stream(task, seed)))
    model.train()
    for step in range(1, settings.steps + 1):
        parts: list[Tensor] = []
        with failing_together():
            for batch in islice(batches, settings.gradient_accumulation):
                rows, share = shards.of(batch)
                with mixed_precision(model):
                    loss = task.loss(model, send_to_device(rows, device))
                if share != 1.0:  # without any row that counts, a mean would be 0 / 0
                    loss = loss * share if share else loss.new_zeros(())
                if share:
                    (loss / settings.gradient_accumulation).backward()
                parts.append(loss.detach().float())
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        sum_gradients(trained)  # of the optimizer's parameters: a controller replaces the model's
        if settings.max_grad_norm:
            nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        optimizer.step()
        losses.append(torch.stack(parts).mean())
        sum_over_processes(losses[-1:])
        running.step(losses[-1])
        optimizer.zero_grad()
        schedule.step()
        if step % _CHECK_EVERY == 0 or step == settings.steps:
            if not bool(torch.isfinite(torch.stack(losses)).all()):
                must = f"the loss must be finite, but is not by step {step} of {settings.steps}"
                raise TrainingError(f"{must}; lower `learning_rate`, now {settings.peak_learning_rate:g}.")
            losses.clear()
        yield step


def _stream(task: Task, seed: int) -> Iterator[Batch]:
    """Yield epoch after epoch, each in an order of its own that depends on the seed only."""
    for epoch in count():
        batches = iter(task.train_batches(seed + 1_000_003 * epoch))
        if (first := next(batches, None)) is None:
            raise TrainingError(f"`{task.name}` must give at least one training batch, but gave none; check its data.")
        yield first
        yield from batches


@contextmanager
def _trained_in_float32(model: nn.Module) -> Iterator[None]:
    """Hold trainable weights in float32 meanwhile, since half precision rounds small updates away."""
    half = {p: p.dtype for p in model.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)}
    for parameter in half:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in half.items():
            parameter.grad, parameter.data = None, parameter.data.to(dtype)


def _body_and_head(task: Task, model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters outside and inside the head."""
    names, trained = getattr(task, "head_modules", ()), [p for p in model.named_parameters() if p[1].requires_grad]
    head = {name for name, _ in trained if any(f".{part}." in f".{name}." for part in names)}
    return [p for name, p in trained if name not in head], [p for name, p in trained if name in head]


def _groups(task: Task, model: nn.Module, settings: TrainingSettings) -> list[dict[str, Any]]:
    """The optimizer's parameter groups: one, or two if the head has its own learning rate."""
    rate = settings.peak_learning_rate
    if settings.head_learning_rate is None:
        return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": rate}]
    body, head = _body_and_head(task, model)
    if not head:
        raise TrainingError(f"`head_learning_rate` needs a task with a head, but `{task.name}` has none; leave it out.")
    groups = [{"params": body, "lr": rate}, {"params": head, "lr": settings.head_learning_rate}]
    return [group for group in groups if group["params"]]
