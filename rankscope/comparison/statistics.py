"""Differences between methods, seed by seed."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A mean with its bootstrap confidence interval."""

    mean: float
    low: float
    high: float


def paired_difference(
    ours: Sequence[float], theirs: Sequence[float], *, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Mean of the differences seed by seed, with a BCa bootstrap interval (Efron 1987, by scipy).

    Needs at least 3 pairs; with fewer, or where all differences are equal, the interval is the mean alone.

    >>> paired_difference([0.8, 0.9, 0.85], [0.7, 0.8, 0.75]).mean.__round__(3)
    0.1
    """
    from scipy.stats import bootstrap

    differences = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    mean = fmean(differences)
    if len(differences) < 3 or np.ptp(differences) < 1e-12:
        return Interval(mean, mean, mean)
    found = bootstrap((differences,), np.mean, confidence_level=confidence, rng=np.random.default_rng(seed))
    return Interval(mean, float(found.confidence_interval.low), float(found.confidence_interval.high))
