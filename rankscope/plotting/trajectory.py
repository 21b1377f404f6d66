"""Ranks that move during a run: where they were after each move, and how the budget flowed between towers and roles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle, pairwise
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from rankscope.allocation import RankAllocation
from rankscope.exceptions import ControlError
from rankscope.plotting.heatmap import ModuleGrid, draw_panel, module_grids, write_rank
from rankscope.targets import TargetModule

PANELS = 6
PAGE = 8.0  # inches: the width within which panels stand side by side
GAINED = "#ff3b30"
_PAIRS = colormaps["tab20"](range(20))
COLOURS = [*_PAIRS[0::2], *_PAIRS[1::2]]  # the ten strong ones first

Floats = NDArray[np.float64]


class Waypoint(NamedTuple):
    """The ranks that hold from a step on.

    Attributes:
        step: After how many optimizer steps; 0 at the start.
        allocation: The ranks.
    """

    step: int
    allocation: RankAllocation


class BudgetFlow(NamedTuple):
    """Shares of the adapter parameters over the run.

    Attributes:
        steps: (n,) from which each column of `shares` holds; the first is 0.
        towers: (g,) tower of each row.
        roles: (g,) role of each row.
        shares: (g, n), each column sums to 1.
        frozen: The step of the last decision.
    """

    steps: list[int]
    towers: list[str]
    roles: list[str]
    shares: Floats
    frozen: int


def waypoints(decisions: pd.DataFrame, targets: Sequence[TargetModule]) -> list[Waypoint]:
    """The start, and the ranks after each decision that moved some.

    Args:
        decisions: A controller's `decisions`, or its `decisions.parquet`.
        targets: The model's target modules, in any order, also those that the controller does not watch.

    Raises:
        ControlError: There is no decision.
        AllocationError: The decisions are of other modules.
    """
    if decisions.empty:
        raise ControlError("`decisions` must hold at least one decision to be drawn, but is empty; train for longer.")

    def allocation(modules: Sequence[str], ranks: Sequence[int]) -> RankAllocation:
        return RankAllocation.from_ranks(targets, dict(zip(modules, ranks, strict=True)))

    first = decisions.iloc[0]
    found = [Waypoint(0, allocation(first["modules"], first["ranks_before"]))]
    for _, row in decisions[decisions["action"] == "moved"].iterrows():
        found.append(Waypoint(int(row["step"]), allocation(row["modules"], row["ranks_after"])))
    return found


def spread(found: Sequence[Waypoint], at_most: int) -> list[Waypoint]:
    """The first, the last, and evenly chosen ones between them."""
    if len(found) <= at_most:
        return list(found)
    return [found[round(index)] for index in np.linspace(0, len(found) - 1, at_most)]


def budget_flow(decisions: pd.DataFrame, targets: Sequence[TargetModule]) -> BudgetFlow:
    """What share of the adapter parameters each tower and role has, from the start and from each move on.

    Args:
        decisions: As for `waypoints`.
        targets: As for `waypoints`.

    Raises:
        ControlError: There is no decision.
        AllocationError: The decisions are of other modules.
    """
    found = waypoints(decisions, targets)
    columns = []
    for _, allocation in found:
        grids = module_grids(targets, {t.name: t.rank_cost * allocation.ranks[t.name] for t in targets})
        used = np.concatenate([np.nansum(grid.values, axis=1) for grid in grids])
        columns.append(used / used.sum())
    return BudgetFlow(
        steps=[waypoint.step for waypoint in found],
        towers=[grid.tower for grid in grids for _ in grid.roles],
        roles=[role for grid in grids for role in grid.roles],
        shares=np.array(columns).T,
        frozen=int(decisions["step"].iloc[-1]),
    )


def plot_trajectories(decisions: pd.DataFrame, targets: Sequence[TargetModule]) -> Figure:
    """Ranks as heatmaps, block x role: the start, and after each move or, of many, evenly chosen ones with the last.

    Cells with more ranks than in the panel before are framed. Where there are towers, each panel is a row of them.

    Args:
        decisions: A controller's `decisions`, or its `decisions.parquet`.
        targets: The model's target modules.

    Raises:
        ControlError: There is no decision.
        AllocationError: The decisions are of other modules.
    """
    shown = spread(waypoints(decisions, targets), PANELS)
    grids = [module_grids(targets, {n: float(r) for n, r in w.allocation.ranks.items()}) for w in shown]
    fine = max(len(tower.blocks) for tower in grids[0]) > 12
    figure, panels, n_columns = _panels(len(shown), grids[0], cell=0.22 if fine else 0.36)
    colours = Normalize(0, max(1, *(max(w.allocation.vector) for w in shown)))
    for index, (row, heading) in enumerate(zip(panels, _headings(shown), strict=True)):
        for axis, grid, before in zip(row, grids[index], grids[max(index - 1, 0)], strict=True):
            image = draw_panel(axis, grid, colours, write_rank, 6 if fine else 8)
            _frame_gains(axis, grid, before)
            if index % n_columns:
                axis.set_yticks([])
            if index + n_columns < len(shown):
                axis.set_xticks([])
            else:
                axis.set_xlabel("block", fontsize=8)
            if index == 0 and len(row) > 1:
                axis.set_title(grid.tower, loc="left", fontsize=9)
        above = f"{heading}\n{grids[0][0].tower}" if index == 0 and len(row) > 1 else heading
        row[0].set_title(above, loc="left", fontsize=9)
    bar = figure.colorbar(image, ax=[axis for row in panels for axis in row], fraction=0.04, aspect=30)
    bar.set_label("rank (framed: more than in the panel before)", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return figure


def _panels(n_shown: int, towers: Sequence[ModuleGrid], cell: float) -> tuple[Figure, list[list[Axes]], int]:
    """A figure with a row of axes, one a tower, for each waypoint, and how many waypoints stand side by side.

    Args:
        n_shown: Waypoints.
        towers: The grids of one.
        cell: Width of a cell in inches.
    """
    widths = [cell * max(len(tower.blocks), 3) for tower in towers]
    height = 0.85 * cell * max(len(tower.roles) for tower in towers)
    abreast = 1 if len(towers) > 1 else max(1, int(PAGE / (widths[0] + 0.2)))
    n_rows = math.ceil(n_shown / abreast)
    n_columns = math.ceil(n_shown / n_rows)
    figure = Figure(figsize=(1.7 + n_columns * sum(widths) + 0.2 * len(widths), n_rows * (height + 0.35) + 0.6))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(n_rows, n_columns * len(towers), squeeze=False, width_ratios=widths * n_columns)
    panels = axes.reshape(-1, len(towers)).tolist()
    for axis in (axis for row in panels[n_shown:] for axis in row):
        axis.remove()
    return figure, panels[:n_shown], n_columns


def _headings(shown: Sequence[Waypoint]) -> list[str]:
    """Of each panel: its step, and the ranks that modules gained since the panel before."""
    found = ["start"]
    for before, after in pairwise(shown):
        gained = sum(max(more, 0) for more in after.allocation.difference(before.allocation).values())
        found.append(f"step {after.step:,}: +{gained} rank{'' if gained == 1 else 's'}")
    return found


def _frame_gains(axis: Axes, grid: ModuleGrid, before: ModuleGrid) -> None:
    for row, column in np.argwhere(grid.values > before.values):
        axis.add_patch(Rectangle((column - 0.45, row - 0.45), 0.9, 0.9, fill=False, edgecolor=GAINED, linewidth=1.4))


def plot_flow(decisions: pd.DataFrame, targets: Sequence[TargetModule]) -> Figure:
    """The share of the adapter parameters by tower and role over the optimizer steps, stacked.

    The last decision, after which ranks stay, is marked; the axis goes on for as long again as between two decisions.

    Args:
        decisions: A controller's `decisions`, or its `decisions.parquet`.
        targets: The model's target modules.

    Raises:
        ControlError: There is no decision.
        AllocationError: The decisions are of other modules.
    """
    flow = budget_flow(decisions, targets)
    end = flow.frozen + int(decisions["step"].iloc[0])
    steps = [*flow.steps, end]
    edges = 1.0 - np.cumsum(np.vstack([np.zeros_like(flow.shares[:1]), flow.shares]), axis=0)
    edges = np.column_stack([edges, edges[:, -1]])  # the last shares hold until the end
    figure = Figure(figsize=(6.4, 4.2))
    figure.set_layout_engine("constrained")
    axis = figure.subplots()
    _draw_bands(axis, flow, steps, edges)
    _draw_towers(axis, flow, steps, edges)
    axis.axvline(flow.frozen, color="black", lw=0.8, ls="--")
    axis.text(flow.frozen, 1.01, "last decision", ha="center", va="bottom", fontsize=8)
    axis.set(xlim=(0, end), ylim=(0, 1))
    axis.set_xlabel("optimizer step", fontsize=8)
    axis.set_ylabel("share of the adapter parameters", fontsize=8)
    axis.yaxis.set_major_formatter("{x:.0%}")
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=7, fontsize=8, frameon=False)
    return figure


def _draw_bands(axis: Axes, flow: BudgetFlow, steps: Sequence[int], edges: Floats) -> None:
    """One band a tower and role, a role's in one colour, with its share at both ends where there is room."""
    colours = dict(zip(dict.fromkeys(flow.roles), cycle(COLOURS), strict=False))
    for index, role in enumerate(flow.roles):
        label = role if role not in flow.roles[:index] else None
        high, low = edges[index], edges[index + 1]
        axis.fill_between(
            steps, low, high, step="post", color=colours[role], alpha=0.75, lw=0.6, edgecolor="white", label=label
        )
        for column, side in ((0, "left"), (-1, "right")):
            if (share := high[column] - low[column]) >= 0.04:
                middle = (high[column] + low[column]) / 2
                axis.text(steps[column], middle, f" {share:.0%} ", ha=side, va="center", fontsize=7)


def _draw_towers(axis: Axes, flow: BudgetFlow, steps: Sequence[int], edges: Floats) -> None:
    """Where there are several: lines between them, and beside each what it had and has."""
    towers = list(dict.fromkeys(flow.towers))
    if len(towers) == 1:
        return
    for tower in towers:
        first = flow.towers.index(tower)
        high, low = edges[first], edges[first + flow.towers.count(tower)]
        axis.step(steps, low, where="post", color="black", lw=1.2)
        text = f" {tower}\n {high[0] - low[0]:.0%} → {high[-1] - low[-1]:.0%}"
        axis.text(steps[-1], (high[-1] + low[-1]) / 2, text, fontsize=8, va="center")
