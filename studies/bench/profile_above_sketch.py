"""Ranks above the sketch on SmolLM2-135M and WordNet glosses: one-shot from estimated tails against exact spectra.

    python studies/bench/profile_above_sketch.py --out studies/results/profile_above_sketch.json

A profile with 56 sketch columns, which is what a small budget gives, and one whose sketch follows the budget are taken from
8 batches. One-shot is asked for ranks at uniform 32, 64, 128 and 256 and compared with water-filling on the singular values of
autograd's own gradient: Spearman correlation of the ranks over modules, and the share that one-shot captures of the gradient
energy by which exact spectra beat uniform. `moved` is the share of the budget that one-shot places elsewhere than uniform.
One thread; about 6 minutes. `--quick`: 2 batches, the first four blocks, rank 64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from _harness import Claim, batches_of, run_benchmark
from numpy.typing import NDArray
from scipy.stats import spearmanr

import rankscope as rs
from rankscope.budget import allocate_marginal
from rankscope.profiling import profile

Gains = dict[str, NDArray[np.float64]]


def measure(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """All rows and claims."""
    torch.set_num_threads(1)
    task = rs.load_task("glosses")
    model, data = task.build_model().eval().requires_grad_(False), batches_of(task, 2 if quick else 8)
    targets = tuple(t for t in rs.find_targets(model) if not quick or (t.block or 0) < 4)
    gains = exact_gains(task, model, targets, data)
    rows, taken = [], profile(model, data, targets=targets, loss_fn=task.loss)
    for rank in (64,) if quick else (32, 64, 128, 256):
        budget = rs.ParameterBudget.uniform(targets, rank)
        rows.append({"rank": rank, **compare(taken, gains, budget)})
        if rank == 64:  # from here on, modules of this size are kept whole
            sized = profile(model, data, targets=targets, loss_fn=task.loss, budget=budget)
            rows.append({"rank": rank, **compare(sized, gains, budget)})
    claims = []
    for row in rows:
        name = f"uniform rank {row['rank']}, {row['sketch_size']} columns"
        claims.append(Claim.at_least(f"{name}: budget placed elsewhere than uniform", row["moved"], 0.05))
        claims.append(Claim.at_least(f"{name}: correlation with ranks from exact spectra", row["correlation"], 0.9))
        if row["rank"] <= 64:  # beyond, uniform's ranks capture all but a thousandth of the energy
            claims.append(Claim.at_least(f"{name}: share of the exact advantage", row["share_of_advantage"], 0.4))
    return rows, claims


def exact_gains(task: Any, model: Any, targets: tuple[rs.TargetModule, ...], data: list[Any]) -> Gains:
    """Squared singular values of autograd's gradient of the mean loss over all examples."""
    weights = {t.name: model.get_submodule(t.name).weight.requires_grad_() for t in targets}
    sizes = [len(batch["input_ids"]) for batch in data]
    for batch, size in zip(data, sizes, strict=True):
        (task.loss(model, batch) * (size / sum(sizes))).backward()
    gains = {name: torch.linalg.svdvals(weight.grad).double().numpy() ** 2 for name, weight in weights.items()}
    for weight in weights.values():
        weight.grad = None
        weight.requires_grad_(False)
    return gains


def compare(taken: rs.Profile, gains: Gains, budget: rs.ParameterBudget) -> dict[str, Any]:
    """One-shot on raw spectra beside exact water-filling and uniform."""
    targets = taken.targets
    exact = allocate_marginal(targets, gains, budget)
    found = rs.allocate("one-shot", targets=targets, budget=budget, profile=taken, signal=False)
    uniform = rs.allocate("uniform", targets=targets, budget=budget)
    best, mine, base = (captured(allocation, gains) for allocation in (exact, found, uniform))
    moved = sum(t.rank_cost * abs(r - u) for t, r, u in zip(targets, found.vector, uniform.vector, strict=True))
    return {
        "sketch_size": taken.metadata["sketch_size"],
        "sketched": int((~taken.table["exact"]).sum()),
        "modules": len(targets),
        "moved": moved / (2 * budget.limit),
        "correlation": float(spearmanr(found.vector, exact.vector)[0]),
        "energy_uniform": base,
        "energy_one_shot": mine,
        "energy_exact": best,
        "share_of_advantage": (mine - base) / (best - base),
    }


def captured(allocation: rs.RankAllocation, gains: Gains) -> float:
    """The share of all modules' gradient energy within the allocation's ranks."""
    total = sum(float(values.sum()) for values in gains.values())
    return sum(float(gains[name][:rank].sum()) for name, rank in allocation.ranks.items()) / total


if __name__ == "__main__":
    run_benchmark(measure, __doc__ or "")
