"""The seam itself: what counts as a task, what is evaluated, and what importing it costs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

import rankscope as rs
from rankscope.errors import TaskError
from rankscope.tasks import DigitsShift, check_task, evaluate

WITH_DATACLASS = """
from __future__ import annotations
from dataclasses import dataclass
from rankscope.tasks import DigitsShift

@dataclass
class Options:
    batch_size: int = 8

class Mine(DigitsShift):
    name = "mine"
    def __init__(self):
        super().__init__(batch_size=Options().batch_size)
"""


def test_a_class_is_no_task() -> None:
    message = "a task must be an object, but got the class DigitsShift; make one: `DigitsShift()`."
    with pytest.raises(TaskError, match=f"^{re.escape(message)}$"):
        check_task(DigitsShift)


def test_what_is_missing_is_named() -> None:
    class Half:
        name, metric = "half", "score"

        def loss(self, model, batch): ...

    message = (
        "a task must have name, metric, build_model, train_batches, loss, evaluate, but Half lacks build_model, "
        "train_batches, evaluate."
    )
    with pytest.raises(TaskError, match=f"^{re.escape(message)}$"):
        check_task(Half())


def test_metrics_must_hold_the_metric_and_the_loss() -> None:
    class Silent(DigitsShift):
        def evaluate(self, model, split="validation"):
            return {"accuracy": 1.0}

    with pytest.raises(TaskError, match=r"^task `digits-shift` must evaluate 'loss', but gave accuracy\.$"):
        evaluate(Silent(), nn.Identity())


@pytest.mark.parametrize(
    ("batch_size", "must"),
    [
        (0, "must be a whole number from 1 to 2,147,483,647"),
        (-1, "must be a whole number from 1 to 2,147,483,647"),
        (2.5, "of task 'digits-shift' must be a whole number"),
        ("many", "of task 'digits-shift' must be a whole number"),
    ],
)
def test_counts_are_checked(batch_size: object, must: str) -> None:
    message = f"`batch_size` {must}, but got {batch_size!r}."
    with pytest.raises(TaskError, match=f"^{re.escape(message)}$"):
        rs.load_task({"name": "digits-shift", "batch_size": batch_size})


def test_the_data_folder_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKSCOPE_DATA", str(tmp_path))
    message = (
        f"the ready tasks need the repository's data folder, but there is no `{tmp_path}/digits_vit`; "
        "set RANKSCOPE_DATA to the `data` folder of a clone."
    )
    with pytest.raises(TaskError, match=f"^{re.escape(message)}$"):
        rs.load_task("digits-shift").build_model()


def test_a_users_file_may_hold_dataclasses_and_its_tasks_go_to_workers(tmp_path: Path) -> None:
    from joblib import Parallel, delayed

    (tmp_path / "mine.py").write_text(WITH_DATACLASS)
    task = rs.load_task("mine.py:Mine", base_dir=tmp_path)
    sizes = Parallel(n_jobs=2)(delayed(lambda task: len(list(task.train_batches(0))))(task) for _ in range(2))
    assert sizes == [25, 25]
    assert "rankscope_user_mine" not in sys.modules


def test_import_loads_neither_transformers_nor_sklearn() -> None:
    code = "import sys, rankscope.tasks\nprint({'transformers', 'sklearn', 'peft', 'accelerate'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_building_a_model_is_silent_and_leaves_the_generator_alone(capfd: pytest.CaptureFixture[str]) -> None:
    import torch

    heads = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        heads.append(rs.load_task("digits-shift").build_model().classifier.weight)
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*heads)
    assert capfd.readouterr() == ("", "")
