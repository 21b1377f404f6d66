"""`PerformanceModel` predicts a task's metric from ranks; `validate` says how far it can be believed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize
from scipy.stats import kendalltau, norm, spearmanr
from sklearn.base import BaseEstimator, RegressorMixin, clone
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import PowerTransformer
from sklearn.utils.validation import check_is_fitted, column_or_1d

from rankscope.errors import SettingsError
from rankscope.performance.features import Floats, Ints, RankFeatures, as_numbers

PROFILE_MEAN = 0.15  # standard deviations of the metric that one of a profile term's is expected to bring
PROFILE_SHARE = 10.0  # prior variance of the profile's terms, relative to another level's
GROWTH = 1.2  # transform and variances are estimated again once there are so many times the observations
LOG_SPREAD = 1.0  # standard deviation of the prior on each log variance
NOISE_SHARE = 0.5  # of the targets' variance that the prior expects to be noise
MIN_ALLOCATIONS = 10  # with fewer, cross-validation says nothing
FOLDS = 10

Weights = ArrayLike | None
Labels = Sequence[Any] | None
Data = tuple[Ints, Floats, Floats, list[Any]]  # ranks, metrics, weights and conditions
Pair = tuple[Floats, Floats]


class PerformanceModel(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """Regression from ranks to the metric, by hierarchical Bayesian regression.

    The metric is made normal first (Yeo and Johnson 2000): otherwise a few allocations that starve a module would outweigh
    all differences among good ones. The regression is linear in concave gains of the ranks (`RankFeatures`), so water-filling
    on `utilities()` finds the allocation of the highest value.
    """

    regressor_: HierarchicalRegressor

    def __init__(self, features: RankFeatures) -> None:
        self.features = features

    def fit(self, ranks: ArrayLike, y: ArrayLike, sample_weight: Weights = None, conditions: Labels = None) -> Self:
        """Fit the observations.

        Args:
            ranks: One allocation a row, (n, n_modules).
            y: The metric, or its paired difference to uniform; higher is better, (n,).
            sample_weight: Repeats (seeds) behind each observation, (n,).
            conditions: What else differs between observations, such as the learning rate; each gets an offset. (n,).

        Raises:
            SettingsError: Fewer than two observations, or arguments that do not fit together or are not finite.
        """
        self._data = self._checked(ranks, y, sample_weight, conditions)
        self.n_features_in_ = len(self.features.targets)
        self._estimated_at = 0  # observations when the variances were last estimated
        return self._refit()

    def update(self, ranks: ArrayLike, y: ArrayLike, sample_weight: Weights = None, conditions: Labels = None) -> Self:
        """Add observations. The posterior is exact; transform and variances are estimated again at every fifth more."""
        if not hasattr(self, "regressor_"):
            return self.fit(ranks, y, sample_weight, conditions)
        old, new = self._data, self._checked(ranks, y, sample_weight, conditions)
        self._data = np.vstack([old[0], new[0]]), np.append(old[1], new[1]), np.append(old[2], new[2]), old[3] + new[3]
        return self._refit()

    def predict(self, ranks: ArrayLike) -> Floats:
        """The expected (median) metric, averaged over conditions, (n,)."""
        return self._back(self._fitted.predict(self._rows(ranks)))

    def interval(self, ranks: ArrayLike, confidence: float = 0.8, repeats: float | None = None) -> Pair:
        """Central interval, (n,) and (n,), of the expected metric, or of its mean over so many fresh measurements."""
        if not 0.0 < confidence < 1.0:
            raise SettingsError(f"`confidence` must lie between 0 and 1, but is {confidence:g}.")
        mean, deviation = self._fitted.predict(self._rows(ranks), return_std=True)
        if repeats is not None:
            deviation = np.sqrt(deviation**2 + self._noise(repeats))
        half = norm.ppf(0.5 + confidence / 2.0) * deviation
        return self._back(mean - half), self._back(mean + half)

    def score(self, ranks: ArrayLike, y: ArrayLike, sample_weight: None = None) -> float:
        """Spearman's rank correlation of prediction and metric."""
        return float(spearmanr(self.predict(ranks), y)[0])

    def posterior_differences(
        self,
        ranks: ArrayLike,
        reference: int = 0,
        *,
        retests: ArrayLike | None = None,
        repeats: float = 1.0,
        confidence: float = 0.95,
    ) -> Floats:
        """How much better each allocation's metric is than that of row `reference`: mean, low and high, (n, 3).

        Args:
            ranks: One allocation a row, (n, n_modules).
            reference: The row to compare with.
            retests: Metrics of an independent re-measurement, (n,), NaN where there is none. Only differences among them
                count: fresh seeds, other learning rates or longer training shift all of them alike.
            repeats: Measurements behind each retest.
            confidence: Of the interval.
        """
        mean, covariance = self._fitted.predict(self._rows(ranks), return_cov=True)
        again = np.full(len(mean), np.nan) if retests is None else as_numbers(retests, "retests")
        if again.shape != mean.shape or np.isinf(again).any():
            raise SettingsError(f"`retests` must hold {len(mean)} metrics, one for each allocation, but does not.")
        noise, seen = self._noise(repeats), ~np.isnan(again)
        if self._scaler is None:
            return np.zeros((len(mean), 3))
        if seen.any():  # Gaussian conditioning (Bishop 2006, eq. 2.81), with a shift of all retests whose prior is flat
            precision = np.linalg.inv(covariance[np.ix_(seen, seen)] + noise * np.eye(seen.sum()))
            precision -= np.outer(precision.sum(axis=0), precision.sum(axis=0)) / precision.sum()
            surprise = self._scaler.transform(again[seen, None]).ravel() - mean[seen]
            mean = mean + covariance[:, seen] @ precision @ surprise
            covariance = covariance - covariance[:, seen] @ precision @ covariance[seen]
        variance = np.diag(covariance) + covariance[reference, reference] - 2.0 * covariance[:, reference]
        half = norm.ppf(0.5 + confidence / 2.0) * np.sqrt(np.maximum(variance, 0.0))
        ends = [self._back(each) - self._back(mean[[reference]]) for each in (mean, mean - half, mean + half)]
        return np.column_stack(ends)

    def of_profile(self) -> Self | None:
        """The same observations, regressed on the profile's terms alone; None without a profile."""
        features = self.features.of_profile
        return None if features is None else type(self)(features).fit(*self._data)

    def coefficients(self) -> pd.DataFrame:
        """Each feature's `name`, readable `label`, `level`, and posterior `mean` and `std`, in deviations of the metric."""
        names, labels, levels = self.features.names, self.features.labels, self.features.levels
        mean, deviation = self._fitted.predict(np.eye(len(names), len(self._fitted.coef_)), return_std=True)
        return pd.DataFrame({"name": names, "label": labels, "level": levels, "mean": mean, "std": deviation})

    def utilities(self) -> dict[str, Floats]:
        """Posterior mean of what each rank of each module adds, by module name: marginal gains for water-filling."""
        return self._read(self._fitted.coef_)[0]

    def sample(self, rng: np.random.Generator) -> tuple[dict[str, Floats], Any]:
        """One posterior draw of the utilities, and the condition that is best in it."""
        return self._read(self._fitted.sample(rng))

    @property
    def best_condition(self) -> Any:
        """The condition with the highest offset in the posterior mean."""
        return self._read(self._fitted.coef_)[1]

    @property
    def constant(self) -> bool:
        """Whether all metrics are equal, so that there is nothing to learn from yet."""
        return self._scaler is None

    def _read(self, coefficients: Floats) -> tuple[dict[str, Floats], Any]:
        """The utilities that coefficients stand for, and the condition with the highest offset among them."""
        n = len(self.features.names)  # the intercept is between features and conditions
        return self.features.gains(coefficients[:n]), self.conditions_[int(np.argmax(coefficients[n + 1 :]))]

    def _checked(self, ranks: ArrayLike, y: ArrayLike, weight: Weights, conditions: Labels) -> Data:
        if y is None:
            raise SettingsError("PerformanceModel requires y to be passed, but the target y is None; pass metrics.")
        table, metric = self.features.checked(ranks), column_or_1d(as_numbers(y, "y"), warn=True)
        labels, n = list(conditions or [None] * len(metric)), len(metric)
        if len(table) != n:
            raise SettingsError(f"`ranks` must have a row for each of {n} metrics, but has {len(table)}.")
        if len(labels) != n:
            raise SettingsError(f"`conditions` must hold one for each of {n} metrics, but hold {len(labels)}.")
        if odd := int((~np.isfinite(metric)).sum()):
            raise SettingsError(f"`y` must be finite, but {odd} of {n} metrics are not; drop them.")
        return table, metric, _checked_weights(weight, n), labels

    def _refit(self) -> Self:
        ranks, y, weight, conditions = self._data
        if len(y) < 2:
            n = f"{len(y)} sample{'s' * (len(y) != 1)}"
            raise SettingsError(f"`y` must hold at least 2 metrics, but holds {n}; run more trials.")
        due = self._estimated_at == 0 or len(y) >= GROWTH * self._estimated_at
        if due:
            self._scaler = PowerTransformer().fit(y[:, None]) if np.ptp(y) > 1e-12 * np.abs(y).max() else None
        target = y * 0.0 if self._scaler is None else self._scaler.transform(y[:, None]).ravel()
        self.conditions_ = list(dict.fromkeys(conditions))
        levels = [*self.features.levels, "intercept", *["condition"] * len(self.conditions_)]
        rows = self._rows(ranks, [[each == condition for condition in self.conditions_] for each in conditions])
        spread = rows.std(axis=0)
        helps = (np.array(levels) == "profile") & (spread > 0)  # of nothing else any help is expected
        means = np.divide(PROFILE_MEAN, spread, out=np.zeros(len(levels)), where=helps)
        variances = None if due else self.regressor_.variances_
        self.regressor_ = HierarchicalRegressor(levels, means, {"profile": PROFILE_SHARE}, variances)
        self.regressor_.fit(rows, target, weight)
        if due and not self.constant:
            self._estimated_at = len(y)
        return self

    def _rows(self, ranks: ArrayLike, shares: ArrayLike | None = None) -> Floats:
        """The regressor's columns: features, intercept, and the share of each condition, by default all the same."""
        rows, n = self.features.transform(ranks), len(self.conditions_)
        return np.hstack(
            [rows, np.ones((len(rows), 1)), np.full((len(rows), n), 1.0 / n) if shares is None else shares]
        )

    @property
    def _fitted(self) -> HierarchicalRegressor:
        check_is_fitted(self, "regressor_")
        return self.regressor_

    def _back(self, values: Floats) -> Floats:
        """From the transformed metric to the metric; beyond the transform's range, the farthest metric seen."""
        y = self._data[1]
        if self._scaler is None:
            return np.full(len(values), y[0])
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # sklearn's, of values beyond the range
            found: Floats = self._scaler.inverse_transform(values[:, None]).ravel()
        return np.where(np.isfinite(found), found, np.where(values > 0, y.max(), y.min()))

    def _noise(self, repeats: float) -> float:
        """Variance of a mean over so many measurements."""
        if not repeats > 0:
            raise SettingsError(f"`repeats` must be above 0, but is {repeats:g}.")
        return float(self._fitted.variances_["noise"] / repeats)


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """Scores of predictions for left-out allocations, of the model and of what needs no model; without a profile, None.

    A constant prediction would score 0.
    """

    allocations: int  # number of different ones
    explained: float  # share of the normalised metric's variance; below 0: worse than the mean
    explained_by_profile: float | None  # the same of a regression on the profile's terms alone
    kendall: float
    spearman: float
    profile: float | None  # Kendall's tau of the captured norm, which needs no trial
    ceiling: float | None  # the highest Spearman correlation that the metric's own noise allows; None if unknown
    coverage: float | None  # share of measurements in the 80 % intervals; None under several conditions

    @property
    def trustworthy(self) -> bool:
        """Whether squared errors, which scatter less than rank correlations, are below the profile's and the mean's."""
        return self.explained > max(self.explained_by_profile or 0.0, 0.0)

    def __str__(self) -> str:
        explained, tau = f"explains {self.explained:.0%} of the variance of left-out allocations", f"{self.kendall:.2f}"
        if self.explained_by_profile is not None and self.profile is not None:
            explained += f" (profile alone {self.explained_by_profile:.0%})"
            tau += f" (profile alone {self.profile:.2f})"
        parts = [explained, f"Kendall's tau {tau}"]
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
    sample_weight: Weights = None,
    conditions: Labels = None,
    noise_variance: float | None = None,
) -> Validation | None:
    """Cross-validate clones of the model; all observations of an allocation are left out together.

    Observations are as `PerformanceModel.fit` takes them; `noise_variance` is that of one, from repeats, for the ceiling
    sqrt(1 - noise / variance) (Spearman 1904). None with fewer than 10 different allocations or a constant metric.
    """
    table, metric, weight, labels = model._checked(ranks, y, sample_weight, conditions)
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
        ceiling=None if noise_variance is None else float(np.sqrt(max(0.0, 1.0 - noise_variance / even.var()))),
        coverage=float(inside.mean()) if len(set(labels)) == 1 else None,
    )


