"""The performance model: from (profile, allocation) to the metric, and honest scores of it."""

from rankscope.performance.features import PRIOR_DEPTH, PRIOR_POWER, RankFeatures, prior_gains, rank_features
from rankscope.performance.model import PerformanceModel, Validation, believable, validate

__all__ = [
    "PRIOR_DEPTH", "PRIOR_POWER", "PerformanceModel", "RankFeatures", "Validation", "believable", "prior_gains", "rank_features",
    "validate",
]  # fmt: skip
