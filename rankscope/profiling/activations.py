"""The covariance of a module's inputs, sketched while they stream by: second moment, effective rank, leading variances.

Sums are taken about the running mean, in float32: where a channel's mean is large, a variance from raw sums would be a
difference of large numbers, and nothing but rounding in bfloat16. Parts are merged as in Chan, Golub and LeVeque 1983.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rankscope.profiling.layers import solvable
from rankscope.profiling.processes import sum_over_processes

_ROWS = 2048  # at a time, since they become float32


@dataclass(slots=True)
class ActivationSketch:
    """Sums over input rows x about their mean m: their number, sum ||x - m||^2, and the sketch sum (x - m) (x - m)^T Omega.

    Attributes:
        omega: (in, k), independent standard normal.
        count: Of rows, a whole scalar.
        mean: m, (in,).
        squares: sum ||x - m||^2, a scalar.
        product: sum (x - m) (x - m)^T Omega, (in, k).
    """

    omega: Tensor
    count: Tensor
    mean: Tensor
    squares: Tensor
    product: Tensor

    @classmethod
    def zeros(cls, omega: Tensor) -> ActivationSketch:
        """A sketch of nothing."""
        count = torch.zeros((), dtype=torch.int64, device=omega.device)
        zero = torch.zeros((), device=omega.device)
        return cls(omega, count, omega.new_zeros(len(omega)), zero, torch.zeros_like(omega))

    def copy(self) -> ActivationSketch:
        """The same sums in memory of their own."""
        return ActivationSketch(
            self.omega, self.count.clone(), self.mean.clone(), self.squares.clone(), self.product.clone()
        )

    def add(self, inputs: Tensor, mask: Tensor | None = None) -> None:
        """Adds rows, (n, in), of any floating type; where a mask (n,) is 0, the row is padding and does not count."""
        padding = None if mask is None else mask.eq(0)[:, None]
        for start in range(0, len(inputs), _ROWS):
            part = slice(start, start + _ROWS)
            self._add(inputs[part].float(), None if padding is None else padding[part])

    def _add(self, rows: Tensor, padding: Tensor | None) -> None:
        n = torch.full_like(self.count, len(rows))
        if padding is not None:
            n -= padding.sum()
            rows = rows.masked_fill(padding, 0.0)
        mean = rows.sum(dim=0) / n.clamp_min(1)
        rows = rows - mean
        if padding is not None:
            rows = rows.masked_fill(padding, 0.0)
        apart = mean - self.mean
        total = self.count + n
        between = self.count * (n / total.clamp_min(1))
        self.squares += rows.square().sum() + between * apart.square().sum()
        self.product += rows.T @ (rows @ self.omega) + between * torch.outer(apart, apart @ self.omega)
        self.mean += apart * (n / total.clamp_min(1))
        self.count = total

    def sum_over_processes(self) -> None:
        """Makes it the sketch of the rows of all processes, each of which must call it."""
        total, mean = self.count.clone(), self.mean * self.count
        sum_over_processes([total, mean])
        mean /= total.clamp_min(1)
        apart = self.mean - mean
        self.squares += self.count * apart.square().sum()
        self.product += self.count * torch.outer(apart, apart @ self.omega)
        sum_over_processes([self.squares, self.product])
        self.count, self.mean = total, mean

    def second_moment(self) -> float:
        """Mean ||x||^2."""
        return self.variance() + float(self.mean.square().sum())

    def variance(self) -> float:
        """Tr C: the trace of the covariance C of x."""
        return float(self.squares / self.count.clamp_min(1))

    def effective_rank(self) -> float:
        """(tr C)^2 / ||C||_F^2 (the participation ratio), with ||C||_F^2 = E ||C Omega||_F^2 / k."""
        squared = float((self.product / self.count.clamp_min(1)).square().sum()) / self.omega.shape[1]
        return self.variance() ** 2 / squared if squared else 0.0

    def variances(self) -> Tensor:
        """Leading eigenvalues of C, descending, at least 0 (Nystrom: Halko, Martinsson, Tropp 2011, sec. 5.5): EVA's signal."""
        omega, sketch = solvable(self.omega), solvable(self.product / self.count.clamp_min(1))
        basis = torch.linalg.qr(sketch).Q
        core = torch.linalg.lstsq((basis.T @ omega).T, (basis.T @ sketch).T).solution
        values: Tensor = torch.linalg.eigvalsh((core + core.T) / 2.0)
        return values.flip(0).clamp_min(0.0)
