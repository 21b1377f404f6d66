"""Finalists: which allocations are worth fresh seeds, what those seeds say of each, and which one to recommend."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from rankscope.performance import PerformanceModel
from rankscope.searching.noise import CONFIDENCE, residual_variance, t_interval
from rankscope.searching.trials import ONE_SHOT, POSTERIOR_MEAN, UNIFORM, Trial

N_SAMPLED = 3  # finalists beside uniform and one-shot
_SIMPLICITY = {UNIFORM: 0, ONE_SHOT: 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finalist:
    """An allocation that was trained again on fresh seeds.

    Attributes:
        trial: The trial that made it a finalist.
        metrics_by_seed: Validation metric of each fresh seed.
        difference: Mean paired difference to the finalist `uniform` on these seeds; None for uniform itself.
        interval: Of the difference, at 95 %, over all finalists at once; None for uniform, with fewer than 3 seeds, and where all
            differences are equal.
    """

    trial: Trial
    metrics_by_seed: Mapping[str, float]
    difference: float | None
    interval: tuple[float, float] | None

    @property
    def metric(self) -> float:
        """Mean validation metric over the fresh seeds."""
        return fmean(self.metrics_by_seed.values())


def choose_finalists(
    trials: Sequence[Trial], smoothed: Callable[[Trial], float] | None = None, n_sampled: int = N_SAMPLED
) -> list[Trial]:
    """Uniform, one-shot, and a few different others.

    Args:
        trials: Completed ones.
        smoothed: The performance model's prediction of a trial's metric; None: no model is to be believed.
        n_sampled: With a model, the others are the allocation of its posterior mean, the best by its prediction, and the
            best observed ones; without, the best observed ones only. So many in all.
    """
    ranked = sorted((t for t in trials if t.reused is None), key=lambda t: (-t.metric, t.loss, t.number))
    starts = [next((t for t in ranked if t.origin == origin), None) for origin in (UNIFORM, ONE_SHOT)]
    chosen = [t for t in starts if t is not None]
    others = [t for t in ranked if t.proposed]
    if smoothed is not None:
        newest = sorted((t for t in others if t.origin == POSTERIOR_MEAN), key=lambda t: -t.number)[:1]
        others = [*newest, *sorted(others, key=smoothed, reverse=True)[:1], *others]
    limit, taken = len(chosen) + n_sampled, {t.allocation for t in chosen}
    for trial in others:
        if len(chosen) < limit and trial.allocation not in taken:
            chosen.append(trial)
            taken.add(trial.allocation)
    return chosen


def smoothing(belief: PerformanceModel | None) -> Callable[[Trial], float] | None:
    """A model's prediction of a trial's metric, for `choose_finalists`."""
    return None if belief is None else lambda trial: float(belief.predict([trial.allocation.vector])[0])


def judge(trials: Sequence[Trial], metrics: Sequence[Mapping[str, float]]) -> tuple[Finalist, ...]:
    """Finalists from their trials and what they reached on the same fresh seeds: differences to uniform, with intervals.

    The interval of a mean paired difference d over n seeds is

        d ± t(1 - 0.05 / 2m; (k - 1)(n - 1)) · sqrt(2 s² / n),

    s² being what k finalists and n seeds leave unexplained in a two-way layout, and m = k - 1 the number of differences
    (Dunn, Multiple comparisons among means, JASA 1961): all intervals hold at once with 95 %, so that of whichever
    finalist is chosen afterwards, on these very seeds, holds too.

    Args:
        trials: One a finalist.
        metrics: The validation metric of each by seed; all of the same seeds.
    """
    uniform = next((m for t, m in zip(trials, metrics, strict=True) if t.origin == UNIFORM), None)
    table = np.array([list(m.values()) for m in metrics])
    others, n_seeds = len(table) - 1, table.shape[1]
    variance = 2.0 * residual_variance(table)
    finalists = []
    for trial, mine in zip(trials, metrics, strict=True):
        difference = interval = None
        if uniform is not None and trial.origin != UNIFORM:
            difference = fmean(mine[seed] - uniform[seed] for seed in mine)
            found = t_interval(
                difference,
                variance,
                n_seeds,
                freedom=others * (n_seeds - 1),
                confidence=1.0 - (1.0 - CONFIDENCE) / others,
            )
            interval = None if math.isnan(found.low) else (found.low, found.high)
        finalists.append(Finalist(trial=trial, metrics_by_seed=mine, difference=difference, interval=interval))
    return tuple(finalists)


def recommend(finalists: Sequence[Finalist], belief: PerformanceModel | None = None) -> Finalist:
    """The finalist that trials and fresh seeds together value most; without a believable model, the simplest of the good ones.

    With a model, its posterior from the trials is weighed with the fresh seeds (`PerformanceModel.weigh`), so that neither a
    lucky trial nor a lucky seed decides alone.

    Without, it is the simplest finalist within one standard error of the best; uniform is simplest, then one-shot: the
    one-standard-error rule (Breiman, Friedman, Olshen, Stone 1984, §3.4.3), with the standard error of a paired difference,
    pooled over all finalists: what seeds and finalists leave unexplained in a two-way layout. One seed tells nothing of
    noise; then it is the best.

    Args:
        finalists: At least one.
        belief: Fitted to the trials.
    """
    metrics = np.array([list(finalist.metrics_by_seed.values()) for finalist in finalists])
    means = metrics.mean(axis=1)
    if belief is not None:
        ranks = [finalist.trial.allocation.vector for finalist in finalists]
        return finalists[int(np.argmax(belief.weigh(ranks, means, metrics.shape[1])))]
    error = _standard_error(metrics)
    order = sorted(range(len(metrics)), key=lambda i: (_SIMPLICITY.get(finalists[i].trial.origin, 2), -means[i]))
    return next(finalists[i] for i in order if means[i] >= means.max() - error)


def _standard_error(metrics: np.ndarray[tuple[int, int], np.dtype[np.float64]]) -> float:
    """Of the mean paired difference of two rows of (n_finalists, n_seeds)."""
    return float(np.sqrt(2.0 * residual_variance(metrics) / metrics.shape[1]))
