"""scikit-learn's own checks on the estimators that the package exports."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from scipy.sparse import issparse
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.estimator_checks import parametrize_with_checks
from sklearn.utils.validation import check_is_fitted

import rankscope as rs
from rankscope.performance import PerformanceModel, rank_features


def model_of(n_modules: int) -> PerformanceModel:
    targets = [rs.TargetModule(name=f"m.{i}", in_features=64, out_features=64, block=i) for i in range(n_modules)]
    return PerformanceModel(rank_features(targets, rs.ParameterBudget.uniform(targets, 16)))


def as_ranks(X: Any) -> Any:
    """Whole ranks from the checks' real numbers; what is no dense table of floats is handed on as it is."""
    if issparse(X):
        return X
    table = np.array(X)
    if table.dtype == object:
        table = table.astype(float)
    if table.dtype.kind != "f":
        return table
    return np.where(np.isfinite(table), np.rint(np.clip(table, -4, 4) * 4 + 16), table)


class OfAnyMatrix(RegressorMixin, BaseEstimator):
    """A performance model of as many modules as the checks' matrices have columns."""

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        ranks = as_ranks(X)
        self.model_ = model_of(ranks.shape[1] if ranks.ndim == 2 and ranks.shape[1] else 1)
        self.model_.fit(ranks, y, sample_weight)
        self.n_features_in_ = self.model_.n_features_in_
        return self

    def predict(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        return self.model_.predict(as_ranks(X))

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        return self.model_.score(as_ranks(X), y)


REPEATS = "a mean of repeats tells less of the noise than as many observations"
SPARSE = "ranks are never sparse; scikit-learn 1.6 checks it all the same"
EXPECTED = {
    OfAnyMatrix: {
        "check_sample_weight_equivalence_on_sparse_data": SPARSE,
        "check_sample_weight_equivalence_on_dense_data": REPEATS,
        "check_n_features_in_after_fitting": "the message speaks of modules, not of features",
        "check_estimators_empty_data_messages": "the message speaks of modules, not of features",
        "check_fit2d_predict1d": "one allocation may be given as a vector",
    },
    # It accepts one whole rank for each of its own modules only. `OfAnyMatrix` runs these checks in its place.
    PerformanceModel: dict.fromkeys(
        [
            "check_sample_weight_equivalence_on_sparse_data",
            "check_fit_score_takes_y",
            "check_estimators_overwrite_params",
            "check_dont_overwrite_parameters",
            "check_estimators_fit_returns_self",
            "check_readonly_memmap_input",
            "check_n_features_in_after_fitting",
            "check_positive_only_tag_during_fit",
            "check_estimators_dtypes",
            "check_sample_weights_list",
            "check_all_zero_sample_weights_error",
            "check_sample_weight_equivalence_on_dense_data",
            "check_dtype_object",
            "check_estimators_empty_data_messages",
            "check_pipeline_consistency",
            "check_estimators_nan_inf",
            "check_estimators_pickle",
            "check_f_contiguous_array_estimator",
            "check_regressors_train",
            "check_regressor_data_not_an_array",
            "check_regressors_no_decision_function",
            "check_supervised_y_2d",
            "check_regressors_int",
            "check_methods_sample_order_invariance",
            "check_methods_subset_invariance",
            "check_fit2d_1sample",
            "check_fit2d_1feature",
            "check_dict_unchanged",
            "check_fit_idempotent",
            "check_fit_check_is_fitted",
            "check_n_features_in",
            "check_fit2d_predict1d",
        ],
        "the matrix is not one of whole ranks of the model's own modules",
    ),
}


@parametrize_with_checks([OfAnyMatrix(), model_of(2)], expected_failed_checks=lambda model: EXPECTED[type(model)])
def test_scikit_learn_conventions(estimator: Any, check: Any) -> None:
    check(estimator)
