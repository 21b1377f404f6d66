"""Searching: an Optuna study over the hierarchical space, resumable, paired to uniform, confirmed on fresh seeds."""

from rankscope.searching.attachments import picture_name, study_note, trial_note
from rankscope.searching.confirmation import CONFIDENCE, FEWEST_PAIRS, Finalist, t_interval
from rankscope.searching.runner import SearchResult, search
from rankscope.searching.sampler import START_TRIALS, PerformanceModelSampler, suggest_allocation
from rankscope.searching.space import HierarchicalSpace, group_by_depth, make_space
from rankscope.searching.storage import STUDY_KEY, Trial, load_study, read_trials
from rankscope.searching.trainers import HyperparameterSpace, hp_space

__all__ = [
    "CONFIDENCE", "FEWEST_PAIRS", "START_TRIALS", "STUDY_KEY", "Finalist", "HierarchicalSpace", "HyperparameterSpace",
    "PerformanceModelSampler", "SearchResult", "Trial", "group_by_depth", "hp_space", "load_study", "make_space", "picture_name",
    "read_trials", "search", "study_note", "suggest_allocation", "t_interval", "trial_note",
]  # fmt: skip
