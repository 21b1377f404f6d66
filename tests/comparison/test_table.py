"""The table on hand-made runs: differences, verdicts, and how much uniform must grow."""

import math
import re

import numpy as np
import pandas as pd
import pytest

from rankscope.comparison import format_row, summarise
from rankscope.errors import SettingsError

SEEDS = 8


def rows(method: str, metric: float, *, factor: float = 1.0, parameters: int = 100, spread: float = 0.01) -> list[dict]:
    noise = spread * np.random.default_rng(1).normal(size=SEEDS)  # shared by all methods, as by the same seeds
    own = 0.001 * np.random.default_rng(sum(map(ord, method))).normal(size=SEEDS)
    return [
        {"task": "t", "metric": "accuracy", "method": method, "variant": "", "budget": int(100 * factor), "factor": factor,
         "role": "reported", "seed": seed, "learning_rate": 0.01, "steps": 10, "parameters": parameters,
         "validation": metric, "test": metric + noise[seed] + own[seed], "ranks": "null", "n_moved": 0, "wall_seconds": 1.0,
         "peak_memory": 1e6, "revision": "x", "cost_steps": 0}
        for seed in range(SEEDS)
    ]  # fmt: skip


def test_verdicts() -> None:
    runs = pd.DataFrame(
        [
            *rows("uniform", 0.80),
            *rows("good", 0.83),
            *rows("bad", 0.75),
            *rows("same", 0.80),
            *rows("greedy", 0.90, parameters=101),
        ]
    )
    table = summarise(runs).set_index("method")
    assert table["verdict"].to_dict() == {
        "uniform": "",
        "good": "better",
        "bad": "worse",
        "same": "no difference",
        "greedy": "refused: 101 parameters are over the budget",
    }
    assert table.loc["good", "difference"] == pytest.approx(0.03, abs=0.002)
    assert table.loc["good", "low"] < 0.03 < table.loc["good", "high"] + 0.002
    assert table.loc["good", "relative"] == pytest.approx(0.03 / 0.8, abs=0.003)
    assert table.loc["good", "p"] <= table.loc["good", "p_holm"] <= 0.05
    assert table["uniform_budget_multiplier"].isna().all()


def test_too_few_seeds_get_no_verdict() -> None:
    runs = pd.DataFrame([*rows("uniform", 0.8), *rows("good", 0.9)])
    assert summarise(runs[runs["seed"] < 2]).set_index("method").loc["good", "verdict"] == "too few seeds"


@pytest.mark.parametrize("seeds", [1, 2])
def test_few_seeds_have_neither_interval_nor_test(seeds: int) -> None:
    runs = pd.DataFrame([*rows("uniform", 0.8), *rows("good", 0.9)])
    found = summarise(runs[runs["seed"] < seeds]).set_index("method", drop=False).loc["good"]
    assert found[["low", "high", "p", "p_holm"]].isna().all()
    assert format_row(found)["points"].endswith(" [-]")


def test_the_same_runs_as_uniforms_are_said_to_be_the_same() -> None:
    """Equal metrics of other ranks are not the same runs."""
    uniform, still, other = (rows("uniform", 0.8) for _ in range(3))
    runs = pd.DataFrame(
        [
            *uniform,
            *({**row, "method": "controller"} for row in still),
            *({**row, "method": "x", "ranks": "{}"} for row in other),
        ]
    )
    table = summarise(runs).set_index("method", drop=False)
    assert format_row(table.loc["controller"])["points"] == table.loc["controller", "verdict"] == "same runs as uniform"
    assert (format_row(table.loc["x"])["points"], table.loc["x", "verdict"]) == ("+0.0 [-]", "no difference")


def test_studies_and_tasks_are_not_pooled() -> None:
    runs = pd.DataFrame([*rows("uniform", 0.8), *rows("good", 0.9)])
    parts = [runs.assign(study="a"), runs.assign(study="b"), runs.assign(study="b", task="u")]
    table = summarise(pd.concat(parts, ignore_index=True))
    assert table["study"].unique().tolist() == ["a", "b, t", "b, u"]
    assert (table["seeds"] == SEEDS).all()


@pytest.mark.parametrize("keep", ["none", "no uniform", "other budget"])
def test_without_uniform_at_the_budget_nothing_can_be_compared(keep: str) -> None:
    runs = pd.DataFrame([*rows("uniform", 0.8, factor=0.25), *rows("good", 0.9)])
    runs = {
        "none": runs.iloc[:0],
        "no uniform": runs[runs["method"] == "good"],
        "other budget": runs[runs["factor"] < 1],
    }[keep]
    study = "no study" if keep == "none" else "t"
    message = f"`runs` must hold reported runs of `uniform` at the budget of each study, but `{study}` has none; compare again."
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
        summarise(runs)


def test_how_much_uniform_must_grow() -> None:
    runs = pd.DataFrame(
        [
            *rows("uniform", 0.8, factor=1.0),
            *rows("good", 0.85, factor=1.0),
            *rows("best", 0.99, factor=1.0),
            *rows("uniform", 0.9, factor=4.0, parameters=400),
        ]
    )
    table = summarise(runs).set_index(["method", "factor"])["uniform_budget_multiplier"]
    assert table["good", 1.0] == pytest.approx(2.0, rel=0.1)
    assert table["best", 1.0] == math.inf
    assert table["uniform", 4.0] == pytest.approx(1.0)
