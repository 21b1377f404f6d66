"""What earlier studies, of other tasks and models too, say of a new one: a prior on the coefficients that have a common name.

Profile terms, roles, towers and depth thirds mean the same in every study; blocks and modules do not. In a unit that all studies
share, task k has the coefficients b_kj = m_j + d_kj: a mean over tasks, and a deviation of its own with the variance
t^2 of its level. One regression on all studies' trials estimates all of these (a random-effects meta-analysis in one stage). A
task never seen is then expected at the posterior mean of m_j, within sqrt(Var m_j + t^2) (the predictive distribution
of Higgins, Thompson, Spiegelhalter 2009, sec. 5). One earlier task cannot tell m from d: the regression's prior shares what
it says between them. Studies of one task, as at several budgets, share their d: they do not count as several tasks.

The shared unit of a coefficient is standard deviations of the metric within its study, for one `RankFeatures.unit` of the column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.preprocessing import PowerTransformer

from rankscope.exceptions import PerformanceModelError
from rankscope.performance.features import RankFeatures
from rankscope.performance.regression import HierarchicalRegressor
from rankscope.space import group_by_depth

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

TRANSFERABLE = ("profile", "model", "tower", "group", "role")  # levels whose names mean the same in every study
PROFILE_MEAN = 0.15  # standard deviations of the metric that one of a profile term's is expected to bring
PROFILE_SHARE = 10.0  # how much more than of another level the prior expects of the profile's terms
MIN_TRIALS = 10  # of a study; fewer say nothing of a dozen coefficients


@dataclass(frozen=True, eq=False, kw_only=True)
class EarlierStudy:
    """The measurements of one study.

    Attributes:
        name: For messages, and for the prior's record of where it comes from.
        task: Studies of one task are expected to be more alike than those of several.
        features: Of its targets and budget; block groups, if any, are thirds by depth (`group_by_depth`).
        ranks: (n, n_modules).
        metric: Higher is better, (n,).
        conditions: What else differs between trials, as their learning rates, (n,).
    """

    name: str
    task: str
    features: RankFeatures
    ranks: Ints
    metric: Floats
    conditions: Sequence[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prior:
    """What is expected of the coefficients of a study that is yet to come, in the unit that studies share.

    Attributes:
        means: By column, as in `role/q_proj`.
        deviations: Standard deviations, by column.
        studies: Name and number of trials of each earlier study.
    """

    means: Mapping[str, float]
    deviations: Mapping[str, float]
    studies: tuple[tuple[str, int], ...]

    def coefficients(self, features: RankFeatures) -> tuple[Floats, Floats]:
        """Means and standard deviations in the features' own units, (n_features,) each; NaN where nothing is known.

        A block group is known only where it is a third by depth, as those of the earlier studies are.
        """
        unit = np.where(features.unit > 0, features.unit, np.nan)
        known = [name in self.means and has for name, has in zip(features.names, transferable(features), strict=True)]
        means, deviations = (
            np.array([values[n] if k else np.nan for n, k in zip(features.names, known, strict=True)], dtype=np.float64)
            for values in (self.means, self.deviations)
        )
        return means / unit, deviations / unit

    def predict(self, features: RankFeatures, ranks: Ints) -> Floats:
        """The expected metric without a trial, (n,), in standard deviations from uniform's; it ranks allocations."""
        means: Floats = np.nan_to_num(self.coefficients(features)[0])
        return features.transform(ranks) @ means

    def __str__(self) -> str:
        parts = [f"{name}: {trials}" for name, trials in self.studies]
        return f"{sum(trials for _, trials in self.studies)} trials of earlier studies ({', '.join(parts)})"


