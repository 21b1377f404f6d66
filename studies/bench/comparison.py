"""One-shot allocation against uniform LoRA on digits-shift, at equal parameters and steps, learning rate tuned for each.

    python studies/bench/comparison.py --out studies/results/comparison.json

Claims: one-shot beats uniform on the test split by at least 4 points, and the paired 95 % interval excludes 0. The other
rows (gradient-norm, three random draws, one-shot on raw singular values and with other powers, uniform at four times the
parameters) are for comparison. 16 seeds; two processes, one torch thread each; about 10 minutes. `--quick`: uniform and
one-shot only, 8 seeds, three rates.
"""

from __future__ import annotations

from statistics import fmean, stdev
from typing import Any

from _harness import Claim, run_benchmark

import rankscope as rs
from rankscope.comparison import paired_difference, repeat_all
from rankscope.profiling import profile

RATES = [0.0025, 0.005, 0.01, 0.02, 0.04]
STEPS = 84


def measure(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """Trains every allocation on the same seeds and compares test accuracy seed by seed."""
    task = rs.load_task("digits-shift")
    model = task.build_model()
    targets = rs.find_targets(model)
    budget = rs.ParameterBudget.uniform(targets, 1)
    taken = profile(
        model, list(task.train_batches(0)), targets=targets, loss_fn=task.loss, head=("classifier",), head_steps=100
    )

    def allocate(strategy: str, label: str | None = None, **options: Any) -> rs.RankAllocation:
        arguments = {"targets": targets, "budget": budget, "profile": taken, **options}
        return rs.allocate(strategy, **arguments).renamed(label or strategy)

    allocations = [allocate("uniform"), allocate("one-shot")]
    if not quick:
        allocations += [
            *[allocate("one-shot", f"one-shot, power {p:g}, {'signal' if s else 'raw'}", power=p, signal=s)
              for p, s in ((2.0, False), (1.0, True), (1.0, False), (0.5, True))],
            allocate("gradient-norm"),
            *[allocate("random", f"random {seed}", seed=seed) for seed in range(3)],
            allocate("uniform", "uniform, four times the parameters", budget=rs.ParameterBudget.uniform(targets, 4)),
        ]  # fmt: skip
    repeats = repeat_all(
        task,
        allocations,
        rs.TrainingConfig(steps=STEPS),
        learning_rates=RATES[1:4] if quick else RATES,
        tuning_seeds=range(2 if quick else 4),
        seeds=range(1000, 1008 if quick else 1016),
        n_jobs=2,
    )
    uniform = repeats[0]
    rows = []
    for found in repeats:
        mean, low, high = paired_difference(found.test, uniform.test)
        rows.append(
            {
                "strategy": found.name,
                "parameters": found.parameters,
                "learning_rate": found.learning_rate,
                "validation": round(fmean(found.validation), 4),
                "test": round(fmean(found.test), 4),
                "test_stdev": round(stdev(found.test), 4),
                "difference": [round(value, 4) for value in (mean, low, high)],
                "test_by_seed": [round(value, 4) for value in found.test],
            }
        )
    gain = paired_difference(repeats[1].test, uniform.test)
    return rows, [
        Claim(
            name="one-shot minus uniform, low end of the 95 % interval", value=gain.low, bound="> 0", holds=gain.low > 0
        ),
        Claim(name="one-shot minus uniform, test accuracy", value=gain.mean, bound=">= 0.04", holds=gain.mean >= 0.04),
    ]


if __name__ == "__main__":
    run_benchmark(measure, __doc__ or "")
