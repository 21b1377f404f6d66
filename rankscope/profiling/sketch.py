"""Streaming sketches of weight gradients and of module inputs.

A linear module's gradient is G = sum_n delta_n x_n^T (out x in). Two random projections of it are kept,

    Y = G Omega   and   Z = Psi G,

from which the leading singular triples follow: Q = orth(Y), X = (Psi Q)^+ Z, G ~ Q X
(Tropp, Yurtsever, Udell, Cevher, "Practical sketching algorithms for low-rank matrix approximation", 2017, Alg. 4).
Both are linear in G, so sketches add up over batches and processes. Omega is Gaussian. Psi is a count sketch (Clarkson and
Woodruff 2013): it sums coordinates into l buckets under random signs. That takes one pass over the deltas and no memory, and
on real gradients it reconstructs as well as a Gaussian of l rows.
"""

from __future__ import annotations

import bisect
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rankscope.distributed import sum_over_processes
from rankscope.errors import SettingsError
from rankscope.targets import TargetModule

SKETCH_SIZE = 56  # columns k that every profile wants, if memory allows
LEAST_SIZE = 8  # whatever memory allows
SKETCH_SHARE = 0.25  # of the bytes of the model's weights
SKETCH_BYTES = 2**30  # allowed in any case
INPUT_ROWS = 2048  # converted to float32 at a time
Increment = tuple[Tensor, ...]
Size = TypeVar("Size", int, NDArray[np.float64])
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Decomposition:
    """G ~ left diag(values) right.

    Attributes:
        left: Leading left singular vectors, (out, k).
        values: Leading singular values, (k,), descending.
        right: Leading right singular vectors, (k, in).
        energy: ||G||_F^2; in expectation that of `GradientAccumulator.measure`, with less variance.
        error: Standard error of each leading singular value; 0 if the gradient was kept whole.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    energy: float
    error: float


class RandomMatrices:
    """The random matrices of all sizes, shared by the modules of each size. Equal seeds give equal matrices on any device.

    Args:
        k: Columns of the narrow sketch: how many singular triples can be found. The wide one has l = 4 k rows: with 3 k,
            single modules are off by half as much again.
        seed: Of the random numbers.
    """

    def __init__(self, *, k: int, seed: int) -> None:
        if isinstance(seed, bool) or not 0 <= seed < 2**32:
            raise SettingsError(f"`seed` must be a whole number from 0 to {2**32 - 1}, but got {seed!r}.")
        self.k, self.l, self.seed = k, 4 * k, seed
        self._drawn: dict[tuple[str, int, torch.device], Tensor] = {}

    def omega(self, size: int, device: torch.device) -> Tensor:
        """Omega, (size, k), standard normal."""
        return self._get("omega", size, device, lambda generator: torch.randn(size, self.k, generator=generator))

    def signs(self, size: int, device: torch.device) -> Tensor:
        """The signs of Psi, (size,)."""
        return self._get(
            "signs", size, device, lambda generator: torch.randint(2, (size,), generator=generator) * 2.0 - 1
        )

    def _get(self, which: str, size: int, device: torch.device, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        key = (which, size, device)
        if key not in self._drawn:
            seed = 2 * (self.seed * 1_000_003 + size) + (which == "signs")
            self._drawn[key] = draw(torch.Generator().manual_seed(seed)).to(device)
        return self._drawn[key]


# --- gradients ---------------------------------------------------------------------------------------------------


class GradientAccumulator(ABC):
    """The sum of one module's weighted batch gradients.

    Attributes:
        kept: What is linear in the gradient; `increment` returns as many tensors.
        squares: Sum over batches of weight times ||mean gradient||_F^2, a scalar.
        batches: How many were added.
    """

    def __init__(self, *kept: Tensor) -> None:
        self.kept: Increment = kept
        self.squares = kept[0].new_zeros(())
        self.batches = 0

    @abstractmethod
    def increment(self, inputs: Tensor, deltas: Tensor) -> Increment:
        """What sum_n deltas_n inputs_n^T adds to `kept`; `inputs` is (n, in), `deltas` is (n, out)."""

    @abstractmethod
    def decompose(self) -> Decomposition:
        """Leading singular triples and energy of the sum."""

    def measure(self, increment: Increment) -> Tensor:
        """||G||_F^2, a scalar on the device. Unbiased if sketched: Psi's columns are unit vectors of independent signs."""
        return increment[-1].square().sum()

    def add(self, increment: Increment, weight: float = 1.0) -> None:
        """Add a batch's gradient, which is already multiplied by the batch's weight."""
        self.squares += self.measure(increment) / weight
        for total, part in zip(self.kept, increment, strict=True):
            total += part
        self.batches += 1

    def scale(self, gradient: float, weight: float) -> None:
        """Multiply all gradients, and all batch weights, by factors."""
        for tensor in self.kept:
            tensor *= gradient * weight
        self.squares *= weight * gradient**2

    def tensors(self) -> Increment:
        """All that is summed over batches and processes."""
        return (*self.kept, self.squares)

    def clear(self) -> None:
        """Set every sum to zero."""
        for tensor in self.tensors():
            tensor.zero_()
        self.batches = 0


