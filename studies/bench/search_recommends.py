"""What our searches of 33 trials recommend on RankBench's digits tables: never below one-shot, and no more regret than before.

    python studies/bench/search_recommends.py --out studies/results/search_recommends.json

20 searches a table, which differ in their seeds. A recommendation is compared with one-shot on the test split, with the interval
(95 %) that the residual variance of the table's runs leaves. The median regret may not exceed that of the rule before (`BEFORE`,
the same searches): the highest posterior mean of the model that was believed or, without one, the best on the one fresh seed. The
tables of rank 1, 2 and 4 were there when the rule was chosen. One process; about four minutes. `--quick`: one table, 5 searches.
"""

from __future__ import annotations

from statistics import fmean, median
from typing import Any

from _harness import Claim, run_benchmark
from searches import run_on_table

BEFORE = {"digits-shift/1": 0.2, "digits-shift/2": 0.4167, "digits-shift/4": 0.9444}
ROUNDING = 1e-4  # of these figures


def measure(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """All searches; a row a table."""
    rows: list[dict[str, Any]] = []
    claims: list[Claim] = []
    for name in ["digits-shift/1"] if quick else list(BEFORE):
        found = [run_on_table(name, seed) for seed in range(5 if quick else 20)]
        regret, gaps = median(each for each, _ in found), [gap for _, gap in found]
        below = sum(gap.high < 0.0 for gap in gaps)
        rows.append(
            {"table": name, "searches": len(found), "median_regret": regret, "mean_minus_one_shot": fmean(g.mean for g in gaps),
             "worst_minus_one_shot": min(gap.mean for gap in gaps), "half_interval": gaps[0].high - gaps[0].mean}
        )  # fmt: skip
        claims.append(Claim.at_most(f"{name}: recommendations below one-shot by more than the interval", below, 0.0))
        if not quick:
            more = regret - BEFORE[name]
            claims.append(Claim.at_most(f"{name}: median regret, minus that of the rule before", more, ROUNDING))
    return rows, claims


if __name__ == "__main__":
    run_benchmark(measure, __doc__ or "")
