"""Pure functions from gradients and weights to a profile's features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rankscope.profiling.sketch import row_blocks

POOLED_BATCHES = 8  # the pooled share of signal counts as much as this many batches
Floats = NDArray[np.float64]


class EnergySplit(NamedTuple):
    """Where a mean gradient's energy comes from."""

    signal: float  # ||E g||_F^2, unbiased
    noise: float  # tr Cov(g) / examples
    fisher_trace: float  # E ||g||_F^2


def split_energy(energy: float, squares: float, sizes: Sequence[float], measured: float | None = None) -> EnergySplit:
    """Split ||G||_F^2, the energy of a mean gradient, by the scatter between batches (one-way analysis of variance).

    A batch of n_b examples has a mean gradient G_b with E ||G_b||^2 = ||E g||^2 + tr Cov(g) / n_b. So for independent examples
    E [squares - N ||G||^2] = (B - 1) tr Cov(g), squares = sum_b n_b ||G_b||^2 (McCandlish et al., arXiv 1812.06162, App. A.1).
    `measured` is ||G||_F^2 by the estimator that `squares` uses, if `energy` uses another: its error then cancels.
    """
    total = float(sum(sizes))
    variance = (squares - total * (energy if measured is None else measured)) / (len(sizes) - 1)
    signal = energy - variance / total
    return EnergySplit(signal, variance / total, signal + variance)


def signal_shares(signal: Floats, energy: Floats, n_batches: int, *, pooled: float | None = None) -> Floats:
    """Each module's share of signal in its energy, shrunk towards the pooled share (as in Efron and Morris 1975)."""
    if pooled is None:
        pooled = float(signal.sum() / energy.sum()) if energy.sum() > 0 else 0.0
    own = np.divide(signal, energy, out=np.full_like(signal, pooled), where=energy > 0)
    weight = (n_batches - 1) / (n_batches - 1 + POOLED_BATCHES)
    return np.asarray(weight * np.clip(own, 0.0, 1.0) + (1.0 - weight) * np.clip(pooled, 0.0, 1.0), dtype=np.float64)


def energy_tail(energies: Floats, total: float, size: int, length: int | None = None) -> Floats:
    """Estimate a spectrum of `size` energies beyond the leading k, up to `length`, as a decreasing power law.

    That of index j > k is e_k times the integral of (x / k)^-a over [j - 1/2, j + 1/2], with a >= 0 such that they sum to what
    the leading ones leave of the total; a = 0 if even that is less, since a sketch underrates its last values.
    """
    k, last = len(energies), float(energies[-1]) if len(energies) else 0.0
    tail = np.zeros(max(min(size, length if length is not None else size) - k, 0))
    left = total - float(np.sum(energies))
    if not (tail.size and last > 0 and left > 1e-7 * total):
        return tail
    share = left / last / k  # what the integral of x^-a has to be, x in units of k
    start, end = math.log1p(0.5 / k), math.log((size + 0.5) / k)

    def integral(exponent: float) -> float:
        b = (1.0 - exponent) or 1e-12  # a power with the integral of 1 / x
        return math.exp(b * start) * math.expm1(b * (end - start)) / b

    if share >= integral(0.0):
        return np.full_like(tail, last)
    low, high = 0.0, 1e3 * k  # at the highest exponent nothing is left
    for _ in range(80):
        middle = (low + high) / 2.0
        low, high = (middle, high) if integral(middle) > share else (low, middle)
    b, edges = (1.0 - high) or 1e-12, np.log((np.arange(k, k + tail.size + 1) + 0.5) / k)
    return np.asarray(last * k * np.exp(b * edges[:-1]) * np.expm1(b * np.diff(edges)) / b, dtype=np.float64)


def frobenius_norm(weight: Tensor) -> float:
    """||W||_F in single precision, without a copy of the weight."""
    return float(torch.stack([part.float().norm() for part in row_blocks(weight)]).norm())


def sensitivity(weight: Tensor, left: Tensor, right: Tensor) -> float:
    """Sum |w_ij g_ij| with g = left @ right: how the loss changes as single weights go (Molchanov et al. 2017; AdaLoRA)."""
    blocks, right = row_blocks(weight), right.to(weight.device)
    parts = zip(blocks, left.to(weight.device).split(len(blocks[0])), strict=True)
    return float(torch.stack([(part.float() * (rows @ right)).abs().sum() for part, rows in parts]).sum())
