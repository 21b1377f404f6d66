"""The hierarchical search space: a few tilts of the one-shot gains, coarse (towers, block groups) and fine (roles).

The gain per parameter of rank r of module i becomes

    (gain_{i,r} / cost_i) ** tau * (1 / r**2) ** (1 - tau) * exp(a_{tower(i)} + b_{group(i)} + c_{role(i)}),

a geometric blend of the module's own spectrum with one that all modules share: a bare power would keep the order of gains.
where a group is of blocks of one tower. With zero offsets, tau = 1 is the one-shot allocation and tau = 0 the uniform one. Every
point is projected onto the budget, and onto those of towers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from rankscope.allocation import RankAllocation
from rankscope.budget import ParameterBudget, RankLimits, allocate_marginal
from rankscope.errors import SettingsError, checked
from rankscope.naming import label_blocks
from rankscope.performance import RankFeatures, prior_gains, rank_features
from rankscope.profiling import Profile
from rankscope.settings import SearchSettings
from rankscope.targets import TargetModule

MAX_TAU = 1.5
MAX_OFFSET = 2.0
# Names of Optuna parameters, as its dashboard shows them; what studies keep under `tilts` are the older, shorter ones.
TAU, BUDGET = "one-shot weight", "log2 of budget share"  # the second in a search over budgets only
OLD_NAMES = {TAU: "tau", BUDGET: "log2_budget"}
LEAST_SHARE = 1 / 16
NO_LIMITS = RankLimits()


class Tilt(NamedTuple):
    """One dimension of the space: its name, as in `blocks 0-3`, and its bounds."""

    name: str
    low: float
    high: float


@checked
@dataclass(frozen=True, slots=True, kw_only=True)
class HierarchicalSpace:
    """Tilts of marginal gains under one budget."""

    targets: tuple[TargetModule, ...]
    gains: Mapping[str, NDArray[np.float64]]  # by module: of its first, second, … rank, not increasing
    budget: ParameterBudget
    groups: Mapping[str, str]  # by module: its block group, as in `model/0`
    limits: RankLimits = NO_LIMITS
    features: RankFeatures = field(init=False)  # for the performance model
    names: Mapping[str, str] = field(init=False)  # of the offsets, by level and key: `role/q_proj` is `role q_proj`
    least_share: float = field(init=False)  # of the budget that a search over budgets goes down to

    def __post_init__(self) -> None:
        features = rank_features(self.targets, self.budget, gains=self.gains, groups=self.groups)
        object.__setattr__(self, "features", features)
        object.__setattr__(self, "names", name_offsets(self.targets, self.groups))
        object.__setattr__(self, "least_share", self._least_share())

    @property
    def tilts(self) -> tuple[Tilt, ...]:
        """The dimensions, that of tau first, then the budget if it is searched; the only tower, group or role has no offset."""
        levels = [sorted(set(keys)) for keys in zip(*map(self._offset_keys, self.targets), strict=True)]
        offsets = [self.names[key] for keys in levels if len(keys) > 1 for key in keys]
        shares = [Tilt(BUDGET, math.log2(self.least_share), 0.0)] if self.budget.search else []
        return (Tilt(TAU, 0.0, MAX_TAU), *shares, *(Tilt(name, -MAX_OFFSET, MAX_OFFSET) for name in offsets))

    @property
    def dimensions(self) -> list[str]:
        """The dimensions as studies keep them: `tau`, `group/model/0`, `role/q_proj`, …"""
        older = OLD_NAMES | {name: key for key, name in self.names.items()}
        return [older[tilt.name] for tilt in self.tilts]

    def offsets_of(self, target: TargetModule) -> tuple[str, str, str]:
        """The names of the offsets that a module's gains have, coarse to fine."""
        tower, group, role = (self.names[key] for key in self._offset_keys(target))
        return tower, group, role

    def _offset_keys(self, target: TargetModule) -> tuple[str, str, str]:
        return f"tower/{target.tower}", f"group/{self.groups[target.name]}", f"role/{target.role}"

    def _least_share(self) -> float:
        """What the least ranks and the bounds on towers need, at least."""
        bound = self.limits.min_rank
        lowest = [bound.get(t.name) if isinstance(bound, Mapping) else bound for t in self.targets]
        needed = sum(target.rank_cost * (rank or 0) for target, rank in zip(self.targets, lowest, strict=True))
        least = max(LEAST_SHARE, max(needed, min(t.rank_cost for t in self.targets)) / self.budget.limit)
        return min(1.0, self._share_for_towers(least) if self.budget.towers and self.budget.search else least)

    def _share_for_towers(self, least: float) -> float:
        """The least share from which on whole ranks, up to the dearest one above what a tower asks for, meet all bounds."""
        lowest, _ = self.limits.arrays(self.targets)
        needed = RankAllocation(self.targets, tuple(lowest.tolist())).parameters_by_tower
        dearest = {tower: max(t.rank_cost for t in self.targets if t.tower == tower) for tower in needed}

        def meets(share: float) -> bool:
            try:
                budget = self.budget.at(math.ceil(share * self.budget.limit))
            except SettingsError:  # what a tower asks for in parameters may be above a small budget
                return False
            asked = {tower: low + dearest[tower] for tower, (low, _) in budget.bounds.items() if low}
            low = {tower: max(spent, asked.get(tower, 0)) for tower, spent in needed.items()}
            return sum(low.values()) <= budget.limit and all(low[t] <= most for t, (_, most) in budget.bounds.items())

        shares = np.geomspace(1.0, least, 65).tolist() if least < 1.0 else []
        return min(takewhile(meets, shares), default=1.0)

    def point(self, *, tau: float) -> dict[str, float]:
        """The point with zero offsets, at the full budget: tau = 1 is the one-shot allocation, tau = 0 the uniform one."""
        return {tilt.name: tau if tilt.name == TAU else 0.0 for tilt in self.tilts}

    def allocation(self, point: Mapping[str, float]) -> RankAllocation:
        """The allocation at a point; SettingsError where it lacks a finite number, all gains are zero, or nothing is feasible."""
        for name, _, _ in self.tilts:
            value: Any = point.get(name)
            if not (isinstance(value, Real) and math.isfinite(value)):
                raise SettingsError(f"`point` must hold a finite number for each tilt, but {name!r} is {value!r}.")
        # Gradients may be tiny, and their powers must not underflow.
        scale = max(float(np.max(self.gains[t.name], initial=0.0)) / t.rank_cost for t in self.targets) or 1.0
        tau, tilted = point[TAU], {}
        for target in self.targets:
            offset = sum(point.get(name, 0.0) for name in self.offsets_of(target))
            density = np.asarray(self.gains[target.name], dtype=np.float64) / target.rank_cost / scale
            shared = 1.0 / np.arange(1, density.size + 1) ** 2.0
            blend = density**tau * shared ** (1.0 - tau)  # 0 ** 0 is 1: at tau = 0 all modules are alike
            falling = np.minimum.accumulate(blend)  # beyond tau = 1 it may rise
            tilted[target.name] = falling * np.exp(offset) * target.rank_cost
        return self.solve(tilted, 2.0 ** point.get(BUDGET, 0.0)).renamed("tilted")

    def solve(self, gains: Mapping[str, NDArray[np.float64]], share: float = 1.0) -> RankAllocation:
        """The allocation with the highest total of such gains within a share of the budget, by water-filling."""
        limit = self.budget.limit if share == 1.0 else math.ceil(max(share, self.least_share) * self.budget.limit)
        return allocate_marginal(self.targets, gains, self.budget.at(limit), self.limits)


