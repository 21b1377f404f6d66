"""The performance model: from (profile, allocation) to the metric, and honest scores of it."""

from rankscope.performance.features import RankFeatures, rank_features
from rankscope.performance.model import PerformanceModel, Validation, believable, validate

__all__ = ["PerformanceModel", "RankFeatures", "Validation", "believable", "rank_features", "validate"]
