"""The hierarchical regression against the textbook posterior and BayesianRidge."""

import numpy as np
import pytest
from sklearn.linear_model import BayesianRidge

from rankscope.performance.model import HierarchicalRegressor


@pytest.fixture
def data() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(40, 6))
    return X, X @ [2.0, -1.0, 0.1, 0.0, 0.0, 0.1] + rng.normal(0.0, 0.3, 40), rng.integers(1, 4, 40).astype(float)


LEVELS = ["a", "a", "b", "b", "b", "b"]
VARIANCES = {"a": 2.0, "b": 0.05, "noise": 0.09}


def textbook(X, y, weight, means) -> tuple[np.ndarray, np.ndarray]:
    """Bishop 2006, eq. 3.50 and 3.51, with one precision a coefficient and one a row."""
    prior = np.array([VARIANCES[level] for level in LEVELS])
    precision = np.diag(1.0 / prior) + X.T @ np.diag(weight) @ X / VARIANCES["noise"]
    covariance = np.linalg.inv(precision)
    return covariance @ (means / prior + X.T @ (weight * y) / VARIANCES["noise"]), covariance


@pytest.mark.parametrize("n", [4, 40], ids=["fewer rows than columns", "more rows"])
def test_posterior_is_the_textbook_one(data, n: int) -> None:
    X, y, weight = (part[:n] for part in data)
    means = np.array([1.0, 0.0, 0.0, 0.5, 0.0, 0.0])
    found = HierarchicalRegressor(LEVELS, means=means, variances=VARIANCES).fit(X, y, weight)
    expected, covariance = textbook(X, y, weight, means)
    np.testing.assert_allclose(found.coef_, expected, atol=1e-8)
    new = data[0][-5:]
    mean, deviation = found.predict(new, return_std=True)
    np.testing.assert_allclose(mean, new @ expected, atol=1e-8)
    np.testing.assert_allclose(deviation, np.sqrt(np.einsum("ij,jk,ik->i", new, covariance, new)), atol=1e-8)
    np.testing.assert_allclose(found.predict(new, return_cov=True)[1], new @ covariance @ new.T, atol=1e-8)


def test_draws_have_the_posteriors_mean_and_covariance(data) -> None:
    X, y, weight = data
    found = HierarchicalRegressor(LEVELS, variances=VARIANCES).fit(X[:5], y[:5], weight[:5])
    mean, covariance = textbook(X[:5], y[:5], weight[:5], np.zeros(6))
    rng = np.random.default_rng(0)
    draws = np.array([found.sample(rng) for _ in range(20_000)])
    scale = np.sqrt(np.diag(covariance))
    np.testing.assert_allclose((draws.mean(axis=0) - mean) / scale, 0.0, atol=0.04)
    np.testing.assert_allclose(np.cov(draws.T) / np.outer(scale, scale), covariance / np.outer(scale, scale), atol=0.05)


def test_one_level_finds_what_bayesian_ridge_finds(data) -> None:
    X, y = (
        np.tile(data[0], (20, 1)),
        np.concatenate([data[1] + np.random.default_rng(s).normal(0, 0.2, 40) for s in range(20)]),
    )
    mine = HierarchicalRegressor().fit(X, y)
    theirs = BayesianRidge(fit_intercept=False).fit(X, y)
    np.testing.assert_allclose(mine.coef_, theirs.coef_, atol=0.02)
    assert mine.variances_["noise"] == pytest.approx(1.0 / theirs.alpha_, rel=0.2)


def test_each_level_gets_a_variance_of_its_own() -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(200, 40))
    coefficients = np.concatenate([rng.normal(0, 1.0, 20), rng.normal(0, 0.05, 20)])
    found = HierarchicalRegressor(["big"] * 20 + ["small"] * 20).fit(X, X @ coefficients + rng.normal(0, 0.5, 200))
    assert found.variances_["big"] == pytest.approx(1.0, rel=0.6)
    assert found.variances_["small"] < 0.02
    assert found.variances_["noise"] == pytest.approx(0.25, rel=0.3)


def test_repeats_count_as_so_many_rows(data) -> None:
    X, y, _ = data
    fixed = {"levels": LEVELS, "variances": VARIANCES}
    weighted = HierarchicalRegressor(**fixed).fit(X, y, np.full(40, 3.0))
    repeated = HierarchicalRegressor(**fixed).fit(np.repeat(X, 3, axis=0), np.repeat(y, 3))
    np.testing.assert_allclose(weighted.coef_, repeated.coef_, atol=1e-9)
