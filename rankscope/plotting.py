"""Plots of profiles, allocations, searches, controllers and comparisons.

Each returns its axes: one, or a list where it draws several panels. They lie on `figure`, which may be part of a figure and is
given the size that the plot needs, or on a new figure of pyplot's, which notebooks show. `save_plot` writes a PNG without pyplot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import cycle, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import EngFormatter, NullLocator
from numpy.typing import NDArray
from scipy.stats import norm as normal

from rankscope.allocation import RankAllocation
from rankscope.errors import ModelError
from rankscope.files import AnyPath, replacing
from rankscope.maps import (
    MANY_MODULES,
    block_groups,
    draw_energy,
    draw_maps,
    draw_ranks,
    grouped_grids,
    label_axes,
    module_grids,
    new_figure,
)
from rankscope.profiling import Profile, cumulative_energy
from rankscope.targets import TargetModule
from rankscope.units import AS_IT_IS, SHARE

Floats = NDArray[np.float64]
Parent = Figure | SubFigure | None

if TYPE_CHECKING:
    from rankscope.performance import PerformanceModel
    from rankscope.searching import SearchResult

REFERENCE = "uniform"
MOST_COEFFICIENTS = 48  # of one level
MOST_WAYPOINTS = 6
ABREAST = 0.8  # share of the distance between a budget and its double over which methods at one budget are spread
N_DRAWS = 60  # from a posterior, for an interval
HEADLINE = 0.3  # inches
PANELS_ABREAST = 3
VERDICT_COLOURS = {"better": "#1b7f4d", "worse": "#b3402e"}
ORIGIN_COLOURS = {"uniform": "tab:grey", "one-shot": "tab:orange", "sampler": "tab:blue", "posterior-mean": "tab:red"}
BAND_COLOURS = colormaps["tab20"](np.r_[0:20:2, 1:20:2])  # the ten strong ones first
MARKERS = "osD^vP*X<>hd"


def save_plot(plot: Callable[..., object], path: AnyPath, title: str = "") -> Path:
    """Draw `plot(figure=…)` on a figure of its own, and write it as PNG on white, atomically; returns the path.

    `title` stands on top of the figure, such as the study's name. pyplot takes no part: a server has no display.
    """
    figure = Figure()
    plot(figure=figure)
    if title:
        _headline(figure, title)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, bbox_inches="tight")
    return Path(path)


def _headline(figure: Figure, title: str) -> None:
    """A line on top of a figure, which grows by it."""
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + HEADLINE)
    if figure.get_layout_engine() is None:  # everything keeps its size, and its place from the bottom
        for axis in figure.axes:
            left, bottom, wide, high = axis.get_position().bounds
            share = height / (height + HEADLINE)
            axis.set_position((left, bottom * share, wide, high * share))
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")


def plot_ranks(
    *allocations: RankAllocation, titles: Sequence[str] | None = None, framed: bool = False, figure: Parent = None
) -> list[Axes]:
    """Ranks over the same modules as heatmaps of block x role on one colour scale, a dot for 0.

    Models with several towers get one row per allocation, and each panel tells the tower's share of the parameters. If `framed`,
    ranks above those of the panel before are. From `MANY_MODULES` on, cells are means over groups of blocks.
    """
    titles = titles or [f"{a.strategy or 'allocation'}: {a.parameters:,} parameters" for a in allocations]
    return draw_ranks(allocations[0].targets, [a.ranks for a in allocations], titles, framed=framed, figure=figure)


def plot_energy(profile: Profile, *, figure: Parent = None) -> list[Axes]:
    """Gradient energy per parameter as heatmaps of block x role, with logarithmic colours: what one-shot strategies see."""
    title = f"gradient energy per parameter of one rank, {profile.metadata['batches']} batches"
    return draw_energy(profile.targets, profile.column("gradient_norm"), title, figure=figure)


def plot_modalities(profile: Profile, *, figure: Parent = None) -> list[Axes]:
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
    return draw_maps([shares], [title], norm, "image / (image + text)", "{:.0%}".format, figure=figure)


def plot_belief(model: PerformanceModel, confidence: float = 0.8, *, figure: Parent = None) -> list[Axes]:
    """Maps of what one more rank is worth at uniform's ranks, per parameter, divided by the mean over modules.

    A cell holds the posterior mean, and below it the interval of posterior draws.
    """
    targets, rng = model.features.targets, np.random.default_rng(0)
    chosen = [min(rank, t.full_rank - 1) for t, rank in zip(targets, model.features.reference, strict=True)]

    def density(gains: Mapping[str, Floats]) -> dict[str, float]:
        """Worth per parameter by module."""
        return {t.name: float(gains[t.name][rank]) / t.rank_cost for t, rank in zip(targets, chosen, strict=True)}

    mean = density(model.utilities())
    scale = float(np.mean(list(mean.values()))) or 1.0
    (grids, *drawn) = (
        {tower: grid / scale for tower, grid in grouped_grids(targets, values).items()}
        for values in (mean, *(density(model.sample(rng)[0]) for _ in range(N_DRAWS)))
    )
    below = {}
    for tower in grids:
        ends = np.quantile([grid[tower] for grid in drawn], [0.5 - confidence / 2, 0.5 + confidence / 2], axis=0)
        below[tower] = [
            [f"{low:.1f}..{high:.1f}" for low, high in zip(*row, strict=True)] for row in zip(*ends, strict=True)
        ]
    title = f"worth of one more rank per parameter, {confidence:.0%} intervals (mean: 1)"
    norm = Normalize(0.0, max(2.0, *(float(np.nanmax(grid.to_numpy())) for grid in grids.values())))
    label, text = "worth over the mean", "{:.1f}".format
    return draw_maps([grids], [title], norm, label, text, below=below, figure=figure)


def plot_trajectories(decisions: pd.DataFrame, targets: Sequence[TargetModule], *, figure: Parent = None) -> list[Axes]:
    """Ranks at the start and after each move of a controller, or after evenly chosen ones, as heatmaps; gains are framed."""
    shown = spread(waypoints(decisions, targets), MOST_WAYPOINTS)
    steps, ranks = zip(*shown, strict=True)
    headings = ["start"]
    for step, (before, after) in zip(steps[1:], pairwise(ranks), strict=True):
        gained = sum(max(more, 0) for more in after.difference(before).values())
        headings.append(f"step {step:,}: +{gained} rank{'' if gained == 1 else 's'}")
    return plot_ranks(*ranks, titles=headings, framed=True, figure=figure)


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


def plot_flow(decisions: pd.DataFrame, targets: Sequence[TargetModule], *, figure: Parent = None) -> Axes:
    """The share of the adapter parameters by tower and role, stacked; a dashed line marks the last decision."""
    flow = budget_flow(decisions, targets)
    frozen = int(decisions["step"].iloc[-1])
    end = frozen + int(decisions["step"].iloc[0])  # as long again as between two decisions
    flow[end] = flow.iloc[:, -1]  # the last shares hold until the end
    drawn = new_figure(6.4, 4.2, figure, "constrained")
    axis: Axes = drawn.subplots()
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
    label_axes(axis, x="optimizer step", y="share of the adapter parameters")
    drawn.legend(loc="outside lower center", ncols=7, fontsize=8, frameon=False)
    return axis


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
    groups, members = block_groups(profile.targets), dict[tuple[str, str, str], list[Floats]]()
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


def plot_spectra(profile: Profile, *, figure: Parent = None) -> list[Axes]:
    """Left: singular values of modules over the first, coloured by role. Right: energy captured against parameters.

    From `MANY_MODULES` on, lines are means over the modules of a role in a group of blocks.
    """
    drawn = new_figure(10, 3.8, figure, "constrained")
    left, right = drawn.subplots(1, 2)
    roles = list(dict.fromkeys(profile.table["role"]))
    colours = dict(zip(roles, cycle(BAND_COLOURS), strict=False))
    lines, kind = _spectra(profile)
    for role, values in lines:
        label = roles.pop(roles.index(role)) if role in roles else None
        left.plot(range(1, len(values) + 1), values, color=colours[role], alpha=0.6, lw=1, label=label)
    left.set_yscale("log")
    left.legend(fontsize=7, frameon=False)
    label_axes(left, f"gradient spectra, one line a {kind}", "index", "singular value / first")
    parameters, captured = cumulative_energy(profile)
    right.plot(parameters, captured, color="tab:blue")
    uniform = float(profile.table["rank_cost"].sum())
    for rank in (1, 2, 4, 8):
        dot = (rank * uniform, float(np.interp(rank * uniform, parameters, captured)))
        right.plot(*dot, "o", color="tab:orange", ms=4)
        below = -28 if rank in (2, 8) else -12  # texts of neighbours do not meet
        right.annotate(f"rank {rank}: {dot[1]:.0%}", dot, xytext=(6, below), textcoords="offset points", fontsize=7)
    right.set(xlim=(0, min(10 * uniform, parameters[-1])), ylim=(0, 1.02))
    right.xaxis.set_major_formatter(EngFormatter(sep=""))
    x = "adapter parameters (dots: what uniform LoRA of that rank has)"
    label_axes(right, "energy captured, best ranks first", x, "share of gradient energy")
    return [left, right]


def plot_predictions(model: PerformanceModel, result: SearchResult, *, figure: Parent = None) -> Axes:
    """Each trial's metric against the model's prediction of it, with its 80 % interval; the model has seen these trials."""
    trials = [trial for trial in result.trials if trial.reused is None]
    ranks = np.array([trial.allocation.vector for trial in trials])
    predicted, (low, high) = model.predict(ranks), model.interval(ranks, 0.8)
    measured = np.array([trial.metric for trial in trials])
    around = np.abs([predicted - low, high - predicted])
    drawn = new_figure(4.6, 4.2, figure, "constrained")
    axis: Axes = drawn.subplots()
    for origin, colour in ORIGIN_COLOURS.items():
        mine = np.array([trial.origin == origin for trial in trials])
        if mine.any():
            x, y = predicted[mine], measured[mine]
            axis.errorbar(x, y, xerr=around[:, mine], fmt="o", ms=4, lw=0.7, color=colour, label=origin)
    ends = [min(predicted.min(), measured.min()), max(predicted.max(), measured.max())]
    axis.plot(ends, ends, color="black", lw=0.6, zorder=0)
    axis.legend(fontsize=7, frameon=False)
    x, y = f"predicted {result.metric_name}, averaged over learning rates", f"measured {result.metric_name}"
    label_axes(axis, "performance model on its own trials", x, y)
    return axis


def plot_levels(model: PerformanceModel, confidence: float = 0.8, *, figure: Parent = None) -> list[Axes]:
    """Posterior of the coefficients of towers, block groups, blocks and roles, one panel per level.

    Zero is what the levels above say; to the right of it, ranks are worth more than that. Of a level with more than
    `MOST_COEFFICIENTS`, those furthest from zero are shown.
    """
    shown = model.coefficients().query("level not in ('model', 'profile', 'module')")
    levels, titles = {}, {}
    for level, mine in shown.groupby("level", sort=False):
        furthest = mine.loc[mine["mean"].abs().nlargest(MOST_COEFFICIENTS).index].sort_index()
        levels[str(level)] = furthest
        title = "block group" if level == "group" else str(level)
        titles[str(level)] = title + f": {len(furthest)} of {len(mine)}" * (len(furthest) < len(mine))
    counts = [len(mine) for mine in levels.values()]
    drawn = new_figure(4.6, 0.8 + 0.2 * sum(counts) + 0.35 * len(levels), figure, "constrained")
    panels = drawn.subplots(len(levels), 1, squeeze=False, sharex=True, height_ratios=counts)[:, 0]
    width = float(normal.ppf(0.5 + confidence / 2.0))
    for axis, (level, mine) in zip(panels, levels.items(), strict=True):
        errors = width * mine["std"]
        axis.errorbar(mine["mean"], range(len(mine)), xerr=errors, fmt="o", ms=4, lw=1.0, color="tab:blue")
        axis.axvline(0.0, color="black", lw=0.6)
        axis.set_yticks(range(len(mine)), mine["label"])
        axis.set_ylim(len(mine) - 0.5, -0.5)
        label_axes(axis, title=titles[level])
    panels[-1].set_xlabel(f"θ, in standard deviations of the metric; {confidence:.0%} interval", fontsize=8)
    return list(panels)


def plot_forest(table: pd.DataFrame, *, figure: Parent = None) -> list[Axes]:
    """Mean difference to uniform on the test split with its 95 % interval, one row per method, one panel per study.

    A hollow marker has no interval: fewer than 3 seeds, or differences that are all equal. The band is what two groups of
    seeds of uniform itself differ by, 95 % of the time. `table` is `summarise`'s; rows at the study's own budget are drawn.
    """
    table = table[(table["factor"] == 1.0) & (table["method"] != REFERENCE)]
    _, panels = _study_panels(table, figure, height=0.28 * table.groupby("study").size().max() + 1.0)
    for axis, (study, group) in zip(panels, table.groupby("study", sort=False), strict=True):
        group = group.sort_values("difference")
        unit = SHARE if group["share"].all() else AS_IT_IS
        noise, n_seeds = unit.scale * group["noise"].iloc[0], int(group["seeds"].iloc[0])
        if not math.isnan(noise):
            axis.axvspan(-noise, noise, color="#eeeeee", lw=0, zorder=0)
        axis.axvline(0.0, color="black", lw=0.8, zorder=1)
        labels = []
        for place, row in enumerate(group.to_dict("records")):
            colour = VERDICT_COLOURS.get(row["verdict"], "#6b6b6b")
            low, mean, high = (unit.scale * row[name] for name in ("low", "difference", "high"))
            axis.plot([low, high], [place, place], color=colour, lw=1.6, solid_capstyle="butt")
            axis.plot(mean, place, "o", color=colour, mfc="white" if math.isnan(low) else colour, ms=5)
            same = " (same runs)" if row["verdict"].startswith("same") else ""
            labels.append(f"{row['method']}{' (over budget)' if row['over_budget'] else same}")
        axis.set_yticks(range(len(group)), labels)
        axis.set_ylim(-0.6, len(group) - 0.4)
        label_axes(
            axis,
            str(study),
            f"{unit.points.strip()} over uniform, {n_seeds} seed{'s' * (n_seeds != 1)}",
            spines=("bottom",),
        )
        axis.tick_params(axis="y", length=0)
    return panels


def plot_budgets(table: pd.DataFrame, *, figure: Parent = None) -> list[Axes]:
    """The test metric against adapter parameters, one panel per study: uniform's curve, and the other methods' points.

    Bars are standard deviations over seeds. Methods at one budget lie side by side, in the order of the legend, so that none
    hides another. Methods without adapters lie at the parameters that they train, and are left out where those are none.
    """
    table = table[table["parameters"] > 0]
    methods = [name for name in dict.fromkeys(table["method"]) if name != REFERENCE]
    drawn, panels = _study_panels(table, figure, height=3.6)
    for axis, (study, group) in zip(panels, table.groupby("study", sort=False), strict=True):
        group = group.sort_values("parameters", kind="stable")
        uniform = group[group["method"] == REFERENCE]
        x, y, deviation = (uniform[name].to_numpy() for name in ("parameters", "test", "deviation"))
        axis.plot(x, y, "o-", color="black", ms=4, lw=1.2, label=REFERENCE)
        axis.fill_between(x, y - deviation, y + deviation, color="black", alpha=0.08, lw=0)
        apart = ABREAST * math.log(2) / max(len(methods), 1)
        for place, method in enumerate(methods):
            mine, colour = group[group["method"] == method], f"C{place % 10}"
            marker, filled = MARKERS[place % len(MARKERS)], colour if place < 10 else "white"  # again, hollow
            moved = mine["parameters"] * math.exp(apart * (place + 1 - (len(methods) + 1) / 2))
            style: Any = {"color": colour, "mfc": filled, "ms": 5, "lw": 0.6, "elinewidth": 0.8, "label": method}
            axis.errorbar(moved, mine["test"], yerr=mine["deviation"].fillna(0.0), fmt=f"{marker}-", **style)
        axis.set_xscale("log")
        axis.set_xticks(_apart({*x, group["parameters"].min(), group["parameters"].max()}))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.tick_params(axis="x", rotation=25)
        label_axes(
            axis, title=str(study), x="trainable parameters outside the head", y="test metric, ± 1 deviation of seeds"
        )
    handles, labels = panels[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    return panels


def _apart(values: Collection[float], share: float = 0.08) -> list[float]:
    """The values whose labels fit beside each other on a logarithmic axis: at least this share of its length apart."""
    kept: list[float] = []
    for value in sorted(values):
        if not kept or math.log(value / kept[-1]) >= share * math.log(max(values) / min(values)):
            kept.append(value)
    return kept


def plot_plan(
    table: pd.DataFrame, *, level: float, budget: int | None = None, metric: str = "metric", figure: Parent = None
) -> Axes:
    """Validation metric against adapter parameters, uniform and placed, with 95 % bands; full fine-tuning and the head alone.

    `table` is `BudgetPlan.table`'s, `level` what is enough, and `budget` the recommended one, which is ringed.
    """
    drawn = new_figure(6.4, 4.2, figure, "constrained")
    axis: Axes = drawn.subplots()
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
    label_axes(axis, x="adapter parameters", y=f"{metric} on validation")
    drawn.legend(loc="outside lower center", ncols=2, fontsize=7, frameon=False)
    return axis


def _study_panels(table: pd.DataFrame, figure: Parent, height: float) -> tuple[Any, list[Axes]]:
    """A figure with one panel of this height in inches for each study; several say that their scales differ."""
    n = table["study"].nunique()
    n_abreast = min(n, PANELS_ABREAST)
    n_rows = math.ceil(n / n_abreast)
    drawn = new_figure(4.6 * n_abreast + 1.8 * (n == 1), height * n_rows + 0.2 * (n > 1), figure, "constrained")
    if n > 1:
        drawn.suptitle("each panel has a scale of its own", x=0.01, ha="left", fontsize=8, style="italic")
    return drawn, [drawn.add_subplot(n_rows, n_abreast, place + 1) for place in range(n)]
