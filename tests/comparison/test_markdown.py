"""The Markdown table: cells, what is bold, and gains that are means over all tasks or not given."""

import numpy as np
import pandas as pd
import pytest

from rankscope.comparison import insert_table, summarise, to_markdown
from rankscope.comparison.summary import BEGIN, END
from rankscope.errors import SettingsError


def runs(task: str, methods: dict[str, float], spread: float, unlimited: tuple[str, ...] = ()) -> list[dict]:
    rng = np.random.default_rng(0)
    common = rng.normal(0.0, 0.01, size=8)
    return [
        {
            "task": task, "metric": "accuracy", "method": name, "variant": "", "budget": 0 if name in unlimited else 100, "factor": 1.0,
            "role": "reported", "seed": seed, "learning_rate": 0.01, "parameters": 100, "test": mean + common[seed] + own,
            "validation": mean, "wall_seconds": 1.0, "peak_memory": 1, "cost_steps": 0,
        }
        for name, mean in methods.items()
        for seed, own in enumerate(spread * (rng.permutation(8) - 3.5))
    ]  # fmt: skip


def test_cells_bold_and_mean_gains() -> None:
    rows = runs("a", {"uniform": 0.5, "one-shot": 0.6, "head": 0.5}, 1e-3) + runs(
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
        pd.DataFrame(runs("a", {"uniform": 0.5, "full": 0.6, "one-shot": 0.55}, 1e-3, unlimited=("full",)))
    )
    assert [line.split("|")[1].strip() for line in to_markdown(table).splitlines()[2:]] == [
        "uniform",
        "one-shot",
        "*full*",
    ]


def test_what_ended_over_the_budget_has_no_figures() -> None:
    found = pd.DataFrame(runs("a", {"uniform": 0.5, "eva": 0.6}, 1e-3))
    found.loc[found["method"] == "eva", "parameters"] = 101
    assert to_markdown(summarise(found)).splitlines()[-1] == "| eva | over the budget |  |"


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}", f"{BEGIN}{END}{END}"])
def test_marker_lines_are_needed(text: str) -> None:
    with pytest.raises(SettingsError, match=r"^`card\.md` must hold the lines"):
        insert_table(text, "new", where="card.md")
