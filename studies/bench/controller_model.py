"""Should the controller ask the study's performance model what ranks are worth, or the present gradient alone?

    python studies/bench/controller_model.py --out studies/results/controller_model.json

digits-shift at a quarter of rank 1 and at rank 1, from one-shot's and from uniform's ranks, each arm at its own best learning
rate (chosen on validation by seeds of their own), compared seed by seed on the test split. Ranks stay (`static`), or the
controller moves them by the present gradient (`gradient`). Two more arms did not help, so their code is gone, and their runs are
read from the committed result, which names the revision that made them: `model`, in which the performance model of RankBench's
trials at that budget said what ranks are worth, given the present gradient's spectra; and `vetoes`, in which that model and
another one of earlier moves could refuse the gradient's moves. Runs are kept in .cache/controller_model, so an interrupted study
resumes. About ten minutes on one core. `--quick`: a quarter of rank 1, from uniform, two seeds.
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean
from typing import Any

from _harness import Claim, run_benchmark

import rankscope as rs
from rankscope.comparison import make_grid, paired_difference, run_tuned
from rankscope.files import read_json
from rankscope.tasks import Task, data_folder
from rankscope.training import Lora

KEPT = Path(__file__).parents[2] / ".cache" / "controller_model"
COMMITTED = Path(__file__).parents[1] / "results" / "controller_model.json"
GONE = ("model", "vetoes")
BUDGETS = (1 / 4, 1)  # times rank 1
RATES = [0.0025, 0.005, 0.01, 0.02, 0.04]


def measure(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """A row for each budget, start and arm; claims: the controller mends uniform, and does one-shot no harm."""
    task = rs.load_task("digits-shift")
    rows = []
    for factor in BUDGETS[: 1 if quick else None]:
        for start in ("uniform",) if quick else ("one-shot", "uniform"):
            rows += compare_arms(task, factor, start, quick)
    return rows, [claim for row in rows if row["arm"] == "gradient" for claim in claims_of(row)]


def claims_of(row: dict[str, Any]) -> list[Claim]:
    """What the controller by the gradient alone gains over ranks that stay."""
    gain, name = (
        row["to_static"],
        f"{row['factor']:g} times rank 1, from {row['start']}: points gained over static ranks",
    )
    if row["start"] == "uniform":
        return [Claim.at_least(name, 100 * gain.mean, 1.0)]
    most = gain.mean if math.isnan(gain.high) else gain.high  # no interval where nothing moved
    return [Claim.at_least(f"{name}, high end", 100 * most, 0.0)]


def compare_arms(task: Task, factor: float, start: str, quick: bool) -> list[dict[str, Any]]:
    """All arms from one start at one budget."""
    profile = rs.read_profile(data_folder("rankbench") / "digits-shift.profile.parquet")
    budget = rs.ParameterBudget(round(factor * sum(target.rank_cost for target in profile.targets)))
    ranks = rs.allocate(start, targets=profile.targets, budget=budget, profile=profile)
    arms = {"static": Lora(ranks), "gradient": Lora(ranks, rs.ControllerSettings())}
    training = rs.TrainingSettings(steps=84, learning_rate=[0.01] if quick else RATES)
    grids = [make_grid(method, training, name=name, factor=factor) for name, method in arms.items()]
    seeds, tuning = range(2 if quick else 8), range(10_000, 10_002)
    results = run_tuned(task, grids, seeds=seeds, tuning_seeds=tuning, kept_in=None if quick else KEPT)
    rows: list[dict[str, Any]] = []
    for arm, runs in zip(arms, results, strict=True):
        reported = [run for run in runs if run.role == "reported"]
        rows.append({
            "factor": factor,
            "start": start,
            "arm": arm,
            "parameters": max(run.parameters for run in reported),
            "learning_rate": reported[0].learning_rate,
            "ranks_moved": fmean(run.n_moved for run in reported),
            "validation": fmean(run.validation for run in reported),
            "test": fmean(run.test or 0.0 for run in reported),
            "test_by_seed": [run.test for run in reported],
            "revision": reported[0].revision,
        })  # fmt: skip
    earlier = read_json(COMMITTED, what="a benchmark's result")["rows"] if COMMITTED.exists() and not quick else []
    rows += [row for row in earlier if (row["factor"], row["start"]) == (factor, start) and row["arm"] in GONE]
    return [row | {"to_static": minus(row, rows[0]), "to_gradient": minus(row, rows[1])} for row in rows]


def minus(ours: dict[str, Any], theirs: dict[str, Any]) -> Any:
    """The paired difference on the seeds that both have: the first ones."""
    n = min(len(ours["test_by_seed"]), len(theirs["test_by_seed"]))
    return paired_difference(ours["test_by_seed"][:n], theirs["test_by_seed"][:n])


if __name__ == "__main__":
    run_benchmark(measure, __doc__ or "")
