"""Regret against trials, one panel a landscape, one line a search: median over seeds, with quartiles as a band."""

from __future__ import annotations

import math

import pandas as pd
from matplotlib.figure import Figure

PANEL = (3.4, 2.6)  # inches


def plot_regret(regrets: pd.DataFrame, columns: int = 3) -> Figure:
    """Draws what `regret_curves` found.

    Args:
        regrets: Columns `landscape`, `method`, `seed`, `trials` and `regret`.
        columns: Panels side by side.
    """
    names = list(dict.fromkeys(regrets["landscape"]))
    methods = list(dict.fromkeys(regrets["method"]))
    columns = min(columns, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows + 0.3))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=False)
    for axis in axes.flat[len(names) :]:
        axis.remove()
    for name, axis in zip(names, axes.flat, strict=False):
        for index, method in enumerate(methods):
            part = regrets[(regrets["landscape"] == name) & (regrets["method"] == method)]
            if part.empty:  # not every method need be run everywhere
                continue
            bands = part.groupby("trials")["regret"].quantile([0.25, 0.5, 0.75]).unstack()
            first = index == 0
            colour = f"C{index}"
            axis.plot(bands.index, bands[0.5], "o-", ms=3, lw=2.0 if first else 1.0, color=colour, label=method)
            axis.fill_between(bands.index, bands[0.25], bands[0.75], color=colour, alpha=0.25 if first else 0.08, lw=0)
        axis.axhline(1.0, color="black", lw=0.6, ls=":")
        axis.set_title(name, loc="left", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel("trials", fontsize=8)
    for row in axes:
        row[0].set_ylabel("regret (uniform 1, best 0)", fontsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), fontsize=8, frameon=False)
    return figure
