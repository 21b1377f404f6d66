"""Where runs are done: processes of this machine (joblib's loky), or a Dask cluster of many machines."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, TypeVar

from joblib import Parallel, delayed

from rankscope.distributed import leads_others, one_gpu_each
from rankscope.errors import SettingsError, TrainingError, one_line
from rankscope.settings import DASK

T = TypeVar("T")
_SECONDS = 30  # to wait for a scheduler, and for its first worker
Calls = Sequence[tuple[Any, ...]]  # the arguments of each


@contextmanager
def workers(
    backend: str, n_jobs: int, folder: Path | None
) -> Iterator[Callable[[Callable[..., T], Calls], Iterator[T]]]:
    """What does calls of a function and yields their results in order: `n_jobs` processes, or all workers of `dask://HOST:PORT`.

    A Dask worker that dies has its runs done again by others, up to the scheduler's `allowed-failures` (3) times a run. All must
    see `folder`, which keeps runs. A run takes the device that its worker sees.
    """
    if backend == "loky":
        if n_jobs > 1 and leads_others():
            must = "`--jobs` must be 1 under torchrun or accelerate launch, whose processes share each run"
            raise SettingsError(f"{must}, but got {n_jobs}; leave it out.")
        with one_gpu_each(n_jobs):
            parallel = Parallel(n_jobs=n_jobs, return_as="generator")
        yield lambda function, calls: parallel(delayed(function)(*each) for each in calls)
        return
    if leads_others():
        raise SettingsError(f"`--backend` must be loky under torchrun or accelerate launch, but got {backend!r}.")
    try:
        from distributed import Client, KilledWorker
    except ImportError:
        raise SettingsError(f"`{backend}` needs the package distributed; install rankscope[dask].") from None
    try:
        client = Client(f"tcp://{backend.removeprefix(DASK)}", timeout=_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        must = f"`{backend}` must be a Dask scheduler that answers, but is not ({one_line(error, most=100)})"
        raise SettingsError(f"{must}; start one with `dask scheduler`.") from None

    def submitted(function: Callable[..., T], calls: Calls) -> Iterator[T]:
        # Not through joblib, whose Dask backend waits for ever for a call that is given up (joblib 1.6).
        futures = [client.submit(function, *each, pure=False) for each in calls]
        return (future.result() for future in futures)

    with client:
        _check(client, backend, folder)
        try:
            yield submitted
        except KilledWorker as error:
            must = f"a run must end on a worker of `{backend}`, but {error.allowed_failures + 1} workers died with one"
            raise TrainingError(f"{must}; look at their logs: memory?") from None


def _check(client: Any, backend: str, folder: Path | None) -> None:
    """Raise a SettingsError unless there are workers, each does one run at a time, and all see the folder."""
    with suppress(TimeoutError):
        client.wait_for_workers(1, timeout=_SECONDS)
    threads = client.nthreads()
    if not threads:
        raise SettingsError(f"`{backend}` must have workers, but has none; start some with `dask worker --nthreads 1`.")
    for worker, n in threads.items():
        if n != 1:  # torch's generators and threads belong to a process
            must = f"each worker of `{backend}` must do one run at a time, but {worker} has {n} threads"
            raise SettingsError(f"{must}; start it with `dask worker --nthreads 1`.")
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=folder, prefix=".seen-by-workers-") as token:
        for worker, sees in client.run(os.path.exists, token.name).items():
            if not sees:
                must = f"`{folder}` must be on a file system that all workers share, but {worker} does not see it"
                raise SettingsError(f"{must}; choose another --out.")
