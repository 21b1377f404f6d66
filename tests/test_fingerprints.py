"""Fingerprints: equal content, equal hash, in any process; whatever differs is named."""

import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

import rankscope as rs
from rankscope.errors import FileError
from rankscope.files import digest, digest_source, require_same
from rankscope.settings import ControllerSettings
from rankscope.tasks import TextClassification, fingerprint_task
from tests.tasks.models import save_bert, sentences


@dataclass
class Two:
    a: int
    b: tuple[int, ...] = ()


class Holder:
    def __init__(self, value: Any) -> None:
        self.value, self.me = value, self


LAYER = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
VALUES = [
    None, True, 1, 1.0, "1", b"1", "a", Path("a/b"), [], [1], [[1]], {}, {"a": 1}, {"a": 2}, {1, 2}, Two(1), Two(2), Two(1, (1,)),
    np.zeros(2), np.zeros((2, 1)), np.zeros(2, dtype=np.float32), np.zeros(0), np.array(["a", None], dtype=object),
    torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, 1), torch.tensor(0.0), torch.zeros(2, device="meta"),
    LAYER, torch.nn.Linear(2, 2, bias=False), pd.DataFrame({"a": [1]}), pd.DataFrame({"b": [1]}), Holder(1), Holder(2), Holder.__init__,
]  # fmt: skip


def test_different_content_has_different_hashes() -> None:
    assert len({digest(value) for value in VALUES}) == len(VALUES)


@pytest.mark.parametrize(
    ("one", "same"),
    [([1, 2], (1, 2)), ({"a": 1, "b": 2}, {"b": 2, "a": 1}), ({"x", "y", "z"}, {"z", "y", "x"}), (np.float64(1), 1.0),
     (np.arange(6).reshape(2, 3).T, np.arange(6).reshape(2, 3).T.copy()), (Two(1), Two(1, ())), (Holder(1), Holder(1)),
     (torch.arange(4)[::2], torch.tensor([0, 2]))],
)  # fmt: skip
def test_equal_content_has_equal_hashes(one: Any, same: Any) -> None:
    assert digest(one) == digest(same)


def test_settings_are_told_by_what_is_not_at_its_default() -> None:
    default = ControllerSettings()
    assert digest(default) == digest(ControllerSettings(every=default.every))
    assert digest(default) != digest(ControllerSettings(every=50))


def test_every_weight_counts() -> None:
    layer = torch.nn.Linear(64, 64)
    before = digest(layer)
    with torch.no_grad():
        layer.weight[40, 20] += 1e-3
    assert digest(layer) != before


def test_other_processes_find_the_same() -> None:
    code = "from rankscope.files import digest; print(digest({'a': {'x', 'y'}, 'b': [1, 2.5]}))"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)]
    assert {run.stdout.strip() for run in runs} == {digest({"a": {"x", "y"}, "b": [1, 2.5]})}


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"format": 1, "task": {"batch_size": 4, "name": "a"}, "data": "0" * 16},
         "`f` must be about task batch_size 8, but is about 4; make it again."),
        ({"format": 1, "task": {"batch_size": 8}, "data": "0" * 16}, "`f` must be about task name 'a', but is about None; make it again."),
        ({"format": 1, "task": {"batch_size": 8, "name": "a", "old": 1}, "data": "0" * 16},
         "`f` must be about task old None, but is about 1; make it again."),
        ({"format": 1, "task": {"batch_size": 8, "name": "a"}, "data": "1" * 16},
         "`f` must be about the present data (0000000000000000), but is about another (1111111111111111); make it again."),
        ({}, "`f` must say what it was made from, but does not: an older rankscope wrote it; make it again."),
    ],
)  # fmt: skip
def test_the_first_difference_is_named(kept: dict[str, Any], message: str) -> None:
    wanted = {"format": 1, "task": {"batch_size": 8, "name": "a"}, "data": "0" * 16}
    require_same(wanted, wanted, what="`f`", remedy="make it again.")
    with pytest.raises(FileError, match=f"^{re.escape(message)}$"):
        require_same(kept, wanted, what="`f`", remedy="make it again.")


USERS = """
from rankscope.tasks import DigitsShift

FACTOR = 1.0

class Scaled(DigitsShift):
    def loss(self, model, batch):
        return FACTOR * super().loss(model, batch)

def make():
    return Scaled(batch_size=50)
"""


def test_a_users_task_is_told_by_its_source_weights_and_batches(tmp_path: Path) -> None:
    file = tmp_path / "task.py"
    file.write_text(USERS)
    found = [fingerprint_task(rs.load_task("task.py:make", base_dir=tmp_path)) for _ in range(2)]
    assert found[0] == found[1]
    assert found[0]["task"] == {"batch_size": 50, "name": "digits-shift", "metric": "accuracy", "kind": "Scaled"}
    file.write_text(USERS.replace("1.0", "2.0"))
    changed = fingerprint_task(rs.load_task("task.py:make", base_dir=tmp_path))
    assert [key for key in changed if changed[key] != found[0][key]] == ["code"]
    file.write_text(USERS.replace("50", "40"))
    changed = fingerprint_task(rs.load_task("task.py:make", base_dir=tmp_path))
    assert {key for key in changed if changed[key] != found[0][key]} == {"task", "code", "data"}


@pytest.mark.parametrize(("old", "new", "same"), [("60", "90", True), ("x + 1", "x + 2", False)])
def test_of_a_script_only_the_task_itself_counts(tmp_path: Path, old: str, new: str, same: bool) -> None:
    script = "def loss(x):\n    return x + 1\n\nn_trials = 60\n"
    hashes = []
    for name, text in (("a.py", script), ("b.py", script.replace(old, new))):
        (tmp_path / name).write_text(text)
        hashes.append(digest_source(runpy.run_path(str(tmp_path / name))["loss"]))
    assert (hashes[0] == hashes[1]) is same


def test_a_generic_task_is_told_by_options_data_weights_and_tokenizer(tmp_path: Path) -> None:
    """Where model and data lie does not count; every text, every label and every file of the tokenizer does."""
    table = sentences()

    def facts(table: pd.DataFrame, folder: str = "bert", **options: Any) -> dict[str, Any]:
        (tmp_path / folder).mkdir(exist_ok=True)
        table.to_csv(tmp_path / folder / "rows.csv", index=False)
        return fingerprint_task(TextClassification(tmp_path / folder, tmp_path / folder / "rows.csv", **options))

    def changed(*arguments: Any, **options: Any) -> set[str]:
        now = facts(*arguments, **options)
        return {key for key in now if now[key] != before[key]}

    save_bert(tmp_path / "bert")
    before = facts(table)
    shutil.copytree(tmp_path / "bert", tmp_path / "moved")
    assert changed(table, "moved") == set()
    assert before == fingerprint_task(TextClassification(tmp_path / "bert", table))
    assert changed(table, max_length=16) == {"task"}
    assert changed(table.assign(label=[*table["label"][:-1], "cat"])) == {"data"}
    assert changed(table, split_seed=1) >= {"data"}
    (tmp_path / "moved" / "tokenizer_config.json").write_text("{}")
    assert changed(table, "moved") == {"data"}
    weights = load_file(tmp_path / "bert" / "model.safetensors")
    weights[max(weights)] += 1
    save_file(weights, tmp_path / "bert" / "model.safetensors", metadata={"format": "pt"})
    assert changed(table) == {"weights"}
