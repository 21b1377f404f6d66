"""`PerformanceModel`: predicts a task's metric from ranks, and says what each rank of each module is worth."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize
from scipy.stats import norm, spearmanr
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.preprocessing import PowerTransformer
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data

from rankscope.errors import SettingsError
from rankscope.performance.features import RankFeatures, as_numbers

Floats = NDArray[np.float64]

LOG_SPREAD = 1.0  # standard deviation of the prior on each log variance
NOISE_SHARE = 0.5  # of the targets' variance that the prior expects to be noise


class HierarchicalRegressor(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """Linear regression without intercept whose coefficients share one prior variance a level.

    Args:
        levels: The level of each column; None: all columns are of one.
        means: Prior mean of each coefficient; None: 0.
        shares: How much of what is not noise the prior expects of each level, relative to others; levels not named: 1.
        variances: A dictionary of level (and `"noise"`) to variance, to use instead of estimating them; None: estimate.

    Attributes:
        coef_: Posterior mean of the coefficients, (n_features,).
        variances_: Prior variance of each level, and of the noise of an observation of weight 1 under `"noise"`.

    >>> X = np.eye(3).repeat(20, axis=0)
    >>> y = X @ [1.0, 2.0, 3.0] + np.random.default_rng(0).normal(0.0, 0.1, 60)
    >>> HierarchicalRegressor().fit(X, y).coef_.round(1)
    array([1., 2., 3.])
    """

    def __init__(
        self,
        levels: Sequence[str] | None = None,
        means: ArrayLike | None = None,
        shares: Mapping[str, float] | None = None,
        variances: Mapping[str, float] | None = None,
    ) -> None:
        self.levels = levels
        self.means = means
        self.shares = shares
        self.variances = variances

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """Estimates the variances and the posterior.

        Args:
            X: (n, n_features).
            y: (n,).
            sample_weight: Number of repeats behind each observation: its noise variance is s^2 / weight. (n,), or one for all.

        Raises:
            SettingsError: Weights that are negative, not finite, all zero, or not one an observation.
        """
        table: Floats
        observed: Floats
        table, observed = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        weights = checked_weights(sample_weight, len(table))
        table, observed, roots = table[weights > 0], observed[weights > 0], np.sqrt(weights[weights > 0])
        levels = np.asarray(self.levels if self.levels is not None else ["all"] * table.shape[1])
        means = np.zeros(table.shape[1]) if self.means is None else np.asarray(self.means, dtype=np.float64)
        names, index = np.unique(levels, return_inverse=True)
        rows, target = table * roots[:, None], (observed - table @ means) * roots
        rows, target, left = _compressed(rows, target)
        blocks = [rows[:, index == i] for i in range(len(names))]
        if self.variances is None:
            shares = np.array([(self.shares or {}).get(name, 1.0) for name in names])
            variances, noise = _estimate(
                [block @ block.T for block in blocks], shares / shares.sum(), target, left, len(observed)
            )
        else:
            variances, noise = np.array([self.variances[name] for name in names]), self.variances["noise"]
        self.variances_ = {**dict(zip(names.tolist(), variances.tolist(), strict=True)), "noise": float(noise)}
        self._prior = variances[index]
        self._means, self._rows, self._target, self._noise = means, rows, target, float(noise)
        self._factor = cho_factor((rows * self._prior) @ rows.T + noise * np.eye(len(rows)), lower=True)
        self.coef_ = means + self._prior * (rows.T @ cho_solve(self._factor, target))
        return self

    def predict(self, X: ArrayLike, return_std: bool = False, return_cov: bool = False) -> Any:
        """Posterior mean at X, (n,); also its standard deviation, (n,), or covariance, (n, n), without observations' noise."""
        check_is_fitted(self)
        table: Floats = validate_data(self, X, dtype=np.float64, reset=False)
        mean = table @ self.coef_
        if not (return_std or return_cov):
            return mean
        scaled = table * self._prior
        across = scaled @ self._rows.T
        if return_cov:
            return mean, scaled @ table.T - across @ cho_solve(self._factor, across.T)
        explained = np.einsum("ij,ji->i", across, cho_solve(self._factor, across.T))
        return mean, np.sqrt(np.maximum(np.einsum("ij,ij->i", scaled, table) - explained, 0.0))

    def sample(self, rng: np.random.Generator) -> Floats:
        """One draw of the coefficients from the posterior, (n_features,), by Matheron's rule: a prior draw, corrected."""
        check_is_fitted(self)
        drawn = rng.normal(size=len(self._prior)) * np.sqrt(self._prior)
        seen = self._rows @ drawn + rng.normal(size=len(self._rows)) * np.sqrt(self._noise)
        correction = self._rows.T @ cho_solve(self._factor, self._target - seen)
        result: Floats = self._means + drawn + self._prior * correction
        return result


