"""Should the controller ask the study's performance model what ranks are worth, or the present gradient alone?

    python studies/bench/controller_model.py --out studies/results/controller_model.json

digits-shift at a quarter of rank 1 and at rank 1. From one-shot's and from uniform's ranks, each at its own best learning rate:
ranks that stay; the controller by the gradient alone; and by the model of all of RankBench's trials at that budget, far more than
a study has. `planned` are the ranks of that model's posterior mean, which stay. Two seeds of their own choose the rate on
validation; 8 others are reported, compared seed by seed. Runs are kept in .cache/controller_model, so an interrupted study
resumes. About half an hour on one core. `--quick`: rank 1, from one-shot, two seeds.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
from _harness import Claim, run_benchmark

import rankscope as rs
from rankscope.budget import allocate_marginal
from rankscope.comparison import make_grid, paired_difference, run_tuned
from rankscope.searching import group_by_depth
from rankscope.tasks import Task, data_folder
from rankscope.training import Lora, Method

KEPT = Path(__file__).parents[2] / ".cache" / "controller_model"
BUDGETS = (1 / 4, 1)  # times rank 1
RATES = {1 / 4: [0.005, 0.01, 0.02, 0.04], 1: [0.0025, 0.005, 0.01, 0.02]}  # by budget


def measure(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """A row for each budget and arm, and the claim that the controller does no harm."""
    task = rs.load_task("digits-shift")
    rows = [row for factor in BUDGETS[quick:] for row in compare_arms(task, factor, quick)]
    claims = [
        Claim.at_least(
            f"{row['factor']:g} times rank 1, {row['arm']} minus static, high end", row["to_static"].high, 0.0
        )
        for row in rows
        if row["arm"].endswith("from one-shot") and not row["arm"].startswith("static")
    ]
    return rows, claims


def compare_arms(task: Task, factor: float, quick: bool) -> list[dict[str, Any]]:
    """All arms at one budget."""
    arms = methods(factor, ("one-shot",) if quick else ("one-shot", "uniform"))
    training = rs.TrainingSettings(steps=84, learning_rate=RATES[factor][1:3] if quick else RATES[factor])
    grids = [make_grid(method, training, name=name, factor=factor) for name, method in arms.items()]
    seeds, tuning = range(2 if quick else 8), range(10_000, 10_001 if quick else 10_002)
    results = run_tuned(task, grids, seeds=seeds, tuning_seeds=tuning, kept_in=None if quick else KEPT)
    reported = {arm: [run for run in runs if run.role == "reported"] for arm, runs in zip(arms, results, strict=True)}
    tests = {arm: [float(run.test or 0.0) for run in runs] for arm, runs in reported.items()}

    def minus(arm: str, other: str) -> Any:
        return paired_difference(tests[arm], tests[f"{other} from {arm.partition(' from ')[2] or 'one-shot'}"])

    return [
        {
            "factor": factor,
            "arm": arm,
            "parameters": max(run.parameters for run in runs),
            "learning_rate": runs[0].learning_rate,
            "ranks_moved": fmean(run.n_moved for run in runs),
            "validation": fmean(run.validation for run in runs),
            "test": fmean(tests[arm]),
            "to_static": minus(arm, "static"),
            "to_gradient": minus(arm, "gradient"),
            "test_by_seed": tests[arm],
            "revision": runs[0].revision,
        }
        for arm, runs in reported.items()
    ]


def methods(factor: float, starts: tuple[str, ...]) -> dict[str, Method]:
    """The arms by name."""
    profile = rs.read_profile(data_folder("rankbench") / "digits-shift.profile.parquet")
    targets = profile.targets
    budget = rs.ParameterBudget(round(factor * sum(target.rank_cost for target in targets)))
    model, moving = fitted(profile, budget, factor), rs.ControllerSettings()
    found: dict[str, Method] = {}
    for start in starts:
        ranks = rs.allocate(start, targets=targets, budget=budget, profile=profile)
        found[f"static from {start}"] = Lora(ranks)
        found[f"gradient from {start}"] = Lora(ranks, moving)
        found[f"model from {start}"] = Lora(ranks, moving, performance_model=model)
    return found | {"planned": Lora(allocate_marginal(targets, model.utilities(), budget).renamed("planned"))}


def fitted(profile: rs.Profile, budget: rs.ParameterBudget, factor: float) -> rs.PerformanceModel:
    """The model of all of RankBench's trials at the budget: validation accuracy, the mean over seeds."""
    table = pd.read_parquet(data_folder("rankbench") / "digits-shift.parquet").query("rank == @factor and steps == 84")
    gains = {name: values**2 for name, values in profile.spectra().items()}
    groups = group_by_depth(profile.targets)
    trials = table.groupby("number").agg(ranks=("ranks", "first"), y=("validation", "mean"), n=("seed", "count"))
    features = rs.rank_features(profile.targets, budget, gains=gains, groups=groups)
    return rs.PerformanceModel(features).fit(trials["ranks"].tolist(), trials["y"], trials["n"])


if __name__ == "__main__":
    run_benchmark(measure, __doc__ or "")
