"""Regret of searches at equal numbers of trials, on RankBench (real, tabulated) and on synthetic landscapes.

    python studies/bench/search_regret.py --out studies/results/search_regret.json

Every method gets the same one-shot gains and the same start, uniform and one-shot, and spends the last quarter of its trials on
confirming five finalists (`searches/regret.py`); regret is 1 for uniform and 0 for the optimum. 20 seeds, medians.
CMA-ES needs `pip install cmaes`. Two processes, one thread each; about 20 minutes. Searches that are done are
kept in `.cache/search_regret.jsonl`, by the sources that they measure, so an interrupted run goes on. It also draws
`search_regret.png` beside the result. `--quick`: ours, TPE and random on the tilts, one synthetic landscape, 5 seeds.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from _harness import Claim, run_benchmark
from joblib import Parallel, delayed
from searches import BUDGETS, METHODS, OURS, plot_regret, run_search, tabulate

LOG = Path(__file__).parents[2] / ".cache" / "search_regret.jsonl"
SHARED = (
    "studies/bench/searches",
    "rankscope/budget.py",
    "rankscope/searching/space.py",
    "rankscope/searching/confirmation.py",
)
MINE = ("rankscope/searching", "rankscope/performance")  # what only our own search runs on
JUDGED = ("digits-shift/1", "synthetic/72", "synthetic/72-useless-profile", "synthetic/24", "synthetic/210")
LEFT_OUT = {  # what takes as long as all others together
    *(("gp", name) for name in JUDGED if name != "digits-shift/1"),
    ("tpe-raw", "synthetic/210"),
    ("random-raw", "synthetic/210"),
}
Cell = tuple[str, str, int]


def measure(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """All searches; rows of regrets by landscape, method and trials."""
    names = ["synthetic/72"] if quick else list(JUDGED)
    methods = [OURS, "tpe", "random"] if quick else list(METHODS)
    seeds = range(5 if quick else 20)
    budgets = (30, 60) if quick else BUDGETS
    cells = [
        (name, method, seed) for name in names for method in methods for seed in seeds if (method, name) not in LEFT_OUT
    ]
    curves = run_all(cells, budgets)
    found = tabulate({cell: curves[cell] for cell in cells})
    if not quick:
        path = Path(__file__).parents[1] / "results" / "search_regret.png"
        plot_regret(found).savefig(path, dpi=150, bbox_inches="tight")
    quartiles = (
        found.groupby(["landscape", "method", "trials"], sort=False)["regret"].quantile([0.25, 0.5, 0.75]).unstack()
    )
    rows = [
        {
            "landscape": name,
            "method": method,
            "trials": trials,
            "regret_quartiles": [round(float(v), 4) for v in values],
        }
        for (name, method, trials), values in zip(quartiles.index, quartiles.to_numpy(), strict=True)
    ]
    return rows, [claim for name in names for claim in claims(found[found["landscape"] == name], name, budgets)]


def claims(found: pd.DataFrame, name: str, budgets: Sequence[int]) -> list[Claim]:
    """A third of TPE's trials do; nobody is better at 30."""
    at = found.groupby(["method", "trials"])["regret"].median()
    last = max(budgets)
    bounds = [(f"{last} trials, minus TPE's on the tilts", at[OURS, last] - at["tpe", last])]
    if 100 in budgets:
        best = min(
            (method for method, trials in at.index if (method, trials) == (method, 30) and method != OURS),
            key=lambda m: at[m, 30],
        )
        bounds += [
            ("33 trials, minus that of TPE's 100", at[OURS, 33] - at["tpe", 100]),
            (f"30 trials, minus the best other's ({best})", at[OURS, 30] - at[best, 30]),
        ]
    return [Claim.at_most(f"{name}: our median regret of {text}", float(value), 0.0) for text, value in bounds]


def run_all(cells: list[Cell], budgets: Sequence[int]) -> dict[Cell, dict[int, float]]:
    """Every search, two at a time; those that these sources have done already are read from the log."""
    known: dict[Cell, dict[int, float]] = {}
    versions = {ours: version(SHARED + MINE if ours else SHARED) for ours in (True, False)}
    for line in LOG.read_text().splitlines() if LOG.exists() else ():
        entry = json.loads(line)
        if (entry["version"], entry["budgets"]) == (versions[entry["cell"][1] == OURS], list(budgets)):
            known[tuple(entry["cell"])] = {int(t): regret for t, regret in entry["curve"].items()}
    missing = sorted((cell for cell in cells if cell not in known), key=lambda cell: (cell[1] == OURS, cell[2]))
    LOG.parent.mkdir(exist_ok=True)
    with LOG.open("a") as log:
        jobs = (delayed(run_search)(*cell, budgets) for cell in missing)
        for cell, curve in Parallel(n_jobs=2, batch_size=1, return_as="generator_unordered")(jobs):
            known[cell] = curve
            entry = {"version": versions[cell[1] == OURS], "budgets": budgets, "cell": cell, "curve": curve}
            print(json.dumps(entry), file=log, flush=True)
            print(f"{len(known)} of {len(cells)} searches", end="\r", file=sys.stderr)
    return known


def version(parts: Sequence[str]) -> list[str]:
    """Git's hashes of sources, as committed."""
    names = [f"HEAD:{part}" for part in parts]
    return subprocess.run(["git", "rev-parse", *names], capture_output=True, text=True, check=True).stdout.split()


if __name__ == "__main__":
    run_benchmark(measure, __doc__ or "")
