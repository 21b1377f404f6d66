"""Rank features: sums over modules of concave gains, so that water-filling maximises a linear model on them.

A feature is x_f(ranks) = sum_i W[f, i] h(i, r_i), where h is one of three concave curves of the rank: `log`, log(1 + r), the
same for every module; `norm` and `energy`, what r ranks capture of the module's prior gains or their squares. A linear
model with coefficients beta values rank r of module i at sum_f beta_f W[f, i] (h(i, r) - h(i, r - 1)).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array, issparse, vstack

from rankscope.budget import ParameterBudget, allocate_proportional
from rankscope.errors import SettingsError, checked
from rankscope.naming import label_blocks
from rankscope.targets import TargetModule

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

CURVE_CELLS = 4_000_000  # of a table of gains, which is 32 MB: in larger models, ranks above
PRIOR_POWER, PRIOR_DEPTH = 1.0, 1.0  # of sigma, and of the share of blocks passed, in `prior_gains`
MIN_REACH = 512  # this one and that many cells count as the highest there


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class RankFeatures:
    """The features of allocations of one budget, each as the difference to uniform's.

    Attributes:
        targets: The target modules, in the order of the ranks.
        reference: Uniform's ranks, (n_modules,).
        curves: Cumulative gains by name, (n_modules, max_rank + 1).
        names: Of the features, as level/key: `role/q_proj`, or `profile/norm` for a curve of the profile.
        weights: Of each module in each feature, (n_features, n_modules); sparse, as a feature of a module alone has one.
    """

    targets: tuple[TargetModule, ...]
    reference: Ints
    curves: Mapping[str, Floats]
    names: tuple[str, ...]
    weights: csr_array

    def __repr__(self) -> str:
        return f"<RankFeatures of {len(self.targets)} modules: {len(self.names)}>"

    @property
    def levels(self) -> tuple[str, ...]:
        """Of the features: `profile`, `model`, `tower`, `group`, `block`, `role` or `module`."""
        return tuple(name.partition("/")[0] for name in self.names)

    @property
    def labels(self) -> tuple[str, ...]:
        """The keys of the features, readable: `q_proj`, and `blocks 0-1` for the group `model/0`."""
        several = len({target.tower for target in self.targets}) > 1
        labels = [self._label(row, several) for row in range(len(self.names))]
        times = Counter(zip(self.levels, labels, strict=True))
        shared = {
            label for (_, label), n in times.items() if n > 1
        }  # groups of a user's own making, in the same blocks
        return tuple(
            name.partition("/")[2] if label in shared else label for name, label in zip(self.names, labels, strict=True)
        )

    def _label(self, row: int, several: bool) -> str:
        level, _, key = self.names[row].partition("/")
        if level not in ("group", "block"):
            return key
        start, end = self.weights.indptr[row : row + 2]
        members = [self.targets[place] for place in self.weights.indices[start:end]]
        return label_blocks(key, {t.block for t in members if t.block is not None}, several=several)

    def transform(self, ranks: ArrayLike) -> Floats:
        """(n, n_modules) ranks to (n, n_features), each column minus its value at uniform; raises as `checked` does."""
        return self._sums(self.checked(ranks)) - self._sums(self.reference[None, :])

    def checked(self, ranks: ArrayLike) -> Ints:
        """The ranks as (n, n_modules) integers; SettingsError where they are not such whole numbers from 0 on."""
        table, n = np.atleast_2d(as_numbers(ranks, "ranks")), len(self.targets)
        if table.ndim != 2 or table.shape[1] != n:
            raise SettingsError(f"`ranks` must have a column for each of {n} modules, but has shape {table.shape}.")
        if len(odd := table[~((table >= 0) & (table == np.floor(table)) & np.isfinite(table))]):
            raise SettingsError(
                f"`ranks` must be whole numbers from 0 on, without NaN or inf, but hold {odd[0]:g}; correct them."
            )
        return table.astype(np.int64)

    def gains(self, coefficients: ArrayLike) -> dict[str, Floats]:
        """What a linear model says each rank of each module adds, by module name, made non-negative and non-increasing."""
        beta, parts = np.asarray(coefficients, dtype=np.float64), self._by_curve()
        total = np.zeros((len(self.targets), next(iter(self.curves.values())).shape[1] - 1))
        for curve, mine in parts:  # in place: in large models a curve has tens of megabytes
            step = np.diff(curve, axis=1)
            step *= (beta[mine] @ self.weights[mine])[:, None]
            total += step
        np.maximum(total, 0.0, out=total)
        np.minimum.accumulate(total, axis=1, out=total)
        return {target.name: total[i, : target.full_rank] for i, target in enumerate(self.targets)}

    def without(self, *levels: str) -> RankFeatures:
        """The features of all other levels."""
        kept = [place for place, level in enumerate(self.levels) if level not in levels]
        return replace(self, names=tuple(self.names[place] for place in kept), weights=self.weights[kept])

    @property
    def of_profile(self) -> RankFeatures | None:
        """The profile's terms, and the one of all modules alike; None without a profile."""
        return self.without("tower", "group", "block", "role", "module") if "profile" in self.levels else None

    def _by_curve(self) -> Iterator[tuple[Floats, NDArray[np.bool_]]]:
        """Each curve, and which features are sums of it: the profile's are of the curves of their names, others of `log`."""
        own = np.array([name.removeprefix("profile/") if name.startswith("profile/") else "log" for name in self.names])
        return ((curve, own == name) for name, curve in self.curves.items())

    def _sums(self, ranks: Ints) -> Floats:
        modules, sums = np.arange(ranks.shape[1]), np.empty((len(ranks), len(self.names)))
        for curve, mine in self._by_curve():
            sums[:, mine] = curve[modules, np.minimum(ranks, curve.shape[1] - 1)] @ self.weights[mine].T
        return sums


