"""The covariance of a module's inputs, sketched while they stream by: second moment, effective rank, leading variances."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class ActivationSketch:
    """Sums over input rows x: count, sum x, sum ||x||^2, and the Nystrom sketch sum x (x^T Omega).

    Attributes:
        omega: (in, k), independent standard normal.
        count: Of rows, a scalar.
        total: sum x, (in,).
        squares: sum ||x||^2, a scalar.
        product: sum x x^T Omega, (in, k).
    """

    omega: Tensor
    count: Tensor
    total: Tensor
    squares: Tensor
    product: Tensor

    @classmethod
    def zeros(cls, omega: Tensor) -> ActivationSketch:
        """A sketch of nothing."""
        zero = torch.zeros((), device=omega.device)
        return cls(omega, zero.clone(), omega.new_zeros(len(omega)), zero.clone(), torch.zeros_like(omega))

    def add(self, inputs: Tensor, mask: Tensor | None = None) -> None:
        """Adds rows, (n, in); where a mask (n,) is 0, the row is padding and does not count."""
        if mask is not None:
            mask = mask.ne(0)
            inputs = inputs * mask[:, None]
        self.count += len(inputs) if mask is None else mask.sum()
        self.total += inputs.sum(dim=0).float()
        self.squares += inputs.square().sum().float()
        self.product += (inputs.T @ (inputs @ self.omega.to(inputs.dtype))).float()

    def tensors(self) -> tuple[Tensor, ...]:
        """What is summed over processes."""
        return self.count, self.total, self.squares, self.product

    def second_moment(self) -> float:
        """Mean ||x||^2."""
        return float(self.squares / self.count.clamp_min(1.0))

    def variance(self) -> float:
        """Tr C: the trace of the covariance C of x."""
        mean = self.total / self.count.clamp_min(1.0)
        return max(float(self.squares / self.count.clamp_min(1.0) - mean.square().sum()), 0.0)

    def effective_rank(self) -> float:
        """(tr C)^2 / ||C||_F^2 (the participation ratio), with ||C||_F^2 = E ||C Omega||_F^2 / k."""
        squared = float(self._centred().square().sum()) / self.omega.shape[1]
        return self.variance() ** 2 / squared if squared else 0.0

    def variances(self) -> Tensor:
        """Leading eigenvalues of C, descending, at least 0 (Nystrom: Halko, Martinsson, Tropp 2011, sec. 5.5): EVA's signal."""
        sketch = self._centred()
        basis = torch.linalg.qr(sketch).Q
        core = torch.linalg.lstsq((basis.T @ self.omega).T, (basis.T @ sketch).T).solution
        values: Tensor = torch.linalg.eigvalsh((core + core.T) / 2.0)
        return values.flip(0).clamp_min(0.0)

    def _centred(self) -> Tensor:
        """C Omega, (in, k)."""
        count = self.count.clamp_min(1.0)
        mean = self.total / count
        return self.product / count - mean[:, None] * (mean @ self.omega)[None, :]
