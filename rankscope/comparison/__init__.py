"""Comparing methods at equal terms: a learning rate tuned for each, the same seeds, paired differences on the test split."""

from rankscope.comparison.comparing import DEFAULT_METHODS, REFERENCE, Comparison, compare, read_comparison
from rankscope.comparison.markdown import insert_table, to_markdown
from rankscope.comparison.methods import known_methods
from rankscope.comparison.repeats import Repeats, repeat_all
from rankscope.comparison.runs import Cell, Run, run_all, run_cell
from rankscope.comparison.statistics import paired_difference, rank_methods
from rankscope.comparison.table import allocations, at_budget, summarise
from rankscope.searching.noise import Interval

__all__ = [
    "DEFAULT_METHODS",
    "REFERENCE",
    "Cell",
    "Comparison",
    "Interval",
    "Repeats",
    "Run",
    "allocations",
    "at_budget",
    "compare",
    "insert_table",
    "known_methods",
    "paired_difference",
    "rank_methods",
    "read_comparison",
    "repeat_all",
    "run_all",
    "run_cell",
    "summarise",
    "to_markdown",
]
