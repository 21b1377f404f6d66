"""RankBench's tables: every run keeps its budget, names its allocation, and repeats nothing."""

import runpy
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import rankscope as rs

FOLDER = Path(__file__).parents[1] / "data" / "rankbench"
TABLES = sorted(path.stem for path in FOLDER.glob("*.parquet") if "." not in path.stem)


@pytest.mark.parametrize("name", TABLES)
def test_runs_keep_their_budget_and_allocations_their_ranks(name: str) -> None:
    table = pd.read_parquet(FOLDER / f"{name}.parquet")
    profile = rs.read_profile(FOLDER / f"{name}.profile.parquet")
    assert not table.duplicated(["rank", "steps", "number", "seed"]).any()
    costs = np.array([target.rank_cost for target in profile.targets])
    for rank, part in table.groupby("rank"):
        ranks = np.array(part["ranks"].tolist())
        limit = round(float(rank) * costs.sum())
        assert ((ranks @ costs) == part["parameters"]).all()
        assert (part["parameters"] <= limit).all()
        assert (part["parameters"] > limit - costs.min()).all()
        assert (abs(ranks[part["number"] == 0] - rank) < 1).all()  # uniform
        assert part.groupby("number")["ranks"].agg(lambda rows: len({tuple(row) for row in rows})).max() == 1
    assert table["validation"].between(0, 1).all()


def test_digits_is_as_large_as_its_readme_says() -> None:
    table = pd.read_parquet(FOLDER / "digits-shift.parquet")
    full = table[table["steps"] == 84]
    assert full.groupby("rank")["number"].nunique().to_dict() == {
        1 / 8: 300,
        1 / 4: 300,
        1 / 2: 300,
        1: 601,
        2: 451,
        4: 451,
    }
    assert full.groupby("rank")["seed"].nunique().to_dict() == {1 / 8: 2, 1 / 4: 2, 1 / 2: 2, 1: 3, 2: 2, 4: 2}
    assert full["test"].notna().all()


def test_the_script_draws_the_tables_allocations() -> None:
    """So that it goes on with a table, and a rebuilt one is the same, whatever becomes of one-shot's default."""
    draw = runpy.run_path(str(FOLDER / "build.py"))["draw_allocations"]
    profile, table = (
        rs.read_profile(FOLDER / "digits-shift.profile.parquet"),
        pd.read_parquet(FOLDER / "digits-shift.parquet"),
    )
    ranks = table[table["rank"] == 1 / 4].drop_duplicates("number").sort_values("number")["ranks"].map(tuple)
    budget = rs.ParameterBudget(round(sum(target.rank_cost for target in profile.targets) / 4))
    assert [made.vector for made in islice(draw(profile, budget), 40)] == ranks.tolist()[:40]
