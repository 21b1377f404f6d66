"""Comparing methods at equal terms: a learning rate tuned for each, the same seeds, paired differences on the test split."""

from rankscope.comparison.report import write_report
from rankscope.comparison.runner import (
    DEFAULT_METHODS,
    REFERENCE,
    SEARCHED,
    Cell,
    Comparison,
    Repeats,
    Run,
    check_terms,
    compare,
    known_methods,
    need_profile,
    read_comparison,
    repeat_all,
    run_all,
    run_cell,
)
from rankscope.comparison.statistics import paired_difference, rank_methods
from rankscope.comparison.summary import (
    NO_DIFFERENCE,
    SAME_RUNS,
    allocations,
    at_budget,
    insert_table,
    points_over_uniform,
    summarise,
    to_markdown,
)
from rankscope.searching import Interval

__all__ = [
    "DEFAULT_METHODS",
    "NO_DIFFERENCE",
    "REFERENCE",
    "SAME_RUNS",
    "SEARCHED",
    "Cell",
    "Comparison",
    "Interval",
    "Repeats",
    "Run",
    "allocations",
    "at_budget",
    "check_terms",
    "compare",
    "insert_table",
    "known_methods",
    "need_profile",
    "paired_difference",
    "points_over_uniform",
    "rank_methods",
    "read_comparison",
    "repeat_all",
    "run_all",
    "run_cell",
    "summarise",
    "to_markdown",
    "write_report",
]
