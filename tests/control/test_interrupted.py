"""Runs through the Trainer that are killed and resumed, or split over processes; adapters where rankscope is not installed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from peft import PeftModel

import rankscope as rs
from rankscope.adapters import from_peft_model
from rankscope.tasks import Task
from tests.control.test_callback import Rows, callback_of, trainer, weights

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

KILLED = """
import os, signal, sys
from pathlib import Path
from transformers import TrainerCallback
import rankscope as rs
from tests.control.test_callback import trainer

folder, when, step = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if when == "step" and state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_save(self, args, state, control, **kwargs):
        if when == "save" and state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

digits = rs.load_task("digits-shift")
budget = rs.ParameterBudget.uniform(rs.find_targets(digits.build_model()), 1)
run = trainer(digits, budget, folder)
run.callback_handler.callbacks.insert(0, Kill())  # before the controller saves its state
run.train()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("when", "step", "resumed_from"),
    [("step", 7, 5), ("step", 9, 5), ("step", 11, 10), ("save", 10, 5)],
    ids=["between decisions", "at a decision", "after the last", "while saving"],
)
def test_a_killed_run_resumes_to_the_same_end(
    digits: Task, digits_budget: rs.ParameterBudget, tmp_path: Path, when: str, step: int, resumed_from: int
) -> None:
    whole = trainer(digits, digits_budget, tmp_path / "whole")
    whole.train()
    folder = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, str(folder), when, str(step)]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    complete = [path for path in folder.iterdir() if (path / "rank_controller.pt").exists()]
    assert max(int(path.name.split("-")[1]) for path in complete) == resumed_from
    resumed = trainer(digits, digits_budget, folder)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{resumed_from}"))
    expected = weights(whole.model)
    assert weights(resumed.model).keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed.model).items())
    pd.testing.assert_frame_equal(callback_of(resumed).controller.decisions, callback_of(whole).controller.decisions)


SPLIT = """
import json, sys
from pathlib import Path
import torch.distributed as dist
import rankscope as rs
from tests.control.test_callback import callback_of, trainer

folder = Path(sys.argv[1])
digits = rs.load_task("digits-shift")
budget = rs.ParameterBudget.uniform(rs.find_targets(digits.build_model()), 1)
run = trainer(digits, budget, folder, per_device_train_batch_size=4, seed=3, rank=3)
run.train()
controller = callback_of(run).controller
found = [list(row) for row in controller.decisions["ranks_after"]]
everyone = [None] * dist.get_world_size()
dist.all_gather_object(everyone, found)
assert all(each == found for each in everyone)
if dist.get_rank() == 0:
    controller.masks.save_pretrained(str(folder / "adapter"))
    json.dump({"ranks": found, "losses": controller.state_dict()["losses"]}, open(folder / "found.json", "w"))
else:
    controller.state_dict()
dist.barrier()
"""


@pytest.mark.slow
def test_two_processes_through_the_trainer_decide_alike_and_learn_as_one(
    digits: Task, digits_budget: rs.ParameterBudget, tmp_path: Path
) -> None:
    (tmp_path / "split.py").write_text(SPLIT)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run(
        [sys.executable, *launcher, str(tmp_path / "split.py"), str(tmp_path)],
        env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())

    batches = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}  # the same four in a window
    one = trainer(digits, digits_budget, tmp_path / "one", seed=3, rank=3, mode="mask", **batches)
    one.train()
    controller = callback_of(one).controller
    assert controller is not None
    assert found["ranks"] == [list(row) for row in controller.decisions["ranks_after"]]
    losses = controller.state_dict()["losses"]
    assert found["losses"] == pytest.approx(losses, rel=2e-2)
    plain = PeftModel.from_pretrained(digits.build_model(), str(tmp_path / "adapter"))
    targets = rs.find_targets(digits.build_model())
    assert list(from_peft_model(plain, targets).vector) == found["ranks"][-1]


WITHOUT = """
import sys, torch
sys.modules["rankscope"] = None
from peft import PeftModel
base = torch.load("base.pt", weights_only=False)
model = PeftModel.from_pretrained(base, "adapter").eval()
with torch.no_grad():
    torch.testing.assert_close(model(pixel_values=torch.load("images.pt")).logits, torch.load("logits.pt"), rtol=0, atol=0)
print("same")
"""


def test_what_it_trained_loads_where_rankscope_is_not_installed(
    digits: Task, digits_budget: rs.ParameterBudget, tmp_path: Path
) -> None:
    run = trainer(digits, digits_budget, tmp_path / "run", save_strategy="no")
    run.train()
    controller = callback_of(run).controller
    assert controller is not None
    assert "moved" in set(controller.decisions["action"])
    run.model.save_pretrained(str(tmp_path / "adapter"))
    images = Rows(digits).images[:16]
    with torch.no_grad():
        torch.save(run.model.eval()(pixel_values=images).logits, tmp_path / "logits.pt")
    torch.save(images, tmp_path / "images.pt")
    torch.save(digits.build_model(), tmp_path / "base.pt")
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip().endswith("same"), done.stderr