def checked_weights(weights: ArrayLike | None, n: int) -> Floats:
    """Sample weights of n observations, (n,); None and one number stand for equal ones.

    Raises:
        SettingsError: They are negative, not finite, all zero, or not so many.
    """
    found = as_numbers(1.0 if weights is None else weights, "sample_weight")
    if found.ndim == 0:
        found = np.full(n, float(found))
    if found.shape != (n,):
        raise SettingsError(
            f"`sample_weight` must hold one weight for each of {n} observations, but has shape {found.shape}."
        )
    if len(odd := found[~(np.isfinite(found) & (found >= 0))]):
        raise SettingsError(f"`sample_weight` must be finite and not negative, but holds {odd[0]:g}.")
    if n and not found.any():
        raise SettingsError("`sample_weight` must not be zero for every observation, but is; weigh some.")
    return found


def _compressed(rows: Floats, target: Floats) -> tuple[Floats, Floats, float]:
    """At most n_features rows with the same likelihood, and the squared length of the target that they leave out."""
    if len(rows) <= rows.shape[1]:
        return rows, target, 0.0
    triangle: Floats = np.asarray(np.linalg.qr(np.column_stack([rows, target]), mode="r"))
    return triangle[:-1, :-1], triangle[:-1, -1], float(triangle[-1, -1] ** 2)


def _estimate(products: list[Floats], shares: Floats, target: Floats, left: float, n: int) -> tuple[Floats, float]:
    """The variances of the levels and of the noise, at the mode of marginal likelihood times prior.

    Args:
        products: X_l X_l^T of each level, after compression to m rows, (m, m).
        shares: Of the levels in what is not noise, as the prior has it.
        target: (m,).
        left: Squared length of the target outside these rows, all noise; n - m degrees of freedom.
        n: Observations.
    """
    m = len(target)
    total = max((float(target @ target) + left) / n, 1e-12)
    traces = np.array([np.trace(product) / n for product in products])
    expected = (1.0 - NOISE_SHARE) * total * shares / np.where(traces > 0, traces, 1.0)
    centre = np.log([*expected, NOISE_SHARE * total])
    matrices = [*products, np.eye(m)]

    def negative(logs: Floats) -> tuple[float, Floats]:
        values = np.exp(logs)
        covariance = sum(value * matrix for value, matrix in zip(values, matrices, strict=True))
        factor = cho_factor(covariance, lower=True)
        solved = cho_solve(factor, target)
        inverse = cho_solve(factor, np.eye(m))
        outside = n - m
        loss = 0.5 * float(target @ solved) + float(np.log(np.diag(factor[0])).sum())
        loss += 0.5 * (left / values[-1] + outside * logs[-1])
        slope = np.array(
            [
                0.5 * v * (np.sum(inverse * matrix) - solved @ matrix @ solved)
                for v, matrix in zip(values, matrices, strict=True)
            ]
        )
        slope[-1] += 0.5 * (outside - left / values[-1])
        away = (logs - centre) / LOG_SPREAD
        return loss + 0.5 * float(away @ away), slope + away / LOG_SPREAD

    bounds = [(value - 5 * LOG_SPREAD, value + 5 * LOG_SPREAD) for value in centre]
    found = np.exp(minimize(negative, centre, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 50}).x)
    return found[:-1], float(found[-1])


