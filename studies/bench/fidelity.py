"""Whether short training ranks allocations like long training, on RankBench: both ready tasks, each run trained for real.

    python studies/bench/fidelity.py --out studies/results/fidelity.json

Truth is the test metric at full length, on digits-shift the mean over three seeds, on supersense of the one seed there is.
Against it stands the validation metric of one short run (seed 0) by Kendall's tau and Spearman's correlation, with 95 %
bootstrap intervals over allocations; beside it that of one full run, of a seed that is among the truth's (which flatters it).
`best_half` is among the allocations whose truth is above the median. `ceiling` is what Spearman's correlation could reach at
most, since the truth itself is noisy: sqrt(1 - noise / variance) (Spearman 1904), from the seeds; None with one seed. Then, at
equal steps: the best by validation of k allocations trained short, or of the fewer that can be trained in full. Regret
is 1 for uniform and 0 for the table's best; means over random draws of the k, and their difference with its bootstrap
interval over allocations. About a minute; `--quick`: fewer draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from _harness import Claim, run_benchmark
from numpy.typing import NDArray
from scipy.stats import kendalltau, spearmanr

from rankscope.searching.confirmation import residual_variance
from rankscope.tasks import data_folder

Floats = NDArray[np.float64]
PAIRS = (
    ("digits-shift", 1, 21, 84),
    ("digits-shift", 1, 42, 84),
    ("supersense", 2, 50, 250),
)  # task, rank, short, full
SIZES = {"digits-shift": (20, 40, 80), "supersense": (10, 20)}  # allocations tried short


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The same allocations at two lengths; rows are allocations, uniform is row 0.

    Attributes:
        short: Validation metric of seed 0 after short training, (n,).
        full: The same after full training, (n,).
        truth: Test metric after full training, by seed, (n, n_seeds).
    """

    short: Floats
    full: Floats
    truth: Floats

    def resampled(self, rng: np.random.Generator) -> Pair:
        """Allocations drawn with replacement; uniform stays, for regret is relative to it."""
        rows = np.append(0, rng.integers(len(self.short), size=len(self.short) - 1))
        return Pair(short=self.short[rows], full=self.full[rows], truth=self.truth[rows])


def read_pair(task: str, rank: int, short: int, full: int) -> Pair:
    """From RankBench's table: the allocations that were trained at both lengths."""
    table = pd.read_parquet(data_folder("rankbench") / f"{task}.parquet")
    runs = table[(table["rank"] == rank)].set_index(["steps", "number", "seed"]).sort_index()
    early = runs.loc[short]["validation"].unstack("seed")[0]
    late = runs.loc[full]["validation"].unstack("seed")[0]
    truth = runs.loc[full]["test"].unstack("seed")
    both = early.index.intersection(late.index)
    return Pair(short=early[both].to_numpy(), full=late[both].to_numpy(), truth=truth.loc[both].to_numpy())


def measure(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """Correlations, then regrets, for each task and length."""
    rows: list[dict[str, Any]] = []
    for task, rank, short, full in PAIRS:
        pair, rng = read_pair(task, rank, short, full), np.random.default_rng(0)
        name = {"task": task, "steps": short, "of_steps": full}
        resampled = [pair.resampled(rng) for _ in range(100 if quick else 1000)]
        row = {**name, "allocations": len(pair.short), **correlations(pair), "ceiling": ceiling(pair.truth)}
        for kind in ("kendall", "spearman", "kendall_of_full_run"):
            row[f"{kind}_interval"] = interval([correlations(p)[kind] for p in resampled])
        rows.append(row)
        for k in SIZES[task]:
            found = regrets(pair, k, short / full, rng, draws=2000)
            again = [regrets(p, k, short / full, rng, draws=100) for p in resampled[: 100 if quick else 500]]
            row = {**name, "short_trials": k, "full_trials": full_trials(k, short / full), **found}
            row["difference"] = found["regret_short"] - found["regret_full"]
            row["difference_interval"] = interval([a["regret_short"] - a["regret_full"] for a in again])
            rows.append(row)
    return rows, claims_of(rows)


def claims_of(rows: list[dict[str, Any]]) -> list[Claim]:
    """What short trials are good for: on digits-shift as much as full ones, on supersense there is nothing to be ranked."""
    found = {(row["task"], row["steps"]): row for row in rows if "kendall" in row}
    regret = {(row["task"], row["steps"], row["short_trials"]): row for row in rows if "short_trials" in row}
    claims = []
    for steps in (21, 42):
        name, row = f"digits-shift, {steps} of 84 steps", found["digits-shift", steps]
        claims += [
            Claim.at_least(f"{name}: Kendall's tau with the truth, lower end", row["kendall_interval"][0], 0.4),
            Claim.at_least(f"{name}: tau less that of one full run", row["kendall"] - row["kendall_of_full_run"], 0.0),
            Claim.at_most(
                f"{name}: regret of the best of 40 less that of full trials at equal steps",
                regret["digits-shift", steps, 40]["difference"],
                0.0,
            ),
        ]
    row = found["supersense", 50]
    return [
        *claims,
        Claim.at_most("supersense, 50 of 250 steps: tau with the truth, lower end", row["kendall_interval"][0], 0.0),
        Claim.at_most(
            "supersense, a full run: tau with the truth, lower end", row["kendall_of_full_run_interval"][0], 0.0
        ),
    ]


def correlations(pair: Pair) -> dict[str, float]:
    """Rank correlations of one run's validation metric with the truth."""
    truth = pair.truth.mean(axis=1)
    best = truth > np.median(truth)
    return {
        "kendall": float(kendalltau(pair.short, truth)[0]),
        "spearman": float(spearmanr(pair.short, truth)[0]),
        "kendall_of_full_run": float(kendalltau(pair.full, truth)[0]),
        "spearman_of_full_run": float(spearmanr(pair.full, truth)[0]),
        "kendall_best_half": float(kendalltau(pair.short[best], truth[best])[0]),
        "kendall_of_full_run_best_half": float(kendalltau(pair.full[best], truth[best])[0]),
    }


def ceiling(truth: Floats) -> float | None:
    """What a noiseless predictor could reach; None with one seed."""
    if truth.shape[1] < 2:
        return None
    noise = residual_variance(truth) / truth.shape[1]
    return float(np.sqrt(max(0.0, 1.0 - noise / truth.mean(axis=1).var(ddof=1))))


def full_trials(k: int, fraction: float) -> int:
    """Allocations that can be trained in full with the steps of k short trials."""
    return max(1, round(k * fraction))


def regrets(pair: Pair, k: int, fraction: float, rng: np.random.Generator, *, draws: int) -> dict[str, float]:
    """Mean regret of the best by validation: of k short trials, and of as many full ones as equal steps allow."""
    truth = pair.truth.mean(axis=1)
    regret = (truth.max() - truth) / max(truth.max() - truth[0], 1e-9)
    order = rng.permuted(np.tile(np.arange(len(truth)), (draws, 1)), axis=1)[:, :k]
    few = order[:, : full_trials(k, fraction)]
    by_short = order[np.arange(draws), pair.short[order].argmax(axis=1)]
    by_full = few[np.arange(draws), pair.full[few].argmax(axis=1)]
    return {"regret_short": float(regret[by_short].mean()), "regret_full": float(regret[by_full].mean())}


def interval(values: list[float]) -> list[float]:
    """Central 95 % of bootstrap values."""
    return [float(v) for v in np.quantile(values, [0.025, 0.975])]


if __name__ == "__main__":
    run_benchmark(measure, __doc__ or "")
