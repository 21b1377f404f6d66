"""Searching: an Optuna study over the hierarchical space, resumable, paired to uniform."""

from rankscope.searching.results import SearchResult, Trial
from rankscope.searching.runner import search

__all__ = ["SearchResult", "Trial", "search"]
