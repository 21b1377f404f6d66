"""One plan on every process: the first process decides, the others follow, and all prove that they did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import distributed

from rankscope.exceptions import AdapterError

T = TypeVar("T")


def n_processes() -> int:
    """How many processes train together; 1 outside torch.distributed."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def from_first_process(value: T) -> T:
    """The first process's value, on every process; every process must call it.

    >>> from_first_process(3)
    3
    """
    if n_processes() == 1:
        return value
    box: list[Any] = [value]
    distributed.broadcast_object_list(box, src=0)
    received: T = box[0]
    return received


def check_same(value: Any, *, what: str) -> None:
    """Refuses to go on where processes differ; every process must call it, and every one raises.

    Raises:
        AdapterError: The values differ.
    """
    if n_processes() == 1:
        return
    values: list[Any] = [None] * n_processes()
    distributed.all_gather_object(values, value)
    if odd := _different(values):
        raise AdapterError(
            f"{what} must be the same on every process, but process {odd[0]} differs from process 0; "
            "start all from the same checkpoint and seed."
        )


def _different(values: Sequence[Any]) -> list[int]:
    return [index for index, value in enumerate(values) if value != values[0]]
