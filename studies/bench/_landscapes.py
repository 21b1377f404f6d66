"""Landscapes that a search is judged on without training anything: RankBench's table, and synthetic ones, so called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

import rankscope as rs
from rankscope.budget import allocate_marginal
from rankscope.space import group_by_depth

RANKBENCH = Path(__file__).parents[2] / "data" / "rankbench"
ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Landscape(Protocol):
    """What a search sees, and what it is judged by.

    `regret` is 0 for the best allocation and 1 for uniform.
    """

    space: rs.HierarchicalSpace

    def realise(self, ranks: Ints) -> Ints:
        """The allocation that is measured for a proposal: itself, or the nearest in a table."""
        ...

    def measure(self, ranks: Ints, repeat: int) -> float:
        """A noisy measurement; another for each repeat of an allocation."""
        ...

    def regret(self, ranks: Ints) -> float:
        """How far the allocation is from the best, over how far uniform is."""
        ...


@dataclass
class RankBench:
    """One task and budget of data/rankbench: a proposal is measured at the nearest allocation of the table.

    Measurements are validation metrics, seed by seed; regret is of the test metric's mean over seeds.
    """

    task: str
    rank: int
    steps: int
    space: rs.HierarchicalSpace = field(init=False)

    def __post_init__(self) -> None:
        frame = pd.read_parquet(RANKBENCH / f"{self.task}.parquet")
        frame = frame[(frame["rank"] == self.rank) & (frame["steps"] == self.steps)]
        first = frame.drop_duplicates("number").set_index("number").sort_index()
        self.ranks: Ints = np.array(first["ranks"].tolist(), dtype=np.int64)
        self.validation = frame.pivot(index="number", columns="seed", values="validation").to_numpy()
        self.test_by_seed = frame.pivot(index="number", columns="seed", values="test").to_numpy(dtype=np.float64)
        self.test = self.test_by_seed.mean(axis=1)
        self.space = _space(rs.read_profile(RANKBENCH / f"{self.task}.profile.parquet"), self.rank)
        costs = np.array([t.rank_cost for t in self.space.targets])
        self._places = np.log1p(self.ranks) * np.sqrt(costs)
        self._scale = np.sqrt(costs)
        self._row = {tuple(row): i for i, row in enumerate(self.ranks.tolist())}

    def realise(self, ranks: Ints) -> Ints:
        """See `Landscape`."""
        away = np.square(self._places - np.log1p(ranks) * self._scale).sum(axis=1)
        return self.ranks[int(np.argmin(away))]

    def measure(self, ranks: Ints, repeat: int) -> float:
        """See `Landscape`."""
        return float(self.validation[self._row[tuple(ranks.tolist())], repeat % self.validation.shape[1]])

    def regret(self, ranks: Ints) -> float:
        """See `Landscape`."""
        uniform = self.test[self._row[(self.rank,) * self.ranks.shape[1]]]
        return float((self.test.max() - self.test[self._row[tuple(ranks.tolist())]]) / (self.test.max() - uniform))


def _space(profile: rs.Profile, rank: int) -> rs.HierarchicalSpace:
    return rs.HierarchicalSpace(
        targets=profile.targets,
        gains={name: values**2 for name, values in profile.spectra().items()},
        budget=rs.ParameterBudget.uniform(profile.targets, rank),
        groups=group_by_depth(profile.targets),
    )


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
        self.space = rs.HierarchicalSpace(
            targets=targets,
            gains={t.name: np.exp(g) * t.rank_cost * decay for t, g in zip(targets, guess, strict=True)},
            budget=rs.ParameterBudget.uniform(targets, 4),
            groups=group_by_depth(targets),
        )
        self.noise, self._rng = noise, rng
        steps = {
            t.name: np.diff(w * np.log1p(c * np.arange(t.full_rank + 1.0)))
            for t, w, c in zip(targets, self.weights, self.curvature, strict=True)
        }
        best = allocate_marginal(targets, steps, self.space.budget)
        self.uniform = self.value(np.full(modules, 4))
        self.gap = self.value(np.array(best.vector)) - self.uniform

    def value(self, ranks: Ints) -> float:
        """The truth."""
        return float((self.weights * np.log1p(self.curvature * ranks)).sum())

    def realise(self, ranks: Ints) -> Ints:
        """See `Landscape`."""
        return ranks

    def measure(self, ranks: Ints, repeat: int) -> float:
        """See `Landscape`."""
        return self.value(ranks) + float(self._rng.normal(0.0, self.noise * self.gap))

    def regret(self, ranks: Ints) -> float:
        """See `Landscape`."""
        return 1.0 - (self.value(ranks) - self.uniform) / self.gap


def _module(block: int, role: str) -> rs.TargetModule:
    """Of a transformer of hidden size 64."""
    out = 256 if role.startswith("fc") else 64
    return rs.TargetModule(name=f"h.{block}.{role}", in_features=64, out_features=out, block=block, role=role)


def medians(values: Sequence[float]) -> list[float]:
    """First quartile, median and third quartile."""
    return [round(float(v), 4) for v in np.quantile(values, [0.25, 0.5, 0.75])]
