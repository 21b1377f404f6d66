"""Several processes, one profile: sums are all-reduced, so that n processes on a part each see what one sees on all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import count
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, distributed

from rankscope.errors import ModelError, RankscopeError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


Model = TypeVar("Model", bound="nn.Module")


def best_device() -> torch.device:
    """The device that models run on: the present accelerator (CUDA, MPS, XPU, …), else the CPU.

    `CUDA_VISIBLE_DEVICES` and accelerate's `ACCELERATE_USE_CPU` and `ACCELERATE_TORCH_DEVICE` hold. No Accelerator is made, so
    that one of the caller's keeps its own settings.
    """
    import torch
    from accelerate.utils import parse_flag_from_env

    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        return torch.device("cpu")
    if wanted := os.environ.get("ACCELERATE_TORCH_DEVICE"):
        return torch.device(wanted)
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def mixed_dtype(device: torch.device) -> torch.dtype | None:
    """The type that matrix products run in beside float32 weights: bfloat16 on GPUs that have it; None: that of the weights."""
    import torch

    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.bfloat16 if device.type == "xpu" else None


def placed(model: Model) -> Model:
    """The model on the best device. One that was placed by hand, or by a `device_map`, stays where it is."""
    by_hand = hasattr(model, "hf_device_map") or any(p.device.type != "cpu" for p in model.parameters())
    device = best_device()
    return model if by_hand or device.type == "cpu" else model.to(device)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that FSDP2 shards, gathered; every process must call it. Any other as it is."""
    gather: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return gather() if gather else tensor


def batch_device(model: nn.Module) -> torch.device:
    """The device that a model takes its batches on: that of its first parameter that is not offloaded."""
    import torch

    devices = (parameter.device for parameter in model.parameters())
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


@contextmanager
def mixed_precision(model: nn.Module) -> Iterator[None]:
    """Forward passes of `model` in mixed precision where its device or weights call for it, their outputs in float32.

    Leave it before the backward pass: hooks on gradients would run in mixed precision too. Nothing stays on the model.
    """
    import torch
    from accelerate.utils import convert_to_fp32

    device = batch_device(model)
    halves = (p.dtype for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16))
    dtype = mixed_dtype(device) or next(halves, None)  # float32 adapters or heads beside them
    handle = model.register_forward_hook(lambda _module, _inputs, output: convert_to_fp32(output))
    try:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            yield
    finally:
        handle.remove()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds torch's generators inside; afterwards those of the CPU and of all GPUs go on as if nothing had been drawn."""
    import torch

    gpus = range(torch.cuda.device_count())  # given, since torch warns where it is to find several by itself
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(seed)
        yield


def require_one_process(what: str) -> None:
    """Checks that no launcher (torchrun, accelerate launch) started several copies of this process.

    Raises:
        RankscopeError: It did; each copy would do the same work on the same batches.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    if count.isdigit() and int(count) > 1:
        raise RankscopeError(
            f"{what} must run as one process, but WORLD_SIZE is {count}; start it without torchrun or accelerate launch, "
            "and use --jobs for several runs at a time."
        )


# --- several GPUs, several processes ------------------------------------------------------------------------------


def visible_gpus() -> list[str]:
    """The CUDA devices of this process, as `CUDA_VISIBLE_DEVICES` names them."""
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] or [str(index) for index in range(count)]


@contextmanager
def one_gpu_each(n_jobs: int) -> Iterator[None]:
    """Inside, each worker process that joblib starts sees one GPU only, in turn; nothing where there are no two of either."""
    gpus = visible_gpus()
    if n_jobs < 2 or len(gpus) < 2:
        yield
        return
    from joblib import parallel_config

    with parallel_config(backend="loky", initializer=take_gpu, initargs=(tuple(gpus), _claims().name)):
        yield


@cache
def _claims() -> tempfile.TemporaryDirectory[str]:
    """This process's folder for the claims of its workers; the same for all, so that joblib uses workers again."""
    return tempfile.TemporaryDirectory(prefix="rankscope-workers-")


def take_gpu(gpus: Sequence[str], folder: str) -> None:
    """Keeps this process to one GPU. It must not have looked for GPUs yet.

    A worker holds the lock on the first file that no other holds until it ends, so that one that is started in the place of
    another gets its GPU.
    """
    import fcntl

    for place in count():
        claim = Path(folder, str(place)).open("w")  # noqa: SIM115
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            claim.close()
        else:
            _held.append(claim)
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus[place % len(gpus)]
            return


_held: list[IO[str]] = []


T = TypeVar("T")


def n_processes() -> int:
    """How many processes train together; 1 outside torch.distributed."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def from_first_process(value: T) -> T:
    """The first process's value, on every process; every process must call it.

    >>> from_first_process(3)
    3
    """
    if n_processes() == 1:
        return value
    box: list[Any] = [value]
    distributed.broadcast_object_list(box, src=0)
    received: T = box[0]
    return received


def check_same(value: Any, *, what: str) -> None:
    """Refuses to go on where processes differ; every process must call it, and every one raises.

    Raises:
        ModelError: The values differ.
    """
    if n_processes() == 1:
        return
    values: list[Any] = [None] * n_processes()
    distributed.all_gather_object(values, value)
    if odd := _different(values):
        raise ModelError(
            f"{what} must be the same on every process, but process {odd[0]} differs from process 0; "
            "start all from the same checkpoint and seed."
        )


def _different(values: Sequence[Any]) -> list[int]:
    return [index for index, value in enumerate(values) if value != values[0]]


def process_count() -> int:
    """Processes of the torch.distributed group; 1 without one."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def several() -> bool:
    """Whether this is one of several processes."""
    return process_count() > 1


def is_first() -> bool:
    """Whether this is the first process, or the only one."""
    return not several() or distributed.get_rank() == 0


def gathered(value: Any) -> list[Any]:
    """The values of all processes, in their order; one alone gives its own."""
    if not several():
        return [value]
    values = [None] * process_count()
    distributed.all_gather_object(values, value)
    return values


@torch.no_grad()
def sum_over_processes(tensors: Iterable[Tensor]) -> None:
    """Replaces tensors by their sums over processes; each process must pass as many, of the same shapes."""
    if several():
        for tensor in tensors:
            distributed.all_reduce(tensor)
