"""The report: one page that needs nothing else, with every method's figures and the pictures in it."""

import re
from pathlib import Path

import pandas as pd

import rankscope as rs
from rankscope.comparison import compare, read_comparison, summarise, write_report
from rankscope.settings import TrainingSettings
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
        training=TrainingSettings(steps=14, learning_rate=0.02),
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
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page  # tables scroll on phones
    assert page.count('<div class="scroll">') == page.count("<table>") == 2
    assert "@media (prefers-color-scheme: dark)" in page
    one_budget = found.runs[found.runs["factor"] == 1.0]
    drawn = write_report(tmp_path / "one", one_budget, summarise(one_budget))
    assert [path.name for path in drawn] == ["report.html", "forest.png"]  # no curve over a single budget

    other = found.runs.assign(study="another", task="another")
    runs = pd.concat([found.runs, other], ignore_index=True)
    both = write_report(tmp_path / "both", runs, summarise(runs))
    assert [path.name for path in both] == ["report.html", "forest.png", "budgets.png"]
    page = both[0].read_text()
    assert "Over all tasks" in page
    means = found.runs.groupby("method")["test"].mean()[["uniform", "one-shot", "controller"]]
    for method, rank in means.rank(ascending=False).items():
        assert f"<tr><td>{method}</td><td>{rank:.2f}</td></tr>" in page


def test_pictures_that_cannot_be_drawn_again_are_kept(tmp_path: Path) -> None:
    runs = read_comparison("studies/results/digits-shift/comparison.parquet")
    for name in ("ranks", "trajectories-controller"):
        (tmp_path / f"{name}.png").write_bytes(f"kept {name}".encode())
    page, *drawn = write_report(tmp_path, runs, summarise(runs), pictures_in=tmp_path)
    assert [path.name for path in drawn] == ["forest.png", "budgets.png"]
    assert "Ranks over the run: controller" in page.read_text()
    assert page.read_text().count("data:image/png;base64,") == 4
    assert (tmp_path / "ranks.png").read_bytes() == b"kept ranks"
