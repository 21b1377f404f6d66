"""Devices, precision and processes: the only module that decides where models run, or talks to other processes."""

from __future__ import annotations

import atexit
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial, wraps
from itertools import chain, count
from logging import getLogger
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, distributed, nn

from rankscope.errors import ModelError, RankscopeError, one_line

T = TypeVar("T")
P = ParamSpec("P")
Model = TypeVar("Model", bound=nn.Module)

logger = getLogger(__name__)


def best_device() -> torch.device:
    """The device that `ACCELERATE_USE_CPU` or `ACCELERATE_TORCH_DEVICE` asks for, else the current accelerator or the CPU."""
    from accelerate.utils import parse_flag_from_env  # its PartialState would fix the settings of all later ones

    wanted = "cpu" if parse_flag_from_env("ACCELERATE_USE_CPU") else os.environ.get("ACCELERATE_TORCH_DEVICE")
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device(wanted or found or "cpu")


def mixed_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of matrix products beside float32 weights: bfloat16 on GPUs that support it; else None."""
    return torch.bfloat16 if device.type in ("cuda", "xpu") and computes_in_bfloat16(device) else None


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 about as fast as float32, or faster; a CPU without AVX-512 is many times slower."""
    if device.type == "cpu":
        supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # what torch's own compiler asks
        return supported is None or bool(supported())
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def placed(model: Model) -> Model:
    """The model on the best device. One that was placed by hand, or by a `device_map`, stays where it is."""
    by_hand = hasattr(model, "hf_device_map") or any(p.device.type != "cpu" for p in model.parameters())
    device = best_device()
    if not by_hand and device.type == "cpu":
        if not computes_in_bfloat16(device) and any(p.dtype == torch.bfloat16 for p in model.parameters()):
            _warn_of_bfloat16()
        return model
    return model if by_hand else model.to(device)


@cache
def _warn_of_bfloat16() -> None:
    """Once, and not from each worker."""
    if is_first() and parent_process() is None:
        slow = "this CPU has no arithmetic for the model's bfloat16 weights and takes many times as long as in float32"
        logger.warning("%s; a task of a study takes `dtype: float32`", slow)


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


# --- processes that work on one training --------------------------------------------------------------------------

_BUCKET = 2**24  # elements of gradients that are summed at a time
_leads = False  # this process is the first of several, and the others wait for its next `everywhere`


def n_processes() -> int:
    """Processes of the torch.distributed group that run the present code; 1 without one."""
    grouped = distributed.is_available() and distributed.is_initialized() and not _leads
    return distributed.get_world_size() if grouped else 1


def process_index() -> int:
    """The place of this process among them, from 0."""
    return distributed.get_rank() if n_processes() > 1 else 0


def is_first() -> bool:
    """Whether this is the first process, or the only one."""
    return process_index() == 0


class _ProcessEndedError(RankscopeError):
    """Another process has ended, or cannot be reached."""


@contextmanager
def _reaching_others() -> Iterator[None]:
    """Turn what a backend raises where a process has died into one line."""
    try:
        yield
    except RuntimeError as error:
        raise _ProcessEndedError(
            f"the processes of a run must all be there, but one has ended or cannot be reached ({one_line(error, most=200)}); "
            "look at its own message, and start the run again: what was finished is kept."
        ) from error


def gathered(value: T) -> list[T]:
    """The values of all processes, in order; every process must call it, and those below."""
    if n_processes() == 1:
        return [value]
    values: list[Any] = [None] * n_processes()
    with _reaching_others():
        distributed.all_gather_object(values, value)
    return values


