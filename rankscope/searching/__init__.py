"""Searching: an Optuna study over the hierarchical space, resumable, paired to uniform, confirmed on fresh seeds."""

from rankscope.searching.confirmation import CONFIDENCE, FEWEST_PAIRS, Finalist, Interval, t_interval
from rankscope.searching.runner import SearchResult, search
from rankscope.searching.sampler import START_TRIALS, PerformanceModelSampler, belief_of, suggest_allocation
from rankscope.searching.space import HierarchicalSpace, group_by_depth, group_by_gradient, make_space
from rankscope.searching.storage import (
    RANKS_KEY,
    STUDY_KEY,
    TRIAL_KEY,
    Trial,
    completed,
    find_storage,
    load_study,
    read_trial,
)

__all__ = [
    "CONFIDENCE",
    "FEWEST_PAIRS",
    "RANKS_KEY",
    "START_TRIALS",
    "STUDY_KEY",
    "TRIAL_KEY",
    "Finalist",
    "HierarchicalSpace",
    "Interval",
    "PerformanceModelSampler",
    "SearchResult",
    "Trial",
    "belief_of",
    "completed",
    "find_storage",
    "group_by_depth",
    "group_by_gradient",
    "load_study",
    "make_space",
    "read_trial",
    "search",
    "suggest_allocation",
    "t_interval",
]