def name_offsets(targets: Sequence[TargetModule], groups: Mapping[str, str]) -> dict[str, str]:
    """Readable names of all offsets, by level and key.

    >>> targets = [TargetModule(name=f"h.{i}.fc1", in_features=8, out_features=8, block=i, role="fc1") for i in range(6)]
    >>> names = name_offsets(targets, {target.name: f"model/{target.block % 2 if target.block < 4 else 2}" for target in targets})
    >>> list(names.values())
    ['tower model', 'role fc1', 'blocks 0, 2', 'blocks 1, 3', 'blocks 4-5']
    """
    several = len({target.tower for target in targets}) > 1
    names = {f"tower/{target.tower}": f"tower {target.tower}" for target in targets}
    names |= {f"role/{target.role}": f"role {target.role}" for target in targets}
    members: dict[str, set[int]] = {}
    for target in targets:
        members.setdefault(groups[target.name], set()).update(() if target.block is None else (target.block,))
    for group, blocks in sorted(members.items()):
        names[f"group/{group}"] = label_blocks(group, blocks, several=several)
    shared = {name for name, times in Counter(names.values()).items() if times > 1}  # groups of a user's own making
    return {key: key if name in shared else name for key, name in names.items()}


def make_space(
    profile: Profile,
    targets: Sequence[TargetModule],
    budget: ParameterBudget,
    settings: SearchSettings | None = None,
    limits: RankLimits = NO_LIMITS,
) -> HierarchicalSpace:
    """The space whose gains are one-shot's on the profile, with the groups that the settings ask for."""
    settings = settings or SearchSettings()
    groups = group_by_depth(targets, settings.n_groups)
    if settings.grouping == "gradient":
        energies = {name: norm**2 for name, norm in profile.column("gradient_norm").items()}
        groups = group_by_gradient(targets, energies, settings.n_groups)
    gains = prior_gains(profile.spectra(), targets)
    return HierarchicalSpace(targets=tuple(targets), gains=gains, budget=budget, groups=groups, limits=limits)


