"""The `Task` protocol, and what is done with any task: check, evaluate, fingerprint, profile."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast, runtime_checkable

from torch import Tensor, nn

from rankscope.distributed import everywhere, join_processes, mixed_precision, n_processes, placed
from rankscope.errors import TaskError, shown
from rankscope.files import digest, digest_source
from rankscope.settings import ProfileSettings

if TYPE_CHECKING:
    from rankscope.profiling import Profile

Batch = Mapping[str, Tensor]
Split = Literal["train", "validation", "test"]


@runtime_checkable
class Task(Protocol):
    """A model, its data, its loss and its metric. Higher values of `metric`, a key of `evaluate`'s result, are better.

    Optional attributes:
        head_modules: Full names of fresh modules, such as a classifier, that are trained beside the adapters.
        task_type: PEFT's task type; None for a transformers class that PEFT has no type for, but `AutoPeftModel` builds; for a
            class that plain PEFT cannot build, its full path. Saved adapters hold it.
        model_kwargs: What `from_pretrained` of the base model needs so that a saved adapter fits.
        revision: Of the base model on the hub. Saved adapters hold it, too.
        fingerprint_data: Method that returns a hash of all data. Without it, only the first training batches are hashed.
        count_examples: Method that returns of how many rows, or labels, a batch's loss is the mean, for several processes that
            share batches. Default: the labels other than -100, from the second on in a causal language model; else the rows.
    """

    name: str
    metric: str

    def build_model(self) -> nn.Module:
        """Return the model, with the same weights at every call."""

    def train_batches(self, seed: int) -> Iterable[Batch]:
        """Return one epoch, in an order that depends on the seed only."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the scalar loss of one batch."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return metrics, `metric` and `"loss"` among them.

        With an argument `split`, searches and controllers pass `"validation"` only, and comparisons report `"test"`.
        """


def check_task(candidate: object) -> Task:
    """Return the candidate if it is a task; else raise a TaskError that names what is missing."""
    if isinstance(candidate, type):
        name = candidate.__name__
        raise TaskError(f"a task must be an object, but got the class {name}; make one: `{name}()`.")
    needed = ("name", "metric", "build_model", "train_batches", "loss", "evaluate")
    if missing := [name for name in needed if not hasattr(candidate, name)]:
        must = f"a task must have {', '.join(needed)}"
        raise TaskError(f"{must}, but {type(candidate).__name__} lacks {', '.join(missing)}.")
    return cast(Task, candidate)


def check_counts(**counts: int) -> None:
    """Raise a TaskError unless all options, given by name, are whole numbers that torch and tokenizers can count to."""
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
            raise TaskError(f"`{name}` must be a whole number from 1 to {2**31 - 1:,}, but got {shown(value)}.")


def check_choice(value: object, known: tuple[str | None, ...], *, name: str) -> None:
    """Raise a TaskError unless an option's value is among the known ones."""
    if value not in known:
        choices = " or ".join("null" if each is None else each for each in known)
        raise TaskError(f"`{name}` must be {choices}, but got {shown(value)}.")


def evaluate(task: Task, model: nn.Module, split: Split = "validation") -> dict[str, float]:
    """Return the task's metrics on one split. The model's outputs reach the task in float32."""
    options: Any = {"split": split} if "split" in inspect.signature(task.evaluate).parameters else {}
    if not options and split != "validation":
        must = f"task `{task.name}` must have a {split} split, but its `evaluate` takes none"
        raise TaskError(f"{must}; add a `split` argument.")
    with mixed_precision(model):
        metrics = task.evaluate(model, **options)
    if missing := [key for key in (task.metric, "loss") if key not in metrics]:
        raise TaskError(f"task `{task.name}` must evaluate {missing[0]!r}, but gave {', '.join(metrics) or 'nothing'}.")
    return metrics


def fingerprint_task(task: Task, model: nn.Module | None = None) -> dict[str, Any]:
    """Return what every result of a task depends on: its options, and hashes of its code, data and weights.

    Options are the constructor's arguments that the task keeps as attributes of the same name. Pass `model` to save a
    call of `build_model`.
    """
    kind = type(task)
    kept = {name: getattr(task, name, None) for name in inspect.signature(kind).parameters.keys() - {"model", "data"}}
    options = {name: value for name, value in sorted(kept.items()) if isinstance(value, bool | int | float | str)}
    hash_data = getattr(task, "fingerprint_data", lambda: digest(list(islice(task.train_batches(0), 8))))
    return {
        "task": {**options, "name": task.name, "metric": task.metric, "kind": kind.__qualname__},
        "code": digest_source(task.build_model, task.train_batches, task.loss, task.evaluate),
        "data": hash_data(),
        "weights": digest(task.build_model() if model is None else model),
    }


def profile_task(
    task: Task,
    *,
    seed: int = 0,
    on_start: Callable[[int], None] | None = None,
    settings: ProfileSettings | Mapping[str, Any] | None = None,
    **options: Any,
) -> Profile:
    """Profile a task's model on an epoch of training batches, on the device and in the precision of training.

    If `n_batches` is less than an epoch, the rest of it trains the head, since a head that has fitted a profiled batch
    leaves less gradient in it. `seed` is for the order of the epoch and the sketches, `on_start` is called with the number
    of batches, and `options` are single settings and other arguments of `rankscope.profile`. Processes that torchrun or
    accelerate launch started share the batches.

    >>> import rankscope as rs
    >>> profile_task(rs.load_task("digits-shift"), n_batches=2, head_steps=1).targets[0].name
    'vit.layers.0.attention.q_proj'
    """
    join_processes()
    local = {"on_start": on_start, "on_batch": options.pop("on_batch", None)}
    return everywhere(_profile, task, settings, seed, local=local, **options)


def _profile(
    task: Task,
    settings: ProfileSettings | Mapping[str, Any] | None,
    seed: int,
    *,
    on_start: Callable[[int], None] | None,
    **options: Any,
) -> Profile:
    """Profile on this process and on the others of its group."""
    from rankscope.profiling import Shared, profile  # imports accelerate

    single = {key: options.pop(key) for key in ProfileSettings.model_fields.keys() & options}
    settings = ProfileSettings.of(settings, **single)
    head = tuple(getattr(task, "head_modules", ()))
    epoch = iter(task.train_batches(seed))
    batches = Shared(islice(epoch, settings.n_batches))
    head_batches = list(islice(epoch, settings.head_steps if head else 0)) or None
    if on_start:
        on_start(len(batches[:: n_processes()]))

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with mixed_precision(model):
            return task.loss(model, batch)

    model = placed(task.build_model())
    return profile(
        model, batches, loss_fn=loss, head=head, head_batches=head_batches, seed=seed, settings=settings, **options
    )
