"""Maps of values over modules, block by role: the one drawing behind plots, notebooks and the dashboard's pictures."""

from __future__ import annotations

import base64
import html
import io
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from rankscope.targets import TargetModule

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure, SubFigure

ROLES = "q_proj k_proj v_proj qkv_proj o_proj gate_proj up_proj gate_up_proj down_proj fc1 fc2".split()  # noqa: SIM905
BLOCKS_ACROSS = 24  # of all maps side by side
MANY_MODULES = 1000  # from here on, pictures show groups of blocks
BLOCK_GROUPS = 24  # of one tower
STEPS = 12  # with at most so many ranks, each has a colour of its own in the bar
CELL = (0.46, 0.4)  # inches
LINE, BELOW, GAP, BAR = (
    0.18,
    0.42,
    0.3,
    (0.13, 0.62),
)  # a line of text; tick labels; between panels; colour bar and its texts
BAR_GAP, HIGHEST_BAR = 0.15, 3.6
MOST_DIGITS = 4  # of a block, beside each other
POINTS = {"title": 9, "text": 8, "small": 5.5}
DPI = 100

_drawing = Lock()  # matplotlib's caches are for one thread


def module_grids(targets: Sequence[TargetModule], values: Mapping[str, float]) -> dict[str, pd.DataFrame]:
    """One value per module as a table of role x block for each tower, in the order in which the towers appear.

    Values are summed where modules share a cell, and NaN where there is none. Modules outside blocks are in the last column, `-`.
    """
    return _grids(targets, values, "sum", lambda t: (math.inf, "-") if t.block is None else (t.block, f"{t.block}"))


def grouped_grids(targets: Sequence[TargetModule], values: Mapping[str, float]) -> dict[str, pd.DataFrame]:
    """`module_grids` that can be read however large the model is.

    From `MANY_MODULES` on, columns are at most `BLOCK_GROUPS` groups of blocks that follow each other, as `0-3`, and cells are
    means over modules.
    """
    if len(targets) < MANY_MODULES:
        return module_grids(targets, values)
    groups = block_groups(targets)
    return _grids(targets, values, "mean", lambda target: groups[target.tower, target.block])


def block_groups(targets: Sequence[TargetModule]) -> dict[tuple[str, int | None], tuple[float, str]]:
    """By tower and block, the place and the name of the block's group: at most `BLOCK_GROUPS` of nearly equal size a tower."""
    stacks: dict[str, set[int]] = {target.tower: set() for target in targets}
    for target in targets:
        stacks[target.tower] |= set() if target.block is None else {target.block}
    import numpy as np

    found: dict[tuple[str, int | None], tuple[float, str]] = {(tower, None): (math.inf, "-") for tower in stacks}
    for tower, blocks in stacks.items():
        for group in filter(len, np.array_split(sorted(blocks), BLOCK_GROUPS)):
            low, high = int(group[0]), int(group[-1])
            found |= {(tower, int(block)): (low, f"{low}-{high}" if high > low else f"{low}") for block in group}
    return found


def _grids(
    targets: Sequence[TargetModule],
    values: Mapping[str, float],
    how: Literal["sum", "mean"],
    place_of: Callable[[TargetModule], tuple[float, str]],
) -> dict[str, pd.DataFrame]:
    """Values as tables of role x column, whose place and name `place_of` gives; `how` combines modules that share a cell."""
    import pandas as pd

    places = [place_of(target) for target in targets]
    rows = [(t.tower, t.role, place, values[t.name]) for t, (place, _) in zip(targets, places, strict=True)]
    frame, found = pd.DataFrame(rows, columns=["tower", "role", "block", "value"]), {}
    for tower, mine in frame.groupby("tower", sort=False):
        grid = mine.pivot_table("value", "role", "block", aggfunc=how)
        roles = sorted(grid.index, key=lambda role: (ROLES.index(role) if role in ROLES else 99, role))
        names = {place: name for target, (place, name) in zip(targets, places, strict=True) if target.tower == tower}
        found[str(tower)] = grid.loc[roles].rename(columns=names)
    return found


