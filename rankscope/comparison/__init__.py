"""Comparing methods at equal terms: a learning rate tuned for each, the same seeds, paired differences on the test split."""

from rankscope.comparison.repeats import Repeats, repeat_all
from rankscope.comparison.runs import Cell, Run, run_all, run_cell
from rankscope.comparison.statistics import Interval, paired_difference

__all__ = ["Cell", "Interval", "Repeats", "Run", "paired_difference", "repeat_all", "run_all", "run_cell"]
