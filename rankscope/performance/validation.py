"""How far a performance model can be believed: scores on allocations it has not seen, beside simpler predictors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import kendalltau, spearmanr
from sklearn.base import clone
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import PowerTransformer

from rankscope.performance.model import PerformanceModel

Floats = NDArray[np.float64]

MIN_ALLOCATIONS = 10  # with fewer, scores say nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """Scores of predictions for left-out allocations; a predictor that always says the mean would score 0.

    Attributes:
        allocations: Different ones.
        explained: Share of the variance of the normalised metric that the model explains; below 0: worse than the mean.
        explained_by_profile: The same of the profile alone: a regression on its terms; None without a profile.
        kendall: Kendall's tau of model and metric.
        spearman: Spearman's correlation of model and metric.
        profile: Kendall's tau of the profile alone (the captured norm, without a trial); None without a profile.
        top_regret: How far the best of the five predicted best falls short of the best, over how far the mean does.
        profile_top_regret: The same of the profile alone; None without a profile.
        ceiling: What Spearman's correlation could reach at most, because the metric itself is noisy; None if unknown.
        coverage: Share of measurements inside the model's 80 % intervals; None under several conditions, over which intervals
            are averaged.
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
        """Whether the model predicts left-out allocations better than the profile alone, and than the mean.

        Squared errors judge: with few trials they tell two predictors apart where rank correlations scatter too much.
        """
        return self.explained > max(self.explained_by_profile or 0.0, 0.0)

    def __str__(self) -> str:
        parts = [f"explains {self.explained:.0%} of the variance of left-out allocations"]
        if self.explained_by_profile is not None:
            parts[0] += f" (profile alone {self.explained_by_profile:.0%})"
        parts.append(f"Kendall's tau {self.kendall:.2f}")
        if self.profile is not None:
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
    folds: int = 10,
    seed: int = 0,
) -> Validation | None:
    """Cross-validates: all observations of an allocation are left out together.

    Args:
        model: Cloned, not changed.
        ranks: (n, n_modules).
        y: The metric, (n,).
        sample_weight: Repeats behind each observation, (n,).
        conditions: As `PerformanceModel.fit` takes them.
        noise_variance: Of one observation, from repeats; for the ceiling sqrt(1 - noise / variance) (Spearman 1904).
        folds: Of the cross-validation.
        seed: Of the folds.

    Returns:
        The scores; None with fewer than 10 different allocations or a constant metric.
    """
    table, metric = np.atleast_2d(np.asarray(ranks)), np.asarray(y, dtype=np.float64)
    weight = np.ones(len(metric)) if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
    labels = list(conditions) if conditions is not None else [None] * len(metric)
    _, groups = np.unique(table, axis=0, return_inverse=True)
    groups = groups.ravel()
    if groups.max(initial=0) + 1 < MIN_ALLOCATIONS or np.ptp(metric) == 0:
        return None
    alone = None if model.features.of_profile is None else PerformanceModel(model.features.of_profile)
    predicted, by_profile, inside = np.zeros(len(metric)), np.zeros(len(metric)), np.zeros(len(metric), dtype=bool)
    for train, test in GroupKFold(folds, shuffle=True, random_state=seed).split(table, metric, groups):
        known = table[train], metric[train], weight[train], [labels[i] for i in train]
        fitted = clone(model, safe=False).fit(*known)
        predicted[test] = fitted.predict(table[test])
        if alone is not None:
            by_profile[test] = clone(alone, safe=False).fit(*known).predict(table[test])
        low, high = fitted.interval(table[test], 0.8, repeats=float(weight[test].mean()))
        inside[test] = (low <= metric[test]) & (metric[test] <= high)
    even = _at_one_condition(metric, labels)
    rows: Floats = model.features.transform(table)
    column = [i for i, name in enumerate(model.features.names) if name == "profile/norm"]
    return Validation(
        allocations=int(groups.max()) + 1,
        explained=_explained(predicted, even, weight),
        explained_by_profile=None if alone is None else _explained(by_profile, even, weight),
        kendall=float(kendalltau(predicted, even)[0]),
        spearman=float(spearmanr(predicted, even)[0]),
        profile=float(kendalltau(rows[:, column[0]], even)[0]) if column else None,
        top_regret=top_regret(predicted, even),
        profile_top_regret=top_regret(rows[:, column[0]], even) if column else None,
        ceiling=None if noise_variance is None else float(np.sqrt(max(0.0, 1.0 - noise_variance / even.var()))),
        coverage=float(inside.mean()) if len(set(labels)) == 1 else None,
    )


def top_regret(predicted: ArrayLike, metric: ArrayLike, k: int = 5) -> float:
    """How far the best of the k predicted best falls short of the best, over how far the mean does: 0 is perfect.

    >>> top_regret([1, 2, 3, 4], [0.5, 0.9, 0.7, 0.5], k=2)
    0.8
    """
    truth = np.asarray(metric, dtype=np.float64)
    chosen = np.argsort(-np.asarray(predicted, dtype=np.float64), kind="stable")[:k]
    gap = truth.max() - truth.mean()
    return round(float((truth.max() - truth[chosen].max()) / gap), 12) if gap > 0 else 0.0


def believable(model: PerformanceModel, validation: Validation | None) -> PerformanceModel | None:
    """What left-out allocations speak for: the model; else the profile alone, fitted to the same observations; else nothing.

    Args:
        model: Fitted.
        validation: Its scores; None, where they could not be had, speaks for nothing.
    """
    if validation is None:
        return None
    if validation.trustworthy:
        return model
    return model.of_profile() if (validation.explained_by_profile or 0.0) > 0.0 else None


def _at_one_condition(metric: Floats, conditions: Sequence[Any]) -> Floats:
    """The metric without what conditions do to it on average: predictions are averaged over conditions."""
    codes = np.unique([str(condition) for condition in conditions], return_inverse=True)[1]
    means = np.bincount(codes, weights=metric) / np.bincount(codes)
    even: Floats = metric - means[codes] + metric.mean()
    return even


def _explained(predicted: Floats, metric: Floats, weight: Floats) -> float:
    """1 - variance of the errors over that of the metric made normal, as the model sees it; a common shift is no error."""
    scaler = PowerTransformer().fit(metric[:, None])
    truth, guess = (scaler.transform(values[:, None]).ravel() for values in (metric, predicted))
    error = guess - truth
    spread = [np.average((v - np.average(v, weights=weight)) ** 2, weights=weight) for v in (error, truth)]
    return float(1.0 - spread[0] / spread[1])
