"""What a search's performance model predicts, beside what was measured; and what it believes each module is worth."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from rankscope.performance import PerformanceModel
from rankscope.plotting.heatmap import draw_grids, module_grids
from rankscope.searching import SearchResult

_COLOURS = {"uniform": "tab:grey", "one-shot": "tab:orange", "sampler": "tab:blue", "posterior-mean": "tab:red"}


def plot_predictions(model: PerformanceModel, result: SearchResult) -> Figure:
    """Each trial's metric against the model's prediction of it, with its 80 % interval; the model has seen these trials."""
    trials = [trial for trial in result.trials if trial.reused is None]
    ranks = np.array([trial.allocation.vector for trial in trials])
    predicted, (low, high) = model.predict(ranks), model.interval(ranks, 0.8)
    measured = np.array([trial.metric for trial in trials])
    figure = Figure(figsize=(4.6, 4.2))
    figure.set_layout_engine("constrained")
    axis = figure.subplots()
    for origin, colour in _COLOURS.items():
        mine = np.array([trial.origin == origin for trial in trials])
        if mine.any():
            around = np.abs(np.array([predicted - low, high - predicted])[:, mine])
            axis.errorbar(
                predicted[mine], measured[mine], xerr=around, fmt="o", ms=4, lw=0.7, color=colour, label=origin
            )
    ends = [min(predicted.min(), measured.min()), max(predicted.max(), measured.max())]
    axis.plot(ends, ends, color="black", lw=0.6, zorder=0)
    axis.set_xlabel(f"predicted {result.metric_name}, averaged over learning rates", fontsize=8)
    axis.set_ylabel(f"measured {result.metric_name}", fontsize=8)
    axis.set_title("performance model on its own trials", loc="left", fontsize=9)
    axis.legend(fontsize=7, frameon=False)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def plot_belief(model: PerformanceModel) -> Figure:
    """What one more rank is worth at uniform's ranks, per parameter, over the mean, as heatmaps of block x role."""
    gains, targets = model.utilities(), model.features.targets
    density = {
        t.name: float(gains[t.name][min(rank, t.full_rank - 1)]) / t.rank_cost
        for t, rank in zip(targets, model.features.reference, strict=True)
    }
    mean = float(np.mean(list(density.values()))) or 1.0
    relative = {name: value / mean for name, value in density.items()}
    title = "what the search believes one more rank is worth, per parameter (mean: 1)"
    norm = Normalize(0.0, max(2.0, *relative.values()))
    return draw_grids(module_grids(targets, relative), title, norm, "worth over the mean", lambda value: f"{value:.1f}")
