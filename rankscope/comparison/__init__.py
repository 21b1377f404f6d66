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
    repeat_all,
    run_all,
    run_cell,
)
from rankscope.comparison.statistics import paired_difference, rank_methods
from rankscope.comparison.summary import (
    allocations,
    at_budget,
    format_row,
    insert_table,
    read_comparison,
    summarise,
    to_markdown,
)
from rankscope.searching import Interval

__all__ = [
    "DEFAULT_METHODS",
    "REFERENCE",
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
    "format_row",
    "insert_table",
    "known_methods",
    "need_profile",
    "paired_difference",
    "rank_methods",
    "read_comparison",
    "repeat_all",
    "run_all",
    "run_cell",
    "summarise",
    "to_markdown",
    "write_report",
]
