"""Landscapes that a search is judged on without training anything: RankBench's tables, and synthetic ones, so called."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from rankscope.allocation import RankAllocation
from rankscope.budget import ParameterBudget, allocate_marginal
from rankscope.performance import prior_gains
from rankscope.profiling import read_profile
from rankscope.searching import HierarchicalSpace, group_by_depth
from rankscope.searching.confirmation import residual_variance
from rankscope.targets import TargetModule
from rankscope.tasks import data_folder
from rankscope.units import Interval

ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")
SYNTHETIC_RANK = 4  # of the uniform allocation whose budget synthetic landscapes have
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Landscape(Protocol):
    """What a search sees, and what it is judged by.

    Ranks are vectors in the order of the space's targets, (n_modules,).
    """

    space: HierarchicalSpace

    def measure(self, ranks: Ints, repeat: int) -> float:
        """A noisy measurement of an allocation of the space; another for each repeat of it."""
        ...

    def regret(self, ranks: Ints) -> float:
        """How far the allocation is from the best, over how far uniform is: 0 for the best, 1 for uniform."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TabulatedSpace(HierarchicalSpace):
    """A space in which only some allocations, those of a table, may be used: points and gains are projected onto them."""

    candidates: tuple[RankAllocation, ...]

    def solve(self, gains: Mapping[str, Floats], share: float = 1.0) -> RankAllocation:
        """The candidate with the highest total gain."""
        totals = np.zeros(len(self.candidates))
        for target, ranks in zip(self.targets, np.array([c.vector for c in self.candidates]).T, strict=True):
            sums = np.concatenate([[0.0], np.cumsum(gains[target.name])])
            totals += sums[np.minimum(ranks, len(sums) - 1)]
        return self.candidates[int(np.argmax(totals))]


class RankBench:
    """One task and budget of data/rankbench: allocations that were trained once, and are the only ones there are.

    Measurements are validation metrics, seed by seed; regret is of the test metric's mean over seeds, or of the validation
    metric's where no test split was read.

    Args:
        task: Name of the table.
        rank: The budget is so many times that of uniform LoRA of rank 1.
        steps: Optimizer steps of the runs.

    Attributes:
        ranks: (n, n_modules).
        validation: (n, n_seeds).
        test: (n, n_seeds); NaN where it was not read.
        truth: What regret is of, (n,).

    Raises:
        ValueError: The table holds no such runs.
    """

    def __init__(self, task: str, rank: float, steps: int) -> None:
        folder = data_folder("rankbench")
        frame = pd.read_parquet(folder / f"{task}.parquet")
        frame = frame[(frame["rank"] == rank) & (frame["steps"] == steps)]
        if frame.empty:
            raise ValueError(
                f"RankBench must hold runs of {task} at rank {rank:g} and {steps} steps, but has none; "
                "see data/rankbench/README.md."
            )
        first = frame.drop_duplicates("number").set_index("number").sort_index()
        self.ranks: Ints = np.array(first["ranks"].tolist(), dtype=np.int64)
        self.validation = frame.pivot(index="number", columns="seed", values="validation").to_numpy()
        self.test = frame.pivot(index="number", columns="seed", values="test").to_numpy(dtype=np.float64)
        self.truth = (self.validation if np.isnan(self.test).any() else self.test).mean(axis=1)
        profile = read_profile(folder / f"{task}.profile.parquet")
        self._row = {tuple(row): i for i, row in enumerate(self.ranks.tolist())}
        self._uniform = 0  # the first allocation of every table
        self.space = TabulatedSpace(
            targets=profile.targets,
            gains=prior_gains(profile.spectra(), profile.targets),
            budget=ParameterBudget(round(rank * sum(target.rank_cost for target in profile.targets))),
            groups=group_by_depth(profile.targets),
            candidates=tuple(RankAllocation(profile.targets, vector) for vector in self._row),
        )

    def measure(self, ranks: Ints, repeat: int) -> float:
        """See `Landscape`."""
        return float(self.validation[self._row[tuple(ranks.tolist())], repeat % self.validation.shape[1]])

    def regret(self, ranks: Ints) -> float:
        """See `Landscape`."""
        best = self.truth.max()
        return float((best - self.truth[self._row[tuple(ranks.tolist())]]) / (best - self.truth[self._uniform]))

    def gap(self, ranks: Ints, reference: Ints) -> Interval:
        """How much better an allocation is than another, with the 95 % interval that the runs' noise leaves."""
        runs = self.validation if np.isnan(self.test).any() else self.test
        mine, theirs = (self._row[tuple(each.tolist())] for each in (ranks, reference))
        freedom = (runs.shape[0] - 1) * (runs.shape[1] - 1)
        difference = float(self.truth[mine] - self.truth[theirs])
        half = float(stats.t.ppf(0.975, freedom)) * math.sqrt(2.0 * residual_variance(runs) / runs.shape[1])
        return Interval(difference, difference - half, difference + half)


