"""Do committed comparisons come out again? Trains single runs of them with today's code and compares the test metric.

For every task of studies/compare: the first reported seed of the methods that use this package's own code (uniform, one-shot, and
the controller from both), each at the learning rate that the committed comparison chose, through `rankscope compare`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from _compared import RESULTS, STUDIES
from _harness import Claim, run_benchmark

from rankscope.comparison import at_budget, read_comparison

METHODS = ("uniform", "one-shot", "gradient-norm", "controller", "controller-one-shot")
QUICK_TASKS = ("digits-shift",)
OUT = Path("out") / "reproduce"


def measure(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """One row a task and method: what is committed, and what came out now."""
    tasks = QUICK_TASKS if quick else TASKS or sorted(path.stem for path in STUDIES.glob("*.yaml"))
    rows = [row for task in tasks for row in _rows(task)]
    moved = sum(not row["same_ranks"] for row in rows)
    other = sum(row["now"] != row["committed"] for row in rows)
    return rows, [
        Claim.at_most("runs that end with other ranks than the committed ones", moved, 0),
        Claim.at_most(
            "share of runs whose test metric differs, as by another processor's rounding", other / len(rows), 0.2
        ),
    ]


def _rows(task: str) -> Iterator[dict[str, Any]]:
    committed = at_budget(read_comparison(RESULTS / task / "comparison.parquet")).query("role == 'reported'")
    first = committed[committed["seed"] == committed["seed"].min()].set_index("method")
    chosen = first.loc[[name for name in METHODS if name in first.index]]
    for rate, group in chosen.groupby("learning_rate"):
        now = _train(task, [str(name) for name in group.index], float(rate))
        for name, row in group.iterrows():
            yield {
                "task": task,
                "method": name,
                "committed": row["test"],
                "now": float(now.loc[name, "test"]),
                "same_ranks": now.loc[name, "ranks"] == row["ranks"],
            }


def _train(task: str, methods: list[str], rate: float) -> pd.DataFrame:
    """The first seed of some methods at one learning rate, by method; all of a task share a profile."""
    study = yaml.safe_load((STUDIES / f"{task}.yaml").read_text(encoding="utf-8"))
    study["training"]["learning_rate"] = rate
    study["compare"] = {"methods": methods, "n_seeds": 1, "n_tuning_seeds": 1}
    out = OUT / f"{task}-{rate:g}"
    out.mkdir(parents=True, exist_ok=True)
    path = OUT / f"{out.name}.yaml"
    path.write_text(yaml.safe_dump(study), encoding="utf-8")
    shared = OUT / task / "profile.parquet"
    if shared.exists():
        shutil.copy(shared, out)
    command = [sys.executable, "-m", "rankscope", "compare", str(path), "--out", str(out)]
    subprocess.run(command, check=False, stdout=sys.stderr, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if (out / "profile.parquet").exists() and not shared.exists():
        shared.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(out / "profile.parquet", shared)
    runs = read_comparison(out / "comparison.parquet")
    return at_budget(runs).query("role == 'reported'").set_index("method")


TASKS: list[str] = []

if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--tasks", nargs="*", default=[])
    known, rest = parser.parse_known_args()
    TASKS, sys.argv[1:] = known.tasks, rest
    run_benchmark(measure, __doc__ or "")
