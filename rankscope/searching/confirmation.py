"""Confirmation: the last share of a search's trainings, spent on its finalists on fresh seeds, so that no luck is recommended."""

from __future__ import annotations

import logging
import math
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

import numpy as np
import optuna
from numpy.typing import ArrayLike
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import kendalltau

from rankscope.errors import SettingsError, TrainingError
from rankscope.performance import PerformanceModel
from rankscope.searching.storage import ONE_SHOT, POSTERIOR_MEAN, UNIFORM, Trial, learning_rate_of, seeds_of
from rankscope.tasks import Task
from rankscope.training import TrainingConfig, train

logger = logging.getLogger(__name__)


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
        return finalists[int(np.argmax(belief.posterior_given_retests(ranks, means, metrics.shape[1])))]
    error = _standard_error(metrics)
    order = sorted(range(len(metrics)), key=lambda i: (_SIMPLICITY.get(finalists[i].trial.origin, 2), -means[i]))
    return next(finalists[i] for i in order if means[i] >= means.max() - error)


def _standard_error(metrics: np.ndarray[tuple[int, int], np.dtype[np.float64]]) -> float:
    """Of the mean paired difference of two rows of (n_finalists, n_seeds)."""
    return float(np.sqrt(2.0 * residual_variance(metrics) / metrics.shape[1]))


