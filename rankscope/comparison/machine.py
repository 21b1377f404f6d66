"""What a run is measured with beside its metric: peak memory, and the revision of the sources that made it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

import rankscope
from rankscope.devices import best_device

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


@contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread inside, or what OMP_NUM_THREADS says, so that a run's figures do not depend on the number of jobs."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def reset_peak_memory() -> bool:
    """Starts measuring the peak anew; whether the system offers it."""
    device = best_device().type
    if device == "cuda":
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)
        return True
    try:
        _CLEAR.write_text("5")  # the resident set's high-water mark; see proc(5)
    except OSError:  # not Linux, or a container that forbids it
        return False
    return device == "cpu"


def peak_memory() -> int:
    """Bytes at the peak since `reset_peak_memory`: of all GPUs, else of this process."""
    if best_device().type == "cuda":
        return sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
    return 1024 * int(lines["VmHWM"].split()[0])


@cache
def source_revision() -> str:
    """`git describe` of rankscope's sources, or its version where they are no checkout."""
    folder = Path(rankscope.__file__).parent
    found = subprocess.run(
        ["git", "-C", str(folder), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or f"v{rankscope.__version__}"
