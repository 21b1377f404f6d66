"""Tables of hand-made and committed runs: differences, verdicts, how much uniform must grow; Markdown; broken files."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from rankscope.comparison import (
    format_row,
    insert_table,
    read_comparison,
    summarise,
    to_markdown,
)
from rankscope.comparison.summary import BEGIN, END
from rankscope.errors import FileError, SettingsError

SEEDS = 8


def rows(method: str, metric: float, *, factor: float = 1.0, parameters: int = 100, spread: float = 0.01) -> list[dict]:
    noise = spread * np.random.default_rng(1).normal(size=SEEDS)  # shared by all methods, as by the same seeds
    own = 0.001 * np.random.default_rng(sum(map(ord, method))).normal(size=SEEDS)
    return [
        {"study": "t", "task": "t", "metric": "accuracy", "method": method, "variant": "", "budget": int(100 * factor), "factor": factor,
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


def test_a_metric_that_is_no_share_is_shown_as_it_is() -> None:
    """Per cent and points are of shares; a loss or a BLEU of 27 is neither."""
    runs = pd.DataFrame([*rows("uniform", -27.3), *rows("good", -26.1)])
    uniform, good = (format_row(row) for _, row in summarise(runs).iterrows())
    assert (uniform["points"], uniform["unit"], good["unit"]) == ("-27.298", "", "")
    assert re.fullmatch(r"\+1\.200 \[\+1\.19\d, \+1\.20\d\]", good["points"]), good["points"]
    assert summarise(runs)["relative"].tolist() == pytest.approx([0.0, 1.2 / 27.3], abs=1e-3)
    shares = pd.DataFrame([*rows("uniform", 0.8), *rows("good", 0.83)])
    both = summarise(pd.concat([runs, shares.assign(study="s")]))
    assert both["share"].tolist() == [False, False, True, True]
    assert format_row(both.iloc[3])["points"].startswith("+3.")


def test_a_method_of_its_own_size_is_never_called_equal() -> None:
    runs = pd.DataFrame(
        [*rows("uniform", 0.80), *rows("vera-64", 0.80, parameters=83), *rows("full", 0.83, parameters=900)]
    )
    runs.loc[runs["method"] != "uniform", "budget"] = 0
    table = summarise(runs).set_index("method", drop=False)
    vera, full = (format_row(table.loc[name]) for name in ("vera-64", "full"))
    assert (vera["verdict"], vera["differs"]) == (
        "no difference, with 0.83 x the parameters",
        "no, with 0.83 x the parameters",
    )
    assert vera["points"].endswith("] at 83")
    assert (full["verdict"], full["points"][-1]) == ("better", "]")
    assert re.search(r"^\| \*vera-64\* \| .* at 83 \|", to_markdown(table), re.MULTILINE)


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


def test_studies_are_not_pooled() -> None:
    runs = pd.DataFrame([*rows("uniform", 0.8), *rows("good", 0.9)])
    table = summarise(pd.concat([runs.assign(study="a"), runs.assign(study="b")], ignore_index=True))
    assert table["study"].unique().tolist() == ["a", "b"]
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
    table = summarise(runs).set_index(["method", "factor"], drop=False).sort_index()
    factor = table["uniform_budget_multiplier"]
    assert factor["good", 1.0] == pytest.approx(2.0, rel=0.1)
    low, high = (table.loc[("good", 1.0), f"uniform_budget_multiplier_{end}"] for end in ("low", "high"))
    assert 1.8 < low < factor["good", 1.0] < high < 2.2  # the seeds are shared, and what they share cancels
    assert factor["best", 1.0] == math.inf
    assert (factor["uniform", 4.0], math.isnan(table.loc[("uniform", 4.0), "uniform_budget_multiplier_low"])) == (
        1.0,
        True,
    )
    needs = [format_row(table.loc[each])["needs"] for each in (("good", 1.0), ("best", 1.0), ("uniform", 4.0))]
    assert needs[0] == f"{factor['good', 1.0]:.2g} x [{low:.2g}, {high:.2g}]"
    assert needs[1:] == ["more than tried [more, more]", ""]
    markdown = to_markdown(table).split("\n\n")[1].splitlines()
    assert markdown[0] == "| uniform needs, to match | t |"
    assert markdown[2:] == [f"| best | {needs[1]} |", f"| good | {needs[0]} |"]


def runs_of(task: str, methods: dict[str, float], spread: float, unlimited: tuple[str, ...] = ()) -> list[dict]:
    rng = np.random.default_rng(0)
    common = rng.normal(0.0, 0.01, size=8)
    return [
        {
            "study": task, "task": task, "metric": "accuracy", "method": name, "variant": "", "budget": 0 if name in unlimited else 100, "factor": 1.0,
            "role": "reported", "seed": seed, "learning_rate": 0.01, "parameters": 100, "test": mean + common[seed] + own,
            "validation": mean, "wall_seconds": 1.0, "peak_memory": 1, "cost_steps": 0,
        }
        for name, mean in methods.items()
        for seed, own in enumerate(spread * (rng.permutation(8) - 3.5))
    ]  # fmt: skip


def test_cells_bold_and_mean_gains() -> None:
    rows = runs_of("a", {"uniform": 0.5, "one-shot": 0.6, "head": 0.5}, 1e-3) + runs_of(
        "b", {"uniform": 0.8, "one-shot": 0.76}, 1e-3
    )
    table = summarise(pd.DataFrame(rows))
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in to_markdown(table).splitlines()]
    assert lines[0] == ["method", "a, 8 seeds", "b, 8 seeds", "mean relative gain"]
    first = table[(table["method"] == "uniform") & (table["task"] == "a")]["test"].item()
    assert lines[2] == ["uniform", f"{100 * first:.1f} %", f"{100 * (first + 0.3):.1f} %", ""]
    assert lines[3][1].startswith("**+10.0 [")
    assert lines[3][2].startswith("**-4.0 [")
    assert lines[3][3] == f"{100 * (0.1 / first - 0.04 / (first + 0.3)) / 2:+.1f} %"
    assert lines[4][1].startswith("+0.0 [")  # no difference: not bold
    assert lines[4][2:] == ["", ""]  # not on every task: no mean


def test_methods_without_a_budget_come_last_in_italics() -> None:
    table = summarise(
        pd.DataFrame(runs_of("a", {"uniform": 0.5, "full": 0.6, "one-shot": 0.55}, 1e-3, unlimited=("full",)))
    )
    assert [line.split("|")[1].strip() for line in to_markdown(table).splitlines()[2:]] == [
        "uniform",
        "one-shot",
        "*full*",
    ]


def test_what_ended_over_the_budget_has_no_figures() -> None:
    found = pd.DataFrame(runs_of("a", {"uniform": 0.5, "eva": 0.6}, 1e-3))
    found.loc[found["method"] == "eva", "parameters"] = 101
    assert to_markdown(summarise(found)).splitlines()[-1] == "| eva | over the budget |  |"


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}", f"{BEGIN}{END}{END}"])
def test_marker_lines_are_needed(text: str) -> None:
    with pytest.raises(SettingsError, match=r"^`card\.md` must hold the lines"):
        insert_table(text, "new", where="card.md")


COMMITTED = Path("studies/results/glosses/comparison.parquet")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        *((lambda runs, name=name: runs.drop(columns=name), f"but has no columns `{name}`; write it again.")
          for name in ("study", "role", "variant", "test", "seed", "schema")),
        (lambda runs: runs.assign(seed=1.5), "with int64 in column `seed`, but it holds double; write it again."),
        (lambda runs: runs.assign(schema=9), "but its schema is not 2; compare again."),
        (lambda runs: runs[runs["method"] != "uniform"], "but holds no run of `uniform` at the study's budget; compare again."),
        (lambda runs: runs.assign(factor=0.5), "but holds no run of `uniform` at the study's budget; compare again."),
        (lambda runs: runs.iloc[:0], "but holds no reported run; compare again."),
        (lambda runs: runs[runs["role"] != "reported"], "but holds no reported run; compare again."),
        (lambda runs: pd.concat([runs, runs]), "but holds a run twice; compare again."),
        (lambda runs: runs[(runs["method"] != "eva") | (runs["seed"] != 1000)],
         "but its methods were trained on different seeds; compare again."),
        (lambda runs: runs.assign(test=float("nan")), "but a reported run lacks its factor, learning rate or metric; compare again."),
        (lambda runs: runs.assign(ranks="{"), "but its column `ranks` holds no JSON of ranks; compare again."),
    ],
)  # fmt: skip
def test_a_broken_comparison_is_one_line_when_it_is_read(change: Any, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "comparison.parquet"
    change(pd.read_parquet(COMMITTED)).to_parquet(path)
    with pytest.raises(FileError, match=f"^{re.escape(f'`{path}` must hold a comparison')},? {re.escape(problem)}$"):
        read_comparison(path)
