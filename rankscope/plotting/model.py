"""What a search's performance model predicts, beside what was measured; what it believes each level and each module is worth."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from scipy.stats import norm

from rankscope.performance import PerformanceModel
from rankscope.plotting.heatmap import draw_grids, module_grids
from rankscope.searching import SearchResult

_COLOURS = {
    "uniform": "tab:grey",
    "one-shot": "tab:orange",
    "sampler": "tab:blue",
    "posterior-mean": "tab:red",
}


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
    colours = Normalize(0.0, max(2.0, *relative.values()))
    return draw_grids(
        module_grids(targets, relative), title, colours, "worth over the mean", lambda value: f"{value:.1f}"
    )


def plot_levels(model: PerformanceModel, confidence: float = 0.8) -> Figure:
    """The posterior of every tower's, block group's, block's and role's coefficient, a panel a level; modules are too many.

    Zero is what the levels above say; right of it, ranks there are worth more than that.
    """
    shown = [effect for effect in model.effects() if effect.level not in ("model", "profile", "module")]
    levels = list(dict.fromkeys(effect.level for effect in shown))
    counts = [sum(effect.level == level for effect in shown) for level in levels]
    figure = Figure(figsize=(4.6, 0.8 + 0.2 * sum(counts) + 0.35 * len(levels)))
    figure.set_layout_engine("constrained")
    panels = figure.subplots(len(levels), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": counts})[:, 0]
    width = float(norm.ppf(0.5 + confidence / 2.0))
    for level, axis in zip(levels, panels, strict=True):
        mine = [effect for effect in shown if effect.level == level]
        errors = [width * effect.std for effect in mine]
        axis.errorbar([e.mean for e in mine], range(len(mine)), xerr=errors, fmt="o", ms=4, lw=1.0, color="tab:blue")
        axis.axvline(0.0, color="black", lw=0.6)
        axis.set_yticks(range(len(mine)), [effect.name.removeprefix(f"{level}/") for effect in mine], fontsize=8)
        axis.set_ylim(len(mine) - 0.5, -0.5)
        axis.set_title(level, loc="left", fontsize=9)
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel(f"θ, in standard deviations of the metric; {confidence:.0%} interval", fontsize=8)
    return figure
