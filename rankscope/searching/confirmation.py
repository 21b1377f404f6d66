"""Confirmation: finalists are trained on fresh seeds, so that no luck is recommended; how noisy and how faithful trials are."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import optuna
import pandas as pd
from numpy.typing import ArrayLike
from optuna.distributions import IntDistribution
from optuna.trial import FrozenTrial

from rankscope.errors import SettingsError
from rankscope.performance import PerformanceModel
from rankscope.searching.claims import WITHDRAWN_KEY, Claims, Job, Lease, Patience, Tally, job_of, perform, tally
from rankscope.searching.storage import (
    ID_KEY,
    ONE_SHOT,
    POSTERIOR_MEAN,
    STUDY_KEY,
    UNIFORM,
    Trial,
    open_study,
)
from rankscope.settings import SearchSettings, TrainingSettings
from rankscope.tasks import Task
from rankscope.training import train
from rankscope.units import Interval, unit_of

logger = logging.getLogger(__name__)

CONFIRMING = "-confirming"  # after the study's name: the study of confirming runs
PLAN_KEY = "plan"  # trial attribute: the finalists and the number of seeds, as its worker would confirm them
RECOMMENDATION = "recommendation"  # a job of that study: what the first worker to finish recommends
FIRST_SEED = 500  # trials train on seeds 0, 1, …
N_SAMPLED = 3  # finalists beside uniform and one-shot
CONFIDENCE = 0.95
FEWEST_PAIRS = 3  # with two, the t interval is 4.5 times as wide as with three: it says nothing
PREFERRED = {ONE_SHOT: 0, UNIFORM: 1}  # origins, where nothing else tells; others come after them
OnRun = Callable[[int, int], None]  # runs done and runs in all
MIN_TRIALS = 5  # with fewer, a rank correlation says nothing


def t_interval(mean: float, variance: float, n: int, *, freedom: int, confidence: float = CONFIDENCE) -> Interval:
    """Student's interval of the mean of n paired differences of this variance, with `freedom` degrees of freedom.

    There is no interval for fewer than 3 pairs, nor where all differences are equal: too few or too coarse values.

    >>> t_interval(0.5, 0.04, 4, freedom=3).text()
    '+0.500 [+0.182, +0.818]'
    """
    from scipy.stats import t

    if n < FEWEST_PAIRS or not variance > 1e-24:
        return Interval(mean, math.nan, math.nan)
    half = float(t.ppf(0.5 + confidence / 2.0, freedom)) * math.sqrt(variance / n)
    return Interval(mean, mean - half, mean + half)


def residual_variance(metrics: ArrayLike) -> float:
    """Variance of one measurement that rows (allocations) and columns (seeds) leave unexplained; 0 with fewer than two."""
    table = np.asarray(metrics, dtype=np.float64)
    freedom = math.prod(length - 1 for length in table.shape)
    residuals = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
    return float(np.square(residuals).sum() / freedom) if freedom > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finalist:
    """An allocation that was trained again on fresh seeds."""

    trial: Trial  # that made it a finalist
    metrics_by_seed: Mapping[str, float]  # on the validation split
    difference: float | None = None  # mean paired difference to the finalist `uniform`; None for uniform itself
    interval: tuple[float, float] | None = None  # the difference's, at 95 % for all finalists at once

    @property
    def metric(self) -> float:
        """Mean validation metric over the fresh seeds."""
        return fmean(self.metrics_by_seed.values())


def split_budget(n_trials: int, confirm_fraction: float, n_seeds: int = 1) -> tuple[int, int]:
    """How many trials explore, and how many trainings confirm: whole seeds of all finalists (five at most).

    >>> split_budget(60, 1 / 3), split_budget(60, 1 / 3, n_seeds=2), split_budget(12, 1 / 3)
    ((40, 20), (20, 20), (12, 0))
    """
    if n_trials < n_seeds:
        raise SettingsError(f"`n_trials` must cover one trial of {n_seeds} seeds, but got {n_trials}; raise it.")
    for confirming in range(math.floor(confirm_fraction * n_trials + 1e-9), 0, -1):
        exploring = (n_trials - confirming) // n_seeds
        n_finalists = min(2 + N_SAMPLED, exploring)
        if n_finalists > 1 and confirming % n_finalists == 0:
            return exploring, confirming
    return n_trials // n_seeds, 0


def trials_needed(n_fresh: int, settings: SearchSettings) -> int:
    """The fewest trainings that leave so many fresh seeds for all finalists.

    >>> trials_needed(1, SearchSettings()), trials_needed(3, SearchSettings())
    (20, 60)
    """
    n_seeds, share = settings.n_seeds, settings.confirm_fraction
    return next(n for n in count(n_seeds) if split_budget(n, share, n_seeds)[1] >= n_fresh * (2 + N_SAMPLED))


def choose_finalists(
    trials: Sequence[Trial], belief: PerformanceModel | None = None, *, over_budgets: bool = False
) -> list[Trial]:
    """Uniform, one-shot, and three others: a believed model's posterior mean and best prediction, and the best observed.

    Of a search `over_budgets`, the others are from small to large among those that none with fewer parameters matches.
    """
    ranked = sorted((t for t in trials if t.reused is None), key=lambda t: (-t.metric, t.loss, t.number))
    starts = {t.origin: t for t in reversed(ranked) if not t.proposed}
    chosen = [starts[origin] for origin in (UNIFORM, ONE_SHOT) if origin in starts]
    others = [t for t in ranked if t.proposed]
    if others and over_budgets:
        values = [t.metric for t in others] if belief is None else belief.predict([t.allocation.vector for t in others])
        front = pareto_front(others, values)
        others = [*(front[round(i)] for i in np.linspace(len(front) - 1, 0, N_SAMPLED)), *others]
    elif belief is not None and others:
        best = max(others, key=lambda t: float(belief.predict([t.allocation.vector])[0]))
        newest = max((t for t in others if t.origin == POSTERIOR_MEAN), key=lambda t: t.number, default=best)
        others = [newest, best, *others]
    for trial in others:
        if trial.allocation not in [each.allocation for each in chosen]:
            chosen.append(trial)
    return chosen[: len(starts) + N_SAMPLED]


def pareto_front(trials: Sequence[Trial], values: Iterable[float]) -> list[Trial]:
    """The trials whose value none with as many or fewer parameters reaches, by parameters."""
    front, highest = [], -math.inf
    by_size = sorted(zip(values, trials, strict=True), key=lambda each: (each[1].allocation.parameters, -each[0]))
    for value, trial in by_size:
        if value > highest:
            highest = value
            front.append(trial)
    return front


def confirm(
    claims: Claims,
    stage: str,
    trials: Sequence[Trial],
    chosen: Sequence[Trial],
    task: Task,
    training: TrainingSettings,
    settings: SearchSettings,
    on_run: OnRun,
) -> tuple[tuple[Finalist, ...], str | None]:
    """Train the finalists on fresh seeds, the same for each; returns them, and why there are none.

    Runs that the study of `claims` already holds are not repeated, those of earlier finalists count, and workers share the
    rest. All take the finalists that the first of them has chosen. A finalist that diverges on a fresh seed is dropped.
    """
    if len(chosen) < 2:
        return (), "there are fewer than two allocations to compare; raise `n_trials`."
    n_runs = split_budget(settings.n_trials, settings.confirm_fraction, settings.n_seeds)[1]
    found, known = claims.look(), {trial.number: trial for trial in trials}
    plan = agreed_plan(found, make_plan(found, stage, chosen, n_runs))
    if not plan["n_seeds"]:
        few = f"{n_runs} trainings are left, too few to confirm {len(chosen)} finalists on a fresh seed each"
        one, three = (trials_needed(n, settings) for n in (1, 3))
        return (), f"{few}; raise `n_trials` to {one}, or to {three} for the three seeds that an interval needs."
    patience, last = Patience(), -1
    while True:
        found = claims.look()
        plan = agreed_plan(found, plan)
        runs = [Run(known[number], FIRST_SEED + i) for number in plan["finalists"] for i in range(plan["n_seeds"])]
        jobs = tally(found)
        states = [jobs.get(run.job, Tally()) for run in runs]
        done = sum(state.spent(1) for state in states)
        if done != last:
            on_run(done, len(runs))
            patience, last = Patience(), done
        if done == len(runs):
            break
        free = [run for run, state in zip(runs, states, strict=True) if state.free(1)]
        if not (free and _claim_and_train(claims, random.choice(free), plan, task, training)):
            patience.wait()
    finalists, n_seeds = [known[number] for number in plan["finalists"]], plan["n_seeds"]
    rows = [states[i * n_seeds : (i + 1) * n_seeds] for i in range(len(finalists))]
    seeds = [str(FIRST_SEED + i) for i in range(n_seeds)]
    metrics = [dict(zip(seeds, map(_metric, row), strict=True)) for row in rows]
    whole = [{seed: value for seed, value in by_seed.items() if value is not None} for by_seed in metrics]
    steady = [i for i, by_seed in enumerate(whole) if len(by_seed) == n_seeds]
    if not steady:
        return (), "every finalist diverged on a fresh seed; lower `learning_rate`."
    return judge([finalists[i] for i in steady], [whole[i] for i in steady]), None


class Run(NamedTuple):
    """A confirming run."""

    trial: Trial
    seed: int

    @property
    def job(self) -> str:
        """Its name in the study of confirming runs."""
        return f"{self.trial.allocation.fingerprint}@{self.trial.learning_rate!r}:{self.seed}"


def open_confirming(study: optuna.Study) -> optuna.Study:
    """The study, beside a search's, in which each confirming run is a trial."""
    return open_study(f"{study.study_name}{CONFIRMING}", study._storage, study.user_attrs[STUDY_KEY])


