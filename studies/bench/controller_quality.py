"""The online controller against static ranks and PEFT's AdaLoRA, at equal parameters and steps, learning rate tuned for each.

    python studies/bench/controller_quality.py --out studies/results/controller_quality.json

Reads its figures off `rankscope compare` on studies/compare/digits-shift.yaml (16 seeds) and supersense.yaml (8 seeds): static
uniform and one-shot, the controller (default settings) from either, and AdaLoRA with alpha tuned together with the rate, compared
seed by seed on the test split. The committed runs are read; delete the two tasks' comparison.parquet in studies/results
to do them again (an hour). `--quick`: runs of its own, on digits, the controller from uniform, four seeds.
"""

from __future__ import annotations

from statistics import fmean, stdev
from typing import Any

import pandas as pd
from _compared import compared, minus, scores_of
from _harness import Claim, run_benchmark

from rankscope.comparison import at_budget

METHODS = ("uniform", "one-shot", "controller", "controller-one-shot", "adalora")


def measure(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """Both tasks."""
    rows, claims = [], []
    for task in ("digits-shift",) if quick else ("digits-shift", "supersense"):
        runs = compared(task, ("controller",) if quick else ())
        runs = at_budget(runs).query("role == 'reported' and method in @METHODS")
        scores = scores_of(runs)
        rows += [row(task, name, runs[runs["method"] == name], scores) for name in scores]
        claims += claims_of(task, runs, scores)
    return rows, claims


def row(task: str, name: str, runs: pd.DataFrame, scores: dict[str, list[float]]) -> dict[str, Any]:
    """One method's figures, and its differences to all others: mean and 95 % interval over the seeds."""
    return {
        "task": task,
        "method": name,
        "variant": runs["variant"].iloc[0],
        "learning_rate": runs["learning_rate"].iloc[0],
        "parameters": int(runs["parameters"].max()),
        "ranks_moved": runs["n_moved"].mean(),
        "validation": runs["validation"].mean(),
        "test": fmean(scores[name]),
        "test_stdev": stdev(scores[name]),
        "minus": {other: list(minus(scores, name, other)) for other in scores if other != name},
        "test_by_seed": scores[name],
    }


def claims_of(task: str, runs: pd.DataFrame, scores: dict[str, list[float]]) -> list[Claim]:
    """What issue 5 hopes for."""
    controlled = runs[runs["method"].str.startswith("controller")]
    gain = minus(scores, "controller", "uniform")
    claims = [
        Claim.at_least(f"{task}: from uniform minus static uniform, low end", gain.low, 0.0)
        if task == "digits-shift"
        else Claim.at_least(f"{task}: from uniform minus static uniform, points; 0 is a tie", 100 * gain.mean, 0.01)
    ]
    if "controller-one-shot" in scores:
        kept = minus(scores, "controller-one-shot", "one-shot")
        claims.append(Claim.at_least(f"{task}: from one-shot minus static one-shot, high end", kept.high, 0.0))
    spent = float((controlled["parameters"] / controlled["budget"]).max())
    claims.append(Claim.at_most(f"{task}: the controller's parameters over the budget", spent, 1.0))
    if "adalora" in scores:
        claims += [
            Claim.at_least(f"{task}: {name} minus adalora", minus(scores, str(name), "adalora").mean, 0.0)
            for name in controlled["method"].unique()
        ]
    return claims


if __name__ == "__main__":
    run_benchmark(measure, __doc__ or "")
