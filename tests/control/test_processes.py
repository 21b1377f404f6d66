"""Two processes under torchrun with gloo decide as one process that sees both halves of each batch, and end with its loss.

In a plain loop, and through transformers' Trainer.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

import rankscope as rs
from rankscope.tasks import Task
from tests.control.small_models import LAYERS, Net, adamw, batch, control, net
from tests.control.trainers import MASKED, Rows, build, controller_of, losses_of, trainer

STEPS = 40

WORKER = """
import json, sys
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from tests.control.small_models import adamw, batch, control, net

dist.init_process_group("gloo")
me = dist.get_rank()
model = net(r=4)
if sys.argv[2] == "fsdp2":  # parameters are sharded, so that the optimizer comes afterwards
    fully_shard(model)
optimizer = adamw(model)
controller = control(model, optimizer, start="uniform")
wrapped = DistributedDataParallel(model) if sys.argv[2] == "ddp" else model
wrapped.train()
for step in range(40):
    loss = wrapped(**{k: v.tensor_split(2)[me] for k, v in batch(step).items()}).loss
    loss.backward()
    optimizer.step()
    controller.step()
    optimizer.zero_grad()
found = [list(row) for row in controller.decisions["ranks_after"]]
everyone = [None] * 2
dist.all_gather_object(everyone, found)
assert everyone[0] == everyone[1]
model.eval()
loss = float(model(**batch(0)).loss)
model.save_pretrained(sys.argv[1] + "/adapter")
if me == 0:
    with open(sys.argv[1] + "/found.json", "w") as file:
        json.dump({"ranks": found, "loss": loss}, file)
dist.destroy_process_group()
"""


UNEVEN = """
import json, sys, torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import rankscope as rs
from tests.control.small_models import adamw

class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 1)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, e):
        return self.last(torch.tanh(self.experts[e](torch.tanh(self.first(x)))))

dist.init_process_group("gloo")
me = dist.get_rank()
torch.manual_seed(0)
model = get_peft_model(Experts(), LoraConfig(target_modules=["first", "last", "0", "1", "2"], r=4))
wrapped = DistributedDataParallel(model, find_unused_parameters=True).train()
optimizer = adamw(model)
targets = rs.RankAllocation.from_peft_model(model).targets
controller = rs.RankController(
    wrapped, optimizer, budget=rs.ParameterBudget.uniform(targets, 1), start="uniform", every=4, total_steps=16,
    freeze_fraction=0.5, samples=3, hysteresis=0.0, min_gain_ratio=0.0,
)
for step in range(10):
    torch.manual_seed(step)
    loss = wrapped(torch.randn(2, 4, 8)[me], me).square().mean()  # no process calls the last expert
    loss.backward()
    optimizer.step()
    controller.step(loss)
    optimizer.zero_grad()
found = [list(row) for row in controller.decisions["ranks_after"]]
everyone = [None] * 2
dist.all_gather_object(everyone, [found, controller.decisions["action"].tolist()])
assert everyone[0] == everyone[1]
if me == 0:
    with open(sys.argv[1] + "/found.json", "w") as file:
        json.dump({"ranks": dict(controller.allocation.ranks), "actions": everyone[0][1]}, file)
dist.destroy_process_group()
"""


TRAINER = """
import json, sys
import torch.distributed as dist
import rankscope as rs
from tests.control.trainers import MASKED, build, controller_of, losses_of, trainer

folder, resume = sys.argv[1], sys.argv[2] or None
task = rs.load_task("digits-shift")
settings = MASKED | {"rank_change": "auto"}
run = trainer(
    task, folder, model=build(task, 3), controller=settings, per_device_train_batch_size=4, logging_steps=1, weight_decay=0.01
)
run.train(resume_from_checkpoint=resume)
found = [list(row) for row in controller_of(run).decisions["ranks_after"]]
everyone = [None] * 2
dist.all_gather_object(everyone, [found, controller_of(run).decisions["broken"].tolist()])
assert everyone[0] == everyone[1]
run.save_model(folder + "/adapter")
if run.is_world_process_zero():
    with open(folder + "/found.json", "w") as file:
        json.dump({"ranks": found, "losses": losses_of(run), "decisions": controller_of(run).decisions["action"].tolist()}, file)
