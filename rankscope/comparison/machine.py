"""What a run is measured with beside its metric: peak memory, and the revision of the sources that made it."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

import torch

import rankscope

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def reset_peak_memory() -> None:
    """Starts measuring the peak anew; nothing where the system does not offer it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif _CLEAR.exists():
        _CLEAR.write_text("5")  # the resident set's high-water mark; see proc(5)


def peak_memory() -> int | None:
    """Bytes at the peak since `reset_peak_memory`; None where the system does not tell."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    if not _STATUS.exists():
        return None
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
