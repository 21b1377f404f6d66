"""Devices, precision and processes: the only module that decides where models run, or talks to other processes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from rankscope.errors import ModelError, RankscopeError

T = TypeVar("T")
Model = TypeVar("Model", bound=nn.Module)


def best_device() -> torch.device:
    """The device that `ACCELERATE_USE_CPU` or `ACCELERATE_TORCH_DEVICE` asks for, else the current accelerator or the CPU."""
    from accelerate.utils import parse_flag_from_env  # its PartialState would fix the settings of all later ones

    wanted = "cpu" if parse_flag_from_env("ACCELERATE_USE_CPU") else os.environ.get("ACCELERATE_TORCH_DEVICE")
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device(wanted or found or "cpu")


def mixed_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of matrix products beside float32 weights: bfloat16 on GPUs that support it; else None."""
    on_cuda = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if on_cuda or device.type == "xpu" else None


def placed(model: Model) -> Model:
    """The model on the best device. One that was placed by hand, or by a `device_map`, stays where it is."""
    by_hand = hasattr(model, "hf_device_map") or any(p.device.type != "cpu" for p in model.parameters())
    device = best_device()
    return model if by_hand or device.type == "cpu" else model.to(device)


def batch_device(model: nn.Module) -> torch.device:
    """The device for a model's batches: that of its first parameter that is not offloaded."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


@contextmanager
def mixed_precision(model: nn.Module) -> Iterator[None]:
    """Run forward passes (not backward ones) in mixed precision if device or weights call for it, with float32 outputs."""
    from accelerate.utils import convert_to_fp32

    device, halves = batch_device(model), (torch.bfloat16, torch.float16)  # some weights may be float32 beside them
    dtype = mixed_dtype(device) or next((p.dtype for p in model.parameters() if p.dtype in halves), None)
    handle = model.register_forward_hook(lambda _module, _inputs, output: convert_to_fp32(output))
    try:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            yield
    finally:
        handle.remove()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's generators; on exit those of the CPU and of all GPUs continue as if nothing had been drawn."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # by default it warns of several GPUs
        torch.manual_seed(seed)
        yield


def n_processes() -> int:
    """Processes of the torch.distributed group; 1 without one."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the first process, or the only one."""
    return n_processes() == 1 or distributed.get_rank() == 0


def gathered(value: T) -> list[T]:
    """The values of all processes, in order; every process must call it, and those below."""
    if n_processes() == 1:
        return [value]
    values: list[Any] = [None] * n_processes()
    distributed.all_gather_object(values, value)
    return values


@torch.no_grad()
def sum_over_processes(tensors: Iterable[Tensor]) -> None:
    """Replace tensors by their sums over processes; each process must pass as many, of the same shapes."""
    for tensor in tensors if n_processes() > 1 else ():
        distributed.all_reduce(tensor)


def check_same(value: Any, *, what: str) -> None:
    """Raise a ModelError on every process if the values of any differ."""
    values = gathered(value)
    if odd := [index for index, other in enumerate(values) if other != values[0]]:
        must = f"{what} must be the same on every process, but process {odd[0]} differs from process 0"
        raise ModelError(f"{must}; start all from the same checkpoint and seed.")


def whole(tensor: Tensor) -> Tensor:
    """A tensor that FSDP2 shards, gathered; any other as it is."""
    gathered_tensor: Tensor = getattr(tensor, "full_tensor", lambda: tensor)()
    return gathered_tensor


def require_one_process(what: str) -> None:
    """Raise if a launcher (torchrun, accelerate launch) started copies of this process, which would all do the same work."""
    copies = os.environ.get("WORLD_SIZE", "1")
    if copies.isdigit() and int(copies) > 1:
        remedy = "start it without torchrun or accelerate launch, and use --jobs for several runs at a time"
        raise RankscopeError(f"{what} must run as one process, but WORLD_SIZE is {copies}; {remedy}.")


@contextmanager
def one_gpu_each(n_jobs: int) -> Iterator[None]:
    """Show each worker process that joblib starts one GPU only, in turn; does nothing with fewer than two of either."""
    from joblib import parallel_config

    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    n_gpus = torch.cuda.device_count()
    gpus = tuple(named[:n_gpus] or map(str, range(n_gpus)))
    options: Any = {"initializer": _take_gpu, "initargs": (gpus, _claims().name)} if min(n_jobs, n_gpus) > 1 else {}
    with parallel_config(backend="loky", **options):
        yield


# One folder for this process's workers, so that joblib reuses them.
_claims = cache(partial(tempfile.TemporaryDirectory[str], prefix="rankscope-workers-"))


def _take_gpu(gpus: Sequence[str], folder: str) -> None:
    """Restrict this process to one GPU. It locks a file for it until it ends, so that its successor gets the same one."""
    import fcntl

    for place in count():
        claim = os.open(Path(folder, str(place)), os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(claim)
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus[place % len(gpus)]
            return