def group_by_depth(targets: Sequence[TargetModule], n_groups: int = 3) -> dict[str, str]:
    """Block groups of (nearly) equal depth within each tower, as in `model/0` … `model/2`; `model/-` outside blocks.

    >>> targets = [TargetModule(name=f"h.{i}.fc", in_features=8, out_features=8, block=i) for i in range(6)]
    >>> list(group_by_depth(targets).values())
    ['model/0', 'model/0', 'model/1', 'model/1', 'model/2', 'model/2']
    """
    stacks: dict[str, set[int]] = {}
    for target in targets:
        stacks.setdefault(target.tower, set()).update(() if target.block is None else (target.block,))
    groups: dict[tuple[str, int | None], str] = {(tower, None): f"{tower}/-" for tower in stacks}
    for tower, blocks in stacks.items():
        for number, block in enumerate(sorted(blocks)):
            groups[tower, block] = f"{tower}/{number * min(n_groups, len(blocks)) // len(blocks)}"
    return {target.name: groups[target.tower, target.block] for target in targets}


def group_by_gradient(targets: Sequence[TargetModule], energies: Mapping[str, float], n_groups: int) -> dict[str, str]:
    """Block groups by k-means over the blocks' gradients, within each tower: HyDRA's coarse stage.

    A block is described by the log energy (squared gradient norm) of each of its roles; group 0 has the least.
    """
    from sklearn.cluster import KMeans

    groups = group_by_depth(targets, n_groups)
    inside = [t for t in targets if t.block is not None]
    for tower in {t.tower for t in inside}:
        members = [t for t in inside if t.tower == tower]
        floor = max(energies[t.name] for t in members) * 1e-12 or 1.0
        logs = pd.Series({(t.block, t.role): np.log(max(energies[t.name], floor)) for t in members})
        features = logs.unstack(fill_value=np.log(floor))
        labels = KMeans(min(n_groups, len(features)), n_init=10, random_state=0).fit_predict(features.to_numpy())
        places = features.mean(axis=1).groupby(labels).mean().rank(method="first").astype(int) - 1
        of_block = dict(zip(features.index, places[labels], strict=True))
        groups |= {t.name: f"{tower}/{of_block[t.block]}" for t in members}
    return groups
