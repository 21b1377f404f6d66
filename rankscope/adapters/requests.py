"""`Resize`: one module's new rank, and the refusal of those that cannot be followed."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from rankscope.exceptions import AdapterError


@dataclass(frozen=True, slots=True, kw_only=True)
class Resize:
    """One module's new rank.

    Attributes:
        name: Full dotted name in the base model (`TargetModule.name`).
        rank: The new rank; 0 puts the module's adapter to sleep, a later resize wakes it.
        directions: (added, inputs) rows for the new part of A, as they are meant to be scaled; None: drawn as PEFT draws A.
    """

    name: str
    rank: int
    directions: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What a module has and can have.

    Attributes:
        rank: Its present rank.
        largest: The largest rank it can have.
        inputs: The width of a row of A.
    """

    rank: int
    largest: int
    inputs: int


def check_resizes(resizes: Sequence[Resize], rooms: Mapping[str, Room]) -> None:
    """Refuses modules that are unknown or named twice, ranks that are impossible, and directions that do not fit.

    A row of zeros does not fit: with zeros in B it would never get a gradient.

    Raises:
        AdapterError: The first that is wrong.
    """
    seen: set[str] = set()
    for resize in resizes:
        name = resize.name
        rank: Any = resize.rank
        if name not in rooms:
            raise _unknown(name, rooms)
        if name in seen:
            raise AdapterError(f"`resizes` must name each module once, but names `{name}` twice.")
        seen.add(name)
        room = rooms[name]
        if not isinstance(rank, Integral) or not 0 <= int(rank) <= room.largest:
            raise AdapterError(
                f"the rank of `{name}` must be a whole number between 0 and {room.largest}, but got {rank!r}."
            )
        if resize.directions is not None:
            _check_directions(resize.directions, name, max(int(rank) - room.rank, 0), room.inputs)


def _check_directions(directions: Tensor, name: str, added: int, inputs: int) -> None:
    if tuple(directions.shape) != (added, inputs):
        raise AdapterError(
            f"`directions` of `{name}` must be of shape ({added}, {inputs}), one row for each added rank, "
            f"but are of shape {tuple(directions.shape)}."
        )
    if not torch.isfinite(directions).all() or not directions.any(dim=1).all():
        raise AdapterError(
            f"`directions` of `{name}` must be finite and without a row of zeros; leave them out to draw."
        )


def _unknown(name: str, rooms: Mapping[str, Room]) -> AdapterError:
    close = difflib.get_close_matches(name, rooms, n=2)
    remedy = f"did you mean {' or '.join(repr(c) for c in close)}" if close else "adapt it when the model is wrapped"
    return AdapterError(f"`resizes` must name modules that carry the adapter, but {name!r} does not; {remedy}.")
