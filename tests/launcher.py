"""Several processes under torchrun with gloo, as a user starts them."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]


def torchrun(*command: str, cwd: Path = ROOT, n: int = 2, **environment: str) -> subprocess.CompletedProcess[str]:
    """What `torchrun COMMAND` says; a command begins with a script, or with `-m`."""
    start = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={n}", "--standalone", *command]
    env: Mapping[str, str] = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(start, env=env, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


def own_lines(text: str) -> list[str]:
    """What is said by rankscope's processes, without torchrun's own report of a process that failed."""
    return [line for line in text.splitlines() if line.startswith("rankscope: ")]
