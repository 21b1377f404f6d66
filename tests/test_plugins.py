"""Errors in a user's own task reach the terminal as one line, with the user's file and line, also from worker processes."""

from pathlib import Path

import pytest

import rankscope as rs
from rankscope.comparison import RunSpec, run_all
from rankscope.errors import TaskError
from rankscope.plugins import entry_points, load_entry_point, user_function
from rankscope.training import Lora
from tests.cli.terminal import invoke_code

TASK = """
import torch
from torch import nn

class Mine:
    name, metric = "mine", "score"
    def build_model(self):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    def train_batches(self, seed):
        yield {"x": torch.ones(3, 4)}
        yield {"x": -torch.ones(3, 4)}
    def loss(self, model, batch):
        return batch["y"].mean()
    def evaluate(self, model, split="validation"):
        return {"score": 0.5, "loss": 1.0}
"""
STUDY = "name: mine\ntask: mine.py:Mine\nbudget: {uniform_rank: 1}\ntraining: {steps: 1}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(TASK)
    (tmp_path / "study.yaml").write_text(STUDY)
    return tmp_path


def test_an_error_in_a_tasks_method_is_one_line(folder: Path) -> None:
    given = ["profile", str(folder / "study.yaml"), "--out", str(folder / "out")]
    message = "rankscope: the study's own code raised KeyError: 'y' (mine.py, line 14); --debug shows the traceback.\n"
    status, _, errors = invoke_code(*given)
    assert (status, errors) == (2, message)
    status, _, errors = invoke_code(*given, "--debug")
    assert status == 2
    assert 'return batch["y"].mean()' in errors


def test_an_error_in_a_worker_names_the_line_too(folder: Path) -> None:
    task = rs.load_task("mine.py:Mine", base_dir=folder)
    targets = rs.find_targets(task.build_model())
    uniform = rs.allocate("uniform", targets=targets, budget=rs.ParameterBudget.uniform(targets, 1))
    specs = [RunSpec(method=Lora(uniform), training=rs.TrainingSettings(steps=1), seed=seed) for seed in range(2)]
    with pytest.raises(TaskError, match=r"^the study's own code raised KeyError: 'y' \(mine\.py, line 14\); --debug"):
        run_all(task, specs, n_jobs=2)


def test_functions_of_packages_and_entry_points_are_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)
    with user_function("mine:Mine", Path(), gives="a task", error=TaskError) as factory:
        assert factory().metric == "score"
    for spec, message in {
        "mine:Mein": r"^`mine` must define 'Mein', but does not; did you mean 'Mine'\?$",
        "none.such:f": r"^`none.such:f` must give a task, but raised ModuleNotFoundError: No module named 'none'; --debug",
        "none.py:f": r"^`none.py:f` must name a Python file, but there is no `none.py`; the path starts from ",
    }.items():
        with pytest.raises(TaskError, match=message), user_function(spec, Path(), gives="a task", error=TaskError):
            pass
    info = folder / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[rankscope.tasks]\nmine = mine:Mine\ngone = mine:Gone\n")
    points = entry_points("tasks")
    assert load_entry_point(points["mine"], error=TaskError)().name == "mine"
    with pytest.raises(
        TaskError, match=r"^the entry point `gone` \(mine:Gone\) must load, but raised AttributeError: "
    ):
        load_entry_point(points["gone"], error=TaskError)
    assert entry_points("strategies") == {}