class Synthetic:
    """SYNTHETIC: sum_i w_i log1p(c_i r_i) with log-normal w, half of log w's variance from block and role, plus noise.

    Args:
        seed: Of the landscape.
        modules: How many; six roles a block.
        noise: Standard deviation of a measurement, over the gap between uniform and the optimum.
        informative: Correlation of the profile's log weights with the true ones.
    """

    def __init__(self, seed: int, *, modules: int = 72, noise: float = 0.3, informative: float = 0.5) -> None:
        rng = np.random.default_rng(seed)
        blocks = modules // len(ROLES)
        targets = tuple(_module(block, role) for block in range(blocks) for role in ROLES)
        shared = rng.normal(0.0, 0.5, blocks).repeat(len(ROLES)) + np.tile(rng.normal(0.0, 0.5, len(ROLES)), blocks)
        logs = shared + rng.normal(0.0, np.sqrt(0.5), modules)
        costs = np.array([t.rank_cost for t in targets])
        self.weights: Floats = np.exp(logs) * costs / costs.mean()
        self.curvature: Floats = np.exp(rng.normal(0.0, 0.5, modules))
        guess = informative * logs + np.sqrt(1.0 - informative**2) * rng.normal(0.0, logs.std(), modules)
        decay = 1.0 / np.arange(1, 65) ** 2.0
        self.space = HierarchicalSpace(
            targets=targets,
            gains={t.name: np.exp(g) * t.rank_cost * decay for t, g in zip(targets, guess, strict=True)},
            budget=ParameterBudget.uniform(targets, SYNTHETIC_RANK),
            groups=group_by_depth(targets),
        )
        self.noise, self._rng = noise, rng

    @cached_property
    def _ends(self) -> tuple[float, float]:
        """The values of uniform and of the optimum, which water-filling finds."""
        targets = self.space.targets
        steps = {
            t.name: np.diff(w * np.log1p(c * np.arange(t.full_rank + 1.0)))
            for t, w, c in zip(targets, self.weights, self.curvature, strict=True)
        }
        best = allocate_marginal(targets, steps, self.space.budget)
        return self.value(np.full(len(targets), SYNTHETIC_RANK)), self.value(np.array(best.vector))

    def value(self, ranks: Ints) -> float:
        """The truth."""
        return float((self.weights * np.log1p(self.curvature * ranks)).sum())

    def measure(self, ranks: Ints, repeat: int) -> float:
        """See `Landscape`."""
        uniform, best = self._ends
        return self.value(ranks) + float(self._rng.normal(0.0, self.noise * (best - uniform)))

    def regret(self, ranks: Ints) -> float:
        """See `Landscape`."""
        uniform, best = self._ends
        return (best - self.value(ranks)) / (best - uniform)


def _module(block: int, role: str) -> TargetModule:
    """Of a transformer of hidden size 64."""
    out = 256 if role.startswith("fc") else 64
    return TargetModule(name=f"h.{block}.{role}", in_features=64, out_features=out, block=block, role=role)


LANDSCAPES: Mapping[str, Callable[[int], Landscape]] = {  # from a seed; RankBench's tables are the same for all seeds
    "digits-shift/1": lambda _seed: RankBench("digits-shift", 1, 84),
    "digits-shift/2": lambda _seed: RankBench("digits-shift", 2, 84),
    "digits-shift/4": lambda _seed: RankBench("digits-shift", 4, 84),
    "synthetic/72": lambda seed: Synthetic(seed),
    "synthetic/72-quiet": lambda seed: Synthetic(seed, noise=0.1),
    "synthetic/72-useless-profile": lambda seed: Synthetic(seed, informative=0.0),
    "synthetic/24": lambda seed: Synthetic(seed, modules=24),
    "synthetic/210": lambda seed: Synthetic(seed, modules=210),
}
