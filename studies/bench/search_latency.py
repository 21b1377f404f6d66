"""How long the search itself takes: proposals, projections, and scoring candidates.

    python studies/bench/search_latency.py --out studies/results/search_latency.json

Bounds of issue 4, on one thread: a proposal of the performance model at 210 modules and 500 trials in at most 50 ms (median,
and the slowest of a tenth more trials, in which the variances are estimated again, beside it); the projection of a 560-module
inventory of 70B class, ranks to 256, in at most 0.1 s; 10,000 candidates scored in at most 0.2 s. `--quick`: the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import optuna
from _harness import Claim, run_benchmark
from searches import Synthetic

import rankscope as rs
from rankscope.budget import RankLimits, allocate_marginal


def measure(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """All timings."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    landscape = Synthetic(0, modules=210)
    study, sampler = searched(landscape, 500)
    times = []
    for _ in range(50):
        started = time.perf_counter()
        trial = study.ask()
        ranks = np.array(rs.suggest_allocation(trial, landscape.space).vector)
        times.append(time.perf_counter() - started)
        study.tell(trial, landscape.measure(ranks, 0))
    model = sampler.model(study)
    assert model is not None
    candidates = np.array([t.user_attrs["ranks"] for t in study.trials] * 19)[:10_000]
    scored = seconds(lambda: model.predict(candidates))
    targets = inventory()
    gains = {t.name: np.random.default_rng(i).gamma(1.0) / np.arange(1, 257) ** 2.0 for i, t in enumerate(targets)}
    budget = rs.ParameterBudget.uniform(targets, 16)
    projected = seconds(lambda: allocate_marginal(targets, gains, budget, RankLimits(max_rank=256)))
    rows = [
        {"what": "proposal", "modules": 210, "trials": 500, "median_s": median(times), "slowest_s": max(times)},
        {"what": "scoring", "modules": 210, "candidates": len(candidates), "median_s": scored},
        {"what": "projection", "modules": len(targets), "max_rank": 256, "median_s": projected},
    ]
    return rows, [
        Claim.at_most("a proposal at 210 modules and 500 trials, s", median(times), 0.05),
        Claim.at_most("the projection of 560 modules, s", projected, 0.1),
        Claim.at_most("scoring 10,000 candidates, s", scored, 0.2),
    ]


def searched(landscape: Synthetic, n_trials: int) -> tuple[optuna.Study, rs.PerformanceModelSampler]:
    """A study of random tilts, and a sampler that has learnt from it."""
    sampler = rs.PerformanceModelSampler(landscape.space, seed=0)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(0))
    for _ in range(n_trials):
        trial = study.ask()
        ranks = np.array(rs.suggest_allocation(trial, landscape.space).vector)
        study.tell(trial, landscape.measure(ranks, 0))
    study.sampler = sampler
    sampler.model(study)
    return study, sampler


def inventory() -> tuple[rs.TargetModule, ...]:
    """LLaMA-70B's 80 blocks of seven linear modules."""
    shapes = {
        "q_proj": (8192, 8192),
        "k_proj": (8192, 1024),
        "v_proj": (8192, 1024),
        "o_proj": (8192, 8192),
        "gate_proj": (8192, 28672),
        "up_proj": (8192, 28672),
        "down_proj": (28672, 8192),
    }
    return tuple(
        rs.TargetModule(name=f"layers.{b}.{role}", in_features=i, out_features=o, block=b, role=role)
        for b in range(80)
        for role, (i, o) in shapes.items()
    )


def seconds(call: Callable[[], object]) -> float:
    """Median of seven calls."""
    times = []
    for _ in range(7):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return median(times)


if __name__ == "__main__":
    run_benchmark(measure, __doc__ or "")
