"""Statistics of paired runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression
from scipy.stats import norm, permutation_test, t

from rankscope.searching import CONFIDENCE, FEWEST_PAIRS, t_interval
from rankscope.units import Interval

N_DRAWS = 4_000  # of a bootstrap
Floats = NDArray[np.float64]


def paired_difference(ours: Sequence[float], theirs: Sequence[float], *, confidence: float = CONFIDENCE) -> Interval:
    """Mean of the differences seed by seed, with Student's paired t interval (see `t_interval` for where there is none).

    Simulated coverage at 5, 8 and 16 pairs is 95 % for normal differences and for differences of accuracies, also near
    100 % accuracy; it falls to 92 % where differences are strongly skewed (skewness 1.4).

    >>> paired_difference([0.8, 0.91, 0.84], [0.7, 0.8, 0.75]).text()
    '+0.100 [+0.075, +0.125]'
    """
    differences = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    n = len(differences)
    variance = float(np.var(differences, ddof=1)) if n > 1 else 0.0
    return t_interval(fmean(differences), variance, n, freedom=n - 1, confidence=confidence)


def paired_p_value(ours: Sequence[float], theirs: Sequence[float], *, seed: int = 0) -> float:
    """Two-sided p-value of a sign-flip permutation test of the mean difference, exact up to 13 pairs; NaN below 3 pairs.

    >>> paired_p_value([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    0.25
    """
    if len(ours) < FEWEST_PAIRS:
        return math.nan
    differences = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    if np.allclose(differences, 0.0):
        return 1.0
    rng = np.random.default_rng(seed)
    return float(permutation_test((differences,), np.mean, permutation_type="samples", rng=rng).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values: rejecting those below 0.05 errs anywhere in the family with at most 5 %.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p_values, kind="stable")
    scaled = [(len(order) - n) * p_values[i] for n, i in enumerate(order)]
    adjusted = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return [float(adjusted[place]) for place in np.argsort(order)]


def seed_noise(metric: Sequence[float]) -> float:
    """How far the means of two groups of so many seeds of one method lie apart, 95 % of the time at most; NaN below 2."""
    return 1.96 * math.sqrt(2.0 / len(metric)) * stdev(metric) if len(metric) > 1 else math.nan


def resampled_means(scores: Floats, *, seed: int = 0) -> Floats:
    """Mean scores of cells under resampling of the seeds that they share, (N_DRAWS + 1, n_cells); first the means as they are.

    `scores` are (n_cells, n_seeds), NaN where a cell was not measured on a seed. Every draw takes the same seeds for all cells.
    """
    n = scores.shape[1]
    weights = np.vstack([np.ones(n), np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=N_DRAWS)])
    known = ~np.isnan(scores)
    counts = weights @ known.T
    sums = weights @ np.where(known, scores, 0.0).T
    means: Floats = np.where(counts > 0, sums / np.maximum(counts, 1), sums[0] / counts[0])
    return means


def monotone(curves: Floats) -> Floats:
    """Each curve's isotonic regression on ascending budgets, (n, n_budgets)."""
    return np.array([isotonic_regression(curve).x for curve in curves])


def needed_budget(levels: Floats, budgets: Floats, rising: Floats) -> Floats:
    """The budget at which each `monotone` curve reaches its level, (n,), joined by straight lines over log parameters.

    The smallest budget where that is good enough already, and infinity where none is.

    >>> needed_budget(np.array([0.85]), np.array([1.0, 2.0, 4.0]), np.array([[0.8, 0.9, 0.95]])).round(3)
    array([1.414])
    """
    last, logs, row = len(budgets) - 1, np.log(budgets), np.arange(len(levels))
    after = (rising < levels[:, None]).sum(axis=1)
    low, high = np.maximum(after - 1, 0), np.minimum(after, last)
    below, rise = rising[row, low], rising[row, high] - rising[row, low]
    share = np.where(rise > 0, (levels - below) / np.where(rise > 0, rise, 1.0), 0.0)
    found: Floats = np.where(after > last, np.inf, np.exp(logs[low] + share * (logs[high] - logs[low])))
    return found


def bootstrap_interval(draws: Floats, n: int) -> Interval:
    """The first of the `draws` with the expanded percentile interval of the others, which covers 95 % also for few seeds.

    Its quantiles are those at which a plain percentile interval would be Student's (Hesterberg, The American Statistician 69,
    2015, section 5.3). NaN for fewer than 3 seeds.
    """
    if n < FEWEST_PAIRS or np.isnan(draws[0]):
        return Interval(float(draws[0]), math.nan, math.nan)
    tail = norm.cdf(-math.sqrt(n / (n - 1)) * t.ppf(0.5 + CONFIDENCE / 2, n - 1))
    low, high = np.quantile(draws[1:], [tail, 1 - tail], method="inverted_cdf")
    return Interval(float(draws[0]), float(low), float(high))


def uniform_budget_multipliers(scores: Floats, parameters: Sequence[float], uniform: Sequence[int]) -> list[Interval]:
    """By how much uniform must grow to match each cell: the parameters it needs over the cell's, with a 95 % interval.

    `scores` are (n_cells, n_seeds), of which the rows `uniform` are uniform's. Uniform's own factor is 1. NaN where uniform has
    one budget only, or a cell no parameters.
    """
    factors, own = [Interval(math.nan, math.nan, math.nan)] * len(scores), np.asarray(parameters, dtype=float)
    order = sorted(uniform, key=lambda cell: own[cell])
    if len(order) < 2:
        return factors
    means = resampled_means(scores)
    rising = monotone(means[:, order])
    for cell in np.flatnonzero(own):
        needed = needed_budget(means[:, cell], own[order], rising) / own[cell]
        alone = Interval(1.0, math.nan, math.nan)
        factors[cell] = alone if cell in order else bootstrap_interval(needed, scores.shape[1])
    return factors