def believable(model: PerformanceModel, validation: Validation | None) -> PerformanceModel | None:
    """What left-out allocations speak for: the model, else the profile alone on the same observations, else nothing."""
    if validation is not None and validation.trustworthy:
        return model
    by_profile = validation and validation.explained_by_profile
    return model.of_profile() if (by_profile or 0.0) > 0.0 else None


def _explained(predicted: Floats, metric: Floats, weight: Floats) -> float:
    """1 - variance of the errors over that of the metric made normal, as the model sees it; a common shift is no error."""
    scaler = PowerTransformer().fit(metric[:, None])
    truth, guess = (scaler.transform(values[:, None]).ravel() for values in (metric, predicted))
    spread = [np.average((v - np.average(v, weights=weight)) ** 2, weights=weight) for v in (guess - truth, truth)]
    return float(1.0 - spread[0] / spread[1])


@dataclass(eq=False)
class HierarchicalRegressor:
    """Bayesian linear regression without intercept whose coefficients share one prior variance a level.

        y = X beta + noise,   beta_j ~ N(mean_j, v_level(j)),   noise_t ~ N(0, s^2 / weight_t)

    Given the variances, the posterior is exact (Bishop, Pattern Recognition and Machine Learning, 2006, sec. 3.3). The variances
    maximise the marginal likelihood (type II, MacKay 1992) times a wide log-normal prior, so that no level vanishes by chance.

    Args:
        levels: The level of each column; None: all columns are of one.
        means: Prior mean of each coefficient; None: 0.
        shares: Prior share of each level in what is not noise, relative to others; levels not named: 1.
        variances: Of each level and of the `"noise"`, instead of the estimates in `variances_`.

    >>> X = np.eye(3).repeat(20, axis=0)
    >>> y = X @ [1.0, 2.0, 3.0] + np.random.default_rng(0).normal(0.0, 0.1, 60)
    >>> HierarchicalRegressor().fit(X, y).coef_.round(1)
    array([1., 2., 3.])
    """

    levels: Sequence[str] | None = None
    means: ArrayLike | None = None
    shares: Mapping[str, float] | None = None
    variances: Mapping[str, float] | None = None

    def fit(self, X: Floats, y: Floats, sample_weight: Weights = None) -> Self:
        """Estimate the variances and the posterior; `sample_weight` are the repeats behind each observation, (n,)."""
        weights = np.ones(len(X)) if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
        table, observed, roots = X[weights > 0], y[weights > 0], np.sqrt(weights[weights > 0])
        levels = np.asarray(self.levels if self.levels is not None else ["all"] * table.shape[1])
        means = np.zeros(table.shape[1]) if self.means is None else np.asarray(self.means, dtype=np.float64)
        names, index = np.unique(levels, return_inverse=True)
        rows, target, left = table * roots[:, None], (observed - table @ means) * roots, 0.0
        if len(rows) > rows.shape[1]:  # n_features rows have the same likelihood, but for what they leave of the target
            triangle = np.asarray(np.linalg.qr(np.column_stack([rows, target]), mode="r"))
            rows, target, left = triangle[:-1, :-1], triangle[:-1, -1], float(triangle[-1, -1] ** 2)
        if self.variances is None:
            shares = np.array([(self.shares or {}).get(name, 1.0) for name in names])
            products = [block @ block.T for block in (rows[:, index == i] for i in range(len(names)))]
            variances, noise = _estimate(products, shares / shares.sum(), target, left, len(observed))
        else:
            variances, noise = np.array([self.variances[name] for name in names]), float(self.variances["noise"])
        self.variances_ = {**dict(zip(names.tolist(), variances.tolist(), strict=True)), "noise": noise}
        self._prior = variances[index]
        self._means, self._rows, self._target, self._noise = means, rows, target, noise
        self._factor = cho_factor((rows * self._prior) @ rows.T + noise * np.eye(len(rows)), lower=True)
        self.coef_ = means + self._prior * (rows.T @ cho_solve(self._factor, target))
        return self

    def predict(self, X: Floats, return_std: bool = False, return_cov: bool = False) -> Any:
        """Posterior mean at X, (n,); also its standard deviation, (n,), or covariance, (n, n), without observations' noise."""
        mean = X @ self.coef_
        if not (return_std or return_cov):
            return mean
        scaled = X * self._prior
        across = scaled @ self._rows.T
        if return_cov:
            return mean, scaled @ X.T - across @ cho_solve(self._factor, across.T)
        explained = np.einsum("ij,ji->i", across, cho_solve(self._factor, across.T))
        return mean, np.sqrt(np.maximum(np.einsum("ij,ij->i", scaled, X) - explained, 0.0))

    def sample(self, rng: np.random.Generator) -> Floats:
        """One draw of the coefficients from the posterior, (n_features,), by Matheron's rule: a prior draw, corrected."""
        drawn = rng.normal(size=len(self._prior)) * np.sqrt(self._prior)
        seen = self._rows @ drawn + rng.normal(size=len(self._rows)) * np.sqrt(self._noise)
        correction = self._rows.T @ cho_solve(self._factor, self._target - seen)
        result: Floats = self._means + drawn + self._prior * correction
        return result


