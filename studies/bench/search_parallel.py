"""Regret at equal trials, of our search with 8 and 16 workers and of one worker: proposals made before results are in.

    python studies/bench/search_parallel.py --out studies/results/search_parallel.json

Each of k simulated workers asks for a trial before any of the k under way is told, as workers on one study do. The course
and the landscapes are those of `search_regret.py`: 60 and 100 trials, confirmation included; regret is 1 for uniform and 0 for
the optimum. Means over 40 seeds, the same for each number of workers; the claims are on the mean over landscapes, whose 95 %
interval (bootstrap over seeds) stands beside it. Two processes, one thread each; about 40 CPU minutes. Searches that are done are
kept in `.cache/search_parallel.jsonl`, so an interrupted run goes on. `--quick`: one landscape, 60 trials, 6 seeds, one and 8.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from _harness import Claim, run_benchmark
from joblib import Parallel, delayed
from search_regret import MINE, SHARED, version
from searches import OURS, run_search

LOG = Path(__file__).parents[2] / ".cache" / "search_parallel.jsonl"
LANDSCAPES = ("digits-shift/1", "synthetic/72", "synthetic/24")
WORKERS = (1, 8, 16)
Cell = tuple[str, int, int, int]  # landscape, trials, workers, seed


def measure(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """All searches; rows of mean regrets by landscape, trials and workers."""
    names, budgets = (("synthetic/72",), (60,)) if quick else (LANDSCAPES, (60, 100))
    workers, seeds = (WORKERS[:2], range(6)) if quick else (WORKERS, range(40))
    cells = [(name, n, k, seed) for seed in seeds for name in names for n in budgets for k in workers]
    found = pd.DataFrame(run_all(cells), columns=["landscape", "trials", "workers", "seed", "regret"])
    rows = found.groupby(["landscape", "trials", "workers"], sort=False)["regret"].agg(["mean", "median"]).reset_index()
    claims = []
    for n in budgets:
        # One row a seed: the mean over landscapes, by workers.
        table = found[found["trials"] == n].pivot_table(index="seed", columns="workers", values="regret").to_numpy()
        rng = np.random.default_rng(0)
        drawn = table[rng.integers(len(table), size=(2000, len(table)))].mean(axis=1)
        for place, k in enumerate(workers[1:], start=1):
            low, high = np.quantile(drawn[:, place] / drawn[:, 0], [0.025, 0.975])
            ratio = float(table[:, place].mean() / table[:, 0].mean())
            text = f"{n} trials: mean regret of {k} workers, over one's [{low:.2f}, {high:.2f}]"
            claims.append(Claim.at_most(text, ratio, 1.10))
    return rows.round(4).to_dict("records"), claims


def run_all(cells: list[Cell]) -> list[tuple[str, int, int, int, float]]:
    """Every search, two at a time; those that these sources have done already are read from the log."""
    known: dict[Cell, float] = {}
    sources = version(SHARED + MINE)
    for line in LOG.read_text().splitlines() if LOG.exists() else ():
        entry = json.loads(line)
        if entry["version"] == sources:
            known[tuple(entry["cell"])] = entry["regret"]
    LOG.parent.mkdir(exist_ok=True)
    with LOG.open("a") as log:
        jobs = (delayed(_run)(cell) for cell in cells if cell not in known)
        for cell, regret in Parallel(n_jobs=2, batch_size=1, return_as="generator_unordered")(jobs):
            known[cell] = regret
            print(json.dumps({"version": sources, "cell": cell, "regret": regret}), file=log, flush=True)
    return [(*cell, known[cell]) for cell in cells]


def _run(cell: Cell) -> tuple[Cell, float]:
    name, n, k, seed = cell
    return cell, run_search(name, OURS, seed, (n,), k)[1][n]


if __name__ == "__main__":
    run_benchmark(measure, __doc__ or "")
