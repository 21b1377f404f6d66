"""The summary of a profile, by hand."""

import pandas as pd
import pytest
from matplotlib.figure import Figure

import rankscope as rs
from rankscope.plotting import plot_spectra
from rankscope.profiling.table import cumulative_energy, group_energy, rank_modules


@pytest.fixture
def profile() -> rs.Profile:
    """Energies 25 and 4 and 1; the third has the same role as the first."""
    rows = {
        "module": ["a", "b", "c"], "tower": ["model"] * 3, "role": ["fc1", "fc2", "fc1"], "rank_cost": [10, 20, 10],
        "gradient_norm": [5.0, 2.0, 1.0], "singular_values": [[4.0, 3.0], [2.0], [1.0]], "signal_share": [0.5] * 3,
        "in_features": [2, 1, 1], "out_features": [8, 19, 9], "block": [0, 0, 1], "kind": ["linear"] * 3,
    }  # fmt: skip
    return rs.Profile(pd.DataFrame(rows), {})


def test_modules_are_ranked_by_energy_per_parameter(profile: rs.Profile) -> None:
    ranked = rank_modules(profile)
    assert ranked["module"].tolist() == ["a", "b", "c"]
    assert ranked["share"].tolist() == pytest.approx([25 / 30, 4 / 30, 1 / 30])
    assert ranked["first"].tolist() == pytest.approx([16 / 25, 1.0, 1.0])


def test_groups_add_up(profile: rs.Profile) -> None:
    groups = group_energy(profile)
    assert groups["role"].tolist() == ["fc1", "fc2"]
    assert groups["modules"].tolist() == [2, 1]
    assert groups["share"].tolist() == pytest.approx([26 / 30, 4 / 30])
    assert groups["parameters"].tolist() == pytest.approx([0.5, 0.5])


def test_cumulative_energy_takes_the_densest_rank_first(profile: rs.Profile) -> None:
    parameters, captured = cumulative_energy(profile)
    assert parameters.tolist() == [0, 10, 20, 40, 50]  # 16/10, 9/10, 4/20, 1/10
    assert captured.tolist() == pytest.approx([0, 16 / 30, 25 / 30, 29 / 30, 1])


def test_spectra_are_drawn_one_line_a_module(profile: rs.Profile) -> None:
    left, right = plot_spectra(profile, figure=Figure())
    assert len(left.lines) == 3
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["fc1", "fc2"]
    assert right.lines[0].get_xydata()[-1].tolist() == [50, 1]
