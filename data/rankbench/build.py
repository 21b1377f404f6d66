"""Measures RankBench: hundreds of allocations of two ready tasks, each trained for real, once, into Parquet.

    python data/rankbench/build.py --jobs 2

Three hours on two cores, one torch thread a process; `--task NAME` measures one task only. Runs that the tables
hold are not repeated; every new one is kept in `.cache/rankbench.jsonl` as it ends, so an interrupted build goes on. In the end
`TASK.parquet` (one row a run) and
`TASK.profile.parquet` are written beside this file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import rankscope as rs
from rankscope.files import replacing
from rankscope.profiling import profile
from rankscope.searching import HierarchicalSpace, group_by_depth
from rankscope.searching.space import TAU
from rankscope.strategies import Request
from rankscope.tasks import evaluate

HERE = Path(__file__).parent
RUNS = HERE.parents[1] / ".cache" / "rankbench.jsonl"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured of one task under one budget.

    Attributes:
        task: A ready task.
        rank: The budget is so many times that of uniform LoRA of rank 1.
        allocations: How many.
        seeds: Training seeds.
        steps: Optimizer steps.
        rate: Learning rate, the same for all.
        with_test: Whether the test split is read.
        one_shot: Whether one-shot's default of 28 November 2026, sigma by depth, follows as the last allocation.
    """

    task: str
    rank: float
    allocations: int
    seeds: Sequence[int]
    steps: int
    rate: float
    with_test: bool = True
    one_shot: bool = False


PLANS = (  # in the order in which they are measured
    Plan(task="digits-shift", rank=1, allocations=600, seeds=(0, 1, 2), steps=84, rate=0.01, one_shot=True),
    Plan(task="supersense", rank=2, allocations=150, seeds=(0,), steps=50, rate=0.004, with_test=False),
    Plan(task="digits-shift", rank=1, allocations=120, seeds=(0,), steps=21, rate=0.01, with_test=False),
    Plan(task="digits-shift", rank=1, allocations=120, seeds=(0,), steps=42, rate=0.01, with_test=False),
    Plan(task="digits-shift", rank=2, allocations=450, seeds=(0, 1), steps=84, rate=0.01, one_shot=True),
    Plan(task="digits-shift", rank=4, allocations=450, seeds=(0, 1), steps=84, rate=0.01, one_shot=True),
    Plan(task="supersense", rank=2, allocations=30, seeds=(0,), steps=250, rate=0.004),
    Plan(task="digits-shift", rank=1 / 4, allocations=300, seeds=(0, 1), steps=84, rate=0.02, one_shot=True),
    Plan(task="digits-shift", rank=1 / 8, allocations=300, seeds=(0, 1), steps=84, rate=0.02, one_shot=True),
    Plan(task="digits-shift", rank=1 / 2, allocations=300, seeds=(0, 1), steps=84, rate=0.02, one_shot=True),
)


def take_profile(name: str) -> rs.Profile:
    """The task's profile, from `TASK.profile.parquet` if it is there."""
    path = HERE / f"{name}.profile.parquet"
    if not path.exists():
        task = _task(name)
        batches = list(islice(task.train_batches(0), 32))
        head = getattr(task, "head_modules", ())
        profile(task.build_model(), batches, loss_fn=task.loss, head=head, head_steps=100).to_parquet(path)
    return rs.read_profile(path)


def fisher(request: Request) -> dict[str, float]:
    """The root of the empirical Fisher trace: the scale of single examples' gradients."""
    return {name: math.sqrt(max(trace, 0.0)) for name, trace in request.profiled.column("fisher_trace").items()}


def blend(request: Request) -> dict[str, float]:
    """A geometric mean of the gradient signal's norm (weight 1/2), the root Fisher trace and the sensitivity (1/4 each)."""
    norms, shares = request.profiled.column("gradient_norm"), request.profiled.signal_shares()
    views = (
        ({name: norm * math.sqrt(shares[name]) for name, norm in norms.items()}, 0.5),
        (fisher(request), 0.25),
        (request.profiled.column("sensitivity"), 0.25),
    )
    scores = dict.fromkeys(norms, 1.0)
    for values, weight in views:
        mean = float(np.mean([values[name] for name in scores]))
        scores = {name: score * (values[name] / mean) ** weight for name, score in scores.items()}
    return scores


def draw_allocations(taken: rs.Profile, budget: rs.ParameterBudget) -> Iterator[rs.RankAllocation]:
    """Different allocations without end: what the strategies give, then tilts, tilts with noise, and Dirichlet shares.

    The first ones are the same for every length, so that plans of one budget share them.
    """
    seen: set[rs.RankAllocation] = set()
    for made in _candidates(taken, budget):
        if made not in seen:
            seen.add(made)
            yield made


