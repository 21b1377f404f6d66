"""What a controller did: ranks over the run as small multiples, and the flow of the budget between towers and roles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.figure import Figure
from numpy.typing import NDArray

from rankscope.allocation import RankAllocation
from rankscope.plotting.heatmap import plot_ranks
from rankscope.targets import TargetModule

MOST_PANELS = 6


class Snapshot(NamedTuple):
    """Ranks at one time of a run.

    Attributes:
        step: Optimizer steps done; 0 at the start.
        title: What happened there.
        allocation: The ranks from there on.
    """

    step: int
    title: str
    allocation: RankAllocation


def snapshots(decisions: pd.DataFrame, targets: Sequence[TargetModule], most: int = MOST_PANELS) -> list[Snapshot]:
    """The start, and the ranks after decisions that moved some: all of them, or evenly chosen ones with the last.

    Args:
        decisions: A controller's, one row each.
        targets: The model's target modules; those without an adapter have rank 0.
        most: Snapshots at most.
    """

    def ranks(row: pd.Series, column: str) -> RankAllocation:
        return RankAllocation.from_ranks(targets, dict(zip(row["modules"], row[column], strict=True)))

    first = decisions.iloc[0]
    found = [Snapshot(0, "start", ranks(first, "ranks_before"))]
    for _, row in decisions[decisions["action"] == "moved"].iterrows():
        n = int(np.maximum(np.subtract(row["ranks_after"], row["ranks_before"]), 0).sum())
        found.append(Snapshot(int(row["step"]), f"step {row['step']}: {n} moved", ranks(row, "ranks_after")))
    if len(found) <= most:
        return found
    return [found[place] for place in np.linspace(0, len(found) - 1, most).round().astype(int)]


def plot_trajectories(decisions: pd.DataFrame, targets: Sequence[TargetModule]) -> Figure:
    """Ranks over a run as heatmaps, block x role: at the start, and after the controller's moves.

    Args:
        decisions: A controller's, one row each.
        targets: The model's target modules.
    """
    shown = snapshots(decisions, targets)
    return plot_ranks(*(each.allocation for each in shown), titles=[each.title for each in shown])


class Flow(NamedTuple):
    """Who holds the budget when.

    Attributes:
        steps: (n,) optimizer steps; the first is 0.
        groups: Role, with the tower before it where there are several; (m,).
        parameters: (m, n) adapter parameters of each group from each step on.
    """

    steps: list[int]
    groups: list[str]
    parameters: NDArray[np.int64]


def budget_flow(decisions: pd.DataFrame, targets: Sequence[TargetModule]) -> Flow:
    """Adapter parameters of each tower and role over the run.

    Args:
        decisions: A controller's, one row each.
        targets: The model's target modules.
    """
    towers = {target.tower for target in targets}
    label = {t.name: f"{t.tower} {t.role}" if len(towers) > 1 else t.role or t.name for t in targets}
    costs = {target.name: target.rank_cost for target in targets}
    groups = list(dict.fromkeys(label.values()))
    columns = [decisions["ranks_before"].iloc[0], *decisions["ranks_after"]]
    parameters = np.zeros((len(groups), len(columns)), dtype=np.int64)
    for place, ranks in enumerate(columns):
        for name, rank in zip(decisions["modules"].iloc[0], ranks, strict=True):
            parameters[groups.index(label[name]), place] += costs[name] * rank
    return Flow([0, *decisions["step"].tolist()], groups, parameters)


def plot_flow(decisions: pd.DataFrame, targets: Sequence[TargetModule]) -> Figure:
    """The budget's shares of towers and roles over a run, stacked; each decision is a tick, the last one the freeze.

    Args:
        decisions: A controller's, one row each.
        targets: The model's target modules.
    """
    flow = budget_flow(decisions, targets)
    steps = [*flow.steps, flow.steps[-1] + max(1, flow.steps[-1] // 8)]
    heights = np.concatenate([flow.parameters, flow.parameters[:, -1:]], axis=1)
    figure = Figure(figsize=(6.0, 3.2))
    figure.set_layout_engine("constrained")
    axis = figure.subplots()
    below = np.zeros(len(steps))
    colours = colormaps["tab20"].colors if len(flow.groups) > 10 else colormaps["tab10"].colors  # type: ignore[attr-defined]
    for place, (group, height) in enumerate(zip(flow.groups, heights, strict=True)):
        colour = colours[place % len(colours)]
        axis.fill_between(steps, below, below + height, step="post", color=colour, lw=0.4, ec="white", label=group)
        below = below + height
    axis.axvline(flow.steps[-1], color="black", lw=0.8, ls=":")
    axis.annotate("frozen", (flow.steps[-1], below.max()), (3, 3), textcoords="offset points", fontsize=8)
    axis.set_xticks(flow.steps, [str(step) for step in flow.steps], fontsize=8)
    axis.tick_params(axis="y", labelsize=8)
    axis.set_xlim(0, steps[-1])
    axis.set_ylim(0, None)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("optimizer step", fontsize=8)
    axis.set_ylabel("adapter parameters", fontsize=8)
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", fontsize=8, frameon=False)
    return figure