@torch.no_grad()
def sum_over_processes(tensors: Iterable[Tensor]) -> None:
    """Replace tensors by their sums over processes; each process must pass as many, of the same shapes."""
    for tensor in tensors if n_processes() > 1 else ():
        with _reaching_others():
            distributed.all_reduce(tensor)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace gradients by their sums over processes; one that only this process lacks counts as zero."""
    parameters = list(parameters)
    missing: list[set[int]] = gathered({n for n, parameter in enumerate(parameters) if parameter.grad is None})
    for place in missing[process_index()]:
        if all(place in each for each in missing):
            continue
        parameters[place].grad = torch.zeros_like(parameters[place])
    sum_in_buckets([parameter.grad for parameter in parameters if parameter.grad is not None])


@torch.no_grad()
def sum_in_buckets(tensors: Iterable[Tensor]) -> None:
    """As `sum_over_processes`, for many small tensors: some 64 MB at a time."""
    buckets: dict[Any, list[list[Tensor]]] = {}
    for tensor in tensors if n_processes() > 1 else ():
        alike = buckets.setdefault((tensor.dtype, tensor.device), [[]])
        if sum(each.numel() for each in alike[-1]) + tensor.numel() > _BUCKET and alike[-1]:
            alike.append([])
        alike[-1].append(tensor)
    for bucket in chain.from_iterable(buckets.values()):
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        sum_over_processes([flat])
        for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))


@torch.no_grad()
def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """Replace tensors by those of the first process; each process must pass as many, of the same shapes."""
    for tensor in tensors if n_processes() > 1 else ():
        with _reaching_others():
            distributed.broadcast(tensor, 0)


def make_replicas(model: nn.Module) -> None:
    """Give all processes the first one's trainable weights; a ModelError if their frozen weights differ."""
    if n_processes() > 1:
        frozen = {name: each for name, each in model.named_parameters() if not each.requires_grad}
        firsts = [(name, tuple(each.shape), each.detach().flatten()[:4].tolist()) for name, each in frozen.items()]
        check_same(repr(firsts), what="the frozen weights")
        copy_from_first(each.detach() for each in model.parameters() if each.requires_grad)


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


@contextmanager
def failing_together() -> Iterator[None]:
    """Raise on every process what any of them raises in the `with` block, which must wait for no other process."""
    raised: Exception | None = None
    try:
        yield
    except Exception as error:
        if n_processes() == 1:
            raise
        raised = error
    if n_processes() == 1:
        return
    told = gathered(None if raised is None else _told(raised))
    for index, each in enumerate(told):
        if each is not None:
            kind, text = each
            raised = raised or kind(f"process {index}: {text}")
    if raised is not None:
        raised.__dict__["known_to_all"] = True
        raise raised


def _known_to_all(error: BaseException) -> bool:
    return "known_to_all" in error.__dict__


def _told(error: Exception) -> tuple[type[Exception], str]:
    """An error as other processes raise it: of its type if that is ours or torch's for memory, else a RankscopeError."""
    if isinstance(error, RankscopeError | torch.OutOfMemoryError):
        return type(error), str(error)
    return RankscopeError, f"{type(error).__name__}: {one_line(error)}"


def by_first(function: Callable[[], T]) -> T:
    """What the first process computes, on every one, or its error."""
    found: Any = None
    with failing_together():
        found = function() if is_first() else None
    return cast(T, gathered(found)[0])


def join_processes() -> None:
    """Join the processes that torchrun or accelerate launch started with this one, if any, each with a GPU of its own."""
    index, local, here = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    if _n_launched() == 1 or not distributed.is_available() or distributed.is_initialized():
        return
    from accelerate.utils import parse_flag_from_env

    for flag, name in _SHARDED.items():
        if parse_flag_from_env(flag):
            must = (
                f"rankscope's own loop must hold the whole model on each process, but accelerate launch asks for {name}"
            )
            raise RankscopeError(
                f"{must}; launch without, or control ranks in your own Trainer: RankControllerCallback."
            )
    if not ("RANK" in os.environ and all(each.isdigit() for each in (index, local, here))):
        raise RankscopeError(
            f"WORLD_SIZE is {_n_launched()}, but RANK and LOCAL_RANK do not say which process this is; start it by torchrun or "
            "accelerate launch, or unset WORLD_SIZE."
        )
    if best_device().type != "cpu":
        if max(int(here), int(local) + 1) > (n := torch.accelerator.device_count()):
            raise RankscopeError(
                f"each process must have a device of its own, but this machine has {n} for {here} processes; lower "
                "--nproc-per-node, or set ACCELERATE_USE_CPU=1."
            )
        torch.accelerator.set_device_index(int(local))
    with _reaching_others():  # the first may plan, evaluate or draw for long meanwhile; a launcher ends all if one dies
        distributed.init_process_group(timeout=timedelta(days=1))
    atexit.register(_leave)


