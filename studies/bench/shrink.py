"""Train at rank 8 and shrink, against training at the budget, PARA's rule and per-module truncation, on digits-shift.

    python studies/bench/shrink.py --out studies/results/shrink.json

Sixteen adapters of uniform rank 8 are trained, and cut to the parameters of uniform rank 1 and to a quarter of them, without
training, by every rule of `rankscope.lora.shrink`: water-filling over energies (`energy`), one threshold for all singular values
(`threshold`: PARA's rule, arXiv 2604.27796, which knows weights only), and equal ranks (`uniform`: truncation module by module,
as kohya's resize_lora.py does; below rank 1 on some of the modules). Each rule cuts by the weights alone, by the inputs' second
moment, and by those of inputs and output gradients, over one epoch of training data.

What is trained at those parameters is read off studies/results/budgets/digits-shift, the runs of `rankscope compare` on
studies/compare/budgets/digits-shift.yaml: the same task, steps and seeds, each method at the learning rate that is best for it on
validation over 3 other seeds; rank 8 takes its rate from there, too. Figures are accuracies on the test split, differences are
paired by seed, with 95 % intervals. 3 CPU minutes; `--quick`: 3 seeds.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pandas as pd
from _compared import RESULTS
from _harness import Claim, run_benchmark

import rankscope as rs
from rankscope.comparison import RunSpec, paired_difference, read_comparison, run_all
from rankscope.lora import Moments, load_adapter, measure_moments, shrink
from rankscope.settings import TrainingSettings
from rankscope.tasks import Task, evaluate
from rankscope.training import Lora

STEPS, RANK = 84, 8
HEAD_RATE = 0.05  # as in the study
FACTORS = {"1": 1.0, "1/4": 0.25}  # of uniform rank 1's parameters
RULES = ("energy", "threshold", "uniform")
OURS, PARA, RESIZE = "energy, by inputs and gradients", "threshold, by weights", "uniform, by weights"
RETRAINED = f"retrained uniform, rank {RANK}"  # the adapters that are cut
TRAINED = ("uniform", "one-shot", "controller-one-shot")

Scores = dict[tuple[str, str], list[float]]  # by method and budget, one a seed


def measure(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """Train, cut, compare."""
    task = rs.load_task("digits-shift")
    runs = read_comparison(RESULTS / "budgets" / "digits-shift" / "comparison.parquet")
    runs = runs[runs["role"] == "reported"].sort_values("seed")
    seeds = range(1000, 1003 if quick else 1016)
    scores: Scores = defaultdict(list)
    facts: dict[tuple[str, str], dict[str, Any]] = {}
    for name, factor in {**FACTORS, str(RANK): float(RANK)}.items():
        for method in TRAINED if name in FACTORS else ("uniform",):
            key = _trained(method, name), name
            scores[key], facts[key] = trained(runs, method, factor, seeds)
    targets = rs.find_targets(task.build_model())
    whole = rs.ParameterBudget.uniform(targets, 1).limit
    wide = rs.allocate("uniform", targets=targets, budget=rs.ParameterBudget.uniform(targets, RANK))
    rate = facts[_trained("uniform", str(RANK)), str(RANK)]["learning_rate"]
    training = TrainingSettings(steps=STEPS, learning_rate=rate, head_learning_rate=HEAD_RATE)
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            adapter = Path(folder) / "adapter"
            spec = RunSpec(method=Lora(wide), training=training, seed=seed, save_to=adapter)
            scores[RETRAINED, str(RANK)].append(run_all(task, [spec])[0].test or 0.0)
            facts[RETRAINED, str(RANK)] = {"parameters": wide.parameters, "learning_rate": rate}
            cut(task, adapter, {name: round(factor * whole) for name, factor in FACTORS.items()}, scores, facts)
    return [row(key, scores, facts) for key in scores], claims_of(scores)


def _trained(method: str, budget: str) -> str:
    return f"trained {method}" + f", rank {RANK}" * (budget == str(RANK))


def trained(runs: pd.DataFrame, method: str, factor: float, seeds: range) -> tuple[list[float], dict[str, Any]]:
    """Test accuracies of a method at a budget, and its parameters and learning rate."""
    found = runs[(runs["method"] == method) & (runs["factor"] == factor) & runs["seed"].isin(seeds)]
    assert found["seed"].tolist() == list(seeds)
    first = found.iloc[0]
    return found["test"].tolist(), {key: first[key].item() for key in ("parameters", "learning_rate")}


def cut(task: Task, adapter: Path, budgets: dict[str, int], scores: Scores, facts: dict[Any, Any]) -> None:
    """One adapter by every rule, with every weighting."""
    moments = measure_moments(load_adapter(task.build_model(), adapter), task.train_batches(0), task.loss)
    weights: dict[str, Any] = {
        "weights": None,
        "inputs": {name: Moments(each.inputs) for name, each in moments.items()},
        "inputs and gradients": moments,
    }
    out = adapter.parent / "cut"
    for name, parameters in budgets.items():
        for rule in RULES:
            for by, given in weights.items():
                shrunk = shrink(adapter, parameters, out, rule=rule, moments=given)
                key = f"{rule}, by {by}", name
                scores[key].append(evaluate(task, load_adapter(task.build_model(), out), "test")[task.metric])
                facts[key] = {"parameters": shrunk.after.parameters, "energy_kept": shrunk.kept}


def row(key: tuple[str, str], scores: Scores, facts: dict[Any, Any]) -> dict[str, Any]:
    """One method at one budget and its differences to all others there, and to rank 8; parameters are the last seed's."""
    method, budget = key
    others = {
        other: list(paired_difference(scores[key], mine))
        for (other, at), mine in scores.items()
        if at in (budget, str(RANK)) and other != method
    }
    return {
        "method": method,
        "budget": budget,
        **facts[key],
        "test": fmean(scores[key]),
        "test_stdev": stdev(scores[key]),
        "minus": others,
        "test_by_seed": scores[key],
    }


def claims_of(scores: Scores) -> list[Claim]:
    """What issue 21 hopes for: better than PARA's rule and than truncation, and not worse than training at the budget."""
    claims = []
    for name in FACTORS:
        for other in (PARA, RESIZE):
            gain = paired_difference(scores[OURS, name], scores[other, name])
            claims.append(Claim.at_least(f"{name} of rank 1: {OURS}, minus {other}: low end", gain.low, 0.0))
        for other in ("trained uniform", "trained one-shot"):
            gain = paired_difference(scores[OURS, name], scores[other, name])
            claims.append(Claim.at_least(f"{name} of rank 1: {OURS}, minus {other}: high end", gain.high, 0.0))
    return claims


if __name__ == "__main__":
    run_benchmark(measure, __doc__ or "")