def confirmed_runs(study: optuna.Study) -> dict[str, FrozenTrial]:
    """The confirming runs that are done, by job."""
    jobs = tally(study.get_trials(deepcopy=False))
    return {job: state.done[0] for job, state in jobs.items() if state.done and not job.startswith(RECOMMENDATION)}


def stage_of(study: optuna.Study, trials: Sequence[Trial], settings: SearchSettings) -> str:
    """What names the state of a search whose trials are done: another has other finalists."""
    n_runs = split_budget(settings.n_trials, settings.confirm_fraction, settings.n_seeds)[1]
    return f"{len(trials)} trials, {n_runs} runs, {study.user_attrs.get(ID_KEY)}"


def agree(claims: Claims, stage: str, mine: Recommendation, trials: Sequence[Trial]) -> Recommendation:
    """The recommendation of the first worker that had one at this stage: rounding may differ between machines."""
    job = f"{RECOMMENDATION} of {stage}"

    def recorded() -> FrozenTrial | None:
        found = (trial for trial in claims.look() if job_of(trial) == job and WITHDRAWN_KEY not in trial.user_attrs)
        return next(found, None)

    if recorded() is None:
        claim = claims.take(Job(job), {"trial": mine.trial.number, "reason": mine.reason})
        if claim is not None:
            claims.tell(claim, mine.trial.metric)
    if (first := recorded()) is None:
        return mine
    number = first.user_attrs["trial"]
    return Recommendation(next(trial for trial in trials if trial.number == number), first.user_attrs["reason"])


