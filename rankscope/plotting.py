"""A comparison drawn: differences to uniform with intervals (forest), and the metric against adapter parameters."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, NullLocator
from numpy.typing import NDArray
from scipy.stats import norm

from rankscope.allocation import RankAllocation
from rankscope.errors import ModelError
from rankscope.files import replacing
from rankscope.performance import PerformanceModel
from rankscope.profiling import Profile, cumulative_energy
from rankscope.searching import SearchResult
from rankscope.targets import TargetModule


def save_figure(figure: Figure, path: str | os.PathLike[str], *, dpi: int = 150) -> Path:
    """Writes the figure; returns the path."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=dpi, bbox_inches="tight")
    return Path(path)


_ROLE_ORDER = (
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "gate_up_proj",
    "down_proj",
    "fc1",
    "fc2",
)

BLOCKS_ACROSS = 24  # of all panels in a row


class ModuleGrid(NamedTuple):
    """A tower's values: rows are roles, columns are blocks; NaN where there is no such module.

    Attributes:
        tower: Name of the tower.
        roles: Row labels.
        blocks: Column labels; `-` for modules outside blocks.
        values: (roles, blocks), summed where several modules share a cell.
    """

    tower: str
    roles: list[str]
    blocks: list[str]
    values: NDArray[np.float64]


def module_grids(targets: Sequence[TargetModule], values: Mapping[str, float]) -> list[ModuleGrid]:
    """Arranges one value a module as a grid a tower, in the order in which the towers appear."""
    grids = []
    for tower in dict.fromkeys(target.tower for target in targets):
        members = [target for target in targets if target.tower == tower]
        roles = sorted({t.role for t in members}, key=_role_key)
        numbered = sorted({t.block for t in members if t.block is not None})
        blocks: list[int | None] = [*numbered, *([None] if any(t.block is None for t in members) else [])]
        grid = np.full((len(roles), len(blocks)), np.nan)
        for t in members:
            row, column = roles.index(t.role), blocks.index(t.block)
            grid[row, column] = np.nansum([grid[row, column], values[t.name]])
        grids.append(ModuleGrid(tower, roles, ["-" if block is None else str(block) for block in blocks], grid))
    return grids


def plot_ranks(*allocations: RankAllocation, titles: Sequence[str] | None = None) -> Figure:
    """Ranks as heatmaps, block x role, one colour scale for all: side by side as far as the page goes, and then in rows.

    Where there are towers, each allocation has a row.

    Args:
        *allocations: One or more over the same target modules.
        titles: One for each; default: strategy and parameter count.
    """
    titles = titles or [f"{a.strategy or 'allocation'}: {a.parameters:,} parameters" for a in allocations]
    rows = [
        _titled(module_grids(a.targets, {name: float(rank) for name, rank in a.ranks.items()}), title)
        for a, title in zip(allocations, titles, strict=True)
    ]
    if all(len(row) == 1 for row in rows):
        beside = max(1, BLOCKS_ACROSS // len(rows[0][0][0].blocks))
        rows = [[panel for row in rows[at : at + beside] for panel in row] for at in range(0, len(rows), beside)]
    top = max(max(allocation.vector) for allocation in allocations)
    return _draw(rows, Normalize(0, max(top, 1)), "rank", write_rank)


def write_rank(rank: float) -> str:
    """A rank in its cell; a dot for 0."""
    return f"{rank:.0f}" if rank else "·"


def plot_energy(profile: Profile) -> Figure:
    """Gradient energy per parameter as heatmaps, block x role: what one-shot strategies see. Logarithmic colours."""
    norms, targets = profile.column("gradient_norm"), profile.targets
    density = {t.name: norms[t.name] ** 2 / t.rank_cost for t in targets}
    positive = [value for value in density.values() if value > 0]
    norm = LogNorm(max(min(positive), max(positive) * 1e-4), max(positive))
    title = f"gradient energy per parameter of one rank, {profile.metadata['batches']} batches"
    return draw_grids(module_grids(targets, density), title, norm, "squared gradient norm / rank cost")


def draw_grids(
    grids: Sequence[ModuleGrid], title: str, norm: Normalize, label: str, text: Callable[[float], str] | None = None
) -> Figure:
    """One row of heatmaps, a panel a tower; `text` writes a value into its cell."""
    return _draw([_titled(grids, title)], norm, label, text)


_Panel = tuple[ModuleGrid, str]


def _titled(grids: Sequence[ModuleGrid], title: str) -> list[_Panel]:
    """The grids with their headings: the title over the first, and each tower's name where there are several."""
    if len(grids) == 1:
        return [(grids[0], title)]
    return [(grid, f"{title}\n{grid.tower}" if grid is grids[0] else grid.tower) for grid in grids]


def _draw(rows: Sequence[Sequence[_Panel]], norm: Normalize, label: str, text: Callable[[float], str] | None) -> Figure:
    widths = [max(len(grid.blocks), 2) for grid, _ in rows[0]]
    heights = [max(max(len(grid.roles) for grid, _ in row), 2) for row in rows]
    figure = Figure(figsize=(2.2 + 0.46 * sum(widths) + 0.7 * (len(widths) - 1), 0.75 * len(rows) + 0.4 * sum(heights)))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(
        len(rows), len(widths), squeeze=False, gridspec_kw={"width_ratios": widths, "height_ratios": heights}
    )
    for row, row_axes in zip(rows, axes, strict=True):
        for axis in row_axes[len(row) :]:
            axis.remove()
        for (grid, heading), axis in zip(row, row_axes, strict=False):
            image = draw_panel(axis, grid, norm, text)
            axis.set_title(heading, loc="left", fontsize=9)
            axis.set_xlabel("block" if row is rows[-1] else "", fontsize=8)
    figure.colorbar(image, ax=figure.axes, label=label, fraction=0.04)
    return figure


def draw_panel(
    axis: Axes, grid: ModuleGrid, norm: Normalize, text: Callable[[float], str] | None, fontsize: float = 8
) -> AxesImage:
    """One heatmap; `text` writes a value into its cell."""
    image = axis.imshow(grid.values, norm=norm, cmap="viridis", aspect="auto")
    axis.set_xticks(range(len(grid.blocks)), grid.blocks, fontsize=fontsize)
    axis.set_yticks(range(len(grid.roles)), grid.roles, fontsize=fontsize)
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)
    if text is not None:
        for (row, column), value in np.ndenumerate(grid.values):
            if not np.isnan(value):
                colour = "white" if norm(value) < 0.6 else "black"
                axis.text(column, row, text(value), ha="center", va="center", fontsize=fontsize, color=colour)
    return image