def new_figure(width: float, height: float, figure: Figure | SubFigure | None = None, layout: Any = None) -> Any:
    """A figure of this size in inches: the given one, which takes the size if it can, or a new one of pyplot's.

    Only pyplot's figures are shown by notebooks and by `plt.show()`; library code passes figures of its own.
    """
    from matplotlib.figure import Figure

    if figure is None:
        from matplotlib import pyplot

        return pyplot.figure(figsize=(width, height), layout=layout)
    if isinstance(figure, Figure):  # a part of a figure has the size that it has
        figure.set_size_inches(width, height)
        figure.set_layout_engine(layout or "none")
    return figure


def label_axes(
    axis: Axes, title: str = "", x: str = "", y: str = "", spines: Sequence[str] = ("left", "bottom")
) -> None:
    """Texts and looks that all plots share."""
    axis.set_title(title, loc="left", fontsize=POINTS["title"])
    axis.set_xlabel(x, fontsize=POINTS["text"])
    axis.set_ylabel(y, fontsize=POINTS["text"])
    axis.tick_params(labelsize=POINTS["text"])
    axis.spines[[side for side in axis.spines if side not in spines]].set_visible(False)


def draw_maps(
    rows: Sequence[Mapping[str, pd.DataFrame]],
    headings: Sequence[str],
    norm: Normalize,
    label: str,
    text: Callable[[float], str] | None = None,
    *,
    framed: bool = False,
    notes: Sequence[Mapping[str, str]] = (),
    below: Mapping[str, Sequence[Sequence[str]]] | None = None,
    whole: bool = False,
    figure: Figure | SubFigure | None = None,
) -> list[Axes]:
    """One panel per heading and tower, on one colour scale; returns their axes, a row's towers side by side.

    `text` writes a value into its cell, `framed` marks gains over the panel before. `notes` are for each row and tower, in models
    with several. `below` are smaller texts under the values, by tower, as the cells of all rows. `whole`: values are whole
    numbers, and so are the ticks of the colour bar.
    """
    from matplotlib import colormaps

    several = len(rows[0]) > 1
    names = [
        [": ".join([*[tower] * (not place or bool(notes)), *[each[tower] for each in notes[place : place + 1]]])
         for tower in rows[place]] if several else [""] for place in range(len(rows))
    ]  # fmt: skip
    layout = _layout(rows[0], headings, names)
    drawn = new_figure(*layout.size, figure)
    axes, colours = [], colormaps["viridis"].with_extremes(bad="#eeeeee")
    for place, (grids, heading) in enumerate(zip(rows, headings, strict=True)):
        bottom, first = place + layout.n_across >= len(rows), place % layout.n_across == 0
        for index, (tower, grid) in enumerate(grids.items()):
            axis = drawn.add_axes(layout.panel(place, index))
            axes.append(axis)
            image = axis.imshow(grid, norm=norm, cmap=colours, aspect="auto")
            titles = ([heading] if index == 0 else [""] * several) + [names[place][index]] * several
            label_axes(axis, "\n".join(titles), x="block" if bottom else "", spines=())
            axis.set_xticks(range(len(grid.columns)), grid.columns)
            axis.set_yticks(range(len(grid.index)), grid.index)
            axis.tick_params(length=0, labelbottom=bottom, labelleft=several or first)
            if max(map(len, grid.columns)) > MOST_DIGITS:  # groups of blocks
                axis.tick_params(axis="x", rotation=90)
            _fill_cells(axis, grid, text, lambda value: colours(norm(value)), below[tower] if below else None)
            if framed and place:
                _frame_gains(axis, grid, rows[place - 1][tower])
    _draw_bar(drawn, drawn.add_axes(layout.bar()), image, norm, label, whole=whole)
    return axes