def make_plan(found: Sequence[FrozenTrial], stage: str, chosen: Sequence[Trial], n_runs: int) -> dict[str, Any]:
    """What one worker would confirm: the numbers of finalists, and the seeds that the trainings left are enough for."""
    known = {job for job, state in tally(found).items() if state.spent(1) and not job.startswith(RECOMMENDATION)}
    n_seeds = affordable_seeds(known, chosen, n_runs)
    return {"stage": stage, "finalists": [trial.number for trial in chosen], "n_seeds": n_seeds}


def agreed_plan(found: Sequence[FrozenTrial], mine: Mapping[str, Any]) -> dict[str, Any]:
    """The plan of the first claim at this stage of the search, else this worker's."""
    plans = (trial.user_attrs.get(PLAN_KEY, {}) for trial in found)
    return dict(next((plan for plan in plans if plan.get("stage") == mine["stage"]), mine))


def _claim_and_train(claims: Claims, run: Run, plan: dict[str, Any], task: Task, training: TrainingSettings) -> bool:
    """Train one confirming run, if no other worker has claimed it; whether this one has."""
    values = {"trial": run.trial.number, "seed": run.seed}
    numbers = {name: IntDistribution(0, 2**31 - 1) for name in values}
    attributes = {PLAN_KEY: plan, "origin": run.trial.origin}
    claim = claims.take(Job(run.job), attributes, {"params": values, "distributions": numbers})
    if claim is None:
        return False
    if agreed_plan(claim.trials, plan) != plan:
        claims.withdraw(claim.trial_id, "others had chosen the finalists")
        return False

    def work(lease: Lease) -> float:
        settings = training.at(run.trial.learning_rate)
        result = train(task, run.trial.allocation, settings, seed=run.seed, on_step=lease.on_step)[1]
        claims.study._storage.set_trial_user_attr(claim.trial_id, "wall_seconds", result.wall_seconds)
        return float(result.metrics[task.metric])

    return perform(claims, claim, work, f"trial {run.trial.number} is no finalist: its run on seed {run.seed}")


