"""Train at rank 8 and shrink, against training at the budget, PARA's rule and per-module truncation.

    python studies/bench/shrink.py --out studies/results/shrink.json

On digits-shift sixteen adapters of uniform rank 8 are trained, and cut to the parameters of uniform rank 1 and to a quarter of
them; on sentiment (all-MiniLM-L6-v2, bfloat16) five, cut to a half and an eighth. Nothing is trained after the cut. The rules
are those of `rankscope.lora.shrink`: water-filling over energies (`energy`), one threshold for all singular values (`threshold`:
PARA's rule, arXiv 2604.27796, which knows weights only), and equal ranks (`uniform`: truncation module by module, as kohya's
resize_lora.py does; below rank 1 on some of the modules). Each rule cuts by the weights alone, by the inputs' second moment, and
by those of inputs and output gradients, over one epoch of training data.

What is trained at those parameters is read off studies/results/budgets, the runs of `rankscope compare` on the studies of
studies/compare/budgets: the same task, steps and seeds, each method at the learning rate that is best for it on validation over
other seeds; rank 8 takes its rate from there, too. Figures are accuracies on the test split, differences are paired by seed, with
95 % intervals. 3 CPU minutes for digits-shift, 10 for sentiment; `--quick`: digits-shift, 3 seeds.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pandas as pd
from _compared import RESULTS, STUDIES
from _harness import Claim, run_benchmark

import rankscope as rs
from rankscope.comparison import RunSpec, paired_difference, read_comparison, run_all
from rankscope.distributed import mixed_precision
from rankscope.lora import Moments, load_adapter, measure_moments, shrink
from rankscope.tasks import Task, evaluate
from rankscope.training import Lora

RANK = 8
FIRST_SEED = 1000


@dataclass(frozen=True)
class Case:
    """A study of studies/compare/budgets, and what its budgets are called: times the parameters of uniform rank 1."""

    task: str
    factors: Mapping[str, float]  # name of a budget: its factor of the study's budget
    wide: float  # the factor at which uniform has rank 8
    n_seeds: int
    methods: tuple[str, ...]  # trained at each budget


CASES = (
    Case("digits-shift", {"1": 1.0, "1/4": 0.25}, 8.0, 16, ("uniform", "one-shot", "controller-one-shot")),
    Case("sentiment", {"1/2": 0.25, "1/8": 0.0625}, 4.0, 5, ("uniform", "one-shot")),  # its budget is rank 2
)
RULES = ("energy", "threshold", "uniform")
OURS, PARA, RESIZE = "energy, by inputs and gradients", "threshold, by weights", "uniform, by weights"
RETRAINED = f"retrained uniform, rank {RANK}"  # the adapters that are cut

Scores = defaultdict[tuple[str, str], list[float]]  # by method and budget, one a seed
Facts = dict[tuple[str, str], dict[str, Any]]


def measure(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """Train, cut, compare, on every task."""
    rows, claims = list[dict[str, Any]](), list[Claim]()
    for case in CASES[:1] if quick else CASES:
        scores, facts = measure_case(case, range(FIRST_SEED, FIRST_SEED + (3 if quick else case.n_seeds)))
        rows += [{"task": case.task, **row(key, scores, facts)} for key in scores]
        claims += claims_of(case, scores)
    return rows, claims


def measure_case(case: Case, seeds: range) -> tuple[Scores, Facts]:
    """One task: scores and facts of every method at every budget."""
    study = rs.read_study(STUDIES / "budgets" / f"{case.task}.yaml")
    task = rs.load_task(study.task)
    runs = read_comparison(RESULTS / "budgets" / case.task / "comparison.parquet")
    runs = runs[runs["role"] == "reported"].sort_values("seed")
    scores, facts = Scores(list), Facts()
    for name, factor in {**case.factors, str(RANK): case.wide}.items():
        for method in case.methods if name in case.factors else ("uniform",):
            key = _trained(method, name), name
            scores[key], facts[key] = trained(runs, method, factor, seeds)
    targets = rs.find_targets(task.build_model())
    wide = rs.allocate("uniform", targets=targets, budget=rs.ParameterBudget.uniform(targets, RANK))
    training = study.training.at(facts[_trained("uniform", str(RANK)), str(RANK)]["learning_rate"])
    budgets = {name: round(factor / case.wide * wide.parameters) for name, factor in case.factors.items()}
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            adapter = Path(folder) / "adapter"
            spec = RunSpec(method=Lora(wide), training=training, seed=seed, save_to=adapter)
            scores[RETRAINED, str(RANK)].append(run_all(task, [spec])[0].test or 0.0)
            facts[RETRAINED, str(RANK)] = {
                "parameters": wide.parameters,
                "learning_rate": training.peak_learning_rate,
            }
            cut(task, adapter, budgets, scores, facts)
    return scores, facts


def _trained(method: str, budget: str) -> str:
    return f"trained {method}" + f", rank {RANK}" * (budget == str(RANK))


def trained(runs: pd.DataFrame, method: str, factor: float, seeds: range) -> tuple[list[float], dict[str, Any]]:
    """Test accuracies of a method at a budget, and its parameters and learning rate."""
    found = runs[(runs["method"] == method) & (runs["factor"] == factor) & runs["seed"].isin(seeds)]
    assert found["seed"].tolist() == list(seeds)
    first = found.iloc[0]
    return found["test"].tolist(), {key: first[key].item() for key in ("parameters", "learning_rate")}


def cut(task: Task, adapter: Path, budgets: dict[str, int], scores: Scores, facts: Facts) -> None:
    """One adapter by every rule, with every weighting."""

    def loss(model: Any, batch: Any) -> Any:
        with mixed_precision(model):  # as it was trained
            return task.loss(model, batch)

    moments = measure_moments(load_adapter(task.build_model(), adapter), task.train_batches(0), loss)
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


def row(key: tuple[str, str], scores: Scores, facts: Facts) -> dict[str, Any]:
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


def claims_of(case: Case, scores: Scores) -> list[Claim]:
    """What issue 21 hopes for: better than PARA's rule and than truncation, and not worse than training at the budget."""
    claims = []
    for name in case.factors:
        for other in (PARA, RESIZE, "trained uniform", "trained one-shot"):
            gain = paired_difference(scores[OURS, name], scores[other, name])
            end, least = ("high", gain.high) if other.startswith("trained") else ("low", gain.low)
            about = f"{case.task}, {name} of rank 1: {OURS}, minus {other}: {end} end"
            claims.append(Claim.at_least(about, least, 0.0))
    return claims


if __name__ == "__main__":
    run_benchmark(measure, __doc__ or "")
