"""`rankscope worker`: helps a search that any number of machines share, with one process a GPU."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rankscope.cli.commands import search_study
from rankscope.cli.session import Session, print_json, print_line, stderr
from rankscope.distributed import visible_gpus
from rankscope.errors import RankscopeError, SettingsError, TrainingError
from rankscope.plugins import user_errors
from rankscope.settings import read_study

DEVICES = "CUDA_VISIBLE_DEVICES"
TO_END = 10.0  # seconds that processes have to give their trials back when they are asked to end


def run_worker(session: Session, *, devices: str | None, jobs: int, as_json: bool) -> None:
    """`rankscope worker`."""
    gpus = _gpus(devices)
    before = signal.signal(signal.SIGTERM, _interrupt)  # clusters end a process so: its trial is given back at once
    try:
        told = _work_here(session) if jobs == 1 and not gpus else _work_in_processes(session, gpus or [None] * jobs)
    finally:
        signal.signal(signal.SIGTERM, before)
    if as_json:
        print_json(told)
        return
    print_line(
        f"study `{told['study']}`: {told['trials']} trials, {told['confirming_runs']} confirming runs; none is left"
    )
    print_line(told["recommendation"])


def _gpus(devices: str | None) -> list[str | None]:
    """The GPUs that `--devices` names."""
    found: list[str | None] = list(visible_gpus()) if devices == "all" else [*filter(None, (devices or "").split(","))]
    if devices is not None and not found:
        raise SettingsError(f"`--devices` must name GPUs, but got {devices!r}, and none is seen; use --jobs on CPUs.")
    return found


def _interrupt(_signal: int, _frame: Any) -> None:
    raise KeyboardInterrupt


def _work_here(session: Session) -> dict[str, Any]:
    """Work until nothing is left, in this process; the search in figures."""
    result = search_study(session)
    told = {"study": result.study.study_name, "trials": len(result.trials), "confirming_runs": result.confirming_runs}
    return {**told, "recommendation": result.recommendation.reason}


def _work_in_processes(session: Session, gpus: Sequence[str | None]) -> dict[str, Any]:
    """Work in so many processes; one that dies leaves its trial to the others."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    arguments = session.path, dict(session.flags), session.out

    def start(gpu: str | None, *, profiling: bool = False) -> Any:
        with _process_for(gpu):
            process = context.Process(target=_work, args=(*arguments, gpu, profiling, results))
            process.start()
        return process

    processes: list[Any] = []
    try:
        if not session.profile_path.exists():  # else each would take one
            processes = [start(gpus[0], profiling=True)]
            processes[0].join()
            if not results.empty():
                raise _raised(results.get())
        processes = [start(gpu) for gpu in gpus]
        told = []
        while any(process.is_alive() for process in processes) or not results.empty():
            if not results.empty():
                told.append(results.get())
            else:
                next(filter(multiprocessing.process.BaseProcess.is_alive, processes), processes[0]).join(0.1)
    except KeyboardInterrupt:
        _end(processes)
        raise
    for process in processes:
        if process.exitcode and process.exitcode < 0:
            name = signal.Signals(-process.exitcode).name
            stderr.print(f"a process was ended by {name}; its trial goes to another worker", soft_wrap=True)
    done = [each for each in told if "error" not in each]
    if not done:
        raise _raised(told[0]) if told else TrainingError("every process of this worker died; see what ended them.")
    for each in told:
        if "error" in each:
            stderr.print(f"a process ended: {each['error']}", soft_wrap=True)
    return dict(done[-1])


def _raised(told: Mapping[str, Any]) -> RankscopeError:
    """The error that ended a process."""
    return TrainingError(told["error"]) if told.get("training") else SettingsError(told["error"])


def _end(processes: Sequence[Any]) -> None:
    """End processes: they give their trials back, if they do it in time, and before a second Ctrl-C."""
    deadline = time.monotonic() + TO_END
    try:
        for process in processes:
            if process.is_alive():
                process.terminate()
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()


@contextmanager
def _process_for(gpu: str | None) -> Iterator[None]:
    """What is started meanwhile sees one GPU only, and leaves a terminal's Ctrl-C to this process, which ends it in order."""
    device, heard = os.environ.get(DEVICES), signal.signal(signal.SIGINT, signal.SIG_IGN)
    if gpu is not None:
        os.environ[DEVICES] = gpu
    try:
        yield
    finally:
        if gpu is not None:
            os.environ.pop(DEVICES) if device is None else os.environ.update({DEVICES: device})
        signal.signal(signal.SIGINT, heard)


def _work(path: Path, flags: dict[str, Any], out: Path, gpu: str | None, profiling: bool, results: Any) -> None:
    """One process: take the profile, or work until nothing is left."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if gpu is not None and torch.cuda.device_count() != 1:
            raise SettingsError(
                f"`--devices` must name GPUs of this machine, but `{gpu}` is none; see `nvidia-smi -L`."
            )
        with user_errors("the study's own code", RankscopeError):
            session = Session(path, flags, read_study(path, flags), out)
            if profiling:
                _ = session.profile
            else:
                results.put(_work_here(session))
    except RankscopeError as error:
        results.put({"error": str(error), "training": isinstance(error, TrainingError)})
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        gc.freeze()  # the interpreter's end would look through all modules, while the parent waits for it
