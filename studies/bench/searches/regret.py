"""Regret of a search's recommendation by number of trials, confirmation included: the same course for every method.

Uniform and one-shot come first, then what the method proposes; the last share of the trials confirms finalists, as in
`rankscope.search`. For ours the course is the search's own: the posterior mean's allocation is tried last, finalists are chosen
and one is recommended by what left-out trials speak for. For all others the finalists are uniform, one-shot and the three
best observed, and the best mean over the confirming measurements is recommended.
"""

from __future__ import annotations

import itertools
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import optuna
import pandas as pd
from joblib import Parallel, delayed

from rankscope.allocation import RankAllocation
from rankscope.searching import PerformanceModelSampler
from rankscope.searching.confirmation import choose_finalists, recommend, split_budget
from rankscope.searching.storage import ONE_SHOT, POSTERIOR_MEAN, RANKS_KEY, SAMPLER, UNIFORM, Trial
from rankscope.settings import SearchSettings
from rankscope.units import Interval
from searches.landscapes import LANDSCAPES, Ints, Landscape, RankBench
from searches.methods import METHODS, OURS, Method

CONFIRM_FRACTION = SearchSettings().confirm_fraction
BUDGETS = (30, 33, 60, 100, 150)


def regret_curves(
    landscapes: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
    budgets: Sequence[int] = BUDGETS,
    *,
    n_jobs: int = 1,
    on_search: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """Runs every search on every landscape under every seed.

    Args:
        landscapes: Names in `LANDSCAPES`.
        methods: Names in `METHODS`.
        seeds: Of landscape and search alike.
        budgets: Numbers of trials, confirming ones included, after which the recommendation is judged.
        n_jobs: Searches at a time.
        on_search: Called with the number of searches done and of searches in all.

    Returns:
        Columns `landscape`, `method`, `seed`, `trials` and `regret`.

    Raises:
        ValueError: An unknown landscape or method, or too few trials.
    """
    for kind, names, known in (("landscapes", landscapes, LANDSCAPES), ("methods", methods, METHODS)):
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"`{kind}` must be among {'; '.join(known)}, but got {unknown[0]!r}.")
    cells = [(name, method, seed) for seed in seeds for name in landscapes for method in methods]
    curves = {}
    jobs = (delayed(run_search)(*cell, budgets) for cell in cells)
    for done, (cell, curve) in enumerate(Parallel(n_jobs=n_jobs, return_as="generator_unordered")(jobs), start=1):
        curves[cell] = curve
        if on_search:
            on_search(done, len(cells))
    return tabulate({cell: curves[cell] for cell in itertools.product(landscapes, methods, seeds)})


def tabulate(curves: Mapping[tuple[str, str, int], Mapping[int, float]]) -> pd.DataFrame:
    """Regret curves of searches, by landscape, method and seed, as `regret_curves` returns them."""
    return pd.DataFrame(
        {"landscape": name, "method": method, "seed": seed, "trials": trials, "regret": regret}
        for (name, method, seed), curve in curves.items()
        for trials, regret in curve.items()
    )


def run_search(
    name: str, method: str, seed: int, budgets: Sequence[int] = BUDGETS, workers: int = 1
) -> tuple[tuple[str, str, int], dict[int, float]]:
    """One search by its names: the same names and seed, and its regret curve."""
    landscape = LANDSCAPES[name](seed)
    return (name, method, seed), regret_curve(landscape, METHODS[method](landscape, seed), budgets, workers)


def regret_curve(
    landscape: Landscape, method: Method, budgets: Sequence[int] = BUDGETS, workers: int = 1
) -> dict[int, float]:
    """The regret of the recommendation by number of trials, of one search with so many workers.

    Raises:
        ValueError: A budget has no room to confirm.
    """
    splits = {split_budget(trials, CONFIRM_FRACTION): trials for trials in budgets}
    if tight := [trials for (_, confirming), trials in splits.items() if not confirming]:
        raise ValueError(f"`budgets` must leave trials to confirm, but {tight[0]} are too few; take more.")
    search = _Search(landscape, method, workers)
    curve = {}
    for (exploring, confirming), trials in sorted(splits.items()):
        search.explore(exploring)
        curve[trials] = landscape.regret(search.recommended(confirming))
    return curve