def _metric(state: Tally) -> float | None:
    """What a confirming run measured; None where it failed."""
    return state.done[0].value if state.done else None


def affordable_seeds(known: Collection[str], finalists: Sequence[Trial], n_runs: int) -> int:
    """The most fresh seeds on which each finalist can be trained; what is known costs nothing more."""
    seeds, left = 0, max(n_runs - len(known), 0)
    while (left := left - sum(Run(t, FIRST_SEED + seeds).job not in known for t in finalists)) >= 0:
        seeds += 1
    return seeds


def judge(trials: Sequence[Trial], metrics: Sequence[Mapping[str, float]]) -> tuple[Finalist, ...]:
    """Finalists from their trials and their metrics on the same fresh seeds: differences to uniform, with intervals.

    The interval of a mean paired difference d of k finalists over n seeds is

        d ± t(1 - 0.05 / 2m; (k - 1)(n - 1)) · sqrt(2 s² / n),

    s² being the residual variance, and m = k - 1 the number of differences (Dunn, Multiple comparisons among means, JASA 1961):
    all intervals hold at once with 95 %, and so does that of whichever finalist is chosen on these very seeds.
    """
    uniform = next((m for t, m in zip(trials, metrics, strict=True) if t.origin == UNIFORM), None)
    table = np.array([list(m.values()) for m in metrics])
    variance, others, n_seeds = 2.0 * residual_variance(table), len(table) - 1, table.shape[1]
    finalists = []
    for trial, mine in zip(trials, metrics, strict=True):
        difference = interval = None
        if uniform is not None and trial.origin != UNIFORM:
            difference = fmean(mine[seed] - uniform[seed] for seed in mine)
            freedom, confidence = others * (n_seeds - 1), 1.0 - (1.0 - CONFIDENCE) / others
            _, low, high = t_interval(difference, variance, n_seeds, freedom=freedom, confidence=confidence)
            interval = None if math.isnan(low) else (low, high)
        finalists.append(Finalist(trial=trial, metrics_by_seed=mine, difference=difference, interval=interval))
    return tuple(finalists)


class Recommendation(NamedTuple):
    """What a search recommends, and why, in words."""

    trial: Trial
    reason: str


