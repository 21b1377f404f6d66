"""Heatmaps of block x role, one panel a tower: where the ranks went, where the gradient energy is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import NDArray

from rankscope.allocation import RankAllocation
from rankscope.profiling import Profile
from rankscope.targets import TargetModule

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