def _leave() -> None:
    """Leave the other processes: a backend's threads must not outlive the interpreter, whose end they would abort."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _n_launched() -> int:
    """Processes that a launcher started together with this one."""
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if size.isdigit() else 1


_SHARDED = {  # what accelerate launch sets
    "ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "several kinds of parallelism",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _End:
    result: Any


def led(function: Callable[[], T]) -> T:
    """Call a function on the first process; the others help where it comes to `everywhere`. All return its result.

    If it raises, the first process has to end: its launcher ends the others.
    """
    global _leads
    join_processes()
    if n_processes() == 1:  # also if this process leads already
        return function()
    if not is_first():
        while not isinstance(job := _received(), _End):
            try:
                job()
            except Exception as error:  # which the first process raises as well, and may go on
                if isinstance(error, _ProcessEndedError) or not (
                    isinstance(error, RankscopeError) or _known_to_all(error)
                ):
                    raise
        return cast(T, job.result)
    _leads = True
    try:
        result = function()
    finally:
        _leads = False
    _send(_End(result))
    return result


def led_by_first(function: Callable[P, T]) -> Callable[P, T]:
    """A function that every process calls, and the first one runs: see `led`."""
    return wraps(function)(lambda *args, **kwargs: led(lambda: function(*args, **kwargs)))


def leads_others() -> bool:
    """Whether this process is the first of several, and the others wait for its next `everywhere`."""
    return _leads


def everywhere(function: Callable[..., T], *args: Any, local: Mapping[str, Any] | None = None, **kwargs: Any) -> T:
    """Call a function on this process and on those that it leads, if it does; those call no functions in `local`."""
    global _leads
    local = local or {}
    if not _leads:
        return function(*args, **local, **kwargs)
    others = {name: each if each is None else _nothing for name, each in local.items()}
    _leads = False
    try:
        _send(partial(function, *args, **others, **kwargs))
        return function(*args, **local, **kwargs)
    finally:
        _leads = True


def _nothing(*_: Any) -> None:
    """What stands for a function that only the first process calls."""


def _send(job: Callable[[], Any] | _End) -> None:
    from joblib import wrap_non_picklable_objects  # which sends code of a study's files by value

    with _reaching_others():
        distributed.broadcast_object_list([wrap_non_picklable_objects(job, keep_wrapper=False)])
    with failing_together():
        pass


def _received() -> Callable[[], Any] | _End:
    """The next job; one that cannot be loaded here is raised on the first process."""
    held: list[Any] = [None]
    while held[0] is None:
        try:
            with failing_together():
                distributed.broadcast_object_list(held)
        except _ProcessEndedError:
            raise
        except Exception:
            held[0] = None
    return cast("Callable[[], Any] | _End", held[0])


def require_one_process(what: str, *, remedy: str) -> None:
    """Raise if a launcher (torchrun, accelerate launch) started other processes beside this one."""
    if (n := _n_launched()) > 1:
        raise RankscopeError(f"{what} must run as one process, but WORLD_SIZE is {n}; {remedy}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a run failed since the device, or this machine, has no memory left."""
    from accelerate.utils.memory import should_reduce_batch_size

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, Exception) and bool(should_reduce_batch_size(error))


def free_memory() -> None:
    """Give back what a failed run held: objects in reference cycles, and the allocator's cache on the device."""
    from accelerate.utils.memory import clear_device_cache

    clear_device_cache(garbage_collection=True)


def visible_gpus() -> tuple[str, ...]:
    """The GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    n_gpus = torch.cuda.device_count()
    return tuple(named[:n_gpus] or map(str, range(n_gpus)))


@contextmanager
def one_gpu_each(n_jobs: int) -> Iterator[None]:
    """Show each worker process that joblib starts one GPU only, in turn; does nothing with fewer than two of either."""
    from joblib import parallel_config

    gpus = visible_gpus()
    options: Any = {"initializer": _take_gpu, "initargs": (gpus, _claims().name)} if min(n_jobs, len(gpus)) > 1 else {}
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
