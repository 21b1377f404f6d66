"""The performance model: from (profile, allocation) to the metric, and honest scores of it."""

from rankscope.performance.features import RankFeatures, rank_features
from rankscope.performance.model import HierarchicalRegressor, PerformanceModel, Validation, believable, validate

__all__ = [
    "HierarchicalRegressor", "PerformanceModel", "RankFeatures", "Validation", "believable", "rank_features", "validate",
]  # fmt: skip
