"""How well performance models rank allocations they have not seen, on RankBench; and how honest their intervals are.

    python studies/bench/performance_model.py --out studies/results/performance_model.json

A model is fitted to the validation metric of n allocations under one seed, and judged on the others by Kendall's tau with the
mean test metric over all seeds; 20 draws of the training set. Beside it: the profile alone (the captured norm, no trial),
the mean predictor (0 by definition, as is a model that predicts a constant), and one measurement: tau between one seed's
validation metric of the very same allocations and that mean, which a good model surpasses by smoothing. Coverage is
the share of unseen allocations whose single validation measurement lies in the model's 80 % interval. Feature sets: all;
without the profile's terms; without single modules; the captured share of a module's own spectrum in place of log1p as the gain
of every level; raw ranks (BayesianRidge). About two minutes. `--quick`: 3 draws of one budget, the default model.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
from _harness import Claim, run_benchmark
from joblib import Parallel, delayed
from numpy.typing import NDArray
from scipy.stats import kendalltau
from searches import RankBench
from sklearn.base import RegressorMixin
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
from sklearn.linear_model import BayesianRidge
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PowerTransformer, StandardScaler

from rankscope.performance import PerformanceModel, RankFeatures, rank_features

TABLES = {"digits-shift, rank 1": ("digits-shift", 1, 84), "digits-shift, rank 2": ("digits-shift", 2, 84),
          "digits-shift, rank 4": ("digits-shift", 4, 84)}  # fmt: skip
SIZES = (25, 50, 100)
Floats = NDArray[np.float64]


def measure(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """Rows by table, model and feature set; the coverage claim for each table."""
    names = list(TABLES)[:1] if quick else list(TABLES)
    draws = range(3 if quick else 20)
    cells = [(name, draw, quick) for name in names for draw in draws]
    found = Parallel(n_jobs=2)(delayed(judge)(*cell) for cell in cells)
    pooled: dict[tuple[Any, ...], list[float]] = {}
    for scores in found:
        for key, value in scores.items():
            pooled.setdefault(key, []).append(value)
    rows = [
        {"table": name, "predictor": predictor, "trained_on": n, "score": score, "mean": float(np.mean(values))}
        for (name, predictor, n, score), values in pooled.items()
    ]
    claims = []
    for name in names:

        def mean(predictor: str, n: int, score: str, name: str = name) -> float:
            return float(np.mean(pooled[name, predictor, n, score]))

        coverage = mean("hierarchical", 50, "coverage")
        inside = 0.7 <= coverage <= 0.9
        claims.append(
            Claim(name=f"{name}: coverage of the 80 % intervals", value=coverage, bound="in 0.7 to 0.9", holds=inside)
        )
        ahead = mean("hierarchical", 100, "kendall") - mean("profile alone", 100, "kendall")
        claims.append(Claim.at_least(f"{name}: tau at 100 trials, model minus profile alone", ahead, 0.0))
    return rows, claims


def judge(name: str, draw: int, quick: bool) -> dict[tuple[Any, ...], float]:
    """All predictors on one draw of training sets."""
    warnings.simplefilter("ignore")
    table = RankBench(*TABLES[name])
    features = rank_features(
        table.space.targets, table.space.budget, gains=table.space.gains, groups=table.space.groups
    )
    rng = np.random.default_rng(draw)
    order, seed = rng.permutation(len(table.ranks)), int(rng.integers(table.validation.shape[1]))
    measured = table.validation[:, seed]
    scores: dict[tuple[Any, ...], float] = {}
    for n in SIZES:
        train, test = order[:n], order[n:]

        def tau(predicted: np.ndarray, test: np.ndarray = test) -> float:
            return float(np.nan_to_num(kendalltau(predicted, table.truth[test])[0]))

        sets = {"": features} if quick else {"": features, **subsets(features)}
        for label, columns in sets.items():
            model = PerformanceModel(columns).fit(table.ranks[train], measured[train])
            scores[name, "hierarchical" + label, n, "kendall"] = tau(model.predict(table.ranks[test]))
            if not label:
                low, high = model.interval(table.ranks[test], 0.8, repeats=1)
                inside = (low <= measured[test]) & (measured[test] <= high)
                scores[name, "hierarchical", n, "coverage"] = float(inside.mean())
        rows = features.transform(table.ranks)
        normal = PowerTransformer().fit_transform(measured[train, None]).ravel()
        for label, regressor in {} if quick else alternatives().items():
            scores[name, label, n, "kendall"] = tau(regressor.fit(rows[train], normal).predict(rows[test]))
        ridge = BayesianRidge().fit(table.ranks[train], measured[train])
        scores[name, "BayesianRidge, raw ranks", n, "kendall"] = tau(ridge.predict(table.ranks[test]))
        profile = features.transform(table.ranks[test])[:, features.names.index("profile/norm")]
        scores[name, "profile alone", n, "kendall"] = tau(profile)
        scores[name, "one measurement of the same allocations", n, "kendall"] = tau(measured[test])
    return scores


def alternatives() -> dict[str, RegressorMixin]:
    """Other regressors on the same features, of the metric made normal."""
    kernel = ConstantKernel() * Matern(10.0, (1.0, 1e3), nu=2.5) + WhiteKernel(0.5)
    network = MLPRegressor(hidden_layer_sizes=(64, 64), max_iter=1000, random_state=0)
    return {
        "gp": make_pipeline(StandardScaler(), GaussianProcessRegressor(kernel, normalize_y=True, random_state=0)),
        "extra-trees": ExtraTreesRegressor(300, min_samples_leaf=2, random_state=0),
        "mlp": make_pipeline(StandardScaler(), network),
    }


def shares(features: RankFeatures) -> Floats:
    """What all ranks of each module capture: with it, the energy's curve is the captured share of a module's own spectrum."""
    return np.maximum(features.curves["energy"][:, -1:], np.finfo(np.float64).tiny)


def subsets(features: RankFeatures) -> dict[str, RankFeatures]:
    """Feature sets, by what is said of them."""
    return {
        ", without the profile": features.without("profile"),
        ", without modules": features.without("module"),
        ", profile and all modules alike": features.of_profile,
        ", captured share instead of log1p": replace(
            features, curves={**features.curves, "log": features.curves["energy"] / shares(features)}
        ),
    }


if __name__ == "__main__":
    run_benchmark(measure, __doc__ or "")
