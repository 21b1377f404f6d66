"""Which rule turns a gradient spectrum into ranks best? Candidates for `one-shot`, each trained at its own best learning rate.

    python studies/bench/prior_rules.py --out studies/results/prior_rules.json

A rule gives the gains of a module's first, second, … rank; water-filling does the rest. `sigma^p`: the gradient's singular
values to the power p. `+ e even`: a share e of the total is spread evenly over the modules, falling as 1/r^2 in each. `by
depth`: times the share of the blocks that a module's change passes through. The rate is chosen on validation by eight seeds of
their own (two on dinov2-digits), then 16 seeds (eight) are reported; the rule is chosen on validation, and test is only shown.
An earlier revision (8bbfcdf) also had blocks that share, each worth the sum over its modules to the power of 3/4: behind
`sigma^1 by depth` in nine of eleven cells, by up to 3.7 points. Runs are kept in .cache/prior_rules, so an interrupted study
resumes. About four hours on one core.
`--quick`: one budget, two rules, two seeds.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from _harness import Claim, run_benchmark
from digit_shifts import turned

import rankscope as rs
from rankscope.comparison import make_grid, paired_difference, run_tuned
from rankscope.strategies import Gains, Request, one_shot
from rankscope.tasks import Task, profile_task

KEPT = Path(__file__).parents[2] / ".cache" / "prior_rules"
DEFAULT = "sigma^1 by depth"
POINTS_LOST = 0.3  # at most, by the default to the best rule of a budget


def power(p: float, even: float = 0.0) -> Any:
    """The rule sigma^p, with a share `even` of the total spread over all modules as 1/r^2."""

    def rule(request: Request) -> Gains:
        spectra = {name: values**p for name, values in request.profiled.spectra().items()}
        total = sum(float(values.sum()) for values in spectra.values())
        each = {name: 1.0 / np.arange(1.0, len(values) + 1) ** 2 for name, values in spectra.items()}
        spread = sum(float(values.sum()) for values in each.values())
        return {name: (1 - even) * spectra[name] / total + even * each[name] / spread for name in spectra}

    return rule


RULES: dict[str, Any] = {
    "uniform": "uniform",
    "sigma^1 by depth": one_shot,
    "sigma^2": power(2.0),
    "sigma^1": power(1.0),
    "sigma^2 + 0.1 even": power(2.0, 0.1),
    "gradient-norm": "gradient-norm",
    "sigma^0.5": power(0.5),
    "sigma^1.5": power(1.5),
    "sigma^1 + 0.1 even": power(1.0, 0.1),
    "sigma^2 + 0.3 even": power(2.0, 0.3),
    "random": "random",
}
FEWER_RULES = (
    "uniform", DEFAULT, "sigma^2", "sigma^1", "sigma^2 + 0.1 even", "gradient-norm", "random",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured of a task; each rule's rate is chosen by `n_tuning_seeds`."""

    task: Task
    budgets: tuple[float, ...]  # times uniform rank 1, the most telling first
    training: rs.TrainingSettings
    n_seeds: int = 16
    n_tuning_seeds: int = 8
    rules: tuple[str, ...] = tuple(RULES)


def plans() -> list[Plan]:
    """All tasks. A run of DINOv2 takes twice as long, and its tuning tells less between seeds, so it has fewer."""
    digits = rs.TrainingSettings(steps=84, learning_rate=[0.005, 0.01, 0.02, 0.04])
    photos = rs.TrainingSettings(steps=100, learning_rate=[0.00125, 0.0025, 0.005, 0.01], head_learning_rate=0.01)
    dinov2 = rs.load_task({"name": "dinov2-digits", "dtype": "bfloat16"})
    return [
        Plan(task=rs.load_task("digits-shift"), budgets=(1 / 4, 1, 1 / 8, 4, 1 / 2, 2), training=digits),
        Plan(task=turned(), budgets=(1 / 4, 1, 4), training=digits),
        Plan(task=dinov2, budgets=(1 / 4, 1 / 16), training=photos, n_seeds=8, n_tuning_seeds=2, rules=FEWER_RULES),
    ]


def measure(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """A row for each task, budget and rule; a claim for each task and budget: the default loses little to the best rule."""
    rows: list[dict[str, Any]] = []
    claims: list[Claim] = []
    cells = [(plan, factor) for plan in plans() for factor in plan.budgets]
    for plan, factor in sorted(cells, key=lambda cell: cell[0].budgets.index(cell[1]))[: 1 if quick else None]:
        found, name = compare_rules(plan, factor, quick), plan.task.name
        rows += found
        points = {row["rule"]: 100 * row["test"] for row in found}
        claims.append(
            Claim.at_most(
                f"{name}, {factor:g} times rank 1: points that {DEFAULT} loses to the best rule",
                max(points.values()) - points[DEFAULT],
                3.0 if quick else POINTS_LOST,
            )
        )
    return rows, claims


def compare_rules(plan: Plan, factor: float, quick: bool) -> list[dict[str, Any]]:
    """All rules at one budget."""
    task = plan.task
    profile = profile_task(task)
    targets = profile.targets
    budget = rs.ParameterBudget(round(factor * sum(target.rank_cost for target in targets)))
    rules = {name: RULES[name] for name in islice(plan.rules, 3 if quick else None)}
    made = [rs.allocate(rule, targets=targets, budget=budget, profile=profile) for rule in rules.values()]
    grids = [make_grid(each.renamed("rule"), plan.training, name="rule", factor=factor) for each in made]
    seeds = range(2 if quick else plan.n_seeds)
    tuning = range(10_000, 10_000 + (1 if quick else plan.n_tuning_seeds))
    results = run_tuned(task, grids, seeds=seeds, tuning_seeds=tuning, kept_in=None if quick else KEPT)
    reported = {
        name: [run for run in runs if run.role == "reported"] for name, runs in zip(rules, results, strict=True)
    }
    tests = {name: [float(run.test or 0.0) for run in runs] for name, runs in reported.items()}
    return [
        {
            "task": task.name,
            "factor": factor,
            "budget": budget.limit,
            "rule": name,
            "parameters": runs[0].parameters,
            "learning_rate": runs[0].learning_rate,
            "modules": sum(rank > 0 for rank in (runs[0].ranks or {}).values()),
            "validation": fmean(run.validation for run in runs),
            "test": fmean(tests[name]),
            "to_uniform": paired_difference(tests[name], tests["uniform"]),
        }
        for name, runs in reported.items()
    ]


if __name__ == "__main__":
    run_benchmark(measure, __doc__ or "")
