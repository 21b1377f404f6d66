"""Heatmaps: the data behind them, and that every value is where its labels say."""

from pathlib import Path

import numpy as np

import rankscope as rs
from rankscope.plotting import module_grids, plot_energy, plot_ranks, save_figure
from tests.architectures import build
from tests.inventories import vit_inventory


def test_grids_hold_every_module_once() -> None:
    targets = rs.find_targets(build("llava"))
    grids = module_grids(targets, {t.name: float(i + 1) for i, t in enumerate(targets)})
    assert [grid.tower for grid in grids] == ["vision", "projector", "language"]
    for grid in grids:
        for t in (t for t in targets if t.tower == grid.tower):
            row, column = grid.roles.index(t.role), grid.blocks.index("-" if t.block is None else str(t.block))
            assert grid.values[row, column] == targets.index(t) + 1
    assert sum(np.isfinite(grid.values).sum() for grid in grids) == len(targets)
    assert grids[2].roles == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def test_rank_plots_write_each_rank(tmp_path: Path) -> None:
    targets = vit_inventory()
    one_rank = rs.RankAllocation.from_ranks(targets, {targets[0].name: 7}, strategy="one-shot")
    figure = plot_ranks(rs.RankAllocation(targets, (1,) * 36, strategy="uniform"), one_rank)
    panels = [axis for axis in figure.axes if axis.get_title(loc="left")]
    assert [axis.get_title(loc="left") for axis in panels] == ["uniform: 6,912 parameters", "one-shot: 896 parameters"]
    texts = [[text.get_text() for text in axis.texts] for axis in panels]
    assert texts[0] == ["1"] * 36
    assert texts[1].count("7") == 1
    assert texts[1].count("·") == 35
    assert save_figure(figure, tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")


def test_energy_plot(digits_profile: rs.Profile) -> None:
    figure = plot_energy(digits_profile)
    assert figure.axes[0].get_title(loc="left") == "gradient energy per parameter of one rank, 7 batches"