class ExactGradient(GradientAccumulator):
    """The whole gradient, (out, in), of a module so small that a sketch would save less than half."""

    def increment(self, inputs: Tensor, deltas: Tensor) -> Increment:
        """See `GradientAccumulator`."""
        return ((deltas.T @ inputs).to(self.squares.dtype),)

    def decompose(self) -> Decomposition:
        """See `GradientAccumulator`."""
        gradient = self.kept[0]
        return Decomposition(*thin_svd(solvable(gradient)), float(gradient.square().sum()), 0.0)


class SketchedGradient(GradientAccumulator):
    """Two-sided sketch (Y, Z) of a gradient, or of its transpose if in > out.

    The narrow sketch Y, (max(in, out), k), lies on the longer side and the wide one Z, (l, min(in, out)), on the shorter.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        matrices: RandomMatrices,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        short, long = sorted((in_features, out_features))
        self.narrow = torch.zeros(long, matrices.k, device=device, dtype=dtype)
        self.wide = torch.zeros(matrices.l, short, device=device, dtype=dtype)
        self.omega, self.signs = matrices.omega(short, device), matrices.signs(long, device)
        self.transposed = in_features > out_features
        super().__init__(self.narrow, self.wide)

    def increment(self, inputs: Tensor, deltas: Tensor) -> Increment:
        """See `GradientAccumulator`."""
        rows, columns = (inputs, deltas) if self.transposed else (deltas, inputs)  # G = rows^T columns
        narrow = rows.T @ (columns @ self.omega.to(columns.dtype))
        return narrow.to(self.narrow.dtype), (self.compress(rows).T @ columns).to(self.wide.dtype)

    def decompose(self) -> Decomposition:
        """The fit is X = Q^T G + (Psi Q)^+ Psi R, where R = G - Q Q^T G is what the range Q misses.

        For columns of R in any direction outside Q, with P = Psi Q and D = Psi Psi^T (the bucket sizes, diagonal), the energy
        of X is (tr P^+ D P^+^T - k) / (n - k) ||R||^2 too large, and the residual's is tr (I - P P^+) D / (n - k) ||R||^2.

        A leading direction loses about ||R||^2 / k to R. The fit scatters a k-th of the excess onto its own left vector, which
        gives the standard error of a singular value to first order (tests/profiling/test_real_gradients.py).
        """
        wide = solvable(self.wide)
        basis = torch.linalg.qr(solvable(self.narrow)).Q
        projected = solvable(self.compress(basis.T.to(self.signs.device)).T)
        inverse = torch.linalg.pinv(projected.cpu()).to(projected)  # small: see thin_svd
        core = inverse @ wide
        (n, k), l = basis.shape, len(projected)
        sizes = torch.bincount(torch.arange(n, device=basis.device) % l, minlength=l).to(basis.dtype)
        excess = (float((inverse.square() @ sizes).sum()) - k) / (n - k)
        seen = float(((1.0 - (projected * inverse.T).sum(dim=1)) * sizes).sum()) / (n - k)
        missed = float((wide - projected @ core).square().sum()) / seen
        energy = float(core.square().sum()) + (1.0 - excess) * missed
        left, values, right = thin_svd(core)
        left = basis @ left
        if self.transposed:
            left, right = right.T, left.T
        return Decomposition(left, values, right, energy, math.sqrt(max(missed * excess, 0.0)) / k)

    def compress(self, rows: Tensor) -> Tensor:
        """Rows Psi^T, (n, l): coordinate i is added to bucket i mod l under its sign, a block of rows at a time."""
        long, l = self.signs.numel(), self.wide.shape[0]
        signs = self.signs.to(rows.dtype)
        pieces = []
        for part in row_blocks(rows, 256):
            padded = part.new_zeros(len(part), -(-long // l) * l)
            torch.mul(part, signs, out=padded[:, :long])
            pieces.append(padded.view(len(part), -1, l).sum(dim=1))
        return torch.cat(pieces)


def new_accumulator(
    in_features: int,
    out_features: int,
    matrices: RandomMatrices,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> GradientAccumulator:
    """A sketch, or the gradient itself if a sketch would save less than half of it."""
    short, long = sorted((in_features, out_features))
    if 2 * _sketch_numbers(matrices.k, short, long) > short * long:
        return ExactGradient(torch.zeros(out_features, in_features, device=device, dtype=dtype))
    return SketchedGradient(in_features, out_features, matrices, device, dtype)


# --- sizes -------------------------------------------------------------------------------------------------------


def choose_sketch_size(targets: Sequence[TargetModule], limit: int | None, weight_bytes: int) -> tuple[int, int]:
    """The size k that a budget calls for, and the largest up to it within the memory bound.

    Args:
        targets: The target modules.
        limit: The budget, in adapter parameters: it calls for twice its mean rank, and 56 at least. None: 56.
        weight_bytes: Memory of the model's weights.
    """
    mean_rank = 0.0 if limit is None else limit / max(sum(target.rank_cost for target in targets), 1)
    wanted = max(SKETCH_SIZE, min(math.ceil(2 * mean_rank), max(target.full_rank for target in targets)))
    return wanted, largest_sketch_size(targets, wanted, weight_bytes)


def largest_sketch_size(targets: Sequence[TargetModule], wanted: int, weight_bytes: int, *, copies: int = 1) -> int:
    """The largest size up to `wanted` at which that many copies of all sketches fit the memory bound.

    The bound is a quarter of the memory of the model's weights, or 1 GiB if that is more; sizes below 8 are never chosen.
    A warning says if the bound binds.
    """
    short, long = np.sort([(t.in_features, t.out_features) for t in targets], axis=1).T.astype(np.float64)

    def memory(size: int) -> float:
        whole, sketch = short * long, _sketch_numbers(size, short, long)
        return 4.0 * float(np.where(2 * sketch > whole, whole, sketch).sum())

    bound = max(SKETCH_SHARE * weight_bytes, SKETCH_BYTES) / copies
    size = LEAST_SIZE + bisect.bisect_right(range(LEAST_SIZE + 1, wanted + 1), bound, key=memory)
    if size < wanted:
        logger.warning(
            "the gradient sketches have %d columns instead of %d, so as to take no more than a quarter of the memory of the "
            "model's weights; singular values beyond are estimated",
            *(size, wanted),
        )
    return size


def _sketch_numbers(k: int, short: Size, long: Size) -> Size:
    """How many numbers a sketch keeps."""
    return k * long + 4 * k * short


def bytes_of_weights(model: nn.Module) -> int:
    """Memory of the model's parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