def learn_prior(studies: Sequence[EarlierStudy]) -> Prior:
    """The prior that earlier studies give; the more they differ, the wider.

    Raises:
        PerformanceModelError: There is no study, or one has too few trials or a constant metric.
    """
    if not studies:
        raise PerformanceModelError("a warm start needs at least one earlier study, but got none; name one.")
    for study in studies:
        _check(study)
    tables = [_columns(study, index) for index, study in enumerate(studies)]
    columns = list(dict.fromkeys(chain.from_iterable(tables)))
    shared = [column for column in columns if column.task is None]
    model = HierarchicalRegressor(
        levels=[column.level for column in columns],
        means=[PROFILE_MEAN if column.level == "shared/profile" else 0.0 for column in columns],
        shares={"shared/profile": PROFILE_SHARE, "own/profile": PROFILE_SHARE},
    ).fit(
        np.vstack([_stacked(table, columns, len(study.metric)) for table, study in zip(tables, studies, strict=True)]),
        np.concatenate([PowerTransformer().fit_transform(study.metric[:, None]).ravel() for study in studies]),
    )
    mean, deviation = model.predict(np.eye(len(columns))[[columns.index(column) for column in shared]], return_std=True)
    between = [model.variances_[column.level.replace("shared", "own")] for column in shared]
    names = [column.name for column in shared]
    return Prior(
        means=dict(zip(names, mean.tolist(), strict=True)),
        deviations=dict(zip(names, np.sqrt(deviation**2 + between).tolist(), strict=True)),
        studies=tuple((study.name, len(study.metric)) for study in studies),
    )


def transferable(features: RankFeatures) -> list[bool]:
    """Whether each column means the same in other studies."""
    depth = group_by_depth(features.targets)
    thirds = {key: [depth[t.name] == key for t in features.targets] for key in set(depth.values())}
    members = (features.weights["log"] != 0).tolist()
    found = []
    for index, (name, level) in enumerate(zip(features.names, features.levels, strict=True)):
        is_third = level != "group" or thirds.get(name.removeprefix("group/")) == members[index]
        found.append(level in TRANSFERABLE and is_third)
    return found


# --- inside ----------------------------------------------------------------------------------------------------------


class _Column(NamedTuple):
    """A coefficient of the regression on all studies: shared by all tasks (`task` None), or a task's own."""

    task: str | None
    level: str
    name: str


def _columns(study: EarlierStudy, index: int) -> dict[_Column, Floats]:
    """A study's columns in the shared unit: those shared by all tasks, the task's own, and the study's offsets, (n,) each."""
    unit = study.features.unit
    rows = study.features.transform(study.ranks)
    scaled = np.divide(rows, unit, out=np.zeros_like(rows), where=unit > 0)
    found = {_Column(study.task, "intercept", f"{index}"): np.ones(len(rows))}
    for condition in dict.fromkeys(study.conditions):
        same = np.array([other == condition for other in study.conditions], dtype=np.float64)
        found[_Column(study.task, "condition", f"{index}/{condition}")] = same
    common = transferable(study.features)
    for name, level, values, is_common in zip(
        study.features.names, study.features.levels, scaled.T, common, strict=True
    ):
        if is_common:
            found[_Column(None, f"shared/{level}", name)] = values
        if is_common or level == "block":
            found[_Column(study.task, f"own/{level}", name)] = values
    return found


def _stacked(table: Mapping[_Column, Floats], columns: Sequence[_Column], n: int) -> Floats:
    """One study's rows of the regression, (n, n_columns); 0 in the columns that it does not have."""
    return np.column_stack([table.get(column, np.zeros(n)) for column in columns])


def _check(study: EarlierStudy) -> None:
    if len(study.metric) < MIN_TRIALS:
        raise PerformanceModelError(
            f"study `{study.name}` must hold at least {MIN_TRIALS} completed trials for a warm start, but holds "
            f"{len(study.metric)}; run more of it, or leave it out."
        )
    if not np.ptp(study.metric) > 1e-12 * np.abs(study.metric).max():
        raise PerformanceModelError(
            f"study `{study.name}` must have metrics that differ for a warm start, but all {len(study.metric)} are "
            f"{study.metric[0]:g}; leave it out."
        )
