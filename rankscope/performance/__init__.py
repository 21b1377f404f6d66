"""The performance model: from (profile, allocation) to the metric, and honest scores of it."""

from rankscope.performance.features import RankFeatures, rank_features
from rankscope.performance.model import PerformanceModel
from rankscope.performance.regression import HierarchicalRegressor
from rankscope.performance.transfer import MIN_TRIALS, EarlierStudy, Prior, learn_prior
from rankscope.performance.validation import Validation, believable, validate

__all__ = [
    "MIN_TRIALS",
    "EarlierStudy",
    "HierarchicalRegressor",
    "PerformanceModel",
    "Prior",
    "RankFeatures",
    "Validation",
    "believable",
    "learn_prior",
    "rank_features",
    "validate",
]
