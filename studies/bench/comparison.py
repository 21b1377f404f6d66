"""Rank allocation against uniform LoRA and other baselines at equal parameters and steps, over tasks, at the best rate of each.

    python studies/bench/comparison.py --out studies/results/comparison.json
    rankscope report studies/results/{digits-shift,supersense,sentiment,glosses,word-order} --out out/all --into docs/evidence.md

The latter makes the table of docs/evidence.md. Runs `rankscope compare` on the studies of studies/compare that TASKS names, and
states what is hoped for: how far rankscope's best method is above uniform, EVA and AdaLoRA on digits-shift; by how much uniform
must grow to match it; and what the default gains on average over the tasks. Best, and default: on validation. The committed runs
are read; delete a task's comparison.parquet to do them again (hours, on two cores). `--quick`: runs of its own, one-shot and
uniform on digits, four seeds.
"""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

import pandas as pd
from _compared import compared, minus, scores_of
from _harness import Claim, run_benchmark

from rankscope.comparison import at_budget, summarise

TASKS = ("digits-shift", "supersense", "sentiment", "glosses", "word-order")
OURS = ("one-shot", "gradient-norm", "controller", "controller-one-shot")
BASELINES = ("eva", "adalora")
COLUMNS = ["task", "factor", "method", "variant", "learning_rate", "parameters", "seeds", "validation", "test", "deviation",
           "difference", "low", "high", "p_holm", "verdict", "noise", "relative",
           "uniform_budget_multiplier"]  # fmt: skip


def measure(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """Every task."""
    runs = {task: compared(task, ("one-shot",) if quick else ()) for task in (TASKS[:1] if quick else TASKS)}
    table = summarise(pd.concat(runs.values(), ignore_index=True))
    rows = [{key: row[key] for key in COLUMNS} for _, row in table.iterrows()]
    return rows, [*on_digits(runs[TASKS[0]], table), *over_tasks(table)]


def on_digits(runs: pd.DataFrame, table: pd.DataFrame) -> list[Claim]:
    """Of the method that is best on validation: points over the baselines, and how many times the parameters uniform needs."""
    table = table[table["task"] == TASKS[0]]
    best = best_on_validation(table)
    scores = scores_of(runs)
    gain = minus(scores, best, "uniform")
    claims = [
        Claim.at_least(f"digits-shift: {best} minus uniform, points", 100 * gain.mean, 6.0),
        Claim.at_least(f"digits-shift: {best} minus uniform, low end, points", 100 * gain.low, 0.0),
    ]
    claims += [
        Claim.at_least(f"digits-shift: {best} minus {baseline}, points", 100 * minus(scores, best, baseline).mean, 0.0)
        for baseline in BASELINES
        if baseline in scores
    ]
    factor = float(at_budget(table).set_index("method").loc[best, "uniform_budget_multiplier"])
    if not math.isnan(factor):
        claims.append(Claim.at_least(f"digits-shift: uniform must grow by to match {best}", factor, 3.0))
    return claims


def over_tasks(table: pd.DataFrame) -> list[Claim]:
    """The default's mean relative gain, and the tasks on which it is significantly worse than uniform."""
    default = best_on_validation(table)
    mine = at_budget(table).query("method == @default")
    worse = int((mine["verdict"] == "worse").sum())
    return [
        Claim.at_least(f"{default}: mean relative gain over {len(mine)} tasks, %", 100 * fmean(mine["relative"]), 4.7),
        Claim.at_most(f"{default}: tasks on which it is worse than uniform", float(worse), 0.0),
    ]


def best_on_validation(table: pd.DataFrame) -> str:
    """Of rankscope's methods that every task has, the one whose validation metric over uniform's is highest in the mean."""
    validation = at_budget(table).pivot(index="method", columns="task", values="validation").dropna()
    gains = validation.div(validation.loc["uniform"]).mean(axis=1)
    return str(gains[[name for name in OURS if name in gains.index]].idxmax())


if __name__ == "__main__":
    run_benchmark(measure, __doc__ or "")