dist.barrier()
dist.destroy_process_group()
"""


def torchrun(script: str, folder: Path, *arguments: str) -> None:
    """Two processes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "worker.py").write_text(script)
    root = Path(__file__).parents[2]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--standalone",
        str(folder / "worker.py"),
    ]
    env = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *arguments], env=env, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_two_processes_decide_and_end_as_one(tmp_path: Path, wrapper: str) -> None:
    torchrun(WORKER, tmp_path, str(tmp_path), wrapper)
    found = json.loads((tmp_path / "found.json").read_text())

    model = net(r=4)
    optimizer = adamw(model)
    controller = control(model, optimizer, rank_change="mask", start="uniform")
    model.train()
    for step in range(STEPS):
        for part in range(2):
            (model(**{k: v.tensor_split(2)[part] for k, v in batch(step).items()}).loss / 2).backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    model.eval()
    assert found["ranks"] == [list(row) for row in controller.decisions["ranks_after"]]
    expected = model(**batch(0))
    assert found["loss"] == pytest.approx(expected.loss.item(), rel=1e-3)
    torch.manual_seed(0)
    plain = PeftModel.from_pretrained(Net(), str(tmp_path / "adapter")).eval()
    assert list(rs.RankAllocation.from_peft_model(plain, rs.find_targets(Net(), LAYERS)).vector) == found["ranks"][-1]
    torch.testing.assert_close(plain(**batch(0)).logits, expected.logits, rtol=1e-2, atol=1e-2)


@pytest.mark.slow
def test_experts_that_get_no_batch_on_a_process(tmp_path: Path) -> None:
    """Each process routes to an expert of its own, none to the third, whose rank goes elsewhere."""
    torchrun(UNEVEN, tmp_path, str(tmp_path))
    found = json.loads((tmp_path / "found.json").read_text())
    assert "moved" in found["actions"]
    assert found["ranks"]["experts.2"] == 0


@pytest.mark.slow
def test_the_trainer_on_two_processes(digits: Task, tmp_path: Path) -> None:
    """As one process with batches of twice the size; checkpoints and the end are at true ranks, and can be resumed."""
    torchrun(TRAINER, tmp_path / "two", str(tmp_path / "two"), "")
    two = json.loads((tmp_path / "two" / "found.json").read_text())
    assert "moved" in two["decisions"]

    one = trainer(
        digits, tmp_path / "one", model=build(digits, 3), controller=MASKED, logging_steps=1, weight_decay=0.01
    )
    one.train()
    assert two["ranks"] == [list(row) for row in controller_of(one).decisions["ranks_after"]]
    np.testing.assert_allclose(two["losses"], losses_of(one), rtol=1e-3)

    targets = rs.find_targets(digits.build_model())
    for folder, ranks in (
        ("checkpoint-5", two["ranks"][0]),
        ("checkpoint-10", two["ranks"][2]),
        ("adapter", two["ranks"][2]),
    ):
        plain = PeftModel.from_pretrained(digits.build_model(), str(tmp_path / "two" / folder))
        assert list(rs.RankAllocation.from_peft_model(plain, targets).vector) == ranks
    images = Rows(digits).images[:16]
    with torch.no_grad():
        logits = [model.eval()(pixel_values=images).logits for model in (plain, one.model)]
    torch.testing.assert_close(*logits, rtol=1e-2, atol=1e-2)

    torchrun(TRAINER, tmp_path / "again", str(tmp_path / "again"), str(tmp_path / "two" / "checkpoint-5"))
    again = json.loads((tmp_path / "again" / "found.json").read_text())
    assert again["ranks"] == two["ranks"]
    np.testing.assert_allclose(again["losses"], two["losses"], rtol=1e-5)
