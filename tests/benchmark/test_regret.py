"""Regret curves: every method runs the same course, reproducibly, on real tables; and the command that shows them."""

import json

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from rankscope.benchmark import METHODS, OURS, Synthetic, regret_curve, regret_curves, run_search
from rankscope.cli.app import app
from rankscope.exceptions import BenchmarkError


@pytest.mark.parametrize("method", METHODS)
def test_every_method_searches_the_table_and_repeats_itself(method: str) -> None:
    first, second = (run_search("digits-shift/1", method, 1, (20, 24)) for _ in range(2))
    assert first == second
    assert first[0] == ("digits-shift/1", method, 1)
    assert list(first[1]) == [20, 24]
    assert all(0.0 <= regret < 3.0 for regret in first[1].values())


def test_ours_finds_more_than_random_search_where_there_is_little_noise() -> None:
    ends = {
        name: np.mean(
            [
                regret_curve(land := Synthetic(s, modules=24, noise=0.05), METHODS[name](land, s), (60,))[60]
                for s in range(3)
            ]
        )
        for name in (OURS, "random")
    }
    assert ends[OURS] < ends["random"] < 1.0


def test_bad_names_and_budgets_are_one_line() -> None:
    with pytest.raises(BenchmarkError) as caught:
        regret_curves(["digits-shift/1"], ["tpes"], [0])
    assert str(caught.value) == (
        "`methods` must be among performance-model; tpe; gp; cma-es; random; tpe-raw; random-raw; evolution, but got 'tpes'."
    )
    with pytest.raises(BenchmarkError, match="^`budgets` must leave trials to confirm, but 6 are too few; take more.$"):
        run_search("digits-shift/1", "random", 0, (6,))


def test_the_command_writes_table_and_picture(tmp_path) -> None:
    arguments = ["bench", "search", "--landscape", "digits-shift/1", "--method", "random", "--method", "tpe"]
    options = ["--seeds", "2", "--trials", "20", "--trials", "24", "--out", str(tmp_path)]
    shown = CliRunner().invoke(app, [*arguments, *options])
    assert shown.exit_code == 0
    assert "median regret of 2 searches: uniform 1, best 0" in shown.stdout
    found = pd.read_parquet(tmp_path / "regret.parquet")
    assert len(found) == 8
    assert (tmp_path / "regret.png").read_bytes().startswith(b"\x89PNG")
    printed = json.loads(CliRunner().invoke(app, [*arguments, *options, "--json"]).stdout)
    medians = found.groupby(["method", "trials"])["regret"].median()
    assert {(row["method"], row["trials"]): row["regret"] for row in printed["regret"]} == medians.to_dict()
    wrong = CliRunner().invoke(app, ["bench", "search", "--method", "tpes"])
    assert (wrong.exit_code, wrong.stderr.count("\n")) == (2, 1)
