"""A comparison drawn: differences to uniform with intervals (forest), and the metric against adapter parameters."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

REFERENCE = "uniform"  # its own word here: importing rankscope.comparison would load peft
COLOURS = {"better": "#1b7f4d", "worse": "#b3402e"}
GREY = "#6b6b6b"
ROW_HEIGHT = 0.28  # inches
MARKERS = "osD^vP*X<>hd"


def plot_forest(table: pd.DataFrame) -> Figure:
    """One row a method: the mean difference to uniform on the test split with its 95 % interval, one panel a task.

    The band is what two groups of seeds of uniform itself differ by, 95 % of the time.

    Args:
        table: As `rankscope.comparison.summarise` gives it; rows at the study's own budget are drawn.
    """
    table = table[(table["factor"] == 1.0) & (table["method"] != REFERENCE)]
    tasks = list(dict.fromkeys(table["task"]))
    most = max(int((table["task"] == task).sum()) for task in tasks)
    figure = Figure(figsize=(4.2 * len(tasks) + 1.2, ROW_HEIGHT * most + 1.0))
    figure.set_layout_engine("constrained")
    for axis, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        _forest(axis, table[table["task"] == task].sort_values("difference"), task)
    return figure


def _forest(axis: Axes, table: pd.DataFrame, task: str) -> None:
    noise = 100 * float(table["noise"].iloc[0])
    axis.axvspan(-noise, noise, color="#eeeeee", lw=0, zorder=0)
    axis.axvline(0.0, color="black", lw=0.8, zorder=1)
    for place, (_, row) in enumerate(table.iterrows()):
        colour = COLOURS.get(str(row["verdict"]), GREY)
        low, mean, high = (100 * float(row[name]) for name in ("low", "difference", "high"))
        axis.plot([low, high], [place, place], color=colour, lw=1.6, solid_capstyle="butt")
        axis.plot(mean, place, "o", color=colour, ms=5)
    axis.set_yticks(range(len(table)), table["method"], fontsize=8)
    axis.set_ylim(-0.6, len(table) - 0.4)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.set_xlabel(f"points over uniform, {table['seeds'].iloc[0]} seeds", fontsize=8)
    axis.set_title(task, loc="left", fontsize=9)


def plot_budgets(table: pd.DataFrame) -> Figure:
    """The test metric against adapter parameters, one panel a task: uniform's curve, and every other method's points.

    Methods without adapters lie at the parameters that they train, and are left out where those are none.

    Args:
        table: As `rankscope.comparison.summarise` gives it.
    """
    table = table[table["parameters"] > 0]
    tasks = list(dict.fromkeys(table["task"]))
    methods = [name for name in dict.fromkeys(table["method"]) if name != REFERENCE]
    figure = Figure(figsize=(4.6 * len(tasks), 3.6 + 0.18 * (len(methods) // 4)))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axis, task in zip(axes, tasks, strict=True):
        _budgets(axis, table[table["task"] == task], methods)
        axis.set_title(task, loc="left", fontsize=9)
    axes[0].set_ylabel("test metric", fontsize=8)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    return figure


def _budgets(axis: Axes, table: pd.DataFrame, methods: list[str]) -> None:
    uniform = table[table["method"] == REFERENCE].sort_values("parameters")
    x, y, deviation = (uniform[name].to_numpy() for name in ("parameters", "test", "deviation"))
    axis.plot(x, y, "o-", color="black", ms=4, lw=1.2, label=REFERENCE)
    axis.fill_between(x, y - deviation, y + deviation, color="black", alpha=0.08, lw=0)
    for place, method in enumerate(methods):
        mine = table[table["method"] == method].sort_values("parameters")
        marker, colour = MARKERS[place % len(MARKERS)], f"C{place % 10}"
        axis.plot(mine["parameters"], mine["test"], marker + "-", color=colour, ms=5, lw=1.0, label=method)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.tick_params(labelsize=8)
    axis.tick_params(axis="x", which="both", rotation=25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("trainable parameters outside the head", fontsize=8)
