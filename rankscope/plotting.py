"""Plots of profiles, allocations, searches, controllers and comparisons. Each function returns a matplotlib figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import cycle, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, NullLocator
from numpy.typing import NDArray
from scipy.stats import norm as normal

from rankscope.allocation import RankAllocation
from rankscope.errors import ModelError
from rankscope.files import AnyPath, replacing
from rankscope.profiling import Profile, cumulative_energy
from rankscope.targets import TargetModule

Floats = NDArray[np.float64]

if TYPE_CHECKING:
    from rankscope.performance import PerformanceModel
    from rankscope.searching import SearchResult

REFERENCE = "uniform"
ROLES = "q_proj k_proj v_proj qkv_proj o_proj gate_proj up_proj gate_up_proj down_proj fc1 fc2".split()  # noqa: SIM905
BLOCKS_ACROSS = 24  # of all heatmaps side by side
MANY_MODULES = 1000  # from here on, pictures show groups of blocks
BLOCK_GROUPS = 24  # of one tower
MOST_COEFFICIENTS = 48  # of one level
MOST_WAYPOINTS = 6
PANELS_ABREAST = 3
VERDICT_COLOURS = {"better": "#1b7f4d", "worse": "#b3402e"}
ORIGIN_COLOURS = {"uniform": "tab:grey", "one-shot": "tab:orange", "sampler": "tab:blue", "posterior-mean": "tab:red"}
BAND_COLOURS = colormaps["tab20"](np.r_[0:20:2, 1:20:2])  # the ten strong ones first
MARKERS = "osD^vP*X<>hd"


def save_figure(figure: Figure, path: AnyPath) -> Path:
    """Write the figure as PNG, atomically; returns the path."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, bbox_inches="tight")
    return Path(path)


def _figure(width: float, height: float) -> Figure:
    """A figure of this size in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def _label(axis: Axes, title: str = "", x: str = "", y: str = "", spines: Sequence[str] = ("left", "bottom")) -> None:
    """Texts and looks that all plots share."""
    axis.set_title(title, loc="left", fontsize=9)
    axis.set_xlabel(x, fontsize=8)
    axis.set_ylabel(y, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[[side for side in axis.spines if side not in spines]].set_visible(False)


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
    groups = _block_groups(targets)
    return _grids(targets, values, "mean", lambda target: groups[target.tower, target.block])


def _block_groups(targets: Sequence[TargetModule]) -> dict[tuple[str, int | None], tuple[float, str]]:
    """By tower and block, the place and the name of the block's group: at most `BLOCK_GROUPS` of nearly equal size a tower."""
    stacks: dict[str, set[int]] = {target.tower: set() for target in targets}
    for target in targets:
        stacks[target.tower] |= set() if target.block is None else {target.block}
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
    places = [place_of(target) for target in targets]
    rows = [(t.tower, t.role, place, values[t.name]) for t, (place, _) in zip(targets, places, strict=True)]
    frame, found = pd.DataFrame(rows, columns=["tower", "role", "block", "value"]), {}
    for tower, mine in frame.groupby("tower", sort=False):
        grid = mine.pivot_table("value", "role", "block", aggfunc=how)
        roles = sorted(grid.index, key=lambda role: (ROLES.index(role) if role in ROLES else 99, role))
        names = {place: name for target, (place, name) in zip(targets, places, strict=True) if target.tower == tower}
        found[str(tower)] = grid.loc[roles].rename(columns=names)
    return found