def _candidates(taken: rs.Profile, budget: rs.ParameterBudget) -> Iterator[rs.RankAllocation]:
    targets, rng = taken.targets, np.random.default_rng(0)
    given = {"targets": targets, "budget": budget, "profile": taken}
    yield rs.allocate("uniform", **given)
    yield rs.allocate("one-shot", **given, power=2.0, depth=0.0)  # the default when the tables were made
    for strategy in ("gradient-norm", fisher, "sensitivity", "activation", blend):
        yield rs.allocate(strategy, **given)
    for power in (0.5, 1.0):
        yield rs.allocate("one-shot", **given, power=power, depth=0.0)
    gains = {name: values**2 for name, values in taken.spectra().items()}
    groups = group_by_depth(targets)
    for index in count():
        if index % 4 == 3:
            concentration = float(rng.choice([0.3, 1.0, 3.0, 10.0]))
            yield rs.allocate("random", targets=targets, budget=budget, seed=index, concentration=concentration)
            continue
        spread = (0.0, 0.5, 1.5)[index % 4]  # of the noise on single modules
        noisy = {name: values * np.exp(rng.normal(0.0, spread)) for name, values in gains.items()}
        space = HierarchicalSpace(targets=targets, gains=noisy, budget=budget, groups=groups)
        point = {tilt.name: rng.uniform(tilt.low, tilt.high) * rng.choice([0.25, 1.0]) for tilt in space.tilts}
        yield space.allocation(point | {TAU: rng.uniform(0.0, 1.2)})


def cells(plan: Plan) -> Iterator[tuple[dict[str, Any], rs.RankAllocation]]:
    """The runs of a plan: what identifies a run, and its allocation; all seeds of one allocation follow each other."""
    taken = take_profile(plan.task)
    budget = rs.ParameterBudget(round(plan.rank * sum(target.rank_cost for target in taken.targets)))
    drawn = list(islice(draw_allocations(taken, budget), plan.allocations))
    later = rs.allocate("one-shot", targets=taken.targets, budget=budget, profile=taken, power=1.0, depth=1.0)
    if plan.one_shot and later not in drawn:
        drawn.append(later)
    for number, allocation in enumerate(drawn):
        for seed in plan.seeds:
            key = {
                "task": plan.task,
                "rank": plan.rank,
                "steps": plan.steps,
                "learning_rate": plan.rate,
                "number": number,
                "seed": seed,
            }
            yield key, allocation


def measure(key: dict[str, Any], allocation: rs.RankAllocation, with_test: bool) -> dict[str, Any]:
    """One training run: the key, the ranks, and metric and loss on both splits."""
    import torch

    torch.set_num_threads(1)
    task = _task(key["task"])
    config = rs.TrainingSettings(steps=key["steps"], learning_rate=key["learning_rate"])
    model, result = rs.train(task, allocation, config, seed=key["seed"])
    test = evaluate(task, model, "test") if with_test else {}
    return {
        **key,
        "origin": allocation.strategy,
        "parameters": allocation.parameters,
        "ranks": list(allocation.vector),
        "validation": result.metrics[task.metric],
        "validation_loss": result.metrics["loss"],
        "test": test.get(task.metric),
        "test_loss": test.get("loss"),
    }


_tasks: dict[str, rs.Task] = {}


def _task(name: str) -> rs.Task:
    """Loaded once a process."""
    if name not in _tasks:
        _tasks[name] = rs.load_task(name)
    return _tasks[name]


def _tabulated() -> list[dict[str, Any]]:
    """The runs in the tables as they are."""
    tables = sorted({HERE / f"{plan.task}.parquet" for plan in PLANS})
    return [run for path in tables if path.exists() for run in pd.read_parquet(path).to_dict("records")]


def _identity(run: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(run[name] for name in ("task", "rank", "steps", "learning_rate", "number", "seed"))


def main() -> None:
    """Measures what is missing, then writes the tables."""
    from joblib import Parallel, delayed

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--task", choices=sorted({plan.task for plan in PLANS}), help="measure this one only")
    arguments = parser.parse_args()
    plans = [plan for plan in PLANS if arguments.task in (None, plan.task)]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    RUNS.parent.mkdir(exist_ok=True)
    runs = _tabulated() + ([json.loads(line) for line in RUNS.read_text().splitlines()] if RUNS.exists() else [])
    known = {_identity(run) for run in runs}
    missing = [
        (key, allocation, plan.with_test)
        for plan in plans
        for key, allocation in cells(plan)
        if _identity(key) not in known
    ]
    print(f"{len(known)} runs known, {len(missing)} to do", flush=True)
    with RUNS.open("a") as log:
        for run in Parallel(n_jobs=arguments.jobs, return_as="generator_unordered")(
            delayed(measure)(*cell) for cell in missing
        ):
            runs.append(run)
            print(json.dumps(run), file=log, flush=True)
    frame = pd.DataFrame({_identity(run): run for run in runs}.values()).sort_values(
        ["task", "rank", "steps", "number", "seed"], ignore_index=True
    )
    for name, part in frame.groupby("task"):
        with replacing(HERE / f"{name}.parquet") as temporary:
            part.to_parquet(temporary, index=False)


if __name__ == "__main__":
    main()
