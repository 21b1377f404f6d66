"""Plots: data prepared apart from drawing; every function returns a matplotlib figure."""

from rankscope.plotting.comparison import plot_budgets, plot_forest
from rankscope.plotting.heatmap import module_grids, plot_energy, plot_ranks
from rankscope.plotting.model import plot_belief, plot_levels, plot_predictions
from rankscope.plotting.save import save_figure
from rankscope.plotting.spectra import plot_spectra
from rankscope.plotting.trajectory import plot_flow, plot_trajectories

__all__ = [
    "module_grids",
    "plot_belief",
    "plot_budgets",
    "plot_energy",
    "plot_flow",
    "plot_forest",
    "plot_levels",
    "plot_predictions",
    "plot_ranks",
    "plot_spectra",
    "plot_trajectories",
    "save_figure",
]
