"""The online controller against static ranks on digits-shift, at equal parameters and steps, learning rate tuned for each.

    python studies/bench/controller_quality.py --out studies/results/controller_quality.json

Static uniform and one-shot, and the controller from either: budget of uniform rank 1, decisions every 7 of 84 steps until 35 %.
The rate is chosen on validation with seeds of their own; then 12 fresh seeds are compared on the test split, seed by seed. Two
processes, one torch thread each; about 15 minutes. `--quick`: one rate, four seeds.
"""

from __future__ import annotations

from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from _harness import Claim, run_benchmark
from joblib import Parallel, delayed

import rankscope as rs
from rankscope.comparison import paired_difference
from rankscope.profiling import profile
from rankscope.tasks import evaluate

RATES = [0.005, 0.01, 0.02]
STEPS = 84
CONTROLLER = rs.ControllerConfig(every=7, freeze_fraction=0.35, samples=7)


def measure(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """Trains the four methods on the same seeds and compares test accuracy seed by seed."""
    task = rs.load_task("digits-shift")
    taken = profile(task.build_model(), list(task.train_batches(0)), loss_fn=task.loss, head=("classifier",))
    budget = rs.ParameterBudget.uniform(taken.targets, 1)
    starts = [
        rs.allocate(name, targets=taken.targets, budget=budget, profile=taken) for name in ("uniform", "one-shot")
    ]
    methods = [(start, controller) for start in starts for controller in (None, CONTROLLER)]
    rates = RATES[1:2] if quick else RATES
    tuning = [] if quick else [(m, rate, seed) for m in methods for rate in rates for seed in range(4)]
    tried = np.array([run["validation"] for run in _runs(tuning)]).reshape(len(methods), -1, 4)
    chosen = [rates[int(np.argmax(each.mean(axis=1)))] for each in tried] if tuning else rates * len(methods)
    seeds = range(1000, 1004 if quick else 1012)
    runs = _runs([(m, rate, seed) for m, rate in zip(methods, chosen, strict=True) for seed in seeds])
    rows = []
    for index, ((start, controller), rate) in enumerate(zip(methods, chosen, strict=True)):
        mine = runs[index * len(seeds) : (index + 1) * len(seeds)]
        test = [run["test"] for run in mine]
        rows.append(
            {
                "start": start.strategy,
                "controller": controller is not None,
                "learning_rate": rate,
                "most_parameters": max(run["parameters"] for run in mine),
                "ranks_moved": fmean(run["moved"] for run in mine),
                "validation": fmean(run["validation"] for run in mine),
                "test": fmean(test),
                "test_stdev": stdev(test),
                "test_by_seed": test,
            }
        )
    static, moving = rows[0::2], rows[1::2]
    gains = [paired_difference(m["test_by_seed"], s["test_by_seed"]) for m, s in zip(moving, static, strict=True)]
    for row, gain in zip(moving, gains, strict=True):
        row["minus_static"] = list(gain)
    return rows, [
        Claim.at_least("from uniform minus static uniform, low end of the 95 % interval", gains[0].low, 0.0),
        Claim.at_least("from one-shot minus static one-shot, high end of the 95 % interval", gains[1].high, 0.0),
        Claim.at_most("parameters at any decision", max(row["most_parameters"] for row in rows), budget.limit),
    ]


_Cell = tuple[tuple[rs.RankAllocation, rs.ControllerConfig | None], float, int]


def _runs(cells: list[_Cell]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = Parallel(n_jobs=2)(delayed(_run)(cell) for cell in cells)
    return found


def _run(cell: _Cell) -> dict[str, Any]:
    torch.set_num_threads(1)
    (start, controller), rate, seed = cell
    task = rs.load_task("digits-shift")
    config = rs.TrainingConfig(steps=STEPS, learning_rate=rate)
    model, result = rs.train(task, start, config, seed=seed, controller=controller)
    most, moved = result.parameters, 0
    if result.decisions is not None:
        most = max(most, int(result.decisions["parameters"].max()))
        changes = zip(result.decisions["ranks_before"], result.decisions["ranks_after"], strict=True)
        moved = sum(int(np.maximum(np.subtract(after, before), 0).sum()) for before, after in changes)
    return {
        "validation": result.metrics[task.metric],
        "test": evaluate(task, model, "test")[task.metric],
        "parameters": most,
        "moved": moved,
    }


if __name__ == "__main__":
    run_benchmark(measure, __doc__ or "")
