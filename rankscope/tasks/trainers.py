"""Tasks from a user's own transformers or TRL Trainer, which a function of a PEFT config makes."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import cached_property
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rankscope.distributed import require_one_process, seeded
from rankscope.errors import TaskError
from rankscope.files import digest, digest_source
from rankscope.plugins import user_errors
from rankscope.tasks.pretrained import head_of
from rankscope.tasks.protocol import Batch, Split

_TASK_TYPES = {
    "CausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "SequenceClassification": "SEQ_CLS",
    "TokenClassification": "TOKEN_CLS",
}  # fmt: skip
# Arguments on which no result depends, or which a run sets.
_FREE = ("output_dir", "logging", "run_name", "report_to", "hub", "push_to_hub", "seed", "data_seed", "learning_rate")
_RUN = ("max_steps", "save", "disable_tqdm", "num_train_epochs", "eval_strategy", "eval_steps", "load_best")


def makes_trainer(factory: Callable[..., Any]) -> bool:
    """Whether a user's function makes a Trainer: it takes a `peft_config`."""
    try:
        return "peft_config" in inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return False


class TrainerTask:
    """A task from `make_trainer(peft_config, seed)`, which returns a transformers `Trainer` or one of TRL's.

    The function gets the `peft_config` of each run, and None for the bare model, and passes it to `get_peft_model` or to TRL's
    Trainer. Profile, search, budget and compare then use the Trainer's model, data, collator, loss, optimizer and metrics; only
    steps, learning rate and seed are those of the study. Nothing is saved or evaluated by the Trainer itself.

    The metric is the Trainer's `metric_for_best_model` if more of it is better; else `negative_loss`. `eval_dataset` validates;
    to compare, it must be `{"validation": ..., "test": ...}`. Heads of classifiers are trained beside the adapters.
    """

    def __init__(self, factory: Callable[..., Any], *, name: str) -> None:
        remedy = "launch your Trainer's own script so, with RankControllerCallback; or run rankscope as one process."
        require_one_process(f"`{name}`, a task with a Trainer of its own,", remedy=remedy)
        self._factory, self.name = factory, name
        args = self.bare.args
        best = str(args.metric_for_best_model or "loss").removeprefix("eval_")
        self.metric = best if args.greater_is_better and not best.endswith("loss") else "negative_loss"

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the Trainer: worker processes make their own."""
        return {key: value for key, value in vars(self).items() if key != "bare"}

    def make(self, peft_config: Any, *, seed: int) -> Any:
        """A new Trainer. Global generators are left alone, though Trainers seed them."""
        with undisturbed(seed), user_errors(f"`{self.name}` must make a Trainer, but", TaskError, everywhere=True):
            trainer = self._factory(peft_config=peft_config, seed=seed)
        needed = ("train", "evaluate", "compute_loss", "get_train_dataloader", "callback_handler")
        must = f"`{self.name}` must return a transformers Trainer"
        if any(not hasattr(trainer, each) for each in needed):
            raise TaskError(f"{must}, but returned {type(trainer).__name__}; end it with `return trainer`.")
        if trainer.model_init is not None:
            raise TaskError(f"{must} with a `model`, but it has a `model_init`; pass the model itself.")
        if trainer.optimizer is not None:
            remedy = "name it by `optim`, or set `optimizer_cls_and_kwargs`."
            raise TaskError(f"{must} that makes its optimizer, but it has one; {remedy}")
        return trainer

    @cached_property
    def bare(self) -> Any:
        """The Trainer of the model without adapters, which computes losses and metrics of any other."""
        from transformers.trainer_callback import DefaultFlowCallback

        trainer = self.make(None, seed=0)
        if hasattr(trainer.model, "peft_config"):
            must = f"`{self.name}` must give the model without adapters where `peft_config` is None"
            raise TaskError(f"{must}, but it has some; call get_peft_model only with a config.")
        kept = [each for each in trainer.callback_handler.callbacks if isinstance(each, DefaultFlowCallback)]
        trainer.callback_handler.callbacks = kept  # it trains nothing, and reports to nobody
        return trainer

    @cached_property
    def head_modules(self) -> tuple[str, ...]:
        """The head of a classifier; other heads stay frozen."""
        model = self.bare.model
        return head_of(model) if type(model).__name__.endswith("Classification") else ()

    @cached_property
    def task_type(self) -> str | None:
        """PEFT's, by the model's class."""
        model, name = self.bare.model, type(self.bare.model).__name__
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and "Generation" in name:
            return "SEQ_2_SEQ_LM"
        return next((kind for end, kind in _TASK_TYPES.items() if name.endswith(end)), None)

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """What `from_pretrained` of the base model needs so that a trained adapter fits."""
        model = self.bare.model
        dtype = {} if model.dtype == torch.float32 else {"dtype": str(model.dtype).removeprefix("torch.")}
        names = {key: dict(getattr(model.config, key)) for key in ("id2label", "label2id")} if self.head_modules else {}
        return {**dtype, **names}

    def build_model(self) -> nn.Module:
        """Return the model without adapters. Weights are the same at every call."""
        return cast(nn.Module, deepcopy(self.bare.model)).requires_grad_(True)

    def train_batches(self, seed: int) -> DataLoader[Batch]:
        """Return one epoch of the Trainer's batches, in an order that depends on the seed only."""
        trainer = self.bare
        loader = trainer.get_train_dataloader()
        trainer.accelerator.free_memory()  # which keeps every loader
        try:
            n = len(loader.dataset)
        except TypeError:
            must = f"`{self.name}` must give a Trainer whose `train_dataset` has a length"
            found = f"{type(loader.dataset).__name__} has none"
            raise TaskError(f"{must}, but {found}; take a data set that is not streamed.") from None
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
        own, size = torch.Generator(), trainer.args.train_batch_size
        return DataLoader(loader.dataset, size, sampler=order, collate_fn=loader.collate_fn, generator=own)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the Trainer's own loss."""
        return cast(Tensor, self.bare.compute_loss(model, dict(batch)))

    def evaluate(self, model: nn.Module, split: Split = "validation") -> dict[str, float]:
        """Return the metrics of the Trainer's own `evaluate`. The model keeps its mode."""
        trainer, data, was_training = self.bare, self._data(split), model.training
        own = trainer.model, trainer.model_wrapped
        forward = {key: vars(model).get(key) for key in ("forward", "_original_forward", "_is_accelerate_prepared")}
        trainer.model = trainer.model_wrapped = model
        try:
            with undisturbed(0):
                found = trainer.evaluate(data, metric_key_prefix="eval")
        finally:
            trainer.model, trainer.model_wrapped = own
            trainer.accelerator.free_memory()
            for key, value in forward.items():  # accelerate wraps it each time
                vars(model).pop(key, None)
                if value is not None:
                    vars(model)[key] = value
            model.train(was_training)
        timing = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
        named = {key.removeprefix("eval_"): value for key, value in found.items() if key.startswith("eval_")}
        metrics = {key: float(v) for key, v in named.items() if key not in timing and isinstance(v, int | float)}
        if self.metric == "negative_loss" and "loss" in metrics:
            metrics["negative_loss"] = -metrics["loss"]
        return metrics

    def _data(self, split: Split) -> Any:
        held = self.bare.eval_dataset
        if split == "train":
            return self.bare.train_dataset
        if isinstance(held, Mapping):
            if split not in held:
                must = f"the `eval_dataset` of `{self.name}` must hold {split!r}"
                raise TaskError(f"{must}, but holds {', '.join(map(str, held)) or 'nothing'}; add it.")
            return held[split]
        if held is None:
            raise TaskError(f"`{self.name}` must give a Trainer with an `eval_dataset`, but it has none; pass one.")
        if split == "test":
            must = f"`{self.name}` must give a test set to compare on"
            raise TaskError(f"{must}, but gives one `eval_dataset`; pass {{'validation': ..., 'test': ...}}.")
        return held

    def fingerprint_data(self) -> str:
        """Return a hash of the function's file, the Trainer's arguments, the first batches, and the first rows to evaluate on."""
        args = {key: value for key, value in self.bare.args.to_dict().items() if not key.startswith(_FREE + _RUN)}
        batches, held = self.train_batches(0), self.bare.eval_dataset
        parts = held if isinstance(held, Mapping) else {"validation": held or ()}
        rows = {str(name): [len(part), [part[i] for i in range(min(len(part), 64))]] for name, part in parts.items()}
        plain = {key: str(value) for key, value in args.items()}
        first = [dict(batch) for batch in islice(batches, 8)]
        return digest([digest_source(self._factory), plain, len(cast(Any, batches.dataset)), first, rows])


@contextmanager
def undisturbed(seed: int) -> Iterator[None]:
    """Seed torch; on exit the generators of torch, NumPy and Python go on as if nothing had been drawn or seeded."""
    numbers, letters = random.getstate(), np.random.get_state()  # noqa: NPY002  # it is theirs
    try:
        with seeded(seed):
            yield
    finally:
        random.setstate(numbers)
        np.random.set_state(letters)  # noqa: NPY002
