"""The one place that decides device and precision: what it honours, and that it leaves nothing on the model."""

import os
import re
import time

import pytest
import torch
from joblib import Parallel, delayed
from joblib.parallel import get_active_backend
from torch import nn

from rankscope import distributed as devices
from rankscope.errors import RankscopeError


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
    assert devices.best_device() == torch.device("meta")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert devices.best_device() == torch.device("cpu")


def test_a_model_is_moved_unless_it_was_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "best_device", lambda: torch.device("meta"))
    assert devices.placed(nn.Linear(2, 2)).weight.device.type == "meta"
    dispatched = nn.Linear(2, 2)
    dispatched.hf_device_map = {"": "cpu"}
    assert devices.placed(dispatched).weight.device.type == "cpu"


def test_bfloat16_on_a_cpu_without_it_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    devices._warn_of_bfloat16.cache_clear()
    monkeypatch.setattr(devices, "best_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(devices, "computes_in_bfloat16", lambda device: True)
    devices.placed(nn.Linear(2, 2).bfloat16())
    monkeypatch.setattr(devices, "computes_in_bfloat16", lambda device: False)
    devices.placed(nn.Linear(2, 2))
    assert not caplog.messages
    for _ in range(2):
        devices.placed(nn.Linear(2, 2).bfloat16())
    (said,) = caplog.messages
    assert said.startswith("this CPU has no arithmetic for the model's bfloat16 weights")


def test_batches_go_where_the_first_weights_are() -> None:
    offloaded = nn.Sequential(nn.Linear(2, 2, device="meta"), nn.Linear(2, 2))
    assert devices.batch_device(offloaded) == torch.device("cpu")
    assert devices.batch_device(nn.Flatten()) == torch.device("cpu")


def test_mixed_precision_ends_in_float32_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "mixed_dtype", lambda device: torch.bfloat16)
    model, inner = nn.Sequential(nn.Linear(4, 4)), []
    model[0].register_forward_hook(lambda _module, _inputs, output: inner.append(output.dtype))
    with devices.mixed_precision(model):
        assert model(torch.ones(2, 4)).dtype == torch.float32
    assert inner == [torch.bfloat16]
    assert not model._forward_hooks
    assert not torch.is_autocast_enabled("cpu")


def test_generators_go_on_as_if_nothing_was_drawn() -> None:
    before = torch.get_rng_state()
    with devices.seeded(3):
        drawn = torch.rand(2)
    assert torch.equal(torch.get_rng_state(), before)
    with devices.seeded(3):
        assert torch.equal(torch.rand(2), drawn)


def test_several_copies_of_a_process_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    remedy = "leave it out."
    devices.require_one_process("a Trainer", remedy=remedy)
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = "a Trainer must run as one process, but WORLD_SIZE is 2; leave it out."
    with pytest.raises(RankscopeError, match=f"^{re.escape(message)}$"):
        devices.require_one_process("a Trainer", remedy=remedy)


def _gpu_of_this_worker(_: int) -> str:
    time.sleep(0.3)  # so that one worker does not do both
    return os.environ["CUDA_VISIBLE_DEVICES"]


def test_each_worker_sees_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    for _ in range(2):
        with devices.one_gpu_each(3):
            seen = Parallel(n_jobs=3)(delayed(_gpu_of_this_worker)(i) for i in range(6))
        assert set(seen) == {"3", "GPU-5"}
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,GPU-5"


def test_one_gpu_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with devices.one_gpu_each(2):
        assert get_active_backend()[0].backend_kwargs == {}
