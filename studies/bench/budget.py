"""How few adapter parameters a task needs: `rankscope budget studies/digits.yaml`, what it recommends and what it costs.

    python studies/bench/budget.py --out studies/results/budget.json

Claims: at most 3,456 parameters are recommended; uniform LoRA needs more than the recommended budget for the same, interval
included; and the whole plan takes less than 20 minutes on 2 cores: its trainings, times the CPU time of one that is measured
alone here. Runs are kept in out/bench/budget, so that an interrupted benchmark resumes. `--quick`: three budgets, three
seeds, one learning rate; too few seeds to recommend a budget, enough to see the factor.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from _harness import Claim, run_benchmark

import rankscope as rs
from rankscope.comparison import RunSpec, run_all
from rankscope.tasks import Task, profile_task
from rankscope.training import Lora

STUDY = Path(__file__).parents[1] / "digits.yaml"
KEPT = Path("out") / "bench" / "budget"
QUICK = {"n_seeds": 3, "max_seeds": 3, "lowest": 0.25, "highest": 4, "step": 4, "ceiling": False}
MOST_PARAMETERS, MOST_MINUTES, CORES = 3456, 20.0, 2


def measure(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """One plan on digits-shift."""
    study = rs.read_study(STUDY)
    task = rs.load_task(study.task)
    training = study.training.at(0.01) if quick else study.training
    profile = profile_task(task, seed=study.seed)
    settings = rs.PlanSettings(**QUICK) if quick else study.plan
    seeds = range(1000, 1000 + settings.max_seeds)  # those of the command line
    plan = rs.plan_budget(
        task, profile=profile, training=training, settings=settings, seeds=seeds, kept_in=None if quick else KEPT
    )
    runs = plan.all_runs()
    seconds = cpu_seconds(task, profile.targets, training)
    minutes = len(runs) * seconds / 60 / CORES
    about = {"task": task.name, "recommended": plan.budget, "reference": list(plan.assessment.reference)}
    about |= {
        "margin": plan.assessment.margin,
        "saved": list(plan.saved),
        "runs": len(runs),
        "cpu_seconds_of_one": seconds,
    }
    claims = [
        Claim.at_most("recommended adapter parameters", plan.budget or math.inf, MOST_PARAMETERS),
        Claim.at_least("times the parameters that uniform needs, low end", plan.saved.low, 1.0),
        Claim.at_most("minutes on 2 cores", minutes, MOST_MINUTES),
    ]
    return [about, plan.answers(), *plan.table().to_dict("records")], claims[1:] if quick else claims


def cpu_seconds(task: Task, targets: Any, training: rs.TrainingSettings) -> float:
    """CPU time of one training, test split included, once everything is loaded."""
    uniform = Lora(rs.allocate("uniform", targets=targets, budget=rs.ParameterBudget.uniform(targets, 1)))
    spec = RunSpec(method=uniform, training=training.at(0.01))
    run_all(task, [spec])
    start = time.process_time()
    run_all(task, [replace(spec, seed=1)])
    return time.process_time() - start


if __name__ == "__main__":
    run_benchmark(measure, __doc__ or "")
