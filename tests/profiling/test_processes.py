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
from tests.profiling.test_modalities import llava, some_texts

WORKER = """
import sys
import torch
import rankscope
from torch import distributed
from torch.distributed.fsdp import fully_shard
from tests.profiling.test_modalities import llava, some_texts
from tests.profiling.test_processes import batches, build, routed, take, take_routed

torch.set_num_threads(1)
distributed.init_process_group("gloo")
rank = distributed.get_rank()
model = torch.nn.parallel.DistributedDataParallel(build())
found = take(model, batches()[rank::2])
found.to_parquet(f"{sys.argv[1]}/{rank}.parquet")
sharded = build()
for part in sharded[:3]:
    fully_shard(part)
take(fully_shard(sharded), batches()[:6][rank::2]).to_parquet(f"{sys.argv[1]}/sharded-{rank}.parquet")
take_routed(routed()[rank]).to_parquet(f"{sys.argv[1]}/routed-{rank}.parquet")
found = rankscope.profile(llava(), some_texts()[2 * rank : 2 * rank + 2])
found.to_parquet(f"{sys.argv[1]}/llava-{rank}.parquet")
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


class Experts(nn.Module):
    """Each batch goes to the expert that it names; q and k read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        return self.experts[expert](torch.tanh(self.q(x) + self.k(x)))


def routed() -> list[list[tuple[torch.Tensor, int]]]:
    """Of two processes: the second has no batch for expert 0, none has one for expert 2, and the inputs' means differ."""
    generator = torch.Generator().manual_seed(2)
    return [
        [(mean + torch.randn(5, 8, generator=generator), expert) for expert in experts]
        for mean, experts in ((0.0, (0, 1, 0)), (50.0, (1, 1)))
    ]


def take_routed(data: list[tuple[torch.Tensor, int]]) -> rs.Profile:
    torch.manual_seed(0)
    return rs.profile(Experts(), data, loss_fn=lambda m, b: m(*b).square().mean() * 1e24)


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
    for data, file in ((batches(), ""), (batches()[:6], "sharded-")):
        check_equals_one(take(build(), data), [rs.read_profile(tmp_path / f"{file}{rank}.parquet") for rank in (0, 1)])
    one = take_routed([batch for part in routed() for batch in part])
    for rank in (0, 1):
        found = rs.read_profile(tmp_path / f"routed-{rank}.parquet")
        assert found.metadata["without_gradient"] == ["experts.2"]
        pd.testing.assert_frame_equal(found.table[numbers(one)], one.table[numbers(one)], rtol=1e-3, check_dtype=False)
        assert len(found.table["activation_values"].iloc[-1]) == 0
    one = rs.profile(llava(), some_texts())
    for rank in (0, 1):  # the second process saw no image
        found = rs.read_profile(tmp_path / f"llava-{rank}.parquet")
        assert found.metadata["image_tokens"] == one.metadata["image_tokens"]
        columns = ["image_energy", "text_energy"]
        pd.testing.assert_frame_equal(found.table[columns], one.table[columns], rtol=1e-3)


def numbers(profile: rs.Profile) -> list[str]:
    return [c for c in profile.table.columns if pd.api.types.is_float_dtype(profile.table[c])]


def check_equals_one(one: rs.Profile, of_two: list[rs.Profile]) -> None:
    assert one.table["exact"].tolist() == [True, False, True]
    for found in of_two:
        assert found.metadata["batches"] == one.metadata["batches"]
        assert found.metadata["weights"] == one.metadata["weights"]
        assert found.metadata["data"] == one.metadata["data"]
        assert found.metadata["loss"] == pytest.approx(one.metadata["loss"])
        pd.testing.assert_frame_equal(found.table[numbers(one)], one.table[numbers(one)], rtol=1e-3, check_dtype=False)
        for name, values in one.spectra(signal=False).items():
            assert found.spectra(signal=False)[name][:8] == pytest.approx(values[:8], rel=1e-3)
