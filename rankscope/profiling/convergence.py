"""When to stop: the leading singular values of every module have stopped moving."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

LEADING = 8
GROWTH = 1.5  # the next look comes after half as many batches again


class Convergence:
    """Compares leading singular values now with those at the last look, which was two thirds as many batches ago.

    Args:
        tolerance: The largest mean relative movement, over modules, of the leading 8 singular values of the mean gradient.
    """

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self.next_look = 4
        self._last: dict[str, Tensor] = {}

    def due(self, batches: int) -> bool:
        """Whether to look after so many batches."""
        return batches >= self.next_look

    def reached(self, batches: int, values: Mapping[str, Tensor]) -> bool:
        """Takes a look; `values` are the singular values of the mean gradients by module."""
        self.next_look = int(batches * GROWTH) + 1
        now = {name: value[:LEADING] for name, value in values.items()}
        last, self._last = self._last, now
        if not last:
            return False
        moved = [(now[name] - last[name]).norm() / now[name].norm() for name in now if now[name].any()]
        return bool(moved) and float(torch.stack(moved).mean()) <= self.tolerance
