"""How noisy measurements are, from repeats, and the confidence interval that follows."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

CONFIDENCE = 0.95
FEWEST_PAIRS = 3  # with two, the t interval is 4.5 times as wide as with three: it says nothing


class Interval(NamedTuple):
    """A mean with its confidence interval; `low` and `high` are NaN where there is none."""

    mean: float
    low: float
    high: float

    def text(self, *, scale: float = 1.0, digits: int = 3) -> str:
        """As tables show it; a dash where there is no interval.

        >>> Interval(0.02, 0.01, 0.03).text(scale=100, digits=1), Interval(0.02, math.nan, math.nan).text()
        ('+2.0 [+1.0, +3.0]', '+0.020 [-]')
        """
        mean, low, high = (f"{scale * value:+.{digits}f}" for value in self)
        return f"{mean} [-]" if math.isnan(self.low) else f"{mean} [{low}, {high}]"


def t_interval(mean: float, variance: float, n: int, *, freedom: int, confidence: float = CONFIDENCE) -> Interval:
    """Student's interval of the mean of n paired differences: mean ± t(1 - (1 - confidence) / 2; freedom) sqrt(variance / n).

    There is none for fewer than 3 pairs, nor where all differences are equal: a variance of zero is estimated from too few
    or too coarse values, and an interval of no width would claim that the mean is exact.

    Args:
        mean: Of the differences.
        variance: Of one difference.
        n: Number of pairs.
        freedom: Degrees of freedom of `variance`; n - 1 where it comes from these pairs alone.
        confidence: Coverage; for m intervals that shall hold at once, 1 - (1 - 0.95) / m.

    >>> t_interval(0.5, 0.04, 4, freedom=3).text()
    '+0.500 [+0.182, +0.818]'
    """
    from scipy.stats import t

    if n < FEWEST_PAIRS or not variance > 1e-24:
        return Interval(mean, math.nan, math.nan)
    half = float(t.ppf(0.5 + confidence / 2.0, freedom)) * math.sqrt(variance / n)
    return Interval(mean, mean - half, mean + half)


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
