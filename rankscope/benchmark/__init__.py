"""Comparing searches without training anything: RankBench's tables, synthetic landscapes, search methods, and their regret."""

from rankscope.benchmark.landscapes import LANDSCAPES, Landscape, RankBench, Synthetic
from rankscope.benchmark.methods import METHODS, OURS, Method
from rankscope.benchmark.regret import BUDGETS, regret_curve, regret_curves, run_search, tabulate

__all__ = [
    "BUDGETS",
    "LANDSCAPES",
    "METHODS",
    "OURS",
    "Landscape",
    "Method",
    "RankBench",
    "Synthetic",
    "regret_curve",
    "regret_curves",
    "run_search",
    "tabulate",
]
