"""How noisy measurements are, from repeats: several allocations, each on the same seeds."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def residual_variance(metrics: ArrayLike) -> float:
    """What rows (allocations) and columns (seeds) leave unexplained in a two-way layout: the variance of one measurement.

    Args:
        metrics: (n, n_seeds), at least two of each; with fewer nothing can be told, and it is 0.
    """
    table = np.asarray(metrics, dtype=np.float64)
    n, n_seeds = table.shape
    if n < 2 or n_seeds < 2:
        return 0.0
    residuals = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
    return float(np.square(residuals).sum() / ((n - 1) * (n_seeds - 1)))
