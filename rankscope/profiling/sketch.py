"""Streaming sketches of weight gradients and of module inputs.

Of a linear module's gradient G = sum_n delta_n x_n^T (out x in), random projections Y = G Omega and Z = Psi G are kept. With
Q = orth(Y), the leading singular triples are those of Q X, X = (Psi Q)^+ Z (Tropp, Yurtsever, Udell, Cevher 2017, "Practical
sketching algorithms for low-rank matrix approximation", Alg. 4). Omega is Gaussian; Psi is a count sketch (Clarkson and Woodruff
2013), which sums coordinates into l buckets under random signs.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import cache
from itertools import repeat
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rankscope.distributed import sum_over_processes
from rankscope.errors import SettingsError
from rankscope.targets import TargetModule

SKETCH_SIZE = 56  # columns k of any profile, if memory allows
LEAST_SIZE = 8  # whatever memory allows
SKETCH_SHARE = 0.25  # of the bytes of the model's weights
SKETCH_BYTES = 2**30  # allowed in any case
Increment = tuple[Tensor, ...]
logger = logging.getLogger(__name__)


class Decomposition(NamedTuple):
    """The leading singular triples of G ~ left diag(values) right."""

    left: Tensor  # (out, k)
    values: Tensor  # (k,), descending
    right: Tensor  # (k, in)
    energy: float  # ||G||_F^2; in expectation that of `GradientAccumulator.measure`, with less variance
    error: float  # standard error of each singular value; 0 if the gradient was kept whole


class RandomMatrices:
    """Omega, (size, k), and the signs of Psi, (size,), of each size; equal for equal seeds on any device."""

    def __init__(self, *, k: int, seed: int) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
            raise SettingsError(f"`seed` must be a whole number from 0 to {2**32 - 1}, but got {seed!r}.")
        self.k, self.l = k, 4 * k  # with l = 3 k, singular values of single modules are off by half as much again

        def generator(size: int, which: int) -> torch.Generator:
            return torch.Generator().manual_seed(2 * (int(seed) * 1_000_003 + size) + which)

        self.omega = cache(lambda size, device: torch.randn(size, k, generator=generator(size, 0)).to(device))
        self.signs = cache(lambda n, device: torch.randint(2, (n,), generator=generator(n, 1)).to(device) * 2.0 - 1)


class GradientAccumulator:
    """The sum of one module's weighted batch gradients: a sketch, or G itself if a sketch would save less than half of it.

    `kept` holds Y, (max(in, out), k), and Z, (l, min(in, out)), of G or, if in > out, of G^T; or G itself. `squares` sums weight
    times ||mean gradient||_F^2 over batches. Both have the device and the type of `like`. `part` is what some of the rows,
    those of image tokens, add to the last tensor of `kept`, which is all that `measure` needs; None without such rows.
    """

    part: Tensor | None = None

    def __init__(self, in_features: int, out_features: int, matrices: RandomMatrices, like: Tensor) -> None:
        short, long = sorted((in_features, out_features))
        self.exact = 2 * (matrices.k * long + matrices.l * short) > short * long
        shapes = [(out_features, in_features)] if self.exact else [(long, matrices.k), (matrices.l, short)]
        self.kept: Increment = tuple(like.new_zeros(shape) for shape in shapes)
        self.squares, self.transposed = like.new_zeros(()), in_features > out_features
        self.batches = like.new_zeros((), dtype=torch.int64)
        if not self.exact:
            self.omega, self.signs = matrices.omega(short, like.device), matrices.signs(long, like.device)

    def increment(self, inputs: Tensor, deltas: Tensor) -> Increment:
        """What sum_n deltas_n inputs_n^T adds to `kept`, for (n, in) and (n, out)."""
        wide = self._wide(inputs, deltas)
        if self.exact:
            return (wide,)
        rows, columns = self._sides(inputs, deltas)
        return (rows.T @ (columns @ self.omega.to(columns.dtype))).to(self.squares.dtype), wide

    def add_part(self, inputs: Tensor, deltas: Tensor, factor: float = 1.0) -> None:
        """Add rows of a batch that are told apart; `add` counts them with the others."""
        if self.part is None:
            self.part = torch.zeros_like(self.kept[-1])
        self.part += self._wide(inputs, deltas) * factor

    def _sides(self, inputs: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor]:
        """The rows and the columns with G, or its transpose, = rows^T columns, whose longer side is that of the rows."""
        return (inputs, deltas) if self.transposed else (deltas, inputs)

    def _wide(self, inputs: Tensor, deltas: Tensor) -> Tensor:
        """What is added to Z; or to G."""
        if self.exact:
            return (deltas.T @ inputs).to(self.squares.dtype)
        rows, columns = self._sides(inputs, deltas)
        return (self.compress(rows).T @ columns).to(self.squares.dtype)

    def measure(self, increment: Increment) -> Tensor:
        """||G||_F^2, a scalar on the device; unbiased for a sketch, since Psi's columns are unit vectors."""
        return increment[-1].square().sum()

    def add(self, increment: Increment, weight: float = 1.0) -> None:
        """Add a batch's gradient, which is already multiplied by the batch's weight."""
        self.squares += self.measure(increment) / weight
        for total, part in zip(self.kept, increment, strict=True):
            total += part
        self.batches += 1

    def rescale(self, factor: float) -> None:
        """Multiply all gradients so far."""
        parts = () if self.part is None else (self.part,)
        for tensor in (*self.kept, *parts, self.squares.mul_(factor)):
            tensor *= factor

    def tensors(self) -> Increment:
        """All that is summed over batches and processes."""
        return (*self.kept, self.squares, self.batches)

    def clear(self) -> None:
        """Forget all batches."""
        self.part = None
        for tensor in self.tensors():
            tensor.zero_()

    def decompose(self) -> Decomposition:
        """Leading singular triples and energy of the sum.

        X = Q^T G + (Psi Q)^+ Psi R, where R = G - Q Q^T G is what Q misses. For columns of R in any direction outside Q, with
        P = Psi Q and D = Psi Psi^T (the bucket sizes, diagonal), the energy of X is (tr P^+ D P^+^T - k) / (n - k) ||R||^2 too
        large, and the residual's is tr (I - P P^+) D / (n - k) ||R||^2. A leading direction loses about ||R||^2 / k to R, and
        a k-th of the excess falls on its own left vector: to first order, that is the standard error of a singular value.
        """
        if self.exact:
            return Decomposition(*thin_svd(solvable(self.kept[0])), float(self.kept[0].square().sum()), 0.0)
        narrow, wide = map(solvable, self.kept)
        basis = torch.linalg.qr(narrow).Q
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
        long, l = self.signs.numel(), len(self.kept[1])
        signs, pieces = self.signs.to(rows.dtype), []
        for part in row_blocks(rows):
            padded = part.new_zeros(len(part), -(-long // l) * l)
            torch.mul(part, signs, out=padded[:, :long])
            pieces.append(padded.view(len(part), -1, l).sum(dim=1))
        return torch.cat(pieces)


def choose_sketch_size(targets: Sequence[TargetModule], limit: int | None, weight_bytes: int) -> tuple[int, int]:
    """The size k that a budget of `limit` calls for (twice its mean rank, 56 at least), and the largest within memory."""
    mean_rank = 0.0 if limit is None else limit / max(sum(target.rank_cost for target in targets), 1)
    wanted = max(SKETCH_SIZE, min(math.ceil(2 * mean_rank), max(target.full_rank for target in targets)))
    return wanted, largest_sketch_size(targets, wanted, weight_bytes)


def largest_sketch_size(targets: Sequence[TargetModule], wanted: int, weight_bytes: int, *, copies: int = 1) -> int:
    """The largest size from 8 to `wanted` at which all copies of all sketches fit a quarter of the weights' memory, or 1 GiB."""
    short, long = np.sort([(t.in_features, t.out_features) for t in targets], axis=1).T.astype(np.float64)
    sketches = np.arange(LEAST_SIZE, wanted + 1)[:, None] * (long + 4 * short)
    memory = 4 * np.where(2 * sketches > short * long, short * long, sketches).sum(axis=1)  # of each size, in bytes
    fitting = int((memory <= max(SKETCH_SHARE * weight_bytes, SKETCH_BYTES) / copies).sum())
    size = LEAST_SIZE + max(fitting - 1, 0)
    if size < wanted:
        why = "so as to take no more than a quarter of the memory of the model's weights; singular values beyond are estimated"
        logger.warning("the gradient sketches have %d columns instead of %d, %s", size, wanted, why)
    return size


def bytes_of_weights(model: nn.Module) -> int:
    """Memory of the model's parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


class InputSketch:
    """The covariance C of a module's inputs, from sums about the running mean (Chan, Golub and LeVeque 1983).

    With raw sums, the variance of a channel with a large mean would be mere rounding.
    """

    def __init__(self, omega: Tensor) -> None:
        self.omega = omega  # (in, k), standard normal
        self.count = torch.zeros((), dtype=torch.int64, device=omega.device)
        self.mean = omega.new_zeros(len(omega))  # m
        self.squares = omega.new_zeros(())  # sum ||x - m||^2
        self.product = torch.zeros_like(omega)  # sum (x - m) (x - m)^T Omega

    def add(self, inputs: Tensor, mask: Tensor | None = None) -> None:
        """Add rows, (n, in), of any floating type; those with 0 in the mask, of n entries, are padding and do not count."""
        masks = repeat(None) if mask is None else mask.to(inputs.device).eq(0).view(-1, 1).split(2048)
        for part, padding in zip(inputs.split(2048), masks, strict=False):  # since rows become float32
            n = torch.full_like(self.count, len(part)) - (0 if padding is None else padding.sum())
            rows = part.float() if padding is None else part.float().masked_fill(padding, 0.0)
            mean = rows.sum(dim=0) / n.clamp_min(1)
            rows = rows - mean if padding is None else (rows - mean).masked_fill(padding, 0.0)
            apart, total = mean - self.mean, self.count + n
            between = self.count * (n / total.clamp_min(1))
            self.squares += rows.square().sum() + between * apart.square().sum()
            self.product += rows.T @ (rows @ self.omega) + between * torch.outer(apart, apart @ self.omega)
            self.mean += apart * (n / total.clamp_min(1))
            self.count = total

    def over_processes(self) -> InputSketch:
        """A sketch of the rows of all processes; every process must call it."""
        total = InputSketch(self.omega)
        total.count, total.mean = self.count.clone(), self.mean * self.count
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

    def variances(self) -> Tensor:
        """Leading eigenvalues of C, descending, at least 0 (Nystrom: Halko, Martinsson, Tropp 2011, sec. 5.5): EVA's signal."""
        omega, sketch = solvable(self.omega), solvable(self.product / self.count.clamp_min(1))
        basis = torch.linalg.qr(sketch).Q
        core = torch.linalg.lstsq((basis.T @ omega).T, (basis.T @ sketch).T).solution
        values: Tensor = torch.linalg.eigvalsh((core + core.T) / 2.0)
        return values.flip(0).clamp_min(0.0)


def solvable(tensor: Tensor) -> Tensor:
    """The tensor on a device that torch.linalg's solvers support: its own, or the CPU for MPS."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor


def thin_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, k), S (k,) and Vh (k, n), k = min(m, n); cuSOLVER would be slow, so the CPU decomposes the triangular factor."""
    if matrix.device.type == "cpu":
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left, values, right
    if len(matrix) < matrix.shape[1]:
        left, values, right = thin_svd(matrix.T)
        return right.T, values, left.T
    basis, core = torch.linalg.qr(matrix)
    left, values, right = (part.to(matrix.device) for part in torch.linalg.svd(core.cpu(), full_matrices=False))
    return basis @ left, values, right


def row_blocks(matrix: Tensor) -> tuple[Tensor, ...]:
    """The matrix in blocks of rows, so that copies of a block are small: 256 rows on the CPU, 64 MB on other devices."""
    size = 256 if matrix.device.type == "cpu" else max(256, 2**24 // max(matrix.shape[1], 1))
    blocks: tuple[Tensor, ...] = matrix.split(size)
    return blocks