def plot_ranks(*allocations: RankAllocation, titles: Sequence[str] | None = None, framed: bool = False) -> Figure:
    """Ranks over the same modules as heatmaps of block x role on one colour scale, a dot for 0.

    Models with several towers get one row per allocation, and each panel tells the tower's share of the parameters. If `framed`,
    ranks above those of the panel before are. From `MANY_MODULES` on, cells are means over groups of blocks.
    """
    titles = titles or [f"{a.strategy or 'allocation'}: {a.parameters:,} parameters" for a in allocations]
    rows = [grouped_grids(a.targets, {name: float(rank) for name, rank in a.ranks.items()}) for a in allocations]
    many = len(allocations[0].targets) >= MANY_MODULES
    highest = max(np.nanmax(grid.to_numpy()) for grids in rows for grid in grids.values()) if many else 0.0
    norm = Normalize(0, max(1, highest if many else max(max(a.vector) for a in allocations)))
    label = f"{'mean rank' if many else 'rank'}{' (framed: gained)' * framed}"
    shares = [
        {tower: f"{spent / max(a.parameters, 1):.0%}" for tower, spent in a.parameters_by_tower.items()}
        for a in allocations
    ]
    options: Any = {"framed": framed, "notes": shares}
    return _heatmaps(rows, titles, norm, label, _rank_text, **options)


def _rank_text(rank: float) -> str:
    """A rank, or a mean of ranks, that fits its cell."""
    return (f"{rank:.0f}" if rank >= 10 or float(rank).is_integer() else f"{rank:.1f}") if rank else "·"


def plot_energy(profile: Profile) -> Figure:
    """Gradient energy per parameter as heatmaps of block x role, with logarithmic colours: what one-shot strategies see."""
    norms, targets = profile.column("gradient_norm"), profile.targets
    density = {t.name: norms[t.name] ** 2 / t.rank_cost for t in targets}
    positive = [value for value in density.values() if value > 0]
    norm = LogNorm(max(min(positive), max(positive) * 1e-4), max(positive))
    title = f"gradient energy per parameter of one rank, {profile.metadata['batches']} batches"
    return _heatmaps([grouped_grids(targets, density)], [title], norm, "squared gradient norm / rank cost")


def plot_modalities(profile: Profile) -> Figure:
    """Heatmaps of the share of image tokens in a module's gradient energy: image / (image + text), each part's on its own.

    The parts leave out twice their inner product, which the energy of their sum has beside them. Modules whose inputs are no
    tokens, such as those of the vision tower, are not shown. The first token of a sequence, where language models keep huge
    activations whatever it is (attention sinks, Xiao et al., arXiv 2309.17453), may be an image token: an `image_mask` in the
    batches leaves it out. ModelError without image tokens.
    """
    if not profile.tells_modalities:
        must = "the profile must tell image tokens from others, but its batches had none"
        raise ModelError(f"{must}; give them an `image_mask`, or profile with images.")
    image, text = profile.column("image_energy"), profile.column("text_energy")
    targets = [target for target in profile.targets if not math.isnan(image[target.name])]
    ours, theirs = (grouped_grids(targets, values) for values in (image, text))
    shares = {tower: grid / (grid + theirs[tower]) for tower, grid in ours.items()}
    title, norm = "share of image tokens in the gradient energy", Normalize(0.0, 1.0)
    return _heatmaps([shares], [title], norm, "image / (image + text)", "{:.0%}".format)


def plot_belief(model: PerformanceModel) -> Figure:
    """Heatmaps of what one more rank is worth at uniform's ranks, per parameter, divided by the mean over modules."""
    gains, targets = model.utilities(), model.features.targets
    density = {
        t.name: float(gains[t.name][min(rank, t.full_rank - 1)]) / t.rank_cost
        for t, rank in zip(targets, model.features.reference, strict=True)
    }
    mean = float(np.mean(list(density.values()))) or 1.0
    relative = {name: value / mean for name, value in density.items()}
    title = "what the search believes one more rank is worth, per parameter (mean: 1)"
    norm = Normalize(0.0, max(2.0, *relative.values()))
    return _heatmaps([grouped_grids(targets, relative)], [title], norm, "worth over the mean", "{:.1f}".format)


