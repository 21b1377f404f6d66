"""Plots: the data behind them by hand, and that every value is where its labels say."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import rankscope as rs
from rankscope.errors import ModelError, SettingsError
from rankscope.maps import grouped_grids, module_grids
from rankscope.plotting import (
    budget_flow,
    plot_budgets,
    plot_energy,
    plot_flow,
    plot_forest,
    plot_plan,
    plot_ranks,
    plot_spectra,
    plot_trajectories,
    save_plot,
    spread,
    waypoints,
)
from tests.architectures import build
from tests.inventories import vit_inventory

PAIR = (
    rs.TargetModule(name="a.0.q", in_features=64, out_features=64, tower="vision", block=0, role="q_proj"),
    rs.TargetModule(name="b.0.up", in_features=64, out_features=192, tower="language", block=0, role="up_proj"),
)


def decided(targets: Sequence[rs.TargetModule], ranks: Sequence[Sequence[int]], every: int = 5) -> pd.DataFrame:
    """The decisions that lead through these ranks, the first the start; equal ones in a row were kept."""
    rows = [
        {
            "step": every * number,
            "action": "kept" if list(before) == list(after) else "moved",
            "modules": tuple(target.name for target in targets),
            "ranks_before": tuple(before),
            "ranks_after": tuple(after),
        }
        for number, (before, after) in enumerate(pairwise(ranks), start=1)
    ]
    return pd.DataFrame(rows, columns=["step", "action", "modules", "ranks_before", "ranks_after"])


def test_waypoints_are_the_start_and_every_move() -> None:
    found = waypoints(decided(PAIR, [(4, 2), (2, 3), (2, 3), (0, 4)]), PAIR)
    assert [(step, each.vector) for step, each in found] == [(0, (4, 2)), (5, (2, 3)), (15, (0, 4))]


def test_modules_are_matched_by_name() -> None:
    """The frame's order is the model's; the targets may come in another, and hold modules that are not watched."""
    bystander = rs.TargetModule(name="c", in_features=4, out_features=4)
    found = waypoints(decided(PAIR, [(4, 2), (2, 3)]), (bystander, *reversed(PAIR)))
    assert [dict(each.ranks) for _, each in found] == [
        {"c": 0, "b.0.up": 2, "a.0.q": 4},
        {"c": 0, "b.0.up": 3, "a.0.q": 2},
    ]


@pytest.mark.parametrize("n", [1, 2, 5, 6, 7, 13, 40])
def test_spread_keeps_both_ends_and_even_distances(n: int) -> None:
    found = waypoints(decided(PAIR, [(i % 2, i) for i in range(n + 1)]), PAIR)[:n]
    chosen = [found.index(waypoint) for waypoint in spread(found, 6)]
    assert (chosen[0], chosen[-1], len(chosen)) == (0, n - 1, min(n, 6))
    distances = np.diff(chosen)
    assert distances.min(initial=n) >= 1
    assert np.ptp(distances) <= 1 if n > 1 else not distances.size


def test_flow_is_each_roles_share_of_the_parameters() -> None:
    """Ranks cost 128 and 256: 512 and 512 parameters, then 256 and 768, then 0 and 1,024."""
    flow = budget_flow(decided(PAIR, [(4, 2), (2, 3), (2, 3), (0, 4), (0, 4)]), PAIR)
    assert flow.columns.tolist() == [0, 5, 15]
    assert flow.index.tolist() == [("vision", "q_proj"), ("language", "up_proj")]
    assert flow.to_numpy().tolist() == [[0.5, 0.25, 0.0], [0.5, 0.75, 1.0]]


def test_flow_sums_blocks_and_loses_nothing() -> None:
    targets = rs.find_targets(build("llava"))
    ranks = np.random.default_rng(0).integers(0, 4, (3, len(targets)))
    flow = budget_flow(decided(targets, ranks), targets)
    assert np.allclose(flow.sum(), 1.0)
    costs = np.array([t.rank_cost for t in targets])
    mine = np.array([t.tower == "language" and t.role == "v_proj" for t in targets])
    assert np.allclose(
        flow.loc[("language", "v_proj")], (ranks * costs * mine).sum(axis=1) / (ranks * costs).sum(axis=1)
    )


def test_trajectories_write_each_rank_and_frame_gains() -> None:
    targets = vit_inventory()
    uniform = [1] * 36
    moved = [3, 0, 0, *uniform[3:]]
    panels = plot_trajectories(decided(targets, [uniform, moved, moved, uniform]), targets, figure=Figure())
    assert [axis.get_title(loc="left") for axis in panels] == ["start", "step 5: +2 ranks", "step 15: +2 ranks"]
    texts = [[text.get_text() for text in axis.texts] for axis in panels]
    assert texts[0] == texts[2] == ["1"] * 36
    assert (texts[1].count("3"), texts[1].count("·")) == (1, 2)
    assert [len(axis.patches) for axis in panels] == [0, 1, 2]


def test_trajectories_of_many_moves_say_which_they_show() -> None:
    panels = plot_trajectories(decided(PAIR, [(i % 3, i) for i in range(12)], every=50), PAIR, figure=Figure())
    titles = [axis.get_title(loc="left") for axis in panels]
    assert titles[:2] == ["start\nvision: 0%", "\nlanguage: 0%"]
    assert [title.split(":")[0] for title in titles[2::2]] == [f"step {step}" for step in (100, 200, 350, 450, 550)]
    assert titles[2:4] == ["step 100: +4 ranks\nvision: 33%", "\nlanguage: 67%"]  # (2, 2) at costs of 128 and 256


def test_flow_figure_marks_the_last_decision_and_what_towers_have() -> None:
    axis = plot_flow(decided(PAIR, [(4, 2), (2, 3), (2, 3)]), PAIR, figure=Figure())
    assert (axis.get_xlabel(), axis.get_xlim()) == ("optimizer step", (0.0, 15.0))
    texts = [text.get_text().strip() for text in axis.texts]
    assert texts == ["50%", "25%", "50%", "75%", "vision\n 50% → 25%", "language\n 50% → 75%", "last decision"]
    assert [text.get_text() for text in axis.get_figure().legends[0].get_texts()] == ["q_proj", "up_proj"]
    assert axis.lines[-1].get_xdata() == [10, 10]


@pytest.mark.parametrize("plot", [plot_trajectories, plot_flow])
def test_bad_input(plot: object) -> None:
    assert callable(plot)
    with pytest.raises(ModelError) as none:
        plot(decided(PAIR, [(4, 2)]), PAIR)
    assert str(none.value) == "`decisions` must hold at least one decision to be drawn, but is empty; train for longer."
    with pytest.raises(SettingsError) as others:
        plot(decided(PAIR, [(4, 2), (2, 3)]), PAIR[1:])
    assert str(others.value) == "`ranks` must name target modules only, but names 'a.0.q'."


def test_grids_hold_every_module_once() -> None:
    targets = rs.find_targets(build("llava"))
    grids = module_grids(targets, {t.name: float(i + 1) for i, t in enumerate(targets)})
    assert list(grids) == ["vision", "projector", "language"]
    for i, t in enumerate(targets):
        assert grids[t.tower].loc[t.role, "-" if t.block is None else str(t.block)] == i + 1
    assert sum(grid.notna().sum().sum() for grid in grids.values()) == len(targets)
    assert " ".join(grids["language"].index) == "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"


def deep_inventory(n_blocks: int = 200) -> tuple[rs.TargetModule, ...]:
    """Six modules in each of many blocks, and one outside."""
    outside = rs.TargetModule(name="pooler", in_features=64, out_features=64, role="pooler")
    return (*vit_inventory(n_blocks), outside)


def test_large_models_are_shown_by_groups_of_blocks() -> None:
    targets = deep_inventory()
    values = {t.name: float(i) for i, t in enumerate(targets)}
    (grid,) = grouped_grids(targets, values).values()
    assert list(grid.columns[:2]) == ["0-8", "9-17"]  # 200 blocks in 24 groups: eight of 9, then sixteen of 8
    assert list(grid.columns[-2:]) == ["192-199", "-"]
    assert len(grid.columns) == 25
    first = [values[f"layers.{block}.fc1"] for block in range(9)]
    assert grid.loc["fc1", "0-8"] == pytest.approx(np.mean(first))
    assert grid.loc["pooler", "-"] == values["pooler"]
    few = vit_inventory()
    (same,) = grouped_grids(few, {t.name: 1.0 for t in few}).values()
    assert list(same.columns) == list("012345")


def test_pictures_of_large_models_stay_small(tmp_path: Path) -> None:
    targets = deep_inventory()
    rng = np.random.default_rng(0)
    ranks = rs.RankAllocation(targets, tuple(rng.integers(0, 9, len(targets)).tolist()), strategy="drawn")
    (axis,) = plot_ranks(ranks, figure=Figure())
    assert axis.get_figure().get_figwidth() < 20
    texts = [text.get_text() for text in axis.texts]
    assert len(texts) == 6 * 24 + 1  # a cell for each role and group, and the module outside
    drawn = [rank for t, rank in zip(targets, ranks.vector, strict=True) if t.role == "q_proj"]
    assert texts[0] == f"{np.mean(drawn[:9]):.1f}"  # a row's first: of blocks 0 to 8
    assert save_plot(partial(plot_ranks, ranks), tmp_path / "ranks.png").stat().st_size > 0


def test_rank_plots_write_each_rank(tmp_path: Path) -> None:
    targets = vit_inventory()
    one_rank = rs.RankAllocation.from_ranks(targets, {targets[0].name: 7}, strategy="one-shot")
    both = partial(plot_ranks, rs.RankAllocation(targets, (1,) * 36, strategy="uniform"), one_rank)
    panels = both(figure=Figure())
    assert [axis.get_title(loc="left") for axis in panels] == ["uniform: 6,912 parameters", "one-shot: 896 parameters"]
    texts = [[text.get_text() for text in axis.texts] for axis in panels]
    assert texts[0] == ["1"] * 36
    assert texts[1].count("7") == 1
    assert texts[1].count("·") == 35
    assert save_plot(both, tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")


def test_energy_plot(digits_profile: rs.Profile) -> None:
    (axis,) = plot_energy(digits_profile, figure=Figure())
    assert axis.get_title(loc="left") == "gradient energy per parameter of one rank, 7 batches"


def test_a_plans_picture_rings_the_recommended_budget() -> None:
    rows = [("uniform", 432, 0.8), ("uniform", 6912, 0.9), ("one-shot", 432, 0.9), ("one-shot", 6912, 0.91)]
    rows += [("full", 0, 0.93), ("head", 0, 0.6)]
    table = pd.DataFrame(rows, columns=["method", "budget", "validation"])
    table = table.assign(
        parameters=[400, 6912, 400, 6912, 301_504, 0], low=table["validation"] - 0.01, high=table["validation"] + 0.01
    )
    axis = plot_plan(table, level=0.88, budget=432, metric="accuracy", figure=Figure())
    assert [text.get_text() for text in axis.get_figure().legends[0].get_texts()] == [
        "uniform", "one-shot", "full fine-tuning, 301,504 weights", "the head alone", "enough: the reference less the margin",
    ]  # fmt: skip
    rings = [line for line in axis.lines if line.get_markersize() == 12 and len(line.get_xdata())]
    assert [(ring.get_xdata().tolist(), ring.get_ydata().tolist()) for ring in rings] == [([432], [0.9])]
    assert axis.get_ylabel() == "accuracy on validation"


def compared(methods: Sequence[str], studies: Sequence[str] = ("a",)) -> pd.DataFrame:
    """A table as `summarise` makes it: methods at one budget, uniform at three."""
    rows = [(study, factor, "uniform", int(1000 * factor)) for study in studies for factor in (0.5, 1.0, 2.0)]
    rows += [(study, 1.0, method, 1000) for study in studies for method in methods]
    table = pd.DataFrame(rows, columns=["study", "factor", "method", "parameters"])
    values = {"test": 0.9, "deviation": 0.01, "difference": 0.0, "low": -0.01, "high": 0.01, "noise": 0.02, "seeds": 3}
    return table.assign(**values, share=True, verdict="no difference", over_budget=False)


def test_methods_at_one_budget_lie_side_by_side() -> None:
    methods = [f"m{i}" for i in range(14)]
    (axis,) = plot_budgets(compared(methods), figure=Figure())
    xs = [bars.lines[0].get_xdata()[0] for bars in axis.containers]
    assert len(set(xs)) == 14
    assert xs == sorted(xs)
    assert np.exp(np.mean(np.log(xs))) == pytest.approx(1000)
    assert xs[0] > 1000 / 2**0.5  # nearer to their own budget than to uniform's next
    assert xs[-1] < 1000 * 2**0.5
    markers = [(bars.lines[0].get_marker(), bars.lines[0].get_color()) for bars in axis.containers]
    assert len(set(markers)) == 14
    assert all(len(bars.lines[2]) == 1 for bars in axis.containers)  # each with its deviation


@pytest.mark.parametrize("plot", [plot_budgets, plot_forest])
def test_panels_side_by_side_say_that_their_scales_differ(plot: Callable[..., list[Axes]]) -> None:
    first, second = plot(compared(["m"], ["a", "b"]), figure=Figure())
    assert first.get_figure().get_suptitle() == "each panel has a scale of its own"
    assert [axis.get_title(loc="left") for axis in (first, second)] == ["a", "b"]
    (alone,) = plot(compared(["m"]), figure=Figure())
    assert not alone.get_figure().get_suptitle()


@pytest.mark.parametrize("ranks", [(1, 1), (12, 0), (13, 2), (64, 3)])
def test_colour_bars_of_ranks_have_whole_numbers(ranks: tuple[int, int]) -> None:
    (axis, _) = plot_ranks(rs.RankAllocation(PAIR, ranks), figure=Figure())
    bar = axis.get_figure().axes[-1]
    shown = [tick for tick in bar.get_yticks() if bar.get_ylim()[0] <= tick <= bar.get_ylim()[1]]
    assert shown == [float(round(tick)) for tick in shown]
    assert shown == list(range(max(ranks) + 1)) if max(ranks) <= 12 else len(shown) > 3


def test_plots_return_axes_and_take_part_of_a_figure(digits_profile: rs.Profile) -> None:
    left, right = Figure(figsize=(12, 4)).subfigures(1, 2)
    (ours,) = plot_energy(digits_profile, figure=left)
    theirs = plot_spectra(digits_profile, figure=right)
    assert (ours.figure, {axis.figure for axis in theirs}) == (left, {right})
    assert left.get_figure(root=True).get_size_inches().tolist() == [12, 4]


def test_a_new_figure_is_pyplot_s_and_a_file_is_not(tmp_path: Path) -> None:
    from matplotlib import pyplot

    pyplot.switch_backend("Agg")
    allocation = rs.RankAllocation(PAIR, (1, 2))
    try:
        axes = plot_ranks(allocation)
        assert axes[0].get_figure() is pyplot.gcf()
        save_plot(partial(plot_ranks, allocation), tmp_path / "a.png", "my study")
        assert len(pyplot.get_fignums()) == 1
    finally:
        pyplot.close("all")


def test_a_title_stands_above_everything(tmp_path: Path) -> None:
    def drawn(figure: Figure) -> None:
        plot_ranks(rs.RankAllocation(PAIR, (1, 2)), figure=figure)
        figures.append(figure)

    figures: list[Figure] = []
    save_plot(drawn, tmp_path / "a.png")
    save_plot(drawn, tmp_path / "b.png", "my study")
    plain, titled = figures
    assert titled.get_suptitle() == "my study"
    for before, after in zip(plain.axes, titled.axes, strict=True):  # cells keep their size in inches
        sizes = [axis.get_position().height * axis.get_figure().get_figheight() for axis in (before, after)]
        assert sizes[0] == pytest.approx(sizes[1])
    assert max(axis.get_position().y1 for axis in titled.axes) * titled.get_figheight() < titled.get_figheight() - 0.3
