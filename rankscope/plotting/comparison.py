"""A comparison drawn: differences to uniform with intervals (forest), and the metric against adapter parameters."""

from __future__ import annotations

import math

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

REFERENCE = "uniform"  # its own word here: importing rankscope.comparison would load peft
COLOURS = {"better": "#1b7f4d", "worse": "#b3402e"}
GREY = "#6b6b6b"
ROW_HEIGHT = 0.28  # inches
PANELS_ABREAST = 3
MARKERS = "osD^vP*X<>hd"


def plot_forest(table: pd.DataFrame) -> Figure:
    """One row a method: the mean difference to uniform on the test split with its 95 % interval, one panel a study.

    A hollow marker has no interval: fewer than 3 seeds, or differences that are all equal.

    The band is what two groups of seeds of uniform itself differ by, 95 % of the time.

    Args:
        table: As `rankscope.comparison.summarise` gives it; rows at the study's own budget are drawn.
    """
    table = table[(table["factor"] == 1.0) & (table["method"] != REFERENCE)]
    studies = list(dict.fromkeys(table["study"]))
    most = max(int((table["study"] == study).sum()) for study in studies)
    figure, axes = _panels(len(studies), width=4.6, height=ROW_HEIGHT * most + 1.0)
    for axis, study in zip(axes, studies, strict=True):
        _forest(axis, table[table["study"] == study].sort_values("difference"), study)
    return figure


def _forest(axis: Axes, table: pd.DataFrame, study: str) -> None:
    noise = 100 * float(table["noise"].iloc[0])
    if not math.isnan(noise):
        axis.axvspan(-noise, noise, color="#eeeeee", lw=0, zorder=0)
    axis.axvline(0.0, color="black", lw=0.8, zorder=1)
    for place, (_, row) in enumerate(table.iterrows()):
        colour = COLOURS.get(str(row["verdict"]), GREY)
        low, mean, high = (100 * float(row[name]) for name in ("low", "difference", "high"))
        axis.plot([low, high], [place, place], color=colour, lw=1.6, solid_capstyle="butt")
        axis.plot(mean, place, "o", color=colour, mfc="white" if math.isnan(low) else colour, ms=5)
    labels = [_label(row) for _, row in table.iterrows()]
    axis.set_yticks(range(len(table)), labels, fontsize=8)
    axis.set_ylim(-0.6, len(table) - 0.4)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right", "left"]].set_visible(False)
    n_seeds = int(table["seeds"].iloc[0])
    axis.set_xlabel(f"points over uniform, {n_seeds} seed{'s' * (n_seeds != 1)}", fontsize=8)
    axis.set_title(study, loc="left", fontsize=9)


def _label(row: pd.Series) -> str:
    if row["over_budget"]:
        return f"{row['method']} (over budget)"
    return f"{row['method']} (same runs)" if str(row["verdict"]).startswith("same") else str(row["method"])


def plot_budgets(table: pd.DataFrame) -> Figure:
    """The test metric against adapter parameters, one panel a study: uniform's curve, and every other method's points.

    Methods without adapters lie at the parameters that they train, and are left out where those are none.

    Args:
        table: As `rankscope.comparison.summarise` gives it.
    """
    table = table[table["parameters"] > 0]
    studies = list(dict.fromkeys(table["study"]))
    methods = [name for name in dict.fromkeys(table["method"]) if name != REFERENCE]
    figure, axes = _panels(len(studies), width=4.6, height=3.6)
    for axis, study in zip(axes, studies, strict=True):
        _budgets(axis, table[table["study"] == study], methods)
        axis.set_title(study, loc="left", fontsize=9)
        axis.set_ylabel("test metric", fontsize=8)
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
        filled = colour if place < 10 else "white"  # colours come again, hollow
        axis.plot(mine["parameters"], mine["test"], marker + "-", color=colour, mfc=filled, ms=5, lw=1.0, label=method)
    axis.set_xscale("log")
    axis.set_xticks(sorted({*x, table["parameters"].min(), table["parameters"].max()}))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.tick_params(labelsize=8)
    axis.tick_params(axis="x", rotation=25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("trainable parameters outside the head", fontsize=8)


def _panels(n: int, *, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of n panels, each of this size in inches."""
    abreast = min(n, PANELS_ABREAST)
    rows = math.ceil(n / abreast)
    figure = Figure(figsize=(width * abreast, height * rows))
    figure.set_layout_engine("constrained")
    return figure, [figure.add_subplot(rows, abreast, place + 1) for place in range(n)]