def _checked_weights(weights: Weights, n: int) -> Floats:
    """Sample weights of n observations, (n,); None and one number stand for equal ones."""
    found = as_numbers(1.0 if weights is None else weights, "sample_weight")
    found = np.full(n, float(found)) if found.ndim == 0 else found
    if found.shape != (n,):
        raise SettingsError(f"`sample_weight` must hold a weight for each of {n} metrics, but has shape {found.shape}.")
    if len(odd := found[~(np.isfinite(found) & (found >= 0))]):
        raise SettingsError(f"`sample_weight` must be finite and not negative, but holds {odd[0]:g}.")
    if n and not found.any():
        raise SettingsError("`sample_weight` must not be zero for every observation, but is; weigh some.")
    return found


def _estimate(products: list[Floats], shares: Floats, target: Floats, left: float, n: int) -> tuple[Floats, float]:
    """The variances of the levels and of the noise of n observations, at the mode of marginal likelihood times prior.

    `products` are X_l X_l^T of each level, (m, m); `left` is the squared length of the target outside these m rows: noise of
    n - m degrees of freedom.
    """
    m = len(target)
    total = max((float(target @ target) + left) / n, 1e-12)
    traces = np.array([np.trace(product) / n for product in products])
    expected = (1.0 - NOISE_SHARE) * total * shares / np.where(traces > 0, traces, 1.0)
    centre = np.log([*expected, NOISE_SHARE * total])
    matrices = [*products, np.eye(m)]

    def negative(logs: Floats) -> tuple[float, Floats]:
        values = np.exp(logs)
        factor = cho_factor(sum(value * matrix for value, matrix in zip(values, matrices, strict=True)), lower=True)
        solved, inverse = cho_solve(factor, target), cho_solve(factor, np.eye(m))
        loss = 0.5 * float(target @ solved) + float(np.log(np.diag(factor[0])).sum())
        loss += 0.5 * (left / values[-1] + (n - m) * logs[-1])
        slope = 0.5 * values * [np.sum(inverse * matrix) - solved @ matrix @ solved for matrix in matrices]
        slope[-1] += 0.5 * ((n - m) - left / values[-1])
        away = (logs - centre) / LOG_SPREAD
        return loss + 0.5 * float(away @ away), slope + away / LOG_SPREAD

    bounds = [(value - 5 * LOG_SPREAD, value + 5 * LOG_SPREAD) for value in centre]
    found = np.exp(minimize(negative, centre, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 50}).x)
    return found[:-1], float(found[-1])
