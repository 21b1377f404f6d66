"""The searches that are compared: ours, Optuna's samplers over the tilts or over raw ranks, and regularised evolution."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import optuna

from rankscope.budget import allocate_proportional
from rankscope.searching import HierarchicalSpace, PerformanceModelSampler, suggest_allocation
from rankscope.searching.storage import RANKS_KEY
from searches.landscapes import Ints, Landscape, TabulatedSpace

OURS = "performance-model"
POPULATION, TOURNAMENT = 20, 5
MOVES = 4  # modules that one mutation of the evolution changes


class Method(Protocol):
    """A search: a sampler for the study, and what a trial proposes under it."""

    sampler: optuna.samplers.BaseSampler

    def __call__(self, trial: optuna.Trial) -> Ints:
        """The ranks that a trial proposes, (n_modules,), an allocation of the space."""
        ...


class Tilts:
    """A sampler over the tilts; ours sees more than them (`PerformanceModelSampler`)."""

    def __init__(self, landscape: Landscape, sampler: optuna.samplers.BaseSampler) -> None:
        self.space, self.sampler = landscape.space, sampler

    def __call__(self, trial: optuna.Trial) -> Ints:
        """See `Method`."""
        return np.array(suggest_allocation(trial, self.space).vector)


class Raw:
    """One integer a module, repaired onto the budget."""

    def __init__(self, landscape: Landscape, sampler: optuna.samplers.BaseSampler) -> None:
        self.space, self.sampler = landscape.space, sampler

    def __call__(self, trial: optuna.Trial) -> Ints:
        """See `Method`."""
        top = 4 * max(self.space.allocation(self.space.point(tau=0.0)).vector)
        wanted = np.array([trial.suggest_int(t.name, 0, min(top, t.full_rank)) for t in self.space.targets])
        return repaired(wanted if wanted.any() else wanted + 1, self.space)


class Evolution:
    """Regularised evolution (Real et al. 2019): the best of a few of the last twenty moves ranks between a few modules."""

    def __init__(self, landscape: Landscape, seed: int) -> None:
        self.space = landscape.space
        self.sampler: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(seed)
        self.rng = np.random.default_rng(seed)

    def __call__(self, trial: optuna.Trial) -> Ints:
        """See `Method`."""
        done = [t for t in trial.study.get_trials(deepcopy=False) if t.value is not None]
        if len(done) < POPULATION:
            point = {tilt.name: float(self.rng.uniform(tilt.low, tilt.high)) for tilt in self.space.tilts}
            return np.array(self.space.allocation(point).vector)
        pool = self.rng.choice(len(done) - POPULATION + np.arange(POPULATION), TOURNAMENT, replace=False)
        parent = max((done[i] for i in pool), key=lambda t: float(t.value or 0.0)).user_attrs[RANKS_KEY]
        wanted = np.array(parent)
        for index in self.rng.choice(len(wanted), MOVES, replace=False):
            wanted[index] = max(0, wanted[index] + self.rng.choice([-2, -1, 1, 2]))
        return repaired(wanted, self.space)


def repaired(wanted: Ints, space: HierarchicalSpace) -> Ints:
    """The allocation of the space in proportion to the ranks wanted; of candidates the nearest, in log1p of the ranks."""
    scores = {t.name: float(rank) for t, rank in zip(space.targets, wanted, strict=True)}
    fitting = np.array(allocate_proportional(space.targets, scores, space.budget).vector)
    if not isinstance(space, TabulatedSpace):
        return fitting
    costs = np.array([t.rank_cost for t in space.targets])
    table = np.array([candidate.vector for candidate in space.candidates])
    away = (costs * np.square(np.log1p(table) - np.log1p(fitting))).sum(axis=1)
    nearest: Ints = table[int(np.argmin(away))]
    return nearest


METHODS: Mapping[str, Callable[[Landscape, int], Method]] = {  # from a landscape and a seed
    OURS: lambda landscape, seed: Tilts(landscape, PerformanceModelSampler(landscape.space, seed=seed)),
    "tpe": lambda landscape, seed: Tilts(landscape, optuna.samplers.TPESampler(seed=seed, multivariate=True)),
    "gp": lambda landscape, seed: Tilts(landscape, optuna.samplers.GPSampler(seed=seed)),
    # needs `pip install cmaes`
    "cma-es": lambda landscape, seed: Tilts(landscape, optuna.samplers.CmaEsSampler(seed=seed)),
    "random": lambda landscape, seed: Tilts(landscape, optuna.samplers.RandomSampler(seed=seed)),
    "tpe-raw": lambda landscape, seed: Raw(landscape, optuna.samplers.TPESampler(seed=seed)),
    "random-raw": lambda landscape, seed: Raw(landscape, optuna.samplers.RandomSampler(seed=seed)),
    "evolution": Evolution,
}