Ints = NDArray[np.int64]

PROFILE_MEAN = 0.15  # standard deviations of the metric that one of a profile term's is expected to bring
PROFILE_SHARE = 10.0  # how much more than of another level the prior expects of the profile's terms
GROWTH = 1.2  # transform and variances are estimated again once there are so many times the observations


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """A coefficient's posterior: standard deviations of the metric for one unit of the feature (`features.py`).

    Attributes:
        name: Of the feature, as in `role/q_proj`.
        level: Its level.
        mean: Posterior mean.
        std: Posterior standard deviation.
    """

    name: str
    level: str
    mean: float
    std: float


class PerformanceModel(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """Regression from ranks to the metric.

    The metric is made normal first (Yeo and Johnson 2000): a few allocations that starve a module would otherwise count
    for more than all differences among good ones. The regression is linear in concave gains of the ranks (`features.py`),
    with a hierarchical prior (`regression.py`), so that the allocation with the highest value is found exactly by
    water-filling on `utilities()`.

    Args:
        features: Of the target modules and the budget.

    Attributes:
        regressor_: The fitted `HierarchicalRegressor`.
        n_features_in_: How many modules there are.
        conditions_: The conditions seen, in order.
    """

    def __init__(self, features: RankFeatures) -> None:
        self.features = features

    def fit(
        self,
        ranks: ArrayLike,
        y: ArrayLike,
        sample_weight: ArrayLike | None = None,
        conditions: Sequence[Any] | None = None,
    ) -> Self:
        """Fits the observations.

        Args:
            ranks: One allocation a row, (n, n_modules).
            y: The metric, higher is better, (n,); or its paired difference to uniform.
            sample_weight: Repeats (seeds) behind each observation, (n,).
            conditions: What else differs between observations, as their learning rates; each gets an offset. (n,).

        Raises:
            SettingsError: Fewer than two observations, metrics that are not finite, ranks that are no whole numbers from
                0 on, negative weights, or arguments of different lengths.
        """
        self._data = self._checked(ranks, y, sample_weight, conditions)
        self.n_features_in_ = len(self.features.targets)
        self._estimated_at = 0  # observations when the variances were last estimated
        return self._refit()

    def update(
        self,
        ranks: ArrayLike,
        y: ArrayLike,
        sample_weight: ArrayLike | None = None,
        conditions: Sequence[Any] | None = None,
    ) -> Self:
        """Adds observations. The posterior is exact; transform and variances are estimated again at every fifth more."""
        if not hasattr(self, "regressor_"):
            return self.fit(ranks, y, sample_weight, conditions)
        old, new = self._data, self._checked(ranks, y, sample_weight, conditions)
        self._data = (
            np.vstack([old[0], new[0]]),
            np.append(old[1], new[1]),
            np.append(old[2], new[2]),
            [*old[3], *new[3]],
        )
        return self._refit()

    def predict(self, ranks: ArrayLike, return_std: bool = False) -> Any:
        """The expected (median) metric, (n,), averaged over conditions; with `return_std` half its central 68 % interval."""
        if not return_std:
            return self._back(self._predictions(ranks))
        mean, deviation = self._predict_normal(ranks)
        return self._back(mean), (self._back(mean + deviation) - self._back(mean - deviation)) / 2.0

    def interval(
        self, ranks: ArrayLike, confidence: float = 0.8, *, repeats: float | None = None
    ) -> tuple[Floats, Floats]:
        """Central interval of the metric, (n,) and (n,): of its expectation, or of a measurement over so many repeats."""
        if not 0.0 < confidence < 1.0:
            raise SettingsError(f"`confidence` must lie between 0 and 1, but is {confidence:g}.")
        mean, deviation = self._predict_normal(ranks)
        if repeats is not None:
            _check_repeats(repeats)
            deviation = np.sqrt(deviation**2 + self._fitted().variances_["noise"] / repeats)
        half = norm.ppf(0.5 + confidence / 2.0) * deviation
        return self._back(mean - half), self._back(mean + half)

    def difference(self, ranks: ArrayLike, reference: ArrayLike) -> tuple[Floats, Floats]:
        """How much better the ranks are than the reference's, (n,), and the posterior standard deviation of that, (n,).

        In units of the transformed metric, whose standard deviation over the observations is 1.
        """
        rows = self._rows(ranks) - self._rows(reference)
        found: tuple[Floats, Floats] = self._fitted().predict(rows, return_std=True)
        return found

    def score(self, ranks: ArrayLike, y: ArrayLike, sample_weight: None = None) -> float:
        """Spearman's rank correlation of prediction and metric."""
        return float(spearmanr(self.predict(ranks), y)[0])

    def weigh(self, ranks: ArrayLike, y: ArrayLike, repeats: float) -> Floats:
        """The expected metric of allocations as it is after they were measured once more, elsewhere, (n,).

        Only differences among these measurements count: fresh seeds, other learning rates or longer training shift all of
        them alike. The posterior is that of the linear model (Bishop 2006, eq. 3.50), conditioned on them.

        Args:
            ranks: One allocation a row, (n, n_modules).
            y: Their mean metrics, (n,).
            repeats: Measurements behind each mean.
        """
        _check_repeats(repeats)
        regressor = self._fitted()
        mean, covariance = regressor.predict(self._rows(ranks), return_cov=True)
        measured = as_numbers(y, "y")
        if measured.shape != mean.shape or not np.isfinite(measured).all():
            raise SettingsError(f"`y` must hold {len(mean)} finite metrics, one for each allocation, but does not.")
        if self._scaler is None:
            return self._back(mean)
        surprise = self._scaler.transform(measured[:, None]).ravel() - mean
        noise = regressor.variances_["noise"] / repeats * np.eye(len(mean))
        return self._back(mean + covariance @ np.linalg.solve(covariance + noise, surprise - surprise.mean()))

    def of_profile(self) -> Self | None:
        """The same observations, regressed on the profile's terms alone; None where there is no profile."""
        features = self.features.of_profile
        return None if features is None else type(self)(features).fit(*self._data)

    def effects(self) -> list[Effect]:
        """The coefficients of the features, in their order, with what is not known of them."""
        regressor = self._fitted()
        n = len(self.features.names)
        mean, deviation = regressor.predict(np.eye(regressor.n_features_in_)[:n], return_std=True)
        return [
            Effect(name=name, level=level, mean=float(m), std=float(d))
            for name, level, m, d in zip(self.features.names, self.features.levels, mean, deviation, strict=True)
        ]

    def utilities(self) -> dict[str, Floats]:
        """The posterior mean of what each rank of each module adds, by module name: marginal gains for water-filling."""
        return self._read(self._fitted().coef_)[0]

    def sample_utilities(self, rng: np.random.Generator) -> dict[str, Floats]:
        """The same, of one draw from the posterior."""
        return self.sample(rng)[0]

    def sample(self, rng: np.random.Generator) -> tuple[dict[str, Floats], Any]:
        """One draw from the posterior: the marginal gains, and the condition that is best in it."""
        return self._read(self._fitted().sample(rng))

    @property
    def constant(self) -> bool:
        """Whether all metrics are equal, so that there is nothing to learn from yet."""
        return self._scaler is None

    @property
    def best_condition(self) -> Any:
        """The condition with the highest offset in the posterior mean."""
        return self._read(self._fitted().coef_)[1]

    # --- inside ----------------------------------------------------------------------------------------------------

    def _read(self, coefficients: Floats) -> tuple[dict[str, Floats], Any]:
        """The marginal gains that coefficients stand for, and the condition with the highest offset among them."""
        n = len(self.features.names)  # the intercept is between features and conditions
        return self.features.gains(coefficients[:n]), self.conditions_[int(np.argmax(coefficients[n + 1 :]))]

    def _checked(
        self, ranks: ArrayLike, y: ArrayLike, weight: ArrayLike | None, conditions: Sequence[Any] | None
    ) -> tuple[Ints, Floats, Floats, list[Any]]:
        if y is None:
            raise SettingsError(
                "PerformanceModel requires y to be passed, but the target y is None; pass the metric of each allocation."
            )
        table, metric = self.features.checked(ranks), column_or_1d(as_numbers(y, "y"), warn=True)
        if len(table) != len(metric):
            raise SettingsError(f"`ranks` must have a row for each of {len(metric)} metrics, but has {len(table)}.")
        if odd := int((~np.isfinite(metric)).sum()):
            raise SettingsError(f"`y` must be finite, but {odd} of {len(metric)} metrics are not; drop them.")
        if conditions is not None and len(conditions) != len(metric):
            raise SettingsError(
                f"`conditions` must hold one for each of {len(metric)} metrics, but hold {len(conditions)}."
            )
        labels = list(conditions) if conditions is not None else [None] * len(metric)
        return table, metric, checked_weights(weight, len(metric)), labels

    def _refit(self) -> Self:
        ranks, y, weight, conditions = self._data
        if len(y) < 2:
            raise SettingsError(
                f"`y` must hold at least 2 metrics, but holds {len(y)} sample{'s' * (len(y) != 1)}; run more trials."
            )
        self.conditions_ = list(dict.fromkeys(conditions))
        due = self._estimated_at == 0 or len(y) >= GROWTH * self._estimated_at
        if due:
            self._scaler = PowerTransformer().fit(y[:, None]) if np.ptp(y) > 1e-12 * np.abs(y).max() else None
        target = y * 0.0 if self._scaler is None else self._scaler.transform(y[:, None]).ravel()
        rows = self.features.transform(ranks)
        columns = np.array([[c == condition for condition in self.conditions_] for c in conditions], dtype=np.float64)
        offsets = 1 + len(self.conditions_)
        self.regressor_ = HierarchicalRegressor(
            levels=[*self.features.levels, "intercept", *["condition"] * len(self.conditions_)],
            means=np.append(self._expectations(rows), np.zeros(offsets)),
            shares={"profile": PROFILE_SHARE},
            variances=None if due else self._fitted().variances_,
        ).fit(np.hstack([rows, np.ones((len(rows), 1)), columns]), target, weight)
        if due and not self.constant:
            self._estimated_at = len(y)
        return self

    def _expectations(self, rows: Floats) -> Floats:
        """Prior mean of each coefficient: the profile's terms are expected to help, of everything else nothing is."""
        spread = rows.std(axis=0)
        helps = (np.array(self.features.levels) == "profile") & (spread > 0)
        means = np.zeros(rows.shape[1])
        means[helps] = PROFILE_MEAN / spread[helps]
        return means

    def _predict_normal(self, ranks: ArrayLike) -> tuple[Floats, Floats]:
        """Mean and standard deviation of the transformed metric."""
        found: tuple[Floats, Floats] = self._fitted().predict(self._rows(ranks), return_std=True)
        return found

    def _predictions(self, ranks: ArrayLike) -> Floats:
        """Mean of the transformed metric."""
        found: Floats = self._fitted().predict(self._rows(ranks))
        return found

    def _rows(self, ranks: ArrayLike) -> Floats:
        """The regressor's columns; conditions count evenly."""
        rows = self.features.transform(ranks)
        n = len(self.conditions_)
        return np.hstack([rows, np.ones((len(rows), 1)), np.full((len(rows), n), 1.0 / n)])

    def _back(self, values: Floats) -> Floats:
        """From the transformed metric to the metric; beyond the transform's range, the farthest metric seen."""
        y = self._data[1]
        if self._scaler is None:
            return np.full(len(values), y[0])
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # sklearn's, of values beyond the range
            found: Floats = self._scaler.inverse_transform(values[:, None]).ravel()
        return np.where(np.isfinite(found), found, np.where(values > 0, y.max(), y.min()))

    def _fitted(self) -> HierarchicalRegressor:
        check_is_fitted(self, "regressor_")
        return self.regressor_


def _check_repeats(repeats: float) -> None:
    if not repeats > 0:
        raise SettingsError(f"`repeats` must be above 0, but is {repeats:g}.")
