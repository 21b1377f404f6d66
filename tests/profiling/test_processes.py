"""Two processes on half the data each, under torchrun with gloo, give the profile of one process on all of it."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

import rankscope as rs

WORKER = """
import sys
import torch
from torch import distributed
from tests.profiling.test_processes import batches, build, take

torch.set_num_threads(1)
distributed.init_process_group("gloo")
rank = distributed.get_rank()
model = torch.nn.parallel.DistributedDataParallel(build())
found = take(model, batches()[rank::2])
found.to_parquet(f"{sys.argv[1]}/{rank}.parquet")
distributed.destroy_process_group()
"""


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 400), nn.Tanh(), nn.Linear(400, 400), nn.Tanh(), nn.Linear(400, 2))


def batches() -> list[torch.Tensor]:
    """Seven, so that one process has more, and of unequal sizes."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 8, generator=generator) for size in (6, 3, 6, 6, 5, 6, 1)]


def take(model: nn.Module, data: list[torch.Tensor]) -> rs.Profile:
    targets = rs.find_targets(build())
    return rs.profile(model, data, targets=targets, loss_fn=lambda m, b: m(b).square().mean(), sketch_size=16)


def test_two_processes_give_the_profile_of_one(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
        str(tmp_path),
    ]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    one = take(build(), batches())
    assert one.table["exact"].tolist() == [True, False, True]
    for rank in (0, 1):
        found = rs.read_profile(tmp_path / f"{rank}.parquet")
        assert found.metadata["batches"] == 7
        assert found.metadata["data"] == one.metadata["data"]
        assert found.metadata["loss"] == pytest.approx(one.metadata["loss"])
        numbers = [c for c in one.table.columns if pd.api.types.is_float_dtype(one.table[c])]
        pd.testing.assert_frame_equal(found.table[numbers], one.table[numbers], rtol=1e-3, check_dtype=False)
        for name, values in one.spectra(signal=False).items():
            assert found.spectra(signal=False)[name][:8] == pytest.approx(values[:8], rel=1e-3)