class _Layout(NamedTuple):
    """Where panels lie, in inches from the top left corner."""

    size: tuple[float, float]
    right: float  # end of the panels
    n_across: int
    corners: list[list[tuple[float, float]]]  # by row and tower
    sides: list[tuple[float, float]]  # by tower: width and height

    def panel(self, place: int, index: int) -> tuple[float, float, float, float]:
        """A panel as matplotlib takes it: left, bottom, width and height, as shares of the figure."""
        return self._shares(self.corners[place][index], self.sides[index])

    def bar(self) -> tuple[float, float, float, float]:
        """The colour bar, beside all panels."""
        top, bottom = self.corners[0][0][1], self.corners[-1][0][1] + max(height for _, height in self.sides)
        return self._shares((self.right + BAR_GAP, top), (BAR[0], min(bottom - top, HIGHEST_BAR)))

    def _shares(self, corner: tuple[float, float], sides: tuple[float, float]) -> tuple[float, float, float, float]:
        (left, top), (width, height), (all_width, all_height) = corner, sides, self.size
        return left / all_width, 1 - (top + height) / all_height, width / all_width, height / all_height


def _layout(grids: Mapping[str, pd.DataFrame], headings: Sequence[str], names: Sequence[Sequence[str]]) -> _Layout:
    """Panels of cells of one size, as wide apart as their texts need: matplotlib's layout engines take ten times as long."""
    several, blocks = len(grids) > 1, [grid.shape[1] for grid in grids.values()]
    sides = [(CELL[0] * grid.shape[1], CELL[1] * grid.shape[0]) for grid in grids.values()]
    labels = [0.12 + max(_inches(role) for role in grid.index) for grid in grids.values()]
    across = 1 if several else max(1, BLOCKS_ACROSS // blocks[0])
    n_rows = math.ceil(len(headings) / across)
    n_across = math.ceil(len(headings) / n_rows)
    above = 0.14 + LINE * (1 + several)
    longest = max(len(column) for grid in grids.values() for column in grid.columns)
    below = BELOW + (_inches("0") * longest if longest > MOST_DIGITS else 0.0)
    pitches = [max(side[0], *(_inches(row[i], "title") for row in names)) for i, side in enumerate(sides)]
    whole = sum(pitches) + sum(labels[1:]) + GAP * (len(pitches) - 1)
    widest = max(_inches(line, "title") for heading in headings for line in heading.split("\n"))
    lefts = list(accumulate((p + GAP + wide for p, wide in zip(pitches, labels[1:], strict=False)), initial=labels[0]))
    pitch, deep = max(whole, widest) + GAP, above + max(height for _, height in sides)
    corners = [
        [(pitch * (place % n_across) + left, deep * (place // n_across) + above) for left in lefts]
        for place in range(len(headings))
    ]
    last = pitch * (n_across - 1) + labels[0]
    right = last + whole
    width = max(right + BAR_GAP + sum(BAR), last + widest + 0.1)
    return _Layout((width, n_rows * deep + below), right, n_across, corners, sides)


def _inches(text: str, kind: str = "text") -> float:
    """About how wide a text is."""
    return 0.57 * len(text) * POINTS[kind] / 72


def _fill_cells(
    axis: Axes,
    grid: pd.DataFrame,
    text: Callable[[float], str] | None,
    colour: Callable[[float], Any],
    below: Sequence[Sequence[str]] | None = None,
) -> None:
    """Writes each value into its cell, white on dark colours."""
    if text is None:
        return
    style: Any = {"ha": "center", "va": "center"}
    for row, values in enumerate(grid.to_numpy()):
        for column, value in enumerate(values):
            if not math.isnan(value):
                red, green, blue, _ = colour(value)
                shade = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
                high = row - 0.15 if below else row
                axis.text(column, high, text(value), fontsize=POINTS["text"], color=shade, **style)
                if below:
                    axis.text(column, row + 0.25, below[row][column], fontsize=POINTS["small"], color=shade, **style)


def _frame_gains(axis: Axes, grid: pd.DataFrame, before: pd.DataFrame) -> None:
    from matplotlib.patches import Rectangle

    for row, column in zip(*(grid > before).to_numpy().nonzero(), strict=True):
        corner = (column - 0.45, row - 0.45)
        axis.add_patch(Rectangle(corner, 0.9, 0.9, fill=False, edgecolor="#ff3b30", linewidth=1.4))


def _draw_bar(figure: Any, axis: Axes, image: Any, norm: Normalize, label: str, *, whole: bool) -> None:
    from matplotlib.colors import BoundaryNorm
    from matplotlib.ticker import MaxNLocator

    highest, few = norm.vmax or 1.0, isinstance(norm, BoundaryNorm)
    ticks = {"ticks": range(round(highest + 0.5)) if few else MaxNLocator(6, integer=True)} if whole else {}
    bar = figure.colorbar(image, cax=axis, **ticks)
    bar.set_label(label, fontsize=POINTS["text"])
    bar.outline.set_visible(False)
    axis.tick_params(labelsize=POINTS["text"], length=0 if few else 2)
    if few:
        axis.minorticks_off()


def rank_norm(highest: float, *, steps: bool = True) -> Normalize:
    """Colours of the ranks from 0 to `highest`: one for each where they are few (`steps`), else a continuous scale."""
    from matplotlib.colors import BoundaryNorm, Normalize

    if steps and highest <= STEPS:
        return BoundaryNorm([rank - 0.5 for rank in range(max(round(highest), 1) + 2)], 256)
    return Normalize(0, max(highest, 1))


def draw_ranks(
    targets: Sequence[TargetModule],
    ranks: Sequence[Mapping[str, int]],
    titles: Sequence[str],
    *,
    framed: bool = False,
    figure: Figure | SubFigure | None = None,
) -> list[Axes]:
    """Ranks over the same modules as maps on one colour scale, a dot for 0; see `draw_maps`.

    In models with several towers, each panel tells the tower's share of the parameters.
    """
    import numpy as np

    rows = [grouped_grids(targets, {name: float(rank) for name, rank in each.items()}) for each in ranks]
    shares = []
    for each in ranks:
        spent = Counter[str]()
        for target in targets:
            spent[target.tower] += target.rank_cost * each[target.name]
        shares.append({tower: f"{parameters / max(spent.total(), 1):.0%}" for tower, parameters in spent.items()})
    many = len(targets) >= MANY_MODULES
    highest = max(float(np.nanmax(grid.to_numpy())) for grids in rows for grid in grids.values())
    label = f"{'mean rank' if many else 'rank'}{' (framed: gained)' * framed}"
    options: Any = {"framed": framed, "notes": shares, "whole": True, "figure": figure}
    return draw_maps(rows, titles, rank_norm(highest, steps=not many), label, _rank_text, **options)


def _rank_text(rank: float) -> str:
    """A rank, or a mean of ranks, that fits its cell."""
    return (f"{rank:.0f}" if rank >= 10 or float(rank).is_integer() else f"{rank:.1f}") if rank else "·"


def draw_energy(
    targets: Sequence[TargetModule], norms: Mapping[str, float], title: str, *, figure: Figure | SubFigure | None = None
) -> list[Axes]:
    """Gradient energy per parameter of one rank as maps with logarithmic colours, from gradient norms by module."""
    from matplotlib.colors import LogNorm

    density = {t.name: norms[t.name] ** 2 / t.rank_cost for t in targets}
    positive = [value for value in density.values() if value > 0]
    norm = LogNorm(max(min(positive), max(positive) * 1e-4), max(positive))
    label = "squared gradient norm / rank cost"
    return draw_maps([grouped_grids(targets, density)], [title], norm, label, figure=figure)


def to_png(draw: Callable[[Figure], object]) -> bytes:
    """What `draw` draws on a figure, as PNG on white, without pyplot; also from several threads."""
    from matplotlib.figure import Figure

    buffer = io.BytesIO()
    with _drawing:
        figure = Figure()
        draw(figure)
        figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def ranks_png(targets: Sequence[TargetModule], *ranks: Mapping[str, int], titles: Sequence[str]) -> bytes:
    """Maps of ranks as PNG; see `draw_ranks`."""
    return to_png(lambda figure: draw_ranks(targets, ranks, titles, figure=figure))


def html_card(title: str, lines: Sequence[str] = (), png: bytes | None = None, table: str = "") -> str:
    """What a notebook shows of a value: a title, lines of text, a table in HTML, and a picture on white; texts are escaped."""
    texts = "".join(f"<br>{html.escape(line)}" for line in lines)
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}" if png else ""
    style = "max-width: 100%; background: white"
    picture = f'<br><img alt="{html.escape(title)}" src="{source}" style="{style}">' if png else ""
    return f"<div><b>{html.escape(title)}</b>{texts}{table}{picture}</div>"
