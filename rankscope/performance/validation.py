"""How far a performance model can be believed: scores on allocations it has not seen, beside simpler predictors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import kendalltau, spearmanr
from sklearn.base import clone
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import PowerTransformer

from rankscope.performance.features import Floats
from rankscope.performance.model import PerformanceModel

MIN_ALLOCATIONS = 10  # with fewer, scores say nothing
FOLDS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """Scores of predictions for left-out allocations. A constant prediction would score 0.

    Attributes:
        allocations: Different ones.
        explained: Share of the normalised metric's variance that the model explains; below 0: worse than the mean.
        explained_by_profile: The same of a regression on the profile's terms alone; None without a profile.
        kendall: Kendall's tau of model and metric.
        spearman: Spearman's correlation of model and metric.
        profile: Kendall's tau of the captured norm, which needs no trial, and metric; None without a profile.
        top_regret: How far the best of the five predicted best falls short of the best, over how far the mean does.
        profile_top_regret: The same of the captured norm; None without a profile.
        ceiling: The highest Spearman correlation possible, because the metric itself is noisy; None if unknown.
        coverage: Share of measurements inside the 80 % intervals; None under several conditions, which intervals average.
    """

    allocations: int
    explained: float
    explained_by_profile: float | None
    kendall: float
    spearman: float
    profile: float | None
    top_regret: float
    profile_top_regret: float | None
    ceiling: float | None
    coverage: float | None

    @property
    def trustworthy(self) -> bool:
        """Whether squared errors, which scatter less than rank correlations, are below the profile's and the mean's."""
        return self.explained > max(self.explained_by_profile or 0.0, 0.0)

    def __str__(self) -> str:
        parts = [
            f"explains {self.explained:.0%} of the variance of left-out allocations",
            f"Kendall's tau {self.kendall:.2f}",
        ]
        if self.explained_by_profile is not None and self.profile is not None:
            parts[0] += f" (profile alone {self.explained_by_profile:.0%})"
            parts[1] += f" (profile alone {self.profile:.2f})"
        if self.ceiling is not None:
            parts.append(f"Spearman {self.spearman:.2f} of at most {self.ceiling:.2f}")
        if self.coverage is not None:
            parts.append(f"80 % intervals hold {self.coverage:.0%}")
        return "; ".join(parts)


def validate(
    model: PerformanceModel,
    ranks: ArrayLike,
    y: ArrayLike,
    *,
    sample_weight: ArrayLike | None = None,
    conditions: Sequence[Any] | None = None,
    noise_variance: float | None = None,
) -> Validation | None:
    """Cross-validates clones of the model; all observations of an allocation are left out together.

    Observations are as `PerformanceModel.fit` takes them; `noise_variance` is that of one, from repeats, for the ceiling
    sqrt(1 - noise / variance) (Spearman 1904). None with fewer than 10 different allocations or a constant metric.
    """
    table, metric = np.atleast_2d(np.asarray(ranks)), np.asarray(y, dtype=np.float64)
    weight = np.ones(len(metric)) if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
    labels = list(conditions) if conditions is not None else [None] * len(metric)
    groups = np.unique(table, axis=0, return_inverse=True)[1].ravel()
    if groups.max(initial=0) + 1 < MIN_ALLOCATIONS or np.ptp(metric) == 0:
        return None
    profile = model.features.of_profile
    predicted, by_profile, inside = np.zeros((3, len(metric)))
    for train, test in GroupKFold(FOLDS, shuffle=True, random_state=0).split(table, metric, groups):
        known = table[train], metric[train], weight[train], [labels[i] for i in train]
        fitted = clone(model, safe=False).fit(*known)
        predicted[test] = fitted.predict(table[test])
        if profile is not None:
            by_profile[test] = PerformanceModel(profile).fit(*known).predict(table[test])
        low, high = fitted.interval(table[test], 0.8, repeats=float(weight[test].mean()))
        inside[test] = (low <= metric[test]) & (metric[test] <= high)
    codes = np.unique([str(label) for label in labels], return_inverse=True)[1]
    offsets = np.bincount(codes, weights=metric) / np.bincount(codes)
    even = metric - offsets[codes] + metric.mean()  # predictions, too, are averages over conditions
    columns = dict(zip(model.features.names, model.features.transform(table).T, strict=True))
    captured: Floats | None = columns.get("profile/norm")
    return Validation(
        allocations=int(groups.max()) + 1,
        explained=_explained(predicted, even, weight),
        explained_by_profile=None if profile is None else _explained(by_profile, even, weight),
        kendall=float(kendalltau(predicted, even)[0]),
        spearman=float(spearmanr(predicted, even)[0]),
        profile=None if captured is None else float(kendalltau(captured, even)[0]),
        top_regret=top_regret(predicted, even),
        profile_top_regret=None if captured is None else top_regret(captured, even),
        ceiling=None if noise_variance is None else float(np.sqrt(max(0.0, 1.0 - noise_variance / even.var()))),
        coverage=float(inside.mean()) if len(set(labels)) == 1 else None,
    )


def believable(model: PerformanceModel, validation: Validation | None) -> PerformanceModel | None:
    """What left-out allocations speak for: the model, else the profile alone on the same observations, else nothing."""
    if validation is not None and validation.trustworthy:
        return model
    by_profile = validation and validation.explained_by_profile
    return model.of_profile() if (by_profile or 0.0) > 0.0 else None


def top_regret(predicted: ArrayLike, metric: ArrayLike, k: int = 5) -> float:
    """How far the best of the k predicted best falls short of the best, over how far the mean does: 0 is perfect.

    >>> top_regret([1, 2, 3, 4], [0.5, 0.9, 0.7, 0.5], k=2)
    0.8
    """
    truth = np.asarray(metric, dtype=np.float64)
    chosen = np.argsort(-np.asarray(predicted, dtype=np.float64), kind="stable")[:k]
    gap = truth.max() - truth.mean()
    return round(float((truth.max() - truth[chosen].max()) / gap), 12) if gap > 0 else 0.0


def _explained(predicted: Floats, metric: Floats, weight: Floats) -> float:
    """1 - variance of the errors over that of the metric made normal, as the model sees it; a common shift is no error."""
    scaler = PowerTransformer().fit(metric[:, None])
    truth, guess = (scaler.transform(values[:, None]).ravel() for values in (metric, predicted))
    error = guess - truth
    spread = [np.average((v - np.average(v, weights=weight)) ** 2, weights=weight) for v in (error, truth)]
    return float(1.0 - spread[0] / spread[1])
