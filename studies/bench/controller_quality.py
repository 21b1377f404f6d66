"""The online controller against static ranks and PEFT's AdaLoRA, at equal parameters and steps, learning rate tuned for each.

    python studies/bench/controller_quality.py --out studies/results/controller_quality.json

Reads its figures off `rankscope compare` on studies/compare/digits-shift.yaml (16 seeds) and supersense.yaml (8 seeds): static
uniform and one-shot, the controller (default settings) from either, and AdaLoRA with alpha tuned together with the rate, compared
seed by seed on the test split. Runs are kept under `out/controller_quality`, so that an interrupted benchmark goes on. Two
processes, one torch thread each; about an hour. `--quick`: digits, four seeds, no AdaLoRA.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pandas as pd
from _harness import Claim, run_benchmark

from rankscope.comparison import Interval, paired_difference, read_comparison

STUDIES = Path(__file__).parents[1] / "compare"
KEPT = Path("out") / "controller_quality"
METHODS = ("one-shot", "controller", "controller-one-shot", "adalora")


def measure(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """Both tasks."""
    rows, claims = [], []
    for task in ("digits-shift",) if quick else ("digits-shift", "supersense"):
        runs = compared(task, ("controller",), "--seeds=4") if quick else compared(task, METHODS)
        methods = {str(name): group.sort_values("seed") for name, group in runs.groupby("method", sort=False)}
        rows += [row(name, methods) for name in methods]
        claims += claims_of(task, methods)
    return rows, claims


def compared(task: str, methods: tuple[str, ...], *options: str) -> pd.DataFrame:
    """The reported runs of `rankscope compare`, uniform's among them."""
    out = KEPT / task
    command = [
        sys.executable,
        "-m",
        "rankscope",
        "compare",
        str(STUDIES / f"{task}.yaml"),
        "--out",
        str(out),
        "--jobs",
        "2",
    ]
    chosen = [f"--methods={method}" for method in methods]
    subprocess.run([*command, *chosen, "--uniform-budgets=1", *options], check=True, stdout=sys.stderr)
    runs = read_comparison(out / "comparison.parquet")
    return runs[runs["role"] == "reported"]


def row(name: str, methods: dict[str, pd.DataFrame]) -> dict[str, Any]:
    """One method's figures, and its differences to all others: mean and 95 % interval over the seeds."""
    mine = methods[name]
    first = mine.iloc[0]
    return {
        "task": first["task"],
        "method": name,
        "variant": first["variant"],
        "learning_rate": first["learning_rate"],
        "parameters": int(mine["parameters"].max()),
        "ranks_moved": mine["n_moved"].mean(),
        "validation": mine["validation"].mean(),
        "test": fmean(mine["test"]),
        "test_stdev": stdev(mine["test"]),
        "minus": {other: list(minus(methods, name, other)) for other in methods if other != name},
        "test_by_seed": mine["test"].tolist(),
    }


def minus(methods: dict[str, pd.DataFrame], ours: str, theirs: str) -> Interval:
    """The paired difference on the test split."""
    return paired_difference(methods[ours]["test"].tolist(), methods[theirs]["test"].tolist())


def claims_of(task: str, methods: dict[str, pd.DataFrame]) -> list[Claim]:
    """What issue 5 hopes for."""
    controlled = [name for name in methods if name.startswith("controller")]
    gain = minus(methods, "controller", "uniform")
    claims = [
        Claim.at_least(f"{task}: from uniform minus static uniform, low end", gain.low, 0.0)
        if task == "digits-shift"
        else Claim.at_least(f"{task}: from uniform minus static uniform", gain.mean, 0.0)
    ]
    if "controller-one-shot" in methods:
        kept = minus(methods, "controller-one-shot", "one-shot")
        claims.append(Claim.at_least(f"{task}: from one-shot minus static one-shot, high end", kept.high, 0.0))
    most = max(methods[name]["parameters"].max() / methods[name]["budget"].iloc[0] for name in controlled)
    claims.append(Claim.at_most(f"{task}: the controller's parameters over the budget", float(most), 1.0))
    if "adalora" in methods:
        claims += [
            Claim.at_least(f"{task}: {name} minus adalora", minus(methods, name, "adalora").mean, 0.0)
            for name in controlled
        ]
    return claims


if __name__ == "__main__":
    run_benchmark(measure, __doc__ or "")
