"""From ranks to features: every feature is a sum over modules of a concave gain, so that a linear model stays solvable.

A feature is x_f(ranks) = sum_i W[f, i] h(i, r_i), with h one of two concave curves of the rank: `log`, log(1 + r), alike for
all modules, and `energy` and `norm`, the share of the module's own spectrum (sigma^2 or sigma) that r ranks capture. A linear
model on them values rank r of module i at sum_f beta_f W[f, i] (h(i, r) - h(i, r - 1)): gains that water-filling maximises.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import issparse

from rankscope.budget import ParameterBudget, allocate_proportional
from rankscope.errors import SettingsError
from rankscope.targets import TargetModule

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

CURVE_CELLS = 4_000_000  # of a table of gains, which is 32 MB: in larger models, ranks above
MIN_REACH = 512  # this one and that many cells count as the highest there


@dataclass(frozen=True, eq=False, kw_only=True)
class RankFeatures:
    """The features of allocations of one budget, each as the difference to uniform's.

    Attributes:
        targets: The target modules, in the order of the ranks.
        curves: Cumulative gains by name, (n_modules, max_rank + 1).
        weights: For each curve, (n_features of it, n_modules).
        names: Of all features, curve by curve, as in `role/q_proj`.
        levels: Of all features: `profile`, `model`, `tower`, `group`, `block`, `role` or `module`.
        reference: Uniform's ranks, (n_modules,).
    """

    targets: tuple[TargetModule, ...]
    curves: Mapping[str, Floats]
    weights: Mapping[str, Floats]
    names: tuple[str, ...]
    levels: tuple[str, ...]
    reference: Ints

    def __repr__(self) -> str:
        return f"<RankFeatures of {len(self.targets)} modules: {len(self.names)}>"

    def transform(self, ranks: ArrayLike) -> Floats:
        """(n, n_modules) ranks to (n, n_features), each column minus its value at uniform.

        Raises:
            SettingsError: Not one column a module, or ranks that are no whole numbers from 0 on.
        """
        return self._sums(self.checked(ranks)) - self._sums(self.reference[None, :])

    def checked(self, ranks: ArrayLike) -> Ints:
        """The ranks as (n, n_modules) integers.

        Raises:
            SettingsError: As `transform` does.
        """
        table = np.atleast_2d(as_numbers(ranks, "ranks"))
        if table.ndim != 2 or table.shape[1] != len(self.targets):
            raise SettingsError(
                f"`ranks` must have a column for each of {len(self.targets)} modules, but has shape {table.shape}."
            )
        if len(odd := table[~((table >= 0) & (table == np.floor(table)) & np.isfinite(table))]):
            raise SettingsError(
                f"`ranks` must be whole numbers from 0 on, without NaN or inf, but hold {odd[0]:g}; correct them."
            )
        whole: Ints = table.astype(np.int64)
        return whole

    def gains(self, coefficients: ArrayLike) -> dict[str, Floats]:
        """What a linear model says each rank of each module adds, by module name, made non-negative and non-increasing."""
        coefficients = np.asarray(coefficients, dtype=np.float64)
        total = np.zeros_like(next(iter(self.curves.values()))[:, 1:])
        start = 0
        for name, curve in self.curves.items():
            weights = self.weights[name]
            shares = coefficients[start : start + len(weights)] @ weights
            total += shares[:, None] * np.diff(curve, axis=1)
            start += len(weights)
        total = np.minimum.accumulate(np.maximum(total, 0.0), axis=1)
        return {target.name: total[i, : target.full_rank] for i, target in enumerate(self.targets)}

    def without(self, *levels: str) -> RankFeatures:
        """The features but for some levels."""
        kept = np.array([level not in levels for level in self.levels])
        weights, start = {}, 0
        for curve, rows in self.weights.items():
            weights[curve] = rows[kept[start : start + len(rows)]]
            start += len(rows)
        return replace(
            self,
            weights=weights,
            names=tuple(np.array(self.names)[kept].tolist()),
            levels=tuple(np.array(self.levels)[kept].tolist()),
        )

    @property
    def of_profile(self) -> RankFeatures | None:
        """The profile's terms alone, beside all modules alike; None where there are none."""
        found = self.without("tower", "group", "block", "role", "module")
        return found if "profile" in found.levels else None

    def _sums(self, ranks: Ints) -> Floats:
        index = np.arange(ranks.shape[1])
        parts = []
        for name, curve in self.curves.items():
            heights = curve[index, np.minimum(ranks, curve.shape[1] - 1)]
            parts.append(heights @ self.weights[name].T)
        return np.hstack(parts)


