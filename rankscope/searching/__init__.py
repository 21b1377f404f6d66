"""Searching: an Optuna study over the hierarchical space, resumable, paired to uniform, confirmed on fresh seeds."""

from rankscope.searching.finalists import Finalist
from rankscope.searching.results import SearchResult
from rankscope.searching.runner import search
from rankscope.searching.sampler import START_TRIALS, PerformanceModelSampler, suggest_allocation
from rankscope.searching.trials import Trial

__all__ = [
    "START_TRIALS",
    "Finalist",
    "PerformanceModelSampler",
    "SearchResult",
    "Trial",
    "search",
    "suggest_allocation",
]
