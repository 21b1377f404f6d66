"""Compare searches without training anything: RankBench's tables, synthetic landscapes, search methods, and their regret."""

from searches.landscapes import LANDSCAPES, Landscape, RankBench, Synthetic
from searches.methods import METHODS, OURS, Method
from searches.picture import plot_regret
from searches.regret import BUDGETS, regret_curve, regret_curves, run_on_table, run_search, tabulate

__all__ = [
    "BUDGETS", "LANDSCAPES", "METHODS", "OURS", "Landscape", "Method", "RankBench", "Synthetic", "plot_regret", "regret_curve",
    "regret_curves", "run_on_table", "run_search", "tabulate",
]  # fmt: skip
