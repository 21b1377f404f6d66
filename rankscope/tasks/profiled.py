"""`profile_task`: the profile of a task's model on its training batches, behind its head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from torch import Tensor, nn

from rankscope.devices import mixed_precision, placed
from rankscope.profiling import Profile, profile
from rankscope.targets import TargetModule
from rankscope.tasks.protocol import Batch, Task


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
