"""What benchmarks read off `rankscope compare`: the runs of the studies in studies/compare, committed in studies/results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import yaml

from rankscope.comparison import at_budget, paired_difference, read_comparison
from rankscope.units import Interval

STUDIES = Path(__file__).parents[1] / "compare"
RESULTS = Path(__file__).parents[1] / "results"
QUICK = Path("out") / "quick"


def compared(task: str, quick_methods: tuple[str, ...] = ()) -> pd.DataFrame:
    """All runs of a task's comparison: the committed ones, or, once that file is deleted, new ones, two at a time.

    Args:
        task: Of studies/compare.
        quick_methods: Compare these only, on few seeds and apart from the results.
    """
    out = (QUICK if quick_methods else RESULTS) / task
    table = out / "comparison.parquet"
    if table.exists() and not quick_methods:
        return read_comparison(table)
    study = _in_small(task, quick_methods) if quick_methods else STUDIES / f"{task}.yaml"
    command = [sys.executable, "-m", "rankscope", "compare", str(study), "--out", str(out), "--jobs", "2"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return read_comparison(table)


def _in_small(task: str, methods: tuple[str, ...]) -> Path:
    """The study with few methods and seeds, one tuning seed and three of its rates."""
    study = yaml.safe_load((STUDIES / f"{task}.yaml").read_text(encoding="utf-8"))
    study["training"]["learning_rate"] = study["training"]["learning_rate"][-3:]
    study["compare"] = {"methods": list(methods), "n_seeds": 4, "n_tuning_seeds": 1}
    QUICK.mkdir(parents=True, exist_ok=True)
    path = QUICK / f"{task}.yaml"
    path.write_text(yaml.safe_dump(study), encoding="utf-8")
    return path


def scores_of(runs: pd.DataFrame) -> dict[str, list[float]]:
    """The test metric by seed of every method, at the study's budget."""
    reported = at_budget(runs).query("role == 'reported'").sort_values("seed")
    return {str(name): group["test"].tolist() for name, group in reported.groupby("method", sort=False)}


def minus(scores: dict[str, list[float]], ours: str, theirs: str) -> Interval:
    """The paired difference of two methods, with its 95 % interval."""
    return paired_difference(scores[ours], scores[theirs])
