"""A real search on supersense with 40 short trials: is what it recommends better than one-shot and uniform on the test split?

    python studies/bench/search_supersense.py --out studies/results/search_supersense.json

The search is that of `studies/supersense.yaml`: trials of 50 steps, then five finalists on two fresh seeds at 125, three learning
rates, all-MiniLM-L6-v2 on WordNet glosses at uniform rank 2's budget. Then uniform, one-shot and what was recommended are
trained in full on three fresh seeds, each at its best rate in the search, and compared on the test split, seed by seed. About 25
minutes on two cores; study and runs are kept under `.cache/`, so an interrupted run goes on. `--quick`: five trials of
two steps, one seed. The claims are what one would hope for, whatever comes out.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import optuna
import torch
from _harness import Claim, run_benchmark
from joblib import Parallel, delayed

import rankscope as rs
from rankscope.comparison import RunSpec, paired_difference, run_all
from rankscope.searching import SearchResult
from rankscope.settings import read_study
from rankscope.training import Lora

STUDY = Path(__file__).parents[1] / "supersense.yaml"
CACHE = Path(__file__).parents[2] / ".cache"
SEEDS = range(2000, 2003)


def measure(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """The search, then the comparison."""
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = read_study(STUDY)
    training, settings = study.training, study.search
    if quick:
        training = rs.TrainingSettings.of(training, steps=4, learning_rate=training.learning_rates[0])
        settings = rs.SearchSettings.of(settings, n_trials=6, confirm_fraction=0.0, fidelity=0.5)
    taken = rs.read_profile(Path(__file__).parents[2] / "data" / "rankbench" / "supersense.profile.parquet")
    CACHE.mkdir(exist_ok=True)
    result = rs.search(
        rs.load_task("supersense"),
        budget=rs.ParameterBudget.uniform(taken.targets, study.budget.uniform_rank),
        profile=taken,
        settings=settings,
        training=training,
        storage=None if quick else f"sqlite:///{CACHE}/search_supersense.db",
    )
    best = {name: _terms(result, name) for name in ("uniform", "one-shot", "recommended")}
    seeds = SEEDS[:1] if quick else SEEDS
    cells = [(name, seed) for seed in seeds for name in best]
    scores = Parallel(n_jobs=1 if quick else 2)(
        delayed(_test)(best[name][0], training.at(best[name][1]), seed, quick) for name, seed in cells
    )
    test = {name: [s for (cell, _), s in zip(cells, scores, strict=True) if cell == name] for name in best}
    rows: list[dict[str, Any]] = [_search_row(result)]
    for name, (allocation, rate) in best.items():
        interval = list(paired_difference(test[name], test["uniform"]))
        rows.append(
            {"allocation": name, "parameters": allocation.parameters, "learning_rate": rate, "ranks": list(allocation.vector),
             "test": fmean(test[name]), "test_by_seed": test[name], "minus_uniform": interval}
        )  # fmt: skip
    return rows, [
        Claim.at_least(f"test accuracy of the recommended allocation minus {name}'s",
                       fmean(test["recommended"]) - fmean(test[name]), 0.0)
        for name in ("uniform", "one-shot")
    ]  # fmt: skip


def _terms(result: SearchResult, name: str) -> tuple[rs.RankAllocation, float]:
    """An allocation and its best rate in the search."""
    trial = result.best_trial if name == "recommended" else result.best_of_origin(name)
    return trial.allocation, trial.learning_rate


def _test(allocation: rs.RankAllocation, training: rs.TrainingSettings, seed: int, quick: bool) -> float:
    """Test accuracy of one run in full; runs that were done before are read."""
    spec = RunSpec(method=Lora(allocation), training=training, seed=seed)
    (run,) = run_all(rs.load_task("supersense"), [spec], kept_in=None if quick else CACHE / "search_supersense")
    assert run.test is not None
    return run.test


def _search_row(result: SearchResult) -> dict[str, Any]:
    best = result.best_trial
    return {
        "trials": len(result.trials),
        "confirming_runs": result.confirming_runs,
        "recommended": best.origin,
        "trial": best.number,
        "model": str(result.validation),
        "believed": "nothing"
        if result.belief is None
        else "model"
        if result.belief is result.model
        else "profile alone",
        "fidelity": [str(agreement) for agreement in result.agreements],
        "finalists": [[f.trial.origin, f.trial.number, f.metric, f.difference, f.interval] for f in result.finalists],
    }


if __name__ == "__main__":
    run_benchmark(measure, __doc__ or "")
