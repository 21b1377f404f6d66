"""The commands under torchrun and accelerate launch: what one process gives, said and written once, and errors in one line."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rankscope.comparison import read_comparison
from tests.cli.terminal import invoke
from tests.launcher import ROOT, own_lines, torchrun

pytestmark = pytest.mark.slow

STUDY = """
name: short
task: digits-shift
budget: {uniform_rank: 1}
profile: {n_batches: 3, head_steps: 4}
training: {steps: 4, learning_rate: 0.02}
controller: {mode: "on", freeze_fraction: 0.9, hysteresis: 0.0, min_gain_ratio: 0.0}
compare: {methods: [controller], n_seeds: 1, n_tuning_seeds: 1}
"""

FAILING = """
import os, signal, time
import rankscope as rs
from rankscope.tasks import DigitsShift

class Failing(DigitsShift):
    def loss(self, model, batch):
        if os.environ.get("RANK") == "1" and model.training:
            {what}
        return super().loss(model, batch)
"""


def test_the_commands_give_and_say_what_one_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.yaml").write_text(STUDY)
    for command in ("profile", "allocate", "train", "compare"):
        status, expected, errors = invoke(command, "short.yaml", "--out", "out/one")
        assert status == 0, errors
        done = torchrun("-m", "rankscope", command, "short.yaml", "--out", "out/two", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert not [line for line in done.stderr.splitlines() if "OMP_NUM_THREADS" not in line and set(line) != {"*"}]
        assert done.stdout.count("wrote ") == 1
        if command in ("profile", "allocate"):
            assert done.stdout == expected.replace("out/one", "out/two")
    one, two = (read_comparison(Path(f"out/{n}/comparison.parquet")) for n in ("one", "two"))
    figures = ["validation", "test"]
    assert two[figures].to_numpy() == pytest.approx(one[figures].to_numpy(), abs=0.006)  # one image of 200
    same = ["method", "role", "seed", "learning_rate", "parameters", "n_moved", "ranks"]
    assert two[same].to_dict("list") == one[same].to_dict("list")
    names = [sorted(each.name for each in Path(f"out/{n}/runs").glob("*.json")) for n in ("one", "two")]
    assert names[0] == names[1]  # the keys are those of one process: either goes on with the other's runs

    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu", "-m", "rankscope"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*launch, "compare", "short.yaml", "--out", "out/two", "--seeds", "2"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1
    assert len(list(Path("out/two/runs").glob("*.json"))) == 4  # two more


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("raise ValueError('a broken row')", "rankscope: process 1: ValueError: a broken row"),
        ("os.kill(os.getpid(), signal.SIGKILL)", None),
    ],
)
def test_an_error_on_one_process_ends_all_in_one_line(tmp_path: Path, what: str, line: str | None) -> None:
    (tmp_path / "failing.py").write_text(FAILING.replace("{what}", what))
    (tmp_path / "short.yaml").write_text(STUDY.replace("digits-shift", "failing.py:Failing"))
    arguments = ["compare", "short.yaml", "--methods", "uniform", "--methods", "head"]
    done = torchrun("-m", "rankscope", *arguments, cwd=tmp_path)
    assert done.returncode != 0
    said = own_lines(done.stderr)
    assert len(said) <= 1, done.stderr
    if line:
        assert said == [line]
    else:
        assert "SIGKILL" in done.stderr
        assert all(each.startswith("rankscope: the processes of a run must all be there") for each in said)
    assert "rankscope/" not in "".join(re.findall(r'File "(.*?)"', done.stderr))  # no traceback of ours


def test_bad_input_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "short.yaml").write_text(STUDY)
    for arguments, line in (
        (["train", "short.yaml", "--set", "training.stepps=3"], "rankscope: `--set`: unknown key `training.stepps`; did you mean `training.steps`?"),
        (["compare", "short.yaml", "--jobs", "2"], "rankscope: `--jobs` must be 1 under torchrun or accelerate launch, whose processes share each run, but got 2; leave it out."),
        (["compare", "trainer.yaml"], "rankscope: `trainer.py:make`, a task with a Trainer of its own, must run as one process, but WORLD_SIZE is 2; launch your "
            "Trainer's own script so, with RankControllerCallback; or run rankscope as one process."),
    ):  # fmt: skip
        (tmp_path / "trainer.py").write_text("def make(peft_config, seed): ...\n")
        (tmp_path / "trainer.yaml").write_text(STUDY.replace("digits-shift", "trainer.py:make"))
        done = torchrun("-m", "rankscope", *arguments, cwd=tmp_path)
        assert done.returncode != 0
        assert own_lines(done.stderr) == [line], done.stderr
    done = torchrun("-m", "rankscope", "compare", "short.yaml", cwd=tmp_path, ACCELERATE_USE_FSDP="true")
    must = (
        "rankscope: rankscope's own loop must hold the whole model on each process, but accelerate launch asks for FSDP"
    )
    assert [each.startswith(must) for each in own_lines(done.stderr)] == [True], done.stderr
