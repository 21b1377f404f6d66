"""The training loop: one compact loop in plain torch, whatever the method."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankscope.allocation import RankAllocation
from rankscope.control import ControllerConfig
from rankscope.distributed import batch_device, mixed_precision, placed, require_one_process, seeded
from rankscope.errors import TrainingError
from rankscope.files import replacing, write_json
from rankscope.tasks import Batch, Task, evaluate
from rankscope.training.methods import Lora, Method, Running, TrainingConfig, TrainingResult

OPTIONS_FILE = "model_kwargs.json"
_LOADERS = {"SEQ_CLS": "AutoPeftModelForSequenceClassification", "CAUSAL_LM": "AutoPeftModelForCausalLM"}


def save_adapter(model: nn.Module, task: Task, folder: str | os.PathLike[str]) -> Path:
    """Saves a trained model by its own `save_pretrained`, with a README that says how to load it.

    What the base model must be loaded with (`id2label`, …) goes to `model_kwargs.json`. The folder is replaced as a whole.

    Args:
        model: What `train` gave.
        task: What it was trained on.
        folder: Where to.
    """
    options: dict[str, Any] = dict(getattr(task, "model_kwargs", {}))
    with replacing(folder, folder=True) as temporary:
        model.save_pretrained(str(temporary))  # type: ignore[operator]
        if options:
            write_json(temporary / OPTIONS_FILE, options)
        (temporary / "README.md").write_text(_readme(model, task, options), encoding="utf-8")
    return Path(folder)


def _readme(model: nn.Module, task: Task, options: dict[str, Any]) -> str:
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    source = json.dumps(getattr(base, "name_or_path", "") or "")
    loader = _LOADERS.get(getattr(task, "task_type", None) or "")
    how = ["With `folder` the path of this folder:", "", "```python", *_code(loader, options), "```"]
    if loader is None:
        kind = f"{type(base).__module__}.{type(base).__name__}"
        how = [f"Build the base model, a `{kind}`, then `rankscope.lora.load_adapter(base, folder)`."]
    return "\n".join(
        ["---", f"base_model: {source}", "library_name: peft", "---", f"# LoRA for `{task.name}`", "", *how, ""]
    )


def _code(loader: str | None, options: dict[str, Any]) -> list[str]:
    lines = [f"from peft import {loader}", ""]
    if options:
        lines = ["import json", *lines, f'options = json.load(open(f"{{folder}}/{OPTIONS_FILE}"))']
    if "id2label" in options:  # JSON knows no keys but strings
        lines.append('options["id2label"] = {int(code): label for code, label in options["id2label"].items()}')
    return [*lines, f"model = {loader}.from_pretrained(folder{', **options' if options else ''})"]


CHECK_EVERY = 10  # steps between looks at the loss: each look waits for the device


def train(
    task: Task,
    method: RankAllocation | Method,
    config: TrainingConfig,
    *,
    seed: int = 0,
    controller: ControllerConfig | None = None,
    on_evaluation: Callable[[int, Mapping[str, float]], None] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> tuple[nn.Module, TrainingResult]:
    """Fine-tunes the task's model: with LoRA of an allocation's ranks, or by another method.

    The model goes to the best device, unless its task placed it (see `rankscope.distributed`). GPUs that have bfloat16 multiply
    matrices in it; what is trained is float32, also where the model's weights are not.

    Args:
        task: Where model, data, loss and metric come from.
        method: The ranks, or a `rankscope.training.Method`.
        config: The schedule.
        seed: Of the adapters' initial values, dropout and the order of the data. The global generators are left alone.
        controller: Moves an allocation's ranks during the run, within its budget; None: they stay.
        on_evaluation: Called with step and validation metrics; may raise to stop the run (a pruner does).
        on_step: Called with the step.

    Returns:
        The adapted model, and the result.

    Raises:
        TrainingError: The loss or the metric is not finite.
        SettingsError: The allocation is not for this model.
        RankscopeError: torchrun, or another launcher, runs several copies of this process.

    >>> import rankscope as rs
    >>> task = rs.load_task("digits-shift")
    >>> targets = rs.find_targets(task.build_model())
    >>> uniform = rs.allocate("uniform", targets=targets, budget=rs.ParameterBudget.uniform(targets, 1))
    >>> model, result = rs.train(task, uniform, rs.TrainingConfig(steps=2, learning_rate=0.01))
    >>> result.parameters, sorted(result.metrics)
    (6912, ['accuracy', 'loss'])
    """
    require_one_process("a training")
    if isinstance(method, RankAllocation):
        method = Lora(method, controller)
    elif controller is not None:
        raise TrainingError("`controller` moves an allocation's ranks, but `method` is none; pass an allocation.")
    started = time.perf_counter()
    with seeded(seed):
        model = method.adapt(placed(task.build_model()), task, config, seed)
        with _trained_in_float32(model):
            running, losses, history = _fit(task, method, model, config, seed, on_evaluation, on_step)
    for adapter in getattr(model, "peft_config", {}).values():
        adapter.task_type = getattr(task, "task_type", None)  # goes into the saved adapter
    result = TrainingResult(
        metrics=history[config.steps],
        history=history,
        train_loss=float(torch.stack(losses[-max(1, len(losses) // 10) :]).mean()),
        parameters=running.allocation.parameters if running.allocation else _count_trained(task, model),
        steps=config.steps,
        wall_seconds=time.perf_counter() - started,
        allocation=running.allocation,
        decisions=running.decisions,
    )
    return model, result


def _fit(
    task: Task,
    method: Method,
    model: nn.Module,
    config: TrainingConfig,
    seed: int,
    on_evaluation: Callable[[int, Mapping[str, float]], None] | None,
    on_step: Callable[[int], None] | None,
) -> tuple[Running, list[Tensor], dict[int, Mapping[str, float]]]:
    """Takes all steps; the method at work, the loss of every step, and the metrics by step."""
    from transformers import get_linear_schedule_with_warmup

    optimizer = torch.optim.AdamW(_groups(task, model, config), weight_decay=config.weight_decay)
    schedule = get_linear_schedule_with_warmup(optimizer, round(config.warmup_fraction * config.steps), config.steps)
    running = method.follow(model, optimizer, config, seed)
    losses: list[Tensor] = []
    history: dict[int, Mapping[str, float]] = {}
    model.train()
    batches = _stream(task, seed)
    for step in range(1, config.steps + 1):
        losses.append(_step(task, model, batches, optimizer, config, running))
        schedule.step()
        if step % CHECK_EVERY == 0 or step == config.steps:
            _check_finite(losses[-CHECK_EVERY:], step, config)
        if on_step:
            on_step(step)
        if step == config.steps or (config.evaluate_every and step % config.evaluate_every == 0):
            history[step] = _finite_metrics(task, model, step)
            if on_evaluation:
                on_evaluation(step, history[step])
    return running, losses, history


def _step(
    task: Task,
    model: nn.Module,
    batches: Iterator[Batch],
    optimizer: torch.optim.Optimizer,
    config: TrainingConfig,
    running: Running,
) -> Tensor:
    """One optimizer step over `gradient_accumulation` batches; the mean loss, still on the device."""
    from accelerate.utils import send_to_device

    device = batch_device(model)
    losses: list[Tensor] = []
    for batch in islice(batches, config.gradient_accumulation):
        with mixed_precision(model):
            loss = task.loss(model, send_to_device(batch, device))
        (loss / config.gradient_accumulation).backward()
        losses.append(loss.detach().float())
    if config.max_grad_norm:
        nn.utils.clip_grad_norm_(_trained(optimizer), config.max_grad_norm)
    optimizer.step()
    mean = torch.stack(losses).mean()
    running.step(mean)
    optimizer.zero_grad()
    return mean


@contextmanager
def _trained_in_float32(model: nn.Module) -> Iterator[None]:
    """Holds trainable weights in float32: half precision would round small updates away. Afterwards their types are as before."""
    half = {p: p.dtype for p in model.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)}
    for parameter in half:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in half.items():
            parameter.grad, parameter.data = None, parameter.data.to(dtype)


def _trained(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters of the moment: a controller puts others in their place."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _groups(task: Task, model: nn.Module, config: TrainingConfig) -> list[dict[str, Any]]:
    """The optimizer's parameter groups: all but the head, and the head, where it has a rate of its own."""
    if config.head_learning_rate is None:
        return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": config.learning_rate}]
    body, head = _split_off_head(task, model)
    if not head:
        raise TrainingError(f"`head_learning_rate` needs a task with a head, but `{task.name}` has none; leave it out.")
    groups = [{"params": body, "lr": config.learning_rate}, {"params": head, "lr": config.head_learning_rate}]
    return [group for group in groups if group["params"]]


def _count_trained(task: Task, model: nn.Module) -> int:
    """Trainable parameters outside the head."""
    return sum(parameter.numel() for parameter in _split_off_head(task, model)[0])


def _split_off_head(task: Task, model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters outside and inside the head."""
    names = set(getattr(task, "head_modules", ()))
    body: list[nn.Parameter] = []
    head: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (head if names & set(name.split(".")) else body).append(parameter)
    return body, head


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
