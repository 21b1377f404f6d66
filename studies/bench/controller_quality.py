"""The online controller against static ranks and PEFT's AdaLoRA, at equal budgets and steps, learning rate tuned for each.

    python studies/bench/controller_quality.py --out studies/results/controller_quality.json

Static uniform and one-shot, and the controller (default settings) from either; AdaLoRA with alpha tuned together with the rate.
digits-shift: budget of uniform rank 1, 84 steps, 16 seeds. supersense: uniform rank 2, 125 steps, 8 seeds. Rate and alpha
are chosen on validation with seeds of their own; then fresh seeds are compared on the test split, seed by seed. AdaLoRA's budget
is in ranks: what it ends with, in parameters, is beside it. Runs are kept under `.cache/`, so that an interrupted benchmark
goes on. Two processes, one torch thread each; about an hour and a half. `--quick`: digits, one rate, four seeds, no AdaLoRA.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from _harness import Claim, batches_of, run_benchmark

import rankscope as rs
from rankscope.comparison import Repeats, paired_difference, repeat_all
from rankscope.profiling import profile
from rankscope.training import AdaLora, Lora

KEPT = Path(__file__).parents[2] / ".cache" / "controller_quality"
ALPHAS = (8.0, 32.0, 128.0)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One task and its terms."""

    task: str
    uniform_rank: int
    steps: int
    rates: tuple[float, ...]
    n_tuning: int
    n_seeds: int
    profile_batches: int


SETTINGS = (
    Setting(
        task="digits-shift",
        uniform_rank=1,
        steps=84,
        rates=(0.005, 0.01, 0.02, 0.04),
        n_tuning=4,
        n_seeds=16,
        profile_batches=7,
    ),
    Setting(
        task="supersense",
        uniform_rank=2,
        steps=125,
        rates=(0.002, 0.004, 0.008),
        n_tuning=2,
        n_seeds=8,
        profile_batches=32,
    ),
)
QUICK = Setting(task="digits-shift", uniform_rank=1, steps=84, rates=(0.01,), n_tuning=1, n_seeds=4, profile_batches=7)


def measure(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """All settings."""
    rows, claims = [], []
    for setting in [QUICK] if quick else SETTINGS:
        found = compare(setting, quick)
        rows += [row(setting, each, found) for each in found.values()]
        claims += claims_of(setting, found)
    return rows, claims


def compare(setting: Setting, quick: bool) -> dict[str, Repeats]:
    """The methods by name."""
    task = rs.load_task(setting.task)
    batches = batches_of(task, setting.profile_batches)
    head = tuple(getattr(task, "head_modules", ()))
    taken = profile(task.build_model(), batches, loss_fn=task.loss, head=head)
    budget = rs.ParameterBudget.uniform(taken.targets, setting.uniform_rank)
    starts = [
        rs.allocate(name, targets=taken.targets, budget=budget, profile=taken) for name in ("uniform", "one-shot")
    ]
    moving = [Lora(start, rs.ControllerConfig()) for start in starts]
    adalora = [AdaLora(taken.targets, setting.uniform_rank, alpha) for alpha in ALPHAS]
    repeats = repeat_all(
        task,
        [*starts, *moving, *([] if quick else [adalora])],
        rs.TrainingConfig(steps=setting.steps),
        learning_rates=setting.rates,
        tuning_seeds=range(setting.n_tuning),
        seeds=range(1000, 1000 + setting.n_seeds),
        n_jobs=2,
        kept_in=None if quick else KEPT / setting.task,
    )
    return {each.name: each for each in repeats}


def row(setting: Setting, mine: Repeats, found: dict[str, Repeats]) -> dict[str, Any]:
    """One method's figures, and its differences to all others: mean and 95 % interval over the seeds."""
    others = [other for other in found.values() if other is not mine]
    return {
        "task": setting.task,
        "method": mine.name,
        "learning_rate": mine.learning_rate,
        "alpha": mine.method.alpha if isinstance(mine.method, AdaLora) else None,
        "parameters": mine.parameters,
        "ranks_moved": fmean(run.n_moved for run in mine.runs),
        "validation": fmean(mine.validation),
        "test": fmean(mine.test),
        "test_stdev": stdev(mine.test),
        "minus": {other.name: list(paired_difference(mine.test, other.test)) for other in others},
        "test_by_seed": mine.test,
    }


def claims_of(setting: Setting, found: dict[str, Repeats]) -> list[Claim]:
    """What issue 5 hopes for."""
    uniform, one_shot = found["uniform"], found["one-shot"]
    from_uniform, from_one_shot = found["controller from uniform"], found["controller from one-shot"]
    gain = paired_difference(from_uniform.test, uniform.test)
    kept = paired_difference(from_one_shot.test, one_shot.test)
    limit = uniform.method.allocation.budget if isinstance(uniform.method, Lora) else None
    claims = [
        Claim.at_least(f"{setting.task}: from uniform minus static uniform, low end", gain.low, 0.0)
        if setting.task == "digits-shift"
        else Claim.at_least(f"{setting.task}: from uniform minus static uniform", gain.mean, 0.0),
        Claim.at_least(f"{setting.task}: from one-shot minus static one-shot, high end", kept.high, 0.0),
        Claim.at_most(
            f"{setting.task}: the controller's parameters over the budget",
            max(from_uniform.parameters, from_one_shot.parameters) / (limit or np.nan),
            1.0,
        ),
    ]
    if adalora := found.get("AdaLoRA"):
        claims += [
            Claim.at_least(
                f"{setting.task}: {mine.name} minus AdaLoRA", paired_difference(mine.test, adalora.test).mean, 0.0
            )
            for mine in (from_uniform, from_one_shot)
        ]
    return claims


if __name__ == "__main__":
    run_benchmark(measure, __doc__ or "")
