"""A Trainer's run that is killed at any moment goes on from its last whole checkpoint, and ends as if it had never been."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import Trainer

from rankscope.control.trainer import STATE_FILE
from rankscope.tasks import Task
from tests.control.trainers import MASKED, build, ends_the_same, trainer

WORKER = """
import os, signal, sys
import torch
from transformers import TrainerCallback
import rankscope as rs
from tests.control.trainers import MASKED, build, trainer

folder, mode, moment, step = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class Killer(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if moment == "in a step" and state.global_step == step - 1:
            die()

    def on_step_end(self, args, state, control, **kwargs):
        if moment == "after a step" and state.global_step == step:
            die()

save = torch.save

def half(value, path, *args, **kwargs):
    save(value, path, *args, **kwargs)
    if f"checkpoint-{step}" in str(path) and moment in str(path):
        with open(path, "r+b") as file:
            file.truncate(os.path.getsize(path) // 2)
        die()

torch.save = half
task = rs.load_task("digits-shift")
rank, settings = (3, MASKED) if mode == "masked" else (1, {})
trainer(task, folder, model=build(task, rank), controller=settings, callbacks=(Killer(),), save_steps=2).train()
"""


def fresh(task: Task, folder: Path, mode: str) -> Trainer:
    rank, settings = (3, MASKED) if mode == "masked" else (1, {})
    return trainer(task, folder, model=build(task, rank), controller=settings, save_steps=2)


def killed(folder: Path, mode: str, moment: str, step: int) -> None:
    """A run in a process of its own, that dies of SIGKILL."""
    script = folder / "worker.py"
    folder.mkdir(parents=True)
    script.write_text(WORKER)
    root = Path(__file__).parents[2]
    arguments = [sys.executable, str(script), str(folder), mode, moment, str(step)]
    done = subprocess.run(
        arguments, env=os.environ | {"PYTHONPATH": str(root)}, cwd=root, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-4000:]


def checkpoints(folder: Path, *, whole: bool) -> list[int]:
    """The steps of those that are whole or not, in order: the controller's state is the last file of each."""
    found = [path for path in folder.glob("checkpoint-*") if (path / STATE_FILE).exists() == whole]
    return sorted(int(path.name.split("-")[1]) for path in found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "moment", "step"),
    [
        ("resized", "in a step", None),
        ("masked", "after a step", None),
        ("resized", "after a step", 9),  # a decision, and no checkpoint before the next step
        ("resized", "optimizer.pt", 8),
        ("resized", STATE_FILE.split(".")[0], 6),
    ],
)
def test_sigkill_and_resume_end_the_same(
    digits: Task, tmp_path: Path, mode: str, moment: str, step: int | None
) -> None:
    """No step: a random one."""
    step = step or random.randrange(3, 13)
    whole = fresh(digits, tmp_path / "whole", mode)
    whole.train()
    folder = tmp_path / "killed"
    killed(folder, mode, moment, step)
    before = list(range(2, step, 2))  # the Trainer saves after `on_step_end`
    assert checkpoints(folder, whole=True) == before, step
    assert checkpoints(folder, whole=False) == ([] if moment.endswith("a step") else [step])
    resumed = fresh(digits, folder, mode)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{before[-1]}"))
    ends_the_same(resumed, whole)
    assert checkpoints(folder, whole=True) == list(range(2, 13, 2))
