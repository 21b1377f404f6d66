"""Two processes under torchrun with gloo decide as one process that sees both halves of each batch, and end with its loss."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.control.small_models import adamw, batch, control, net

STEPS = 40

WORKER = """
import json, sys
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tests.control.small_models import adamw, batch, control, net

dist.init_process_group("gloo")
me = dist.get_rank()
model = net(r=4)
optimizer = adamw(model)
controller = control(model, optimizer, start="uniform")
wrapped = DistributedDataParallel(model)
wrapped.train()
for step in range(40):
    loss = wrapped(**{k: v.tensor_split(2)[me] for k, v in batch(step).items()}).loss
    loss.backward()
    optimizer.step()
    controller.step()
    optimizer.zero_grad()
assert len(controller.state_dict()["losses"]) == 24
found = [list(row) for row in controller.decisions["ranks_after"]]
everyone = [None] * 2
dist.all_gather_object(everyone, found)
assert everyone[0] == everyone[1]
if me == 0:
    model.eval()
    json.dump({"ranks": found, "loss": float(model(**batch(0)).loss)}, open(sys.argv[1], "w"))
"""


@pytest.mark.slow
def test_two_processes_decide_and_end_as_one(tmp_path: Path) -> None:
    script, out = tmp_path / "worker.py", tmp_path / "found.json"
    script.write_text(WORKER)
    root = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(script), str(out)],
        check=True,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        cwd=root,
    )
    found = json.loads(out.read_text())

    model = net(r=4)
    optimizer = adamw(model)
    controller = control(model, optimizer, mode="mask", start="uniform")
    model.train()
    for step in range(STEPS):
        for part in range(2):
            (model(**{k: v.tensor_split(2)[part] for k, v in batch(step).items()}).loss / 2).backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    model.eval()
    assert found["ranks"] == [list(row) for row in controller.decisions["ranks_after"]]
    assert found["loss"] == pytest.approx(float(model(**batch(0)).loss.detach()), rel=1e-3)
