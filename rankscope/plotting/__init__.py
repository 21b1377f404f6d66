"""Plots: data prepared apart from drawing; every function returns a matplotlib figure."""

from rankscope.plotting.heatmap import module_grids, plot_energy, plot_ranks
from rankscope.plotting.save import save_figure

__all__ = ["module_grids", "plot_energy", "plot_ranks", "save_figure"]