def recommend(trials: Sequence[Trial], metrics: ArrayLike, belief: PerformanceModel | None = None) -> Recommendation:
    """Which of some trials to recommend, uniform and one-shot among them, by their metrics on fresh seeds, (n, n_seeds).

    The posterior mean of a model to believe chooses. Without a model it is one-shot, for which the profile speaks, then uniform,
    if within a standard error of the best (as Breiman, Friedman, Olshen, Stone 1984, §3.4.3, choose the simplest); one fresh
    seed has none, so it overrules neither. No proposal is chosen that fresh seeds put below uniform or one-shot, or that was not
    trained on any, unless the posterior's interval of the difference is above 0.
    """
    table, everyone = np.asarray(metrics, dtype=np.float64), range(len(trials))
    n_seeds, starts = table.shape[1], [i for i in everyone if not trials[i].proposed]
    values = table.mean(axis=1) if n_seeds else np.array([trial.metric for trial in trials])
    fair = [n_seeds > 0 or not starts or i in starts for i in everyone]  # noise flatters the best observed proposal
    over = {j: posterior_over(j, trials, table, belief) for j in starts} if belief is not None else {}

    def allowed(i: int) -> bool:
        return i in starts or all(
            (fair[i] and values[i] >= values[j]) or (j in over and over[j][i].low > 0.0) for j in starts
        )

    unit = unit_of([*table.ravel(), *(trial.metric for trial in trials)])
    error = math.sqrt(2.0 * residual_variance(table) / n_seeds) if n_seeds > 1 else math.inf
    if over:
        wished = sorted(everyone, key=lambda i: -over[starts[0]][i].mean)
    else:
        good = [i for i in everyone if fair[i] and values[i] >= max(values[fair]) - error]
        wished = sorted(good, key=lambda i: (PREFERRED.get(trials[i].origin, 2), -values[i]))
    best = next(filter(allowed, wished))
    ahead = [j for j in starts if values[j] > values[best] or not (n_seeds or best in starts)]
    rival = max(ahead, key=lambda j: values[j], default=best)
    below = f"fresh seeds put it {unit.distance(values[rival] - values[best])} below"
    if not starts:
        why = "neither uniform nor one-shot completed, and it is best of what did"
    elif not n_seeds and best in starts:
        why = "these are too few trainings to tell proposals from it"
    elif ahead and over:
        why = f"the posterior puts it {over[rival][best].text(unit)}{unit.points} above {trials[rival].name}, though "
        why += below if n_seeds else "nothing is confirmed"
    elif ahead:
        noise = (
            f"within their standard error, {unit.distance(error)}" if n_seeds > 1 else "by one seed, which tells little"
        )
        why = f"the profile speaks for it, though {below} {trials[rival].name}, {noise}"
    elif best != wished[0] and over:
        above = " and ".join(trials[j].name for j in starts if values[j] > values[wished[0]])
        why = f"the posterior mean of {trials[wished[0]].name} is higher, but fresh seeds put it below {above}"
    elif best in starts and n_seeds == 1 and not over:
        why = "one fresh seed tells too little to prefer a proposal"
    elif best in starts:
        why = f"no proposal is better {'in the posterior mean' if over else 'by more than the standard error of fresh seeds'}"
    else:
        why = f"it is above uniform and one-shot on fresh seeds{', and best in the posterior mean' if over else ''}"
    return Recommendation(trials[best], f"{trials[best].name} is recommended: {why}")


def posterior_over(start: int, trials: Sequence[Trial], metrics: ArrayLike, belief: PerformanceModel) -> list[Interval]:
    """How much better than the trial at `start` each is, by trials and by fresh seeds, (n, n_seeds), which may be NaN."""
    table = np.asarray(metrics, dtype=np.float64)
    fresh = {"retests": table.mean(axis=1), "repeats": table.shape[1]} if table.shape[1] else {}
    found = belief.posterior_differences([trial.allocation.vector for trial in trials], start, **fresh)
    return [Interval(*row) for row in found.tolist()]


class Agreement(NamedTuple):
    """Kendall's tau of `pairs` allocations' metrics after short and long training; `fresh`: long training had other seeds."""

    steps: int
    of_steps: int
    kendall: float
    pairs: int
    fresh: bool

    def __str__(self) -> str:
        what = "finalists, trained in full on fresh seeds" if self.fresh else "trials at their end"
        return f"{self.steps} of {self.of_steps} steps rank {self.pairs} {what}: Kendall's tau {self.kendall:.2f}"


def agreements(trials: Sequence[Trial], finalists: Sequence[Finalist], steps: int, of_steps: int) -> list[Agreement]:
    """Whether short training ranks allocations like long training, where there are enough of them to tell.

    Trials' metrics about a quarter and half way stand against their final metric, both less the mean of their learning rate;
    where trials take `steps` of `of_steps`, finalists' short trials stand against their full training on fresh seeds.
    """
    from scipy.stats import kendalltau

    pairs = []
    if trained := [t for t in trials if t.reused is None]:
        table = pd.DataFrame([{**t.history, "end": t.metric} for t in trained]).dropna(axis=1)
        table -= table.groupby([t.learning_rate for t in trained]).transform("mean")
        common = set(trained[0].history).intersection(table)
        last = max(common, default=0)
        short = {min(common, key=lambda step: abs(step - share * last)) for share in (0.25, 0.5) if common} - {last}
        pairs += [(step, last, False, table[step].tolist(), table["end"].tolist()) for step in sorted(short)]
    if steps < of_steps:
        pairs.append((steps, of_steps, True, [f.trial.metric for f in finalists], [f.metric for f in finalists]))
    return [
        Agreement(short, full, float(kendalltau(early, late)[0]), len(early), fresh)
        for short, full, fresh, early, late in pairs
        if len(early) >= MIN_TRIALS and len(set(early)) > 1 and len(set(late)) > 1
    ]