def plot_trajectories(decisions: pd.DataFrame, targets: Sequence[TargetModule]) -> Figure:
    """Ranks at the start and after each move of a controller, or after evenly chosen ones, as heatmaps; gains are framed."""
    shown = spread(waypoints(decisions, targets), MOST_WAYPOINTS)
    steps, ranks = zip(*shown, strict=True)
    headings = ["start"]
    for step, (before, after) in zip(steps[1:], pairwise(ranks), strict=True):
        gained = sum(max(more, 0) for more in after.difference(before).values())
        headings.append(f"step {step:,}: +{gained} rank{'' if gained == 1 else 's'}")
    return plot_ranks(*ranks, titles=headings, framed=True)


def _heatmaps(
    rows: Sequence[Mapping[str, pd.DataFrame]],
    headings: Sequence[str],
    norm: Normalize,
    label: str,
    text: Callable[[float], str] | None = None,
    *,
    framed: bool = False,
    notes: Sequence[Mapping[str, str]] = (),
) -> Figure:
    """One panel per heading and tower; `text` writes a value into its cell, `framed` marks gains over the panel before.

    `notes` are for each row and tower, in models with several.
    """
    roles, blocks = zip(*(grid.shape for grid in rows[0].values()), strict=True)
    n_towers, n_roles = len(roles), max(2, *roles)
    n_rows = math.ceil(len(rows) / max(1, BLOCKS_ACROSS // blocks[0])) if n_towers == 1 else len(rows)
    n_across = math.ceil(len(rows) / n_rows)
    widths = [max(n_blocks, 2) for n_blocks in blocks] * n_across
    figure = _figure(2.2 + 0.46 * sum(widths) + 0.7 * (len(widths) - 1), n_rows * (0.75 + 0.4 * n_roles))
    axes = figure.subplots(n_rows, len(widths), squeeze=False, width_ratios=widths).reshape(-1, n_towers)
    for axis in axes[len(rows) :].flat:
        axis.remove()
    for place, (grids, heading) in enumerate(zip(rows, headings, strict=True)):
        bottom = place + n_across >= len(rows)
        for axis, (tower, grid) in zip(axes[place], grids.items(), strict=True):
            image = axis.imshow(grid, norm=norm, cmap="viridis", aspect="auto")
            name = ": ".join(
                [*[tower] * (place == 0 or bool(notes)), *[each[tower] for each in notes[place : place + 1]]]
            )
            named = [heading] * (axis is axes[place, 0]) + [name] * (n_towers > 1)
            _label(axis, "\n".join(named), x="block" if bottom else "", spines=())
            axis.set_xticks(range(len(grid.columns)), grid.columns)
            if max(map(len, grid.columns)) > 4:  # groups of blocks
                axis.tick_params(axis="x", rotation=90)
            axis.set_yticks(range(len(grid.index)), grid.index)
            axis.tick_params(length=0, labelbottom=bottom, labelleft=n_towers > 1 or place % n_across == 0)
            before = rows[place - 1][tower] if framed and place else grid
            for row, column in np.argwhere((grid > before).to_numpy()):
                corner = (column - 0.45, row - 0.45)
                axis.add_patch(Rectangle(corner, 0.9, 0.9, fill=False, edgecolor="#ff3b30", linewidth=1.4))
            for (row, column), value in np.ndenumerate(grid):
                if text is not None and not np.isnan(value):
                    colour = "white" if norm(value) < 0.6 else "black"
                    axis.text(column, row, text(value), ha="center", va="center", fontsize=8, color=colour)
    inch = 1 / figure.get_figwidth()
    figure.colorbar(
        image, ax=figure.axes, label=label, fraction=0.3 * inch, pad=0.15 * inch, aspect=9 * figure.get_figheight()
    )
    return figure


def waypoints(decisions: pd.DataFrame, targets: Sequence[TargetModule]) -> list[tuple[int, RankAllocation]]:
    """Step and ranks at the start, and after each of a controller's `decisions` that moved some.

    `targets` are the model's, in any order, also those that the controller does not watch.
    """
    if decisions.empty:
        raise ModelError("`decisions` must hold at least one decision to be drawn, but is empty; train for longer.")
    first, moved = decisions.iloc[0], decisions[decisions["action"] == "moved"]
    states = [(0, first["modules"], first["ranks_before"])]
    states += zip(moved["step"], moved["modules"], moved["ranks_after"], strict=True)
    named = ((int(step), dict(zip(modules, ranks, strict=True))) for step, modules, ranks in states)
    return [(step, RankAllocation.from_ranks(targets, ranks)) for step, ranks in named]


def spread(found: Sequence[tuple[int, RankAllocation]], at_most: int) -> list[tuple[int, RankAllocation]]:
    """The first, the last, and evenly chosen ones between them."""
    return [found[round(place)] for place in np.linspace(0, len(found) - 1, min(len(found), at_most))]


def budget_flow(decisions: pd.DataFrame, targets: Sequence[TargetModule]) -> pd.DataFrame:
    """Each tower and role's share of the adapter parameters (rows), from the start and from each move on (columns: steps)."""
    used = {}
    for step, allocation in waypoints(decisions, targets):
        ranks = allocation.ranks
        grids = module_grids(targets, {t.name: float(t.rank_cost * ranks[t.name]) for t in targets})
        used[step] = pd.concat({tower: grid.sum(axis="columns") for tower, grid in grids.items()})
    parameters = pd.DataFrame(used)
    return parameters / parameters.sum()


def plot_flow(decisions: pd.DataFrame, targets: Sequence[TargetModule]) -> Figure:
    """The share of the adapter parameters by tower and role, stacked; a dashed line marks the last decision."""
    flow = budget_flow(decisions, targets)
    frozen = int(decisions["step"].iloc[-1])
    end = frozen + int(decisions["step"].iloc[0])  # as long again as between two decisions
    flow[end] = flow.iloc[:, -1]  # the last shares hold until the end
    figure = _figure(6.4, 4.2)
    axis = figure.subplots()
    roles = list(dict.fromkeys(flow.index.get_level_values(1)))
    colours = dict(zip(roles, cycle(BAND_COLOURS), strict=False))
    for (_, role), share, low in zip(flow.index, flow.to_numpy(), 1.0 - flow.cumsum().to_numpy(), strict=True):
        style = {"label": roles.pop(0)} if role in roles[:1] else {}
        style |= {"color": colours[role], "alpha": 0.75, "lw": 0.6, "edgecolor": "white"}
        axis.fill_between(flow.columns, low, low + share, step="post", **style)
        for x, place, side in ((0, 0, "left"), (end, -1, "right")):
            if share[place] >= 0.04:
                text = f" {share[place]:.0%} "
                axis.text(x, low[place] + share[place] / 2, text, ha=side, va="center", fontsize=7)
    towers = flow.groupby(level=0, sort=False).sum()
    for tower, share, low in zip(towers.index, towers.to_numpy(), 1.0 - towers.cumsum().to_numpy(), strict=True):
        if len(towers) > 1:
            axis.step(flow.columns, low, where="post", color="black", lw=1.2)
            text = f" {tower}\n {share[0]:.0%} → {share[-1]:.0%}"
            axis.text(end, low[-1] + share[-1] / 2, text, fontsize=8, va="center")
    axis.axvline(frozen, color="black", lw=0.8, ls="--")
    axis.text(frozen, 1.01, "last decision", ha="center", va="bottom", fontsize=8)
    axis.set(xlim=(0, end), ylim=(0, 1))
    axis.yaxis.set_major_formatter("{x:.0%}")
    _label(axis, x="optimizer step", y="share of the adapter parameters")
    figure.legend(loc="outside lower center", ncols=7, fontsize=8, frameon=False)
    return figure


def _spectra(profile: Profile) -> tuple[list[tuple[str, Floats]], str]:
    """Roles and singular values over the first down to 1e-4, (n_values,), of each module; and what a line stands for.

    From `MANY_MODULES` on, of each role in each group of blocks, the mean over modules.
    """
    spectra, lines = profile.spectra(signal=False), list[tuple[TargetModule, Floats]]()
    for target in profile.targets:
        values = spectra[target.name]
        if len(values) and values[0] > 0:
            lines.append((target, values[values > 1e-4 * values[0]] / values[0]))
    if len(spectra) < MANY_MODULES:
        return [(target.role, values) for target, values in lines], "module"
    groups, members = _block_groups(profile.targets), dict[tuple[str, str, str], list[Floats]]()
    for target, values in lines:
        members.setdefault((target.tower, groups[target.tower, target.block][1], target.role), []).append(values)
    means = []
    for (*_, role), mine in members.items():
        lengths = [len(values) for values in mine]
        total, n = np.zeros(max(lengths)), np.cumsum(np.bincount(lengths)[::-1])[::-1][1:]  # values at each index
        for values in mine:
            total[: len(values)] += values
        means.append((role, total / n))
    return means, "role in a group of blocks"


def plot_spectra(profile: Profile) -> Figure:
    """Left: singular values of modules over the first, coloured by role. Right: energy captured against parameters.

    From `MANY_MODULES` on, lines are means over the modules of a role in a group of blocks.
    """
    figure = _figure(10, 3.8)
    left, right = figure.subplots(1, 2)
    roles = list(dict.fromkeys(profile.table["role"]))
    colours = dict(zip(roles, cycle(BAND_COLOURS), strict=False))
    lines, kind = _spectra(profile)
    for role, values in lines:
        label = roles.pop(roles.index(role)) if role in roles else None
        left.plot(range(1, len(values) + 1), values, color=colours[role], alpha=0.6, lw=1, label=label)
    left.set_yscale("log")
    left.legend(fontsize=7, frameon=False)
    _label(left, f"gradient spectra, one line a {kind}", "index", "singular value / first")
    parameters, captured = cumulative_energy(profile)
    right.plot(parameters, captured, color="tab:blue")
    uniform = float(profile.table["rank_cost"].sum())
    for rank in (1, 2, 4, 8):
        dot = (rank * uniform, float(np.interp(rank * uniform, parameters, captured)))
        right.plot(*dot, "o", color="tab:orange", ms=4)
        right.annotate(f"rank {rank}: {dot[1]:.0%}", dot, xytext=(6, -11), textcoords="offset points", fontsize=7)
    right.set(xlim=(0, min(10 * uniform, parameters[-1])), ylim=(0, 1.02))
    right.xaxis.set_major_formatter(EngFormatter(sep=""))
    x = "adapter parameters (dots: what uniform LoRA of that rank has)"
    _label(right, "energy captured, best ranks first", x, "share of gradient energy")
    return figure


def plot_predictions(model: PerformanceModel, result: SearchResult) -> Figure:
    """Each trial's metric against the model's prediction of it, with its 80 % interval; the model has seen these trials."""
    trials = [trial for trial in result.trials if trial.reused is None]
    ranks = np.array([trial.allocation.vector for trial in trials])
    predicted, (low, high) = model.predict(ranks), model.interval(ranks, 0.8)
    measured = np.array([trial.metric for trial in trials])
    around = np.abs([predicted - low, high - predicted])
    figure = _figure(4.6, 4.2)
    axis = figure.subplots()
    for origin, colour in ORIGIN_COLOURS.items():
        mine = np.array([trial.origin == origin for trial in trials])
        if mine.any():
            x, y = predicted[mine], measured[mine]
            axis.errorbar(x, y, xerr=around[:, mine], fmt="o", ms=4, lw=0.7, color=colour, label=origin)
    ends = [min(predicted.min(), measured.min()), max(predicted.max(), measured.max())]
    axis.plot(ends, ends, color="black", lw=0.6, zorder=0)
    axis.legend(fontsize=7, frameon=False)
    x, y = f"predicted {result.metric_name}, averaged over learning rates", f"measured {result.metric_name}"
    _label(axis, "performance model on its own trials", x, y)
    return figure


def plot_levels(model: PerformanceModel, confidence: float = 0.8) -> Figure:
    """Posterior of the coefficients of towers, block groups, blocks and roles, one panel per level.

    Zero is what the levels above say; to the right of it, ranks are worth more than that. Of a level with more than
    `MOST_COEFFICIENTS`, those furthest from zero are shown.
    """
    shown = model.coefficients().query("level not in ('model', 'profile', 'module')")
    levels, titles = {}, {}
    for level, mine in shown.groupby("level", sort=False):
        furthest = mine.loc[mine["mean"].abs().nlargest(MOST_COEFFICIENTS).index].sort_index()
        levels[str(level)] = furthest
        titles[str(level)] = f"{level}" + f": {len(furthest)} of {len(mine)}" * (len(furthest) < len(mine))
    counts = [len(mine) for mine in levels.values()]
    figure = _figure(4.6, 0.8 + 0.2 * sum(counts) + 0.35 * len(levels))
    panels = figure.subplots(len(levels), 1, squeeze=False, sharex=True, height_ratios=counts)[:, 0]
    width = float(normal.ppf(0.5 + confidence / 2.0))
    for axis, (level, mine) in zip(panels, levels.items(), strict=True):
        errors = width * mine["std"]
        axis.errorbar(mine["mean"], range(len(mine)), xerr=errors, fmt="o", ms=4, lw=1.0, color="tab:blue")
        axis.axvline(0.0, color="black", lw=0.6)
        axis.set_yticks(range(len(mine)), mine["name"].str.removeprefix(f"{level}/"))
        axis.set_ylim(len(mine) - 0.5, -0.5)
        _label(axis, title=titles[level])
    panels[-1].set_xlabel(f"θ, in standard deviations of the metric; {confidence:.0%} interval", fontsize=8)
    return figure


def plot_forest(table: pd.DataFrame) -> Figure:
    """Mean difference to uniform on the test split with its 95 % interval, one row per method, one panel per study.

    A hollow marker has no interval: fewer than 3 seeds, or differences that are all equal. The band is what two groups of
    seeds of uniform itself differ by, 95 % of the time. `table` is `summarise`'s; rows at the study's own budget are drawn.
    """
    table = table[(table["factor"] == 1.0) & (table["method"] != REFERENCE)]
    figure, panels = _study_panels(table, height=0.28 * table.groupby("study").size().max() + 1.0)
    for axis, (study, group) in zip(panels, table.groupby("study", sort=False), strict=True):
        group = group.sort_values("difference")
        noise, n_seeds = 100 * group["noise"].iloc[0], int(group["seeds"].iloc[0])
        if not math.isnan(noise):
            axis.axvspan(-noise, noise, color="#eeeeee", lw=0, zorder=0)
        axis.axvline(0.0, color="black", lw=0.8, zorder=1)
        labels = []
        for place, row in enumerate(group.to_dict("records")):
            colour = VERDICT_COLOURS.get(row["verdict"], "#6b6b6b")
            low, mean, high = (100 * row[name] for name in ("low", "difference", "high"))
            axis.plot([low, high], [place, place], color=colour, lw=1.6, solid_capstyle="butt")
            axis.plot(mean, place, "o", color=colour, mfc="white" if math.isnan(low) else colour, ms=5)
            same = " (same runs)" if row["verdict"].startswith("same") else ""
            labels.append(f"{row['method']}{' (over budget)' if row['over_budget'] else same}")
        axis.set_yticks(range(len(group)), labels)
        axis.set_ylim(-0.6, len(group) - 0.4)
        _label(axis, str(study), f"points over uniform, {n_seeds} seed{'s' * (n_seeds != 1)}", spines=("bottom",))
        axis.tick_params(axis="y", length=0)
    return figure


def plot_budgets(table: pd.DataFrame) -> Figure:
    """The test metric against adapter parameters, one panel per study: uniform's curve, and the other methods' points.

    Methods without adapters lie at the parameters that they train, and are left out where those are none.
    """
    table = table[table["parameters"] > 0]
    methods = [name for name in dict.fromkeys(table["method"]) if name != REFERENCE]
    figure, panels = _study_panels(table, height=3.6)
    for axis, (study, group) in zip(panels, table.groupby("study", sort=False), strict=True):
        group = group.sort_values("parameters", kind="stable")
        uniform = group[group["method"] == REFERENCE]
        x, y, deviation = (uniform[name].to_numpy() for name in ("parameters", "test", "deviation"))
        axis.plot(x, y, "o-", color="black", ms=4, lw=1.2, label=REFERENCE)
        axis.fill_between(x, y - deviation, y + deviation, color="black", alpha=0.08, lw=0)
        for place, method in enumerate(methods):
            mine, colour = group[group["method"] == method], f"C{place % 10}"
            marker, filled = f"{MARKERS[place % len(MARKERS)]}-", colour if place < 10 else "white"  # again, hollow
            axis.plot(mine["parameters"], mine["test"], marker, color=colour, mfc=filled, ms=5, lw=1.0, label=method)
        axis.set_xscale("log")
        axis.set_xticks(_apart({*x, group["parameters"].min(), group["parameters"].max()}))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.tick_params(axis="x", rotation=25)
        _label(axis, title=str(study), x="trainable parameters outside the head", y="test metric")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    return figure


def _apart(values: Collection[float], share: float = 0.08) -> list[float]:
    """The values whose labels fit beside each other on a logarithmic axis: at least this share of its length apart."""
    kept: list[float] = []
    for value in sorted(values):
        if not kept or math.log(value / kept[-1]) >= share * math.log(max(values) / min(values)):
            kept.append(value)
    return kept


def plot_plan(table: pd.DataFrame, *, level: float, budget: int | None = None, metric: str = "metric") -> Figure:
    """Validation metric against adapter parameters, uniform and placed, with 95 % bands; full fine-tuning and the head alone.

    `table` is `BudgetPlan.table`'s, `level` what is enough, and `budget` the recommended one, which is ringed.
    """
    figure = _figure(6.4, 4.2)
    axis = figure.subplots()
    curves = table[table["budget"] > 0]
    for colour, (method, mine) in zip(("black", "tab:orange"), curves.groupby("method", sort=False), strict=False):
        axis.plot(mine["budget"], mine["validation"], "o-", color=colour, ms=4, lw=1.4, label=method)
        axis.fill_between(mine["budget"], mine["low"], mine["high"], color=colour, alpha=0.12, lw=0)
        chosen = mine[(mine["budget"] == budget) & (mine["method"] != REFERENCE)]
        axis.plot(chosen["budget"], chosen["validation"], "o", color=colour, mfc="none", ms=12, mew=1.6)
    styles = {"full": ("tab:blue", "full fine-tuning, {:,} weights"), "head": ("tab:grey", "the head alone")}
    for row in table[table["budget"] == 0].to_dict("records"):
        colour, label = styles[row["method"]]
        axis.axhline(row["validation"], color=colour, lw=1.2, ls="--", label=label.format(row["parameters"]))
        axis.axhspan(row["low"], row["high"], color=colour, alpha=0.08, lw=0)
    axis.axhline(level, color="black", lw=0.7, ls=":", label="enough: the reference less the margin")
    axis.set_xscale("log")
    axis.set_xticks(_apart(set(curves["budget"])))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.tick_params(axis="x", rotation=25)
    _label(axis, x="adapter parameters", y=f"{metric} on validation")
    figure.legend(loc="outside lower center", ncols=2, fontsize=7, frameon=False)
    return figure


def _study_panels(table: pd.DataFrame, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with one panel of this height in inches for each study."""
    n = table["study"].nunique()
    n_abreast = min(n, PANELS_ABREAST)
    n_rows = math.ceil(n / n_abreast)
    figure = _figure(4.6 * n_abreast, height * n_rows)
    return figure, [figure.add_subplot(n_rows, n_abreast, place + 1) for place in range(n)]