# --- inputs ------------------------------------------------------------------------------------------------------


class InputSketch:
    """The covariance C of a module's inputs, from sums about the running mean m of the rows x.

    All sums are float32. With raw sums, the variance of a channel with a large mean would be a difference of large numbers:
    mere rounding in bfloat16. Parts are merged as in Chan, Golub and LeVeque 1983.

    Attributes:
        omega: (in, k), independent standard normal.
        count: Number of rows, an integer scalar.
        mean: m, (in,).
        squares: sum ||x - m||^2, a scalar.
        product: sum (x - m) (x - m)^T Omega, (in, k).
    """

    def __init__(self, omega: Tensor) -> None:
        self.omega = omega
        self.count = torch.zeros((), dtype=torch.int64, device=omega.device)
        self.mean, self.squares, self.product = (
            omega.new_zeros(len(omega)),
            omega.new_zeros(()),
            torch.zeros_like(omega),
        )

    def add(self, inputs: Tensor, mask: Tensor | None = None) -> None:
        """Add rows, (n, in), of any floating type; those with 0 in the mask, (n,), are padding and do not count."""
        masks = [None] * len(inputs) if mask is None else mask.eq(0)[:, None].split(INPUT_ROWS)
        for part, padding in zip(inputs.split(INPUT_ROWS), masks, strict=False):
            self._add(part.float(), padding)

    def _add(self, rows: Tensor, padding: Tensor | None) -> None:
        n = torch.full_like(self.count, len(rows))
        if padding is not None:
            n -= padding.sum()
            rows = rows.masked_fill(padding, 0.0)
        mean = rows.sum(dim=0) / n.clamp_min(1)
        rows = rows - mean
        if padding is not None:
            rows = rows.masked_fill(padding, 0.0)
        apart, total = mean - self.mean, self.count + n
        between = self.count * (n / total.clamp_min(1))
        self.squares += rows.square().sum() + between * apart.square().sum()
        self.product += rows.T @ (rows @ self.omega) + between * torch.outer(apart, apart @ self.omega)
        self.mean += apart * (n / total.clamp_min(1))
        self.count = total

    def over_processes(self) -> InputSketch:
        """A sketch of the rows of all processes; every process must call it."""
        total = InputSketch(self.omega)
        total.count += self.count
        total.mean += self.mean * self.count
        sum_over_processes([total.count, total.mean])
        total.mean /= total.count.clamp_min(1)
        apart = self.mean - total.mean
        total.squares += self.squares + self.count * apart.square().sum()
        total.product += self.product + self.count * torch.outer(apart, apart @ self.omega)
        sum_over_processes([total.squares, total.product])
        return total

    def second_moment(self) -> float:
        """Mean ||x||^2."""
        return self.variance() + float(self.mean.square().sum())

    def variance(self) -> float:
        """Tr C."""
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


# --- linear algebra ----------------------------------------------------------------------------------------------


def solvable(tensor: Tensor) -> Tensor:
    """The tensor on a device that torch.linalg's solvers support: its own, or the CPU for MPS."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor


def thin_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, k), S (k,) and Vh (k, n) with k = min(m, n), on any device.

    For a matrix on a GPU the triangular factor is decomposed on the CPU: cuSOLVER takes tens of milliseconds for it.
    """
    if matrix.device.type == "cpu":
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left, values, right
    if len(matrix) < matrix.shape[1]:
        left, values, right = thin_svd(matrix.T)
        return right.T, values, left.T
    basis, core = torch.linalg.qr(matrix)
    left, values, right = (part.to(matrix.device) for part in torch.linalg.svd(core.cpu(), full_matrices=False))
    return basis @ left, values, right


def row_blocks(matrix: Tensor, on_cpu: int) -> tuple[Tensor, ...]:
    """The matrix in blocks of rows, so that copies of a block are small: `on_cpu` rows, or 64 MB on other devices."""
    size = on_cpu if matrix.device.type == "cpu" else max(on_cpu, 2**24 // max(matrix.shape[1], 1))
    blocks: tuple[Tensor, ...] = matrix.split(size)
    return blocks
