"""Confirmation: the finalists of a search, trained again on fresh seeds, so that no lucky trial is recommended."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np
import optuna

from rankscope.exceptions import TrainingError
from rankscope.searching.noise import residual_variance
from rankscope.searching.trials import POSTERIOR_MEAN, Trial
from rankscope.tasks import Task
from rankscope.training import TrainingConfig, train

logger = logging.getLogger(__name__)

CONFIRMATION_KEY = "confirmation"
_SIMPLICITY = {"uniform": 0, "one-shot": 1}
FIRST_SEED = 500  # trials train on seeds 0, 1, …


@dataclass(frozen=True, slots=True, kw_only=True)
class Finalist:
    """An allocation that was trained again on fresh seeds.

    Attributes:
        trial: The trial that made it a finalist.
        metrics_by_seed: Validation metric of each fresh seed.
        difference: Mean paired difference to the finalist `uniform` on these seeds; None for uniform itself.
    """

    trial: Trial
    metrics_by_seed: Mapping[str, float]
    difference: float | None

    @property
    def metric(self) -> float:
        """Mean validation metric over the fresh seeds."""
        return fmean(self.metrics_by_seed.values())


def choose_finalists(
    trials: Sequence[Trial], smoothed: Callable[[Trial], float] | None = None, n_sampled: int = 3
) -> list[Trial]:
    """Uniform, one-shot, and a few different others.

    Args:
        trials: Completed ones.
        smoothed: The performance model's prediction of a trial's metric; None: no model is to be believed.
        n_sampled: With a model, the others are the allocation of its posterior mean, the best by its prediction, and the
            best observed ones; without, the best observed ones only. So many in all.
    """
    ranked = sorted((t for t in trials if t.reused is None), key=lambda t: (-t.metric, t.loss, t.number))
    starts = [next((t for t in ranked if t.origin == origin), None) for origin in ("uniform", "one-shot")]
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


def recommend(finalists: Sequence[Finalist]) -> Finalist:
    """The simplest finalist within one standard error of the best; uniform is simplest, then one-shot.

    The one-standard-error rule (Breiman, Friedman, Olshen, Stone 1984, §3.4.3), with the standard error of a paired difference,
    pooled over all finalists: what seeds and finalists leave unexplained in a two-way layout. One seed tells nothing of
    noise; then it is the best.
    """
    metrics = np.array([list(finalist.metrics_by_seed.values()) for finalist in finalists])
    means = metrics.mean(axis=1)
    error = float(np.sqrt(2.0 * residual_variance(metrics) / metrics.shape[1]))
    order = sorted(range(len(metrics)), key=lambda i: (_SIMPLICITY.get(finalists[i].trial.origin, 2), -means[i]))
    return next(finalists[i] for i in order if means[i] >= means.max() - error)


def confirm(
    study: optuna.Study,
    task: Task,
    finalists: Sequence[Trial],
    training: TrainingConfig,
    *,
    n_seeds: int,
    on_run: Callable[[int, int], None] | None = None,
) -> tuple[Finalist, ...]:
    """Trains each finalist on the same fresh seeds; runs that the study already holds are not repeated.

    A finalist that diverges on a fresh seed is dropped.

    Args:
        study: Keeps the runs, so that an interrupted confirmation goes on.
        task: Where model, data, loss and metric come from.
        finalists: Trials, each with its allocation and learning rate.
        training: The schedule.
        n_seeds: Fresh seeds.
        on_run: Called with the number of runs done and of runs in all.
    """
    known: dict[str, dict[str, float | None]] = dict(study.user_attrs.get(CONFIRMATION_KEY, {}))
    for index, trial in enumerate(finalists):
        runs = known.setdefault(_key(trial), {})
        for seed in range(FIRST_SEED, FIRST_SEED + n_seeds):
            if str(seed) not in runs:
                runs[str(seed)] = _metric(task, trial, training, seed)
                study.set_user_attr(CONFIRMATION_KEY, known)
            if on_run:
                on_run(index * n_seeds + seed - FIRST_SEED + 1, len(finalists) * n_seeds)
    seeds = [str(seed) for seed in range(FIRST_SEED, FIRST_SEED + n_seeds)]
    metrics = {t.number: {seed: known[_key(t)][seed] for seed in seeds} for t in finalists}
    steady = {number: by_seed for number, found in metrics.items() if (by_seed := _complete(found)) is not None}
    uniform = next((steady[t.number] for t in finalists if t.origin == "uniform" and t.number in steady), None)
    return tuple(_finalist(t, steady[t.number], uniform) for t in finalists if t.number in steady)


def _finalist(trial: Trial, metrics: Mapping[str, float], uniform: Mapping[str, float] | None) -> Finalist:
    difference = None
    if uniform is not None and trial.origin != "uniform":
        difference = fmean(metrics[seed] - uniform[seed] for seed in metrics)
    return Finalist(trial=trial, metrics_by_seed=metrics, difference=difference)


def _metric(task: Task, trial: Trial, training: TrainingConfig, seed: int) -> float | None:
    """The validation metric of one run; None where it diverges."""
    try:
        _, result = train(task, trial.allocation, replace(training, learning_rate=trial.learning_rate), seed=seed)
    except TrainingError as error:
        logger.warning("trial %d is no finalist: on seed %d %s", trial.number, seed, error)
        return None
    return result.metrics[task.metric]


def _complete(metrics: Mapping[str, float | None]) -> dict[str, float] | None:
    """The metrics, if none is missing."""
    found = {seed: value for seed, value in metrics.items() if value is not None}
    return found if len(found) == len(metrics) else None


def _key(trial: Trial) -> str:
    return f"{trial.allocation.fingerprint}@{trial.learning_rate:g}"
