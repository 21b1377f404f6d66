"""What every benchmark shares: its arguments, and the JSON result with command, revision, machine, versions, rows, claims."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import rankscope
from rankscope.files import write_json
from rankscope.tasks import Task


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A ratio or count from this run, and the bound it must keep."""

    name: str
    value: float
    bound: str
    holds: bool

    @classmethod
    def at_most(cls, name: str, value: float, bound: float) -> Claim:
        """Holds up to the bound."""
        return cls(name=name, value=value, bound=f"<= {bound:g}", holds=value <= bound)

    @classmethod
    def at_least(cls, name: str, value: float, bound: float) -> Claim:
        """Holds from the bound on."""
        return cls(name=name, value=value, bound=f">= {bound:g}", holds=value >= bound)


def batches_of(task: Task, n: int, start: int = 0) -> list[Any]:
    """Batches `start` to `start + n` of epoch after epoch, each in an order of its own."""
    endless = chain.from_iterable(task.train_batches(seed) for seed in count())
    return list(islice(endless, start, start + n))


def run_benchmark(measure: Callable[[bool], tuple[list[dict[str, Any]], Sequence[Claim]]], description: str) -> None:
    """Parses --quick and --out, measures, prints rows and claims, writes the result, exits 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="the same claim in small, within 60 s on 2 cores")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    arguments = parser.parse_args()
    rows, claims = measure(arguments.quick)
    for row in rows:
        print(json.dumps(plain(row)))
    for claim in claims:
        print(f"{'holds' if claim.holds else 'FAILS'}: {claim.name}: {claim.value:.4g} ({claim.bound})")
    if arguments.out:
        write_json(
            arguments.out,
            {**circumstances(), "rows": plain(rows), "claims": plain([asdict(claim) for claim in claims])},
        )
    sys.exit(0 if all(claim.holds for claim in claims) else 1)


def circumstances() -> dict[str, Any]:
    """Command, revision, machine and versions of this run."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {
        "command": "python " + " ".join(sys.argv),
        "revision": git.stdout.strip(),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()},
        "versions": _versions(),
    }


def plain(value: Any) -> Any:
    """The value as JSON has it: no numpy; NaN is null, and infinity a word."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def _versions() -> dict[str, str]:
    """Of rankscope, which may run from a checkout, and of what is installed beside it."""
    found = {"rankscope": rankscope.__version__}
    for name in ("torch", "transformers", "peft", "accelerate", "optuna", "scikit-learn"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
