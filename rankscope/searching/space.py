"""The search's space of a profile: which blocks share a tilt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rankscope.allocation import RankAllocation
from rankscope.budget import Bound, ParameterBudget, RankLimits, allocate_marginal
from rankscope.errors import SettingsError
from rankscope.profiling import Profile
from rankscope.targets import TargetModule

MAX_TAU = 1.5
MAX_OFFSET = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tilt:
    """One dimension of the space: its name, as in `group/model/0`, and its bounds."""

    name: str
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HierarchicalSpace:
    """Tilts of marginal gains under one budget.

    Attributes:
        targets: The target modules.
        gains: For each module by name, the gain of its first, second, … rank, not increasing.
        budget: The limit in parameters.
        groups: The block group of each module by name, as in `model/0`.
        min_rank: The least rank, for all modules or by name.
        max_rank: The greatest rank, for all modules or by name; None: full rank.
        candidates: The only allocations that may be used; None: all that the budget and the bounds admit.

    Raises:
        SettingsError: No targets or candidates, or a module without group, or without gains that are finite and not negative.
    """

    targets: tuple[TargetModule, ...]
    gains: Mapping[str, NDArray[np.float64]]
    budget: ParameterBudget
    groups: Mapping[str, str]
    min_rank: Bound = 0
    max_rank: Bound = None
    candidates: tuple[RankAllocation, ...] | None = None

    def __post_init__(self) -> None:
        if not self.targets:
            raise SettingsError("`targets` must hold at least one target module, but is empty; find others.")
        if self.candidates is not None and not self.candidates:
            raise SettingsError("`candidates` must hold an allocation, but is empty; give None to admit all.")
        for target in self.targets:
            if target.name not in self.groups:
                raise SettingsError(f"`groups` must name a group for every target module, but lacks `{target.name}`.")
            if target.name not in self.gains:
                raise SettingsError(
                    f"`gains` must hold every target module, but lacks `{target.name}`; profile it too."
                )
            gains = np.asarray(self.gains[target.name], dtype=np.float64)
            if not (np.isfinite(gains) & (gains >= 0)).all():
                raise SettingsError(
                    f"`gains` of `{target.name}` must be finite and not negative; take the profile again."
                )

    @property
    def tilts(self) -> tuple[Tilt, ...]:
        """The dimensions; an offset for the only group or role there is would change nothing, and is left out."""
        groups = sorted({self.groups[target.name] for target in self.targets})
        roles = sorted({target.role for target in self.targets})
        offsets = [f"group/{name}" for name in groups if len(groups) > 1] + [
            f"role/{name}" for name in roles if len(roles) > 1
        ]
        return (
            Tilt(name="tau", low=0.0, high=MAX_TAU),
            *(Tilt(name=name, low=-MAX_OFFSET, high=MAX_OFFSET) for name in offsets),
        )

    @property
    def _scale(self) -> float:
        """The largest gain per parameter: gradients may be tiny, and their powers must not underflow."""
        scale = max(float(np.max(self.gains[t.name], initial=0.0)) / t.rank_cost for t in self.targets)
        if not scale > 0:
            raise SettingsError(
                "`gains` must not all be zero; choose targets that the loss depends on, or profile on other data."
            )
        return scale

    def point(self, *, tau: float) -> dict[str, float]:
        """The point with zero offsets: tau = 1 is the one-shot allocation, tau = 0 the uniform one."""
        return {tilt.name: tau if tilt.name == "tau" else 0.0 for tilt in self.tilts}

    def allocation(self, point: Mapping[str, float]) -> RankAllocation:
        """The allocation at a point of the space.

        Raises:
            SettingsError: The point lacks a tilt or a finite number for it, or no allocation is feasible.
        """
        for tilt in self.tilts:
            if tilt.name not in point:
                raise SettingsError(f"`point` must give every tilt a value, but lacks {tilt.name!r}.")
            if not (isinstance(point[tilt.name], Real) and math.isfinite(point[tilt.name])):
                raise SettingsError(f"`point` must hold finite numbers, but {tilt.name!r} is {point[tilt.name]!r}.")
        tau, scale = point["tau"], self._scale
        tilted = {}
        for target in self.targets:
            offset = point.get(f"group/{self.groups[target.name]}", 0.0) + point.get(f"role/{target.role}", 0.0)
            density = _blend(np.asarray(self.gains[target.name], dtype=np.float64) / target.rank_cost / scale, tau)
            tilted[target.name] = density * np.exp(offset) * target.rank_cost
        return self.solve(tilted).renamed("tilted")

    def solve(self, gains: Mapping[str, NDArray[np.float64]]) -> RankAllocation:
        """The allocation with the highest total gain: by water-filling, or the best of the candidates.

        Args:
            gains: For each module by name, the gain of its first, second, … rank, not increasing.
        """
        if self.candidates is None:
            limits = RankLimits(self.min_rank, self.max_rank)
            return allocate_marginal(self.targets, gains, self.budget, limits)
        totals = np.zeros(len(self.candidates))
        for target, ranks in zip(self.targets, np.array([c.vector for c in self.candidates]).T, strict=True):
            sums = np.concatenate([[0.0], np.cumsum(gains[target.name])])
            totals += sums[np.minimum(ranks, len(sums) - 1)]
        return self.candidates[int(np.argmax(totals))]


def _blend(density: NDArray[np.float64], tau: float) -> NDArray[np.float64]:
    """The blend density ** tau * (1 / r**2) ** (1 - tau), kept from increasing with r where tau is above 1."""
    shared = 1.0 / np.arange(1, density.size + 1) ** 2.0
    return np.minimum.accumulate(density**tau * shared ** (1.0 - tau))  # 0 ** 0 is 1: at tau = 0 all modules are alike


def group_by_depth(targets: Sequence[TargetModule], n_groups: int = 3) -> dict[str, str]:
    """Block groups of (nearly) equal depth within each tower, as in `model/0` … `model/2`; `model/-` outside blocks.

    >>> targets = [TargetModule(name=f"h.{i}.fc", in_features=8, out_features=8, block=i) for i in range(6)]
    >>> list(group_by_depth(targets).values())
    ['model/0', 'model/0', 'model/1', 'model/1', 'model/2', 'model/2']
    """
    _check_groups(n_groups)
    blocks = {
        tower: sorted({t.block for t in targets if t.tower == tower and t.block is not None})
        for tower in {t.tower for t in targets}
    }
    return {
        t.name: f"{t.tower}/-"
        if t.block is None
        else f"{t.tower}/{blocks[t.tower].index(t.block) * min(n_groups, len(blocks[t.tower])) // len(blocks[t.tower])}"
        for t in targets
    }


def group_by_gradient(
    targets: Sequence[TargetModule], energies: Mapping[str, float], n_groups: int = 3, *, seed: int = 0
) -> dict[str, str]:
    """Block groups by k-means over the blocks' gradients, within each tower: HyDRA's coarse stage.

    A block is described by the log energy of each of its roles; group 0 has the least energy.

    Args:
        targets: The target modules.
        energies: Squared gradient norm of each module, by name.
        n_groups: How many groups in each tower, at most.
        seed: Of k-means.

    Raises:
        SettingsError: `n_groups` is no whole number from 1 on, or a module has no energy that is finite and not negative.
    """
    from sklearn.cluster import KMeans

    _check_groups(n_groups)
    for target in targets:
        if not 0 <= energies.get(target.name, math.nan) < math.inf:
            raise SettingsError(
                f"`energies` must hold a finite number from 0 on for every target module, but `{target.name}` has "
                f"{energies.get(target.name)}; take the profile again."
            )
    groups = group_by_depth(targets, 1)
    for tower in sorted({t.tower for t in targets}):
        members = [t for t in targets if t.tower == tower and t.block is not None]
        blocks = sorted({t.block for t in members if t.block is not None})
        roles = sorted({t.role for t in members})
        if len(blocks) < 2:
            continue
        floor = max(energies[t.name] for t in members) * 1e-12 or 1.0
        features = np.full((len(blocks), len(roles)), np.log(floor))
        for t in members:
            features[blocks.index(t.block or 0), roles.index(t.role)] = np.log(max(energies[t.name], floor))
        labels = KMeans(min(n_groups, len(blocks)), n_init=10, random_state=seed).fit_predict(features)
        by_energy = np.argsort(np.argsort([features[labels == label].mean() for label in range(labels.max() + 1)]))
        for t in members:
            groups[t.name] = f"{tower}/{by_energy[labels[blocks.index(t.block or 0)]]}"
    return groups


def _check_groups(n_groups: Any) -> None:
    if not isinstance(n_groups, Integral) or n_groups < 1:
        raise SettingsError(f"`n_groups` must be a whole number of at least 1, but got {n_groups!r}.")


Grouping = Literal["depth", "gradient"]


def make_space(
    profile: Profile,
    targets: Sequence[TargetModule],
    budget: ParameterBudget,
    *,
    grouping: Grouping = "depth",
    n_groups: int = 3,
    min_rank: Bound = 0,
    max_rank: Bound = None,
) -> HierarchicalSpace:
    """The hierarchical space whose gains are the profile's gradient spectra.

    Raises:
        SettingsError: An unknown grouping.
    """
    if grouping == "depth":
        groups = group_by_depth(targets, n_groups)
    elif grouping == "gradient":
        energy = {name: norm**2 for name, norm in profile.column("gradient_norm").items()}
        groups = group_by_gradient(targets, energy, n_groups)
    else:
        raise SettingsError(f"`grouping` must be 'depth' or 'gradient', but got {grouping!r}.")
    return HierarchicalSpace(
        targets=tuple(targets),
        gains={name: values**2 for name, values in profile.spectra().items()},
        budget=budget,
        groups=groups,
        min_rank=min_rank,
        max_rank=max_rank,
    )