def run_on_table(name: str, seed: int, n_trials: int = 33) -> tuple[float, Interval]:
    """Our search on a table of RankBench: the recommendation's regret, and how much better it is than one-shot."""
    landscape = LANDSCAPES[name](seed)
    if not isinstance(landscape, RankBench):
        raise ValueError(f"`name` must be that of a table of RankBench, but got {name!r}.")
    search = _Search(landscape, METHODS[OURS](landscape, seed))
    exploring, confirming = split_budget(n_trials, CONFIRM_FRACTION)
    search.explore(exploring)
    found, space = search.recommended(confirming), landscape.space
    one_shot = np.array(space.allocation(space.point(tau=1.0)).vector)
    return landscape.regret(found), landscape.gap(found, one_shot)


class _Search:
    """A study on a landscape, and what is recommended from it."""

    def __init__(self, landscape: Landscape, method: Method, workers: int = 1) -> None:
        """With several workers, so many trials are under way before the first of them is told."""
        self.landscape, self.method, self.workers = landscape, method, workers
        self.trials: list[Trial] = []
        self._asked = deque[tuple[optuna.Trial, str, Ints]]()
        self._visits: dict[tuple[int, ...], int] = {}
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.study = optuna.create_study(direction="maximize", sampler=method.sampler)

    def explore(self, n_trials: int) -> None:
        """Goes on until there are so many trials."""
        space = self.landscape.space
        with warnings.catch_warnings(action="ignore"):  # of Optuna, that GPSampler and others are experimental
            for origin, tau in ((UNIFORM, 0.0), (ONE_SHOT, 1.0))[len(self.trials) :]:
                self._ask(origin, np.array(space.allocation(space.point(tau=tau)).vector))
            while len(self.trials) < n_trials:
                asked = len(self.trials) + len(self._asked)
                if asked == n_trials or len(self._asked) >= self.workers:
                    self._tell(*self._asked.popleft())
                elif asked == n_trials - 1 and isinstance(self.method.sampler, PerformanceModelSampler):
                    self._ask(POSTERIOR_MEAN, self._posterior_mean())
                else:
                    self._ask(SAMPLER, None)

    def _posterior_mean(self) -> Ints | None:
        """What the sampler values most; nothing yet where too few trials have ended."""
        sampler = self.method.sampler
        ready = isinstance(sampler, PerformanceModelSampler) and len(self.trials) > 1
        return np.array(sampler.best(self.study).allocation.vector) if ready else None

    def recommended(self, confirming: int) -> Ints:
        """The ranks that are recommended after so many more measurements of the finalists."""
        sampler = self.method.sampler
        belief = sampler.believed(self.study) if isinstance(sampler, PerformanceModelSampler) else None
        chosen = choose_finalists(self.trials, belief)
        rounds = range(1, 1 + confirming // len(chosen))
        fresh = [[self.landscape.measure(np.array(trial.allocation.vector), i) for i in rounds] for trial in chosen]
        if isinstance(sampler, PerformanceModelSampler):
            weighing = None if belief is None else sampler.model(self.study)
            return np.array(recommend(chosen, fresh, weighing).trial.allocation.vector)
        return np.array(chosen[int(np.argmax(np.mean(fresh, axis=1)))].allocation.vector)

    def _ask(self, origin: str, ranks: Ints | None) -> None:
        """Start a trial: of these ranks, or of what the method proposes."""
        if ranks is not None:
            self.study.enqueue_trial({}, user_attrs={RANKS_KEY: ranks.tolist()})
        trial = self.study.ask()
        proposed = self.method(trial)
        ranks = proposed if ranks is None else ranks
        trial.set_user_attr(RANKS_KEY, ranks.tolist())
        self._asked.append((trial, origin, ranks))

    def _tell(self, trial: optuna.Trial, origin: str, ranks: Ints) -> None:
        """End a trial."""
        key = tuple(ranks.tolist())
        self._visits[key] = self._visits.get(key, -1) + 1
        metric = self.landscape.measure(ranks, self._visits[key])
        self.study.tell(trial, metric)
        self.trials.append(_as_trial(trial.number, origin, RankAllocation(self.landscape.space.targets, key), metric))


def _as_trial(number: int, origin: str, allocation: RankAllocation, metric: float) -> Trial:
    return Trial(
        number=number,
        origin=origin,
        allocation=allocation,
        learning_rate=float("nan"),
        metric=metric,
        loss=-metric,
        metrics_by_seed={"0": metric},
    )
