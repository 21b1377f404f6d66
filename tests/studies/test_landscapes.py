"""Landscapes: RankBench's tables as spaces of their own allocations, and synthetic ones whose optimum is known."""

import numpy as np
import pandas as pd
import pytest
from searches import LANDSCAPES, RankBench, Synthetic
from searches.methods import repaired

from rankscope.tasks import data_folder


@pytest.mark.parametrize("name", LANDSCAPES)
def test_uniform_has_regret_one_and_is_in_every_space(name: str) -> None:
    landscape = LANDSCAPES[name](0)
    uniform = np.array(landscape.space.allocation(landscape.space.point(tau=0.0)).vector)
    assert len(set(uniform.tolist())) == 1
    assert landscape.regret(uniform) == pytest.approx(1.0)


def test_rankbench_measures_what_the_table_holds() -> None:
    landscape = RankBench("digits-shift", 1, 84)
    table = pd.read_parquet(data_folder("rankbench") / "digits-shift.parquet").query("rank == 1 and steps == 84")
    rows = table[table["number"] == 17].sort_values("seed")
    ranks = np.array(rows["ranks"].iloc[0])
    assert [landscape.measure(ranks, i) for i in range(4)] == [*rows["validation"], rows["validation"].iloc[0]]
    best = table.groupby("number")["test"].mean()
    gap = best.max() - best[0]
    assert landscape.regret(ranks) == pytest.approx((best.max() - best[17]) / gap)


def test_rankbench_proposals_are_the_tables_own() -> None:
    landscape = RankBench("digits-shift", 1, 84)
    space, tabulated = landscape.space, set(map(tuple, landscape.ranks.tolist()))
    one_shot = space.allocation(space.point(tau=1.0))
    assert one_shot.vector == tuple(landscape.ranks[-1])  # the last one is one-shot, as it is today
    rng = np.random.default_rng(0)
    for _ in range(20):
        point = {tilt.name: float(rng.uniform(tilt.low, tilt.high)) for tilt in space.tilts}
        assert space.allocation(point).vector in tabulated
        assert tuple(repaired(rng.integers(0, 5, 36), space).tolist()) in tabulated


@pytest.mark.parametrize(("task", "rank", "steps"), [("supersense", 2, 51), ("digits-shift", 3, 84)])
def test_missing_runs_are_one_line(task: str, rank: int, steps: int) -> None:
    message = (
        f"RankBench must hold runs of {task} at rank {rank} and {steps} steps, but has none; "
        "see data/rankbench/README.md."
    )
    with pytest.raises(ValueError) as caught:
        RankBench(task, rank, steps)
    assert str(caught.value) == message


def test_synthetic_optimum_beats_every_random_allocation_and_noise_has_its_scale() -> None:
    landscape = Synthetic(3, modules=24, noise=0.2)
    uniform = np.full(24, 4)
    space = landscape.space
    rng = np.random.default_rng(0)
    for _ in range(50):
        ranks = repaired(rng.integers(0, 9, 24) + 1, space)
        assert landscape.regret(ranks) >= 0.0
    measured = [landscape.measure(uniform, i) for i in range(2000)]
    gap = landscape.value(uniform) - landscape.value(np.zeros(24))
    one_more = landscape.regret(np.zeros(24, dtype=int))
    scale = gap / (one_more - 1.0)  # the gap between uniform and the optimum
    assert np.std(measured) == pytest.approx(0.2 * scale, rel=0.1)
    assert np.mean(measured) == pytest.approx(landscape.value(uniform), abs=0.03 * scale)