def _role_key(role: str) -> tuple[int, str]:
    return (_ROLE_ORDER.index(role) if role in _ROLE_ORDER else len(_ROLE_ORDER), role)


def plot_spectra(profile: Profile) -> Figure:
    """Left: singular values of every module over its first, coloured by role. Right: energy captured against parameters."""
    figure = Figure(figsize=(10, 3.8))
    figure.set_layout_engine("constrained")
    left, right = figure.subplots(1, 2)
    roles = list(dict.fromkeys(profile.table["role"]))
    colours = dict(zip(roles, colormaps["tab10"](np.linspace(0, 1, max(len(roles), 2), endpoint=False)), strict=False))
    named: set[str] = set()
    spectra = profile.spectra(signal=False)
    for module, role in zip(profile.table["module"], profile.table["role"], strict=True):
        values = spectra[module]
        if len(values) and values[0] > 0:
            kept = values[values > 1e-4 * values[0]]
            label = None if role in named else role
            left.plot(np.arange(1, len(kept) + 1), kept / values[0], color=colours[role], alpha=0.6, lw=1, label=label)
            named.add(role)
    left.set_yscale("log")
    left.set_xlabel("index", fontsize=8)
    left.set_ylabel("singular value / first", fontsize=8)
    left.set_title("gradient spectra, one line a module", loc="left", fontsize=9)
    left.legend(fontsize=7, frameon=False)
    parameters, captured = cumulative_energy(profile)
    right.plot(parameters, captured, color="tab:blue")
    uniform = float(profile.table["rank_cost"].sum())
    for rank in (1, 2, 4, 8):
        at = float(np.interp(rank * uniform, parameters, captured))
        right.plot([rank * uniform], [at], "o", color="tab:orange", ms=4)
        right.annotate(
            f"rank {rank}: {at:.0%}", (rank * uniform, at), xytext=(6, -11), textcoords="offset points", fontsize=7
        )
    right.set_xlim(0, min(10 * uniform, float(parameters[-1])))
    right.set_ylim(0, 1.02)
    right.set_xlabel("adapter parameters (dots: what uniform LoRA of that rank has)", fontsize=8)
    right.set_ylabel("share of gradient energy", fontsize=8)
    right.set_title("energy captured, best ranks first", loc="left", fontsize=9)
    for axis in (left, right):
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


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


PANELS = 6
PAGE = 8.0  # inches: the width within which panels stand side by side
GAINED = "#ff3b30"
_PAIRS = colormaps["tab20"](range(20))
ROLE_COLOURS = [*_PAIRS[0::2], *_PAIRS[1::2]]  # the ten strong ones first

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
        ModelError: There is no decision.
        SettingsError: The decisions are of other modules.
    """
    if decisions.empty:
        raise ModelError("`decisions` must hold at least one decision to be drawn, but is empty; train for longer.")

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
        ModelError: There is no decision.
        SettingsError: The decisions are of other modules.
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
        ModelError: There is no decision.
        SettingsError: The decisions are of other modules.
    """
    shown = spread(waypoints(decisions, targets), PANELS)
    grids = [module_grids(targets, {n: float(r) for n, r in w.allocation.ranks.items()}) for w in shown]
    fine = max(len(tower.blocks) for tower in grids[0]) > 12
    figure, panels, n_columns = _trajectory_panels(len(shown), grids[0], cell=0.22 if fine else 0.36)
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


def _trajectory_panels(n_shown: int, towers: Sequence[ModuleGrid], cell: float) -> tuple[Figure, list[list[Axes]], int]:
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
        ModelError: There is no decision.
        SettingsError: The decisions are of other modules.
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
    colours = dict(zip(dict.fromkeys(flow.roles), cycle(ROLE_COLOURS), strict=False))
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
