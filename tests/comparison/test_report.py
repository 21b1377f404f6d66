"""The report: one page that needs nothing else, with every method's figures and the pictures in it."""

import re
from pathlib import Path

import pandas as pd

import rankscope as rs
from rankscope.comparison import compare, summarise
from rankscope.comparison.report import write_report
from rankscope.tasks import Task


def test_the_page_is_self_contained_and_shows_every_method(
    digits: Task, digits_profile: rs.Profile, digits_budget: rs.ParameterBudget, tmp_path: Path
) -> None:
    found = compare(
        digits,
        ["one-shot", "controller", "head"],
        budget=digits_budget,
        targets=digits_profile.targets,
        profile=digits_profile,
        training=rs.TrainingConfig(steps=14, learning_rate=0.02),
        seeds=range(3),
        uniform_budgets=[2.0],
    )
    files = write_report(
        tmp_path,
        found.runs,
        summarise(found.runs),
        targets=digits_profile.targets,
        decisions=found.decisions,
        command="made by <hand>",
    )
    assert [path.name for path in files] == [
        "report.html", "forest.png", "budgets.png", "ranks.png", "trajectories-controller.png", "flow-controller.png"
    ]  # fmt: skip
    page = files[0].read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert page.count("data:image/png;base64,") == 5
    assert "made by &lt;hand&gt;" in page
    for method in ("uniform", "one-shot", "controller", "head"):
        assert f"<td>{method}</td>" in page
    mean = found.runs[(found.runs["method"] == "one-shot")]["test"].mean()
    assert f"<td>{mean:.4f}</td>" in page
    assert "uniform needs" in page
    assert "Over all tasks" not in page

    other = found.runs.assign(task="another")
    runs = pd.concat([found.runs, other], ignore_index=True)
    both = write_report(tmp_path / "both", runs, summarise(runs))
    assert [path.name for path in both] == ["report.html", "forest.png", "budgets.png"]
    assert "Over all tasks" in both[0].read_text()