MIN_PAIRS = 5  # with fewer, a rank correlation says nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How alike short and long training rank the same allocations.

    Attributes:
        steps: Of the short training.
        of_steps: Of the long one.
        kendall: Kendall's tau of the two metrics.
        pairs: Trials behind it.
        fresh: Whether long training is a run of its own, on other seeds, and not the end of the short one.
    """

    steps: int
    of_steps: int
    kendall: float
    pairs: int
    fresh: bool

    def __str__(self) -> str:
        what = "finalists, trained in full on fresh seeds" if self.fresh else "trials at their end"
        return f"{self.steps} of {self.of_steps} steps rank {self.pairs} {what}: Kendall's tau {self.kendall:.2f}"


def agreement_on_the_way(trials: Sequence[Trial]) -> list[Agreement]:
    """Metrics about a quarter and half way against the final metric, over trials that were evaluated there.

    Metrics are taken less the mean of their learning rate: allocations are compared, not rates.
    """
    trained = [t for t in trials if t.reused is None]
    common = set.intersection(*(set(t.history) for t in trained)) if trained else set()
    steps = max(common, default=0)
    found = []
    for step in sorted(
        {min(common, key=lambda s: abs(s - share * steps)) for share in (0.25, 0.5) if common} - {steps}
    ):
        early = _less_rate_mean(trained, [t.history[step] for t in trained])
        late = _less_rate_mean(trained, [t.metric for t in trained])
        found += _agreement(early, late, steps=step, of_steps=steps, fresh=False)
    return found


def agreement_when_confirmed(finalists: Sequence[Finalist], steps: int, of_steps: int) -> list[Agreement]:
    """Metrics of short trials against those of full training on fresh seeds, over finalists; none where trials are not short."""
    if steps >= of_steps:
        return []
    early, late = [f.trial.metric for f in finalists], [f.metric for f in finalists]
    return _agreement(early, late, steps=steps, of_steps=of_steps, fresh=True)


def observe(trial: FrozenTrial, complete: Sequence[FrozenTrial], *, by_seed: bool) -> tuple[float, float] | None:
    """A trial as an observation of the final metric, and how many training runs it counts as; None if it is not one.

    A pruned trial was seen up to some step (or over some of its seeds). Trials that completed at its learning rate gained, from
    there to their end, a mean gain; it is expected to gain as much: its difference to the others, uniform among them, is
    taken at equal steps. It counts as the share of the run that it was given, or as its seeds.

    Args:
        trial: Complete or pruned.
        complete: The complete trials of the study.
        by_seed: Whether intermediate values are those of seeds, and not on the way.
    """
    if trial.state == TrialState.COMPLETE and trial.value is not None and math.isfinite(trial.value):
        return trial.value, float(seeds_of(trial))
    if trial.state != TrialState.PRUNED or not trial.intermediate_values:
        return None
    seen = sorted(trial.intermediate_values)
    steps = seen if by_seed else seen[-1:]
    rate = learning_rate_of(trial)
    like = [t for t in complete if learning_rate_of(t) == rate and set(steps) <= set(t.intermediate_values)]
    if not like:
        return None
    gain = fmean(float(t.value or 0.0) - _mean_at(t, steps) for t in like)
    value = _mean_at(trial, steps) + gain
    runs = len(seen) if by_seed else seen[-1] / max(like[0].intermediate_values)
    return (value, float(runs)) if math.isfinite(value) and runs > 0 else None


def _mean_at(trial: FrozenTrial, steps: Sequence[int]) -> float:
    return fmean(trial.intermediate_values[step] for step in steps)


def _less_rate_mean(trials: Sequence[Trial], values: Sequence[float]) -> list[float]:
    by_rate = defaultdict(list)
    for trial, value in zip(trials, values, strict=True):
        by_rate[trial.learning_rate].append(value)
    return [value - fmean(by_rate[trial.learning_rate]) for trial, value in zip(trials, values, strict=True)]


def _agreement(
    early: Sequence[float], late: Sequence[float], *, steps: int, of_steps: int, fresh: bool
) -> list[Agreement]:
    """The agreement, if there is enough to tell it."""
    if len(early) < MIN_PAIRS or len(set(early)) < 2 or len(set(late)) < 2:
        return []
    tau = float(kendalltau(early, late)[0])
    return [Agreement(steps=steps, of_steps=of_steps, kendall=tau, pairs=len(early), fresh=fresh)]


CONFIRMATION_KEY = "confirmation"  # of study attributes: one a run, so that processes which share a study lose none
CONFIRM_FRACTION = 0.25  # of the trainings, by default
FIRST_SEED = 500  # trials train on seeds 0, 1, …


def split_budget(n_trials: int, confirm_fraction: float, n_seeds: int = 1) -> tuple[int, int]:
    """How many trials explore, and how many trainings confirm.

    Confirming takes as many whole seeds of all finalists (five at most) as fit into its share; what is left explores.

    Args:
        n_trials: Trainings in all.
        confirm_fraction: The share that confirms.
        n_seeds: Trainings of an exploring trial.

    Raises:
        SettingsError: There is no room for one trial, or the share is not in [0, 1).

    >>> split_budget(60, 1 / 3), split_budget(60, 1 / 3, n_seeds=2), split_budget(12, 1 / 3)
    ((40, 20), (20, 20), (12, 0))
    """
    if not 0.0 <= confirm_fraction < 1.0:
        raise SettingsError(f"`confirm_fraction` must lie in [0, 1), but got {confirm_fraction:g}.")
    if n_seeds < 1:
        raise SettingsError(f"`n_seeds` must be at least 1, but got {n_seeds}.")
    if n_trials < n_seeds:
        raise SettingsError(f"`n_trials` must cover one trial of {n_seeds} seeds, but got {n_trials}; raise it.")
    share = math.floor(confirm_fraction * n_trials + 1e-9)

    def whole_seeds(confirming: int) -> bool:
        finalists = min(2 + N_SAMPLED, (n_trials - confirming) // n_seeds)
        return finalists > 1 and confirming % finalists == 0

    confirming = next(filter(whole_seeds, range(share, 0, -1)), 0)
    return (n_trials - confirming) // n_seeds, confirming


def confirm(
    study: optuna.Study,
    task: Task,
    finalists: Sequence[Trial],
    training: TrainingConfig,
    *,
    n_runs: int,
    on_run: Callable[[int, int], None] | None = None,
) -> tuple[tuple[Finalist, ...], str | None]:
    """Trains the finalists on fresh seeds, the same for each; runs that the study already holds are not repeated.

    A finalist that diverges on a fresh seed is dropped. Processes that share a study share the runs: each goes through them
    in an order of its own and passes over what another has stored.

    Args:
        study: Keeps the runs, so that an interrupted confirmation goes on.
        task: Where model, data, loss and metric come from.
        finalists: Trials, each with its allocation and learning rate.
        training: The schedule.
        n_runs: Trainings for confirming in all, those included that the study already holds, also of earlier finalists.
        on_run: Called with the number of runs done and of runs in all.

    Returns:
        The finalists, and why there are none.
    """
    if len(finalists) < 2:
        return (), "there are fewer than two allocations to compare; raise `n_trials`."
    seeds = [str(FIRST_SEED + i) for i in range(_affordable_seeds(study, finalists, n_runs))]
    if not seeds:
        return (), (
            f"{n_runs} trainings are left, too few to confirm {len(finalists)} finalists on a fresh seed each; "
            "raise `n_trials` or `confirm_fraction`."
        )
    runs = [(trial, seed) for trial in finalists for seed in seeds]
    random.Random().shuffle(runs)
    for done, (trial, seed) in enumerate(runs, start=1):
        if _key(trial, seed) not in study.user_attrs:
            study.set_user_attr(_key(trial, seed), _metric(task, trial, training, int(seed)))
        if on_run:
            on_run(done, len(runs))
    known = study.user_attrs
    metrics = [{seed: known[_key(trial, seed)] for seed in seeds} for trial in finalists]
    steady = [(t, m) for t, m in zip(finalists, metrics, strict=True) if None not in m.values()]
    if not steady:
        return (), "every finalist diverged on a fresh seed; lower `learning_rate`."
    return judge([t for t, _ in steady], [m for _, m in steady]), None


def confirmed_keys(study: optuna.Study) -> set[str]:
    """The attributes of the study that hold a confirming run each."""
    return {key for key in study.user_attrs if key.startswith(f"{CONFIRMATION_KEY}:")}


def _affordable_seeds(study: optuna.Study, finalists: Sequence[Trial], n_runs: int) -> int:
    """The most fresh seeds on which each finalist can be trained; what is known costs nothing more."""
    known = confirmed_keys(study)
    seeds, left = 0, n_runs - len(known)
    while True:
        missing = sum(_key(trial, str(FIRST_SEED + seeds)) not in known for trial in finalists)
        if missing > max(left, 0):
            return seeds
        seeds, left = seeds + 1, left - missing


def _metric(task: Task, trial: Trial, training: TrainingConfig, seed: int) -> float | None:
    """The validation metric of one run; None where it diverges."""
    try:
        _, result = train(task, trial.allocation, training.at(trial.learning_rate), seed=seed)
    except TrainingError as error:
        logger.warning("trial %d is no finalist: on seed %d %s", trial.number, seed, error)
        return None
    return result.metrics[task.metric]


def _key(trial: Trial, seed: str) -> str:
    return f"{CONFIRMATION_KEY}:{trial.allocation.fingerprint}@{trial.learning_rate:g}:{seed}"
