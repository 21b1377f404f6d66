"""Methods compared at equal terms: a learning rate tuned for each, the same seeds, paired differences on the test split."""

from rankscope.comparison.planner import BudgetPlan, plan_budget
from rankscope.comparison.report import write_report
from rankscope.comparison.runner import (
    REFERENCE,
    REPORTED,
    SEARCHED,
    Comparison,
    RunSpec,
    check_terms,
    compare,
    find_methods,
    make_grid,
    run_all,
    run_tuned,
)
from rankscope.comparison.statistics import paired_difference
from rankscope.comparison.summary import (
    allocations,
    at_budget,
    format_row,
    insert_table,
    read_comparison,
    summarise,
    times,
    to_markdown,
)

__all__ = [
    "REFERENCE", "REPORTED", "SEARCHED", "BudgetPlan", "Comparison", "RunSpec", "allocations", "at_budget", "check_terms",
    "compare", "find_methods", "format_row", "insert_table", "make_grid", "paired_difference", "plan_budget", "read_comparison",
    "run_all", "run_tuned", "summarise", "times", "to_markdown", "write_report",
]  # fmt: skip
