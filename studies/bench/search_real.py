"""Real searches on digits-shift: is the confirmed allocation better than one-shot and uniform on the test split?

    python studies/bench/search_real.py --out studies/results/search_real.json

Five searches (60 trainings: 45 trials, then five finalists on three fresh seeds; three rates), differing in the sampler's seed;
then the recommended allocations, one-shot and uniform are trained on 12 fresh seeds each, at equal parameters and steps, the
learning rate tuned for each on validation, and compared on the test split, seed by seed. Two processes, one torch thread each;
about 15 minutes. `--quick`: one search of 10 trials, two fresh seeds. The claims are what one would hope for, whatever comes out.
"""

from __future__ import annotations

import logging
from statistics import fmean
from typing import Any

import optuna
import torch
from _harness import Claim, run_benchmark
from joblib import Parallel, delayed

import rankscope as rs
from rankscope.comparison import make_grid, paired_difference, run_tuned
from rankscope.tasks import profile_task

RATES = [0.005, 0.01, 0.02]
TRAINING = rs.TrainingSettings(steps=84, learning_rate=RATES)


def measure(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """The searches, then the comparison."""
    task = rs.load_task("digits-shift")
    taken = profile_task(task)
    budget = rs.ParameterBudget.uniform(taken.targets, 1)
    seeds = range(1 if quick else 5)
    searches = Parallel(n_jobs=2)(delayed(searched)(taken, budget, seed, quick) for seed in seeds)
    allocations = [
        rs.allocate(strategy, targets=taken.targets, budget=budget, profile=taken)
        for strategy in ("uniform", "one-shot")
    ]
    found = [
        rs.RankAllocation(taken.targets, tuple(row["ranks"]), strategy=f"search {row['seed']}") for row in searches
    ]
    compared = [*allocations, *dict.fromkeys(found)]
    grids = [make_grid(allocation, TRAINING) for allocation in compared]
    groups = run_tuned(task, grids, seeds=range(2000, 2002 if quick else 2012), n_jobs=2)
    runs = {a.vector: [run for run in group if run.test is not None] for a, group in zip(compared, groups, strict=True)}
    test = {ranks: [run.test for run in reported if run.test is not None] for ranks, reported in runs.items()}
    uniform, one_shot = (test[a.vector] for a in allocations)
    rows: list[dict[str, Any]] = []
    for allocation in allocations:
        mine = test[allocation.vector]
        rate = runs[allocation.vector][0].learning_rate
        rows.append({"strategy": allocation.strategy, "learning_rate": rate, "test": fmean(mine), "test_by_seed": mine})
    for row in searches:
        mine = test[tuple(row["ranks"])]
        differences = {
            "minus_uniform": list(paired_difference(mine, uniform)),
            "minus_one_shot": list(paired_difference(mine, one_shot)),
        }
        rows.append({**row, "test": fmean(mine), **differences})
    mean = fmean(row["test"] for row in rows[2:])
    return rows, [
        Claim.at_least("mean test accuracy of the searched allocations minus uniform's", mean - fmean(uniform), 0.0),
        Claim.at_least("mean test accuracy of the searched allocations minus one-shot's", mean - fmean(one_shot), 0.0),
    ]


def searched(taken: rs.Profile, budget: rs.ParameterBudget, seed: int, quick: bool) -> dict[str, Any]:
    """One search's recommendation."""
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("rankscope").setLevel(logging.ERROR)
    result = rs.search(
        rs.load_task("digits-shift"),
        budget=budget,
        profile=taken,
        n_trials=15 if quick else 60,
        confirm_fraction=1 / 3 if quick else 0.25,
        training=TRAINING,
        seed=seed,
    )
    best = result.best_trial
    return {
        "seed": seed,
        "recommended": best.origin,
        "trial": best.number,
        "trials": len(result.trials),
        "model": str(result.validation),
        "finalists": [[f.trial.origin, f.metric, f.difference] for f in result.finalists],
        "ranks": list(best.allocation.vector),
    }


if __name__ == "__main__":
    run_benchmark(measure, __doc__ or "")