@checked
def rank_features(
    targets: Sequence[TargetModule],
    budget: ParameterBudget | int,
    *,
    gains: Mapping[str, ArrayLike] | None = None,
    groups: Mapping[str, str] | None = None,
) -> RankFeatures:
    """The features of a search: the profile's terms, and one coefficient for each tower, block group, role and module.

    `log` features weigh a module by its rank cost over the mean: with equal coefficients every parameter is worth the same,
    and water-filling gives uniform ranks.

    Args:
        targets: The target modules.
        budget: Its uniform allocation is the reference.
        gains: What each rank is worth before any trial (`prior_gains`), by module name, for the profile's terms.
        groups: The block group of each module by name.
    """
    targets, budget = tuple(targets), ParameterBudget.of(budget)
    if not targets:
        raise SettingsError("`targets` must hold at least one target module, but is empty; find others.")
    for what, known in (("gains", gains), ("groups", groups)):
        if known is not None and (lacking := [t.name for t in targets if t.name not in known]):
            raise SettingsError(f"`{what}` must hold every target module, but lacks `{lacking[0]}`.")
    costs = np.array([target.rank_cost for target in targets], dtype=np.float64)
    reach = max(MIN_REACH, CURVE_CELLS // len(targets))
    highest = int(min(reach, max(min(t.full_rank, budget.limit // t.rank_cost) for t in targets)))
    members = {
        "model": ["all"] * len(targets),
        "tower": [t.tower for t in targets],
        "group": [groups[t.name] if groups else "all" for t in targets],
        "block": [f"{t.tower}/{t.block}" for t in targets],
        "role": [t.role for t in targets],
        "module": [t.name for t in targets],
    }
    kept = [level for level, keys in members.items() if level == "model" or len(set(keys)) > 1]
    features = [(level, key) for level in kept for key in dict.fromkeys(members[level])]
    place = {feature: number for number, feature in enumerate(features)}
    rows = [place[level, key] for level in kept for key in members[level]]
    columns, n = np.tile(np.arange(len(targets)), len(kept)), len(targets)
    weights = csr_array((np.tile(costs / costs.mean(), len(kept)), (rows, columns)), shape=(len(features), n))
    of_profile = {} if gains is None else _captured(targets, gains, highest)
    uniform = allocate_proportional(targets, dict.fromkeys((t.name for t in targets), 1.0), budget)
    return RankFeatures(
        targets=targets,
        reference=np.array(uniform.vector, dtype=np.int64),
        curves={"log": np.broadcast_to(np.log1p(np.arange(highest + 1.0)), (n, highest + 1)), **of_profile},
        names=(*(f"{level}/{key}" for level, key in features), *(f"profile/{name}" for name in of_profile)),
        weights=vstack([weights, np.ones((len(of_profile), n))], format="csr"),
    )


def _captured(targets: Sequence[TargetModule], gains: Mapping[str, ArrayLike], highest: int) -> dict[str, Floats]:
    """By name, cumulative powers of each module's gains, over the modules' mean total, (n_modules, highest + 1)."""
    gained = np.zeros((len(targets), highest + 1))
    for row, target in zip(gained, targets, strict=True):
        values = as_numbers(gains[target.name], "gains")
        if not (np.isfinite(values) & (values >= 0)).all():
            raise SettingsError(f"`gains` of `{target.name}` must be finite and not negative; take the profile again.")
        row[1 : len(values) + 1] = values[:highest]
    tiny = np.finfo(np.float64).tiny
    squares = (gained / max(gained.max(), tiny)) ** 2  # over the largest, as the squares of tiny gains are 0
    curves = {"energy": squares, "norm": gained}
    for each in curves.values():
        mean = max(each.sum(axis=1).mean(), tiny)
        np.cumsum(each, axis=1, out=each)
        each /= mean
    return curves


def prior_gains(
    spectra: Mapping[str, Floats],
    targets: Sequence[TargetModule],
    power: float = PRIOR_POWER,
    depth: float = PRIOR_DEPTH,
) -> dict[str, Floats]:
    """What ranks are worth before any trial, by module: sigma ** power * d ** depth, over the largest sigma's.

    d is the share of the tower's blocks that a module's change passes through, its own block included: 1 in the first block,
    1/n in the last of n, and 1 outside blocks. The gradient tells what a change does at once, which is most in the last blocks;
    what is learned in an early block, all later ones use (measured by studies/bench/prior_rules.py).
    """
    top = max((float(np.max(values, initial=0.0)) for values in spectra.values()), default=0.0) or 1.0
    blocks: dict[str, int] = {}
    for target in targets:
        blocks[target.tower] = max(blocks.get(target.tower, 0), (target.block or 0) + 1)
    passed = {t.name: 1.0 - (t.block or 0) / blocks[t.tower] for t in targets}
    return {t.name: (spectra[t.name] / top) ** power * passed[t.name] ** depth for t in targets}


def as_numbers(values: ArrayLike, name: str) -> Floats:
    """A float64 array; raises SettingsError for what is not a dense array of real numbers."""
    try:
        if issparse(values):
            raise TypeError("a sparse matrix")
        if np.iscomplexobj(np.asarray(values)):
            raise TypeError("Complex data not supported")
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"`{name}` must be a dense array of real numbers, but: {error}.") from None
