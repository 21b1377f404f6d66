"""Hierarchical Bayesian linear regression: coefficients come in levels, and the data say how much each level matters.

    y = X beta + noise,   beta_j ~ N(mean_j, v_level(j)),   noise_t ~ N(0, s^2 / weight_t)

Given the variances, the posterior is exact (Bishop, Pattern Recognition and Machine Learning, 2006, sec. 3.3); the variances
maximise the marginal likelihood (type-II, MacKay 1992) times a wide log-normal prior, so that no level vanishes by chance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from rankscope.exceptions import PerformanceModelError
from rankscope.performance.features import as_numbers

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
            PerformanceModelError: Weights that are negative, not finite, all zero, or not one an observation.
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
        PerformanceModelError: They are negative, not finite, all zero, or not so many.
    """
    found = as_numbers(1.0 if weights is None else weights, "sample_weight")
    if found.ndim == 0:
        found = np.full(n, float(found))
    if found.shape != (n,):
        raise PerformanceModelError(
            f"`sample_weight` must hold one weight for each of {n} observations, but has shape {found.shape}."
        )
    if len(odd := found[~(np.isfinite(found) & (found >= 0))]):
        raise PerformanceModelError(f"`sample_weight` must be finite and not negative, but holds {odd[0]:g}.")
    if n and not found.any():
        raise PerformanceModelError("`sample_weight` must not be zero for every observation, but is; weigh some.")
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
