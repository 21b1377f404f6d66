"""Several processes, one profile: sums are all-reduced, so that n processes on a part each see what one sees on all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed


def process_count() -> int:
    """Processes of the torch.distributed group; 1 without one."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def several() -> bool:
    """Whether this is one of several processes."""
    return process_count() > 1


def is_first() -> bool:
    """Whether this is the first process, or the only one."""
    return not several() or distributed.get_rank() == 0


def gathered(value: Any) -> list[Any]:
    """The values of all processes, in their order; one alone gives its own."""
    if not several():
        return [value]
    values = [None] * process_count()
    distributed.all_gather_object(values, value)
    return values


@torch.no_grad()
def sum_over_processes(tensors: Iterable[Tensor]) -> None:
    """Replaces tensors by their sums over processes; each process must pass as many, of the same shapes."""
    if several():
        for tensor in tensors:
            distributed.all_reduce(tensor)
