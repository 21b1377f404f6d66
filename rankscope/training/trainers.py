"""Fine-tuning in a user's own Trainer: the methods that a PEFT config describes, at the study's steps, rate and seed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from rankscope.allocation import RankAllocation
from rankscope.budget import ParameterBudget
from rankscope.control import RankControllerCallback
from rankscope.errors import SettingsError, TaskError, TrainingError, shown
from rankscope.lora import Resize, count_adapter_parameters, from_peft_model, resize_adapters, with_heads
from rankscope.settings import TrainingSettings
from rankscope.tasks import TrainerTask, evaluate, undisturbed
from rankscope.training.methods import FullFineTuning, HeadOnly, Lora, Method, PeftAdapter
from rankscope.training.watching import tell

# What the Trainer's own arguments say.
_OWNED = ("head_learning_rate", "warmup_fraction", "weight_decay", "max_grad_norm", "gradient_accumulation")


class Run:
    """One training; its result is in `model`, `history`, `allocation` and `decisions`."""

    def __init__(
        self,
        task: TrainerTask,
        method: Method,
        settings: TrainingSettings,
        *,
        seed: int,
        on_evaluation: Callable[[int, Mapping[str, float]], None] | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> None:
        for key in _OWNED:
            if (value := getattr(settings, key)) != TrainingSettings.model_fields[key].default:
                must = f"`training.{key}` is for rankscope's own loop, but got {shown(value)}"
                raise SettingsError(f"{must}; leave it out, and set it in the arguments of `{task.name}`.")
        self.task, self.settings = task, settings
        self.on_evaluation, self.on_step = on_evaluation, on_step
        self.history: dict[int, Mapping[str, float]] = {}
        self.allocation: RankAllocation | None = None
        self.decisions: Any = None
        started = time.perf_counter()
        trainer = self._made(method, seed)
        self._set(trainer, seed)
        callback = self._controlled(trainer, method)
        trainer.add_callback(_steps_watched(self))
        with undisturbed(seed):
            trainer.train()
        self.model: nn.Module = _plain(trainer)
        if callback is not None:
            self.allocation, self.decisions = callback.controller.allocation, callback.controller.decisions
        self.evaluated(settings.steps, self.model)
        self.wall_seconds = time.perf_counter() - started

    def evaluated(self, step: int, model: nn.Module) -> None:
        """Validate at a step."""
        tell("evaluating after step", step, self.settings.steps)
        metrics = self.history[step] = evaluate(self.task, model)
        if not math.isfinite(value := metrics[self.task.metric]):
            must = f"`{self.task.metric}` must be finite, but is {value} at step {step}"
            raise TrainingError(f"{must}; lower `learning_rate`.")
        if self.on_evaluation:
            self.on_evaluation(step, metrics)

    def _made(self, method: Method, seed: int) -> Any:
        """The Trainer, whose model has what the method trains."""
        task, settings = self.task, self.settings
        if isinstance(method, FullFineTuning | HeadOnly):
            trainer = task.make(None, seed=seed)
            method.adapt(trainer.model, task, settings, seed)
            return trainer
        if isinstance(method, PeftAdapter):
            return task.make(with_heads(method.config, task.head_modules), seed=seed)
        if not isinstance(method, Lora):
            must = f"{method.name} must run in rankscope's own loop, but `{task.name}` brings a Trainer"
            raise TrainingError(f"{must}; leave it out.")
        asked = method.allocation
        if method.controller is not None:  # PEFT builds no rank 0, which a controller may raise
            asked = replace(asked, vector=tuple(max(rank, 1) for rank in asked.vector))
        trainer = task.make(asked.to_lora_config(task_type=task.task_type, **method.options(task, settings)), seed=seed)
        _check_ranks(trainer.model, asked, name=task.name)
        idle = [name for name, rank in method.allocation.ranks.items() if rank == 0 and method.controller is not None]
        resize_adapters(trainer.model, None, [Resize(name=name, rank=0) for name in idle])
        self.allocation = method.allocation
        return trainer

    def _set(self, trainer: Any, seed: int) -> None:
        """Give the Trainer the run's steps, rate and seed; it saves and evaluates nothing by itself."""
        from transformers.trainer_callback import PrinterCallback, ProgressCallback

        given: dict[str, Any] = {"max_steps": self.settings.steps, "learning_rate": self.settings.peak_learning_rate}
        given |= {"seed": seed, "data_seed": seed, "save_strategy": "no", "eval_strategy": "no"}
        for name, value in (given | {"load_best_model_at_end": False}).items():
            setattr(trainer.args, name, value)
        for kind in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(kind)

    def _controlled(self, trainer: Any, method: Method) -> RankControllerCallback | None:
        if not isinstance(method, Lora) or method.controller is None:
            return None
        budget = ParameterBudget.of(method.allocation)
        return RankControllerCallback(budget=budget, settings=method.controller).bind(trainer)


def _check_ranks(model: Any, asked: RankAllocation, *, name: str) -> None:
    """Raise a TaskError unless the model has exactly these ranks."""
    must = f"`{name}` must build the ranks of its `peft_config` ({asked.parameters:,} adapter parameters)"
    remedy = "pass it to get_peft_model, or to TRL's Trainer."
    if not hasattr(model, "peft_config"):
        raise TaskError(f"{must}, but built no adapter; {remedy}")
    built = {module: rank for module, rank in from_peft_model(model).items() if rank}
    if built != {module: rank for module, rank in asked.ranks.items() if rank}:
        raise TaskError(f"{must}, but built others ({count_adapter_parameters(model):,}); {remedy}")


def _steps_watched(run: Run) -> Any:
    """A callback that tells the run of its steps."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
            step, every = state.global_step, run.settings.evaluate_every
            tell("step", step, run.settings.steps)
            if run.on_step:
                run.on_step(step)
            if every and step % every == 0 and step < run.settings.steps:
                run.evaluated(step, model)

    return Watch()


def _plain(trainer: Any) -> nn.Module:
    """The trained model, without accelerate's wrappers, which the Trainer forgets."""
    from accelerate.utils import extract_model_from_parallel

    model: nn.Module = extract_model_from_parallel(trainer.model, keep_fp32_wrapper=False)
    trainer.accelerator.free_memory()
    return model
