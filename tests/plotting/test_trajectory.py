"""What a controller did, drawn: the data against hand-made decisions, and what the figures show."""

from itertools import pairwise

import numpy as np
import pandas as pd

import rankscope as rs
from rankscope.plotting import plot_flow, plot_trajectories
from rankscope.plotting.trajectory import budget_flow, snapshots

TARGETS = (
    rs.TargetModule(name="v.q", in_features=4, out_features=6, tower="vision", block=0, role="q_proj"),
    rs.TargetModule(name="l.q", in_features=8, out_features=8, tower="language", block=0, role="q_proj"),
    rs.TargetModule(name="l.fc", in_features=8, out_features=32, tower="language", block=0, role="fc1"),
)


def decisions(*ranks: tuple[int, ...], every: int = 5) -> pd.DataFrame:
    """One decision between each two, kept where they are equal; the last module has no adapter."""
    return pd.DataFrame(
        [
            {
                "step": every * (n + 1),
                "action": "moved" if before != after else "kept",
                "modules": ["v.q", "l.q"],
                "ranks_before": before,
                "ranks_after": after,
            }
            for n, (before, after) in enumerate(pairwise(ranks))
        ]
    )


def test_snapshots_are_the_start_and_the_moves() -> None:
    found = snapshots(decisions((2, 2), (4, 1), (4, 1), (0, 3)), TARGETS)
    assert [(each.step, each.title) for each in found] == [
        (0, "start"),
        (5, "step 5: 2 moved"),
        (15, "step 15: 2 moved"),
    ]
    assert [each.allocation.vector for each in found] == [(2, 2, 0), (4, 1, 0), (0, 3, 0)]


def test_many_moves_are_thinned_evenly_and_the_last_is_kept() -> None:
    found = snapshots(decisions(*[(n % 3, 1) for n in range(12)]), TARGETS, most=4)
    assert [each.step for each in found] == [0, 20, 35, 55]


def test_the_flow_counts_parameters_by_tower_and_role() -> None:
    flow = budget_flow(decisions((2, 2), (4, 1), (4, 1)), TARGETS)
    assert flow.steps == [0, 5, 10]
    assert flow.groups == ["vision q_proj", "language q_proj", "language fc1"]
    np.testing.assert_array_equal(flow.parameters, [[20, 40, 40], [32, 16, 16], [0, 0, 0]])


def test_the_figures_show_every_snapshot_and_group() -> None:
    frame = decisions((2, 2), (4, 1), (0, 3))
    titles = [axis.get_title(loc="left") for axis in plot_trajectories(frame, TARGETS).axes]
    assert [title.splitlines()[0] for title in titles if title and title != "language"] == [
        "start",
        "step 5: 2 moved",
        "step 10: 2 moved",
    ]
    (legend,) = plot_flow(frame, TARGETS).legends
    assert [text.get_text() for text in legend.get_texts()] == ["language fc1", "language q_proj", "vision q_proj"]
