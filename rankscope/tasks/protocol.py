"""`profile_task`: the profile of a task's model on its training batches, behind its head."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from rankscope.distributed import batch_device, mixed_precision, placed
from rankscope.errors import TaskError, shown
from rankscope.files import digest, digest_source
from rankscope.profiling import Profile, profile
from rankscope.targets import TargetModule


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """`model(**batch).loss`."""
    loss = model(**batch).loss
    assert isinstance(loss, Tensor)
    return loss


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients; yields the model's device, and gives the training mode back."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield batch_device(model)
    finally:
        model.train(was_training)


Batch = Mapping[str, Tensor]
Split = Literal["train", "validation", "test"]
N_BATCHES = 8  # whose content tells a task's data


@runtime_checkable
class Task(Protocol):
    """A model, its data, its loss and its metric.

    A task may also have `head_modules`: full names of freshly initialised modules (a new classifier), which are trained
    beside the adapters; `task_type`: PEFT's kind of model (`"CAUSAL_LM"`, …), which goes into saved adapters (a class
    that plain PEFT cannot build names itself, as `rankscope.lora.load_adapter` expects); `model_kwargs`: what the
    base model must be loaded with for them to fit; and `fingerprint_data()`: a hash of all its data, so that a result
    is not reused after the data changed (default: of the first training batches, which do not tell when only validation
    or test data changed). Its `evaluate` may take `split`: search and controllers see `"validation"` only, comparisons
    report `"test"`.

    Attributes:
        name: Of the task.
        metric: The key of `evaluate`'s result that counts; higher is better.
    """

    name: str
    metric: str

    def build_model(self) -> nn.Module:
        """The model, with the same weights at every call."""
        ...

    def train_batches(self, seed: int) -> Iterable[Batch]:
        """One epoch, in an order that the seed gives."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The scalar loss of one batch."""
        ...

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Metrics of the model; they hold `metric` and `"loss"`."""
        ...


def check_task(candidate: object) -> Task:
    """The candidate, if it is a task.

    Raises:
        TaskError: Something is missing; it is named.
    """
    if isinstance(candidate, type):
        raise TaskError(
            f"a task must be an object, but got the class {candidate.__name__}; make one: `{candidate.__name__}()`."
        )
    needed = ("name", "metric", "build_model", "train_batches", "loss", "evaluate")
    if missing := [name for name in needed if not hasattr(candidate, name)]:
        raise TaskError(
            f"a task must have {', '.join(needed)}, but {type(candidate).__name__} lacks {', '.join(missing)}."
        )
    assert isinstance(candidate, Task)
    return candidate


MOST = 2**31 - 1  # what every library below counts up to


def check_counts(**counts: int) -> None:
    """Checks options that count something, given by name.

    Raises:
        TaskError: One is not a whole number above 0, or is beyond 32 bits.
    """
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise TaskError(f"`{name}` must be a whole number above 0, but got {shown(value)}.")
        if value > MOST:
            raise TaskError(f"`{name}` must be at most {MOST:,}, but got {shown(value)}.")


def evaluate(task: Task, model: nn.Module, split: Split = "validation") -> dict[str, float]:
    """The task's metrics on one split; the model's outputs reach the task in float32.

    Raises:
        TaskError: The task has no such split, or its result lacks the metric or the loss.
    """
    takes_split = "split" in inspect.signature(task.evaluate).parameters
    if not takes_split and split != "validation":
        raise TaskError(
            f"task `{task.name}` must have a {split} split, but its `evaluate` takes none; add a `split` argument."
        )
    with mixed_precision(model):
        metrics: dict[str, float] = task.evaluate(model, **({"split": split} if takes_split else {}))
    if missing := [key for key in (task.metric, "loss") if key not in metrics]:
        raise TaskError(f"task `{task.name}` must evaluate {missing[0]!r}, but gave {', '.join(metrics) or 'nothing'}.")
    return metrics


def fingerprint_task(task: Task, model: nn.Module | None = None) -> dict[str, Any]:
    """What every result of a task depends on, as plain values: its options, and hashes of its code, data and weights.

    The options are the arguments of its constructor that it keeps as attributes of the same name. The code is the source file
    of a task of the user's own.

    Args:
        task: The task.
        model: What `build_model` gives, where it is at hand.
    """
    model = task.build_model() if model is None else model
    kind = type(task)
    made_by = getattr(kind.__init__, "__code__", None)
    names = made_by.co_varnames[1 : made_by.co_argcount + made_by.co_kwonlyargcount] if made_by else ()
    kept = {name: getattr(task, name, None) for name in names if name not in ("model", "data")}
    options = {name: value for name, value in kept.items() if isinstance(value, bool | int | float | str)}
    hash_data = getattr(task, "fingerprint_data", None)
    return {
        "task": {**options, "name": task.name, "metric": task.metric, "kind": kind.__qualname__},
        "code": digest_source(task.build_model, task.train_batches, task.loss, task.evaluate),
        "data": digest(list(islice(task.train_batches(0), N_BATCHES))) if hash_data is None else hash_data(),
        "weights": digest(model),
    }


def profile_task(
    task: Task,
    *,
    targets: Sequence[TargetModule] | None = None,
    n_batches: int | None = None,
    head_steps: int = 100,
    seed: int = 0,
    on_start: Callable[[int], None] | None = None,
    **options: Any,
) -> Profile:
    """Profiles a task's model on an epoch of its training batches, or its first, on the device and in the precision of training.

    Args:
        task: Where model, batches and loss come from.
        targets: Which modules; default: all that are found.
        n_batches: So many batches; None: an epoch. The epoch's further batches train the head, since a head that has fitted a
            profiled batch leaves less gradient in it.
        head_steps: AdamW steps on the task's head.
        seed: Of the epoch's order and the sketches.
        on_start: Called with the number of batches.
        **options: As `rankscope.profile` takes them.

    >>> import rankscope as rs
    >>> profile_task(rs.load_task("digits-shift"), n_batches=2, head_steps=1).targets[0].name
    'vit.layers.0.attention.q_proj'
    """
    head = tuple(getattr(task, "head_modules", ()))
    epoch = iter(task.train_batches(seed))
    batches = list(islice(epoch, n_batches))
    rest = list(islice(epoch, head_steps if head else 0))
    if on_start:
        on_start(len(batches))

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with mixed_precision(model):
            return task.loss(model, batch)

    return profile(
        placed(task.build_model()),
        batches,
        targets=targets,
        loss_fn=loss,
        head=head,
        head_steps=head_steps,
        head_batches=rest or None,
        seed=seed,
        **options,
    )