def _check(
    targets: tuple[TargetModule, ...], gains: Mapping[str, ArrayLike] | None, groups: Mapping[str, str] | None
) -> None:
    if not targets:
        raise SettingsError("`targets` must hold at least one target module, but is empty; find others.")
    for what, known in (("gains", gains), ("groups", groups)):
        if known is not None and (lacking := [t.name for t in targets if t.name not in known]):
            raise SettingsError(f"`{what}` must hold every target module, but lacks `{lacking[0]}`.")
    for name in [t.name for t in targets] if gains else ():
        values = as_numbers((gains or {})[name], "gains")
        if not (np.isfinite(values) & (values >= 0)).all():
            raise SettingsError(f"`gains` of `{name}` must be finite and not negative; take the profile again.")


def as_numbers(values: ArrayLike, name: str) -> Floats:
    """An array of numbers from what a user gave.

    Raises:
        SettingsError: It is not one.
    """
    try:
        if issparse(values):
            raise TypeError("a sparse matrix")
        if np.iscomplexobj(np.asarray(values)):
            raise TypeError("Complex data not supported")
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"`{name}` must be a dense array of real numbers, but: {error}.") from None


def rank_features(
    targets: Sequence[TargetModule],
    budget: ParameterBudget,
    *,
    gains: Mapping[str, ArrayLike] | None = None,
    groups: Mapping[str, str] | None = None,
) -> RankFeatures:
    """The features of a search: the profile's terms, and one coefficient for each tower, block group, role and module.

    All `log` features weigh a module by its rank cost over the mean: with equal coefficients every parameter is worth the
    same, and water-filling gives uniform ranks.

    Args:
        targets: The target modules.
        budget: Of the allocations; its uniform allocation is the reference.
        gains: One-shot's, by module name: the gradient energy sigma^2 of each rank; they give the terms `profile/energy` and
            `profile/norm`. None: there are none.
        groups: The block group of each module by name; None: no such level.

    Raises:
        SettingsError: No targets, or a module without group, or without gains that are finite and not negative.
        SettingsError: The budget holds no rank.
    """
    targets = tuple(targets)
    _check(targets, gains, groups)
    costs = np.array([target.rank_cost for target in targets], dtype=np.float64)
    reach = max(MIN_REACH, CURVE_CELLS // len(targets))
    highest = int(min(reach, max(min(t.full_rank, budget.limit // t.rank_cost) for t in targets)))
    curves = {"log": np.log1p(np.arange(highest + 1.0))[None, :].repeat(len(targets), axis=0)}
    keys = {
        "model": ["all"] * len(targets),
        "tower": [t.tower for t in targets],
        "group": [groups[t.name] for t in targets] if groups else ["all"] * len(targets),
        "block": [f"{t.tower}/{t.block}" for t in targets],
        "role": [t.role for t in targets],
        "module": [t.name for t in targets],
    }
    names, levels, rows = [], [], []
    for level, members in keys.items():
        distinct = list(dict.fromkeys(members))
        if level != "model" and len(distinct) == 1:
            continue
        for key in distinct:
            names.append(f"{level}/{key}")
            levels.append(level)
            rows.append([member == key for member in members])
    weights = {"log": np.array(rows, dtype=np.float64) * (costs / costs.mean())}
    if gains is not None:
        for name, power in (("energy", 1.0), ("norm", 0.5)):
            curve = np.zeros((len(targets), highest + 1))
            for i, target in enumerate(targets):
                values = np.asarray(gains[target.name], dtype=np.float64)[:highest] ** power
                curve[i, 1 : len(values) + 1] = values
            curves[name] = np.cumsum(curve, axis=1) / max(curve.sum(axis=1).mean(), np.finfo(np.float64).tiny)
            weights[name] = np.ones((1, len(targets)))
            names.append(f"profile/{name}")
            levels.append("profile")
    uniform = allocate_proportional(targets, dict.fromkeys((t.name for t in targets), 1.0), budget)
    return RankFeatures(
        targets=targets,
        curves=curves,
        weights=weights,
        names=tuple(names),
        levels=tuple(levels),
        reference=np.array(uniform.vector, dtype=np.int64),
    )
