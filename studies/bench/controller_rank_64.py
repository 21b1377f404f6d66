"""The controller at rank 64 on SmolLM2-135M and WordNet glosses: it moves when it should, and stays when it should not.

    python studies/bench/controller_rank_64.py --out studies/results/controller_rank_64.json

Four of the 30 blocks are adapted. Short trainings of equal parameters begin at rank 64 everywhere, or at rank 0 in the first two
blocks and 128 in the others. The first decision, by the default policy or by one without thresholds, is compared with the
one that the same policy makes on the singular values of autograd's own gradients. Sketches have 128 columns, twice rank 64, at
which modules of this size are kept whole, or 32, beyond which the spectrum is estimated. `captured` is the share of the signal's
energy within the ranks. One thread; about 3 minutes. `--quick`: 32 columns.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from _harness import Claim, batches_of, run_benchmark
from peft import LoraConfig, get_peft_model
from scipy.stats import spearmanr

import rankscope as rs
from rankscope.control.decisions import ModuleSignals, propose

RANK, EVERY, BLOCKS = 64, 4, (0, 9, 18, 27)
FREE = rs.ControllerSettings(hysteresis=0.0, min_gain_ratio=0.0)


def measure(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """All rows and claims."""
    torch.set_num_threads(1)
    task = rs.load_task("glosses")
    rows, base = [], task.build_model()
    for start, policy in (
        ("uniform", rs.ControllerSettings()),
        ("uniform", FREE),
        ("misplaced", rs.ControllerSettings()),
    ):
        for sketch_size in (32,) if quick else (128, 32):
            about = {"start": start, "thresholds": policy != FREE, "sketch_size": sketch_size}
            rows.append(about | first_decision(task, copy.deepcopy(base), start, policy, sketch_size))
    return rows, claims_of(rows)


def claims_of(rows: list[dict[str, Any]]) -> list[Claim]:
    """With 32 columns the spectrum from there on is an estimate, by which small gains are found in part only."""
    claims = []
    for row in rows:
        name = f"{row['start']}{'' if row['thresholds'] else ' without thresholds'}, {row['sketch_size']} columns"
        claims.append(Claim.at_least(f"{name}: acts as on exact spectra", row["action"] == row["exact_action"], 1))
        if row["exact_action"] == "moved":
            gained = (row["captured"] - row["captured_before"]) / (row["captured_exact"] - row["captured_before"])
            bound = 0.9 if row["sketch_size"] > RANK else 0.25
            claims.append(Claim.at_least(f"{name}: correlation with ranks from exact spectra", row["correlation"], 0.8))
            claims.append(Claim.at_least(f"{name}: share of what exact spectra gain", gained, bound))
    stayed = all(row["action"] == "kept" for row in rows if row["start"] == "uniform" and row["thresholds"])
    moved = all(row["action"] == "moved" for row in rows if row["start"] == "misplaced")
    return [*claims, Claim.at_least("misplaced moves, uniform stays", stayed and moved, 1)]


def first_decision(task: Any, base: Any, start: str, policy: rs.ControllerSettings, sketch_size: int) -> dict[str, Any]:
    """Trains up to the first decision, and decides on exact spectra as well."""
    targets = [t for t in rs.find_targets(base) if t.block in BLOCKS]
    before = [RANK if start == "uniform" else 2 * RANK * (t.block in BLOCKS[2:]) for t in targets]
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(target_modules=[t.name for t in targets], r=RANK, lora_alpha=RANK)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    budget = rs.ParameterBudget.uniform(targets, RANK)
    controller = rs.RankController(
        model,
        optimizer,
        budget=budget,
        start=rs.RankAllocation(tuple(targets), tuple(before)),
        every=EVERY,
        samples=EVERY,
        total_steps=4 * EVERY,
        freeze_fraction=0.5,
        sketch_size=sketch_size,
        settings=policy,
    )
    found = []
    window = controller._window
    taken = window.measure
    window.measure = lambda factors: found.append(taken(factors)) or found[-1]
    weights = {t.name: base.get_submodule(t.name).base_layer.weight.requires_grad_() for t in targets}
    for batch in batches_of(task, EVERY):
        loss = task.loss(model, batch)
        loss.backward()
        optimizer.step()
        controller.step(loss.detach())
        optimizer.zero_grad()
    (measured,) = found
    exact = []
    for signals in measured.modules:
        energies = torch.linalg.svdvals(weights[signals.target.name].grad).double().square()
        spectrum = (energies * (sum(signals.worth) / float(energies.sum()))).tolist()
        exact.append(ModuleSignals(target=signals.target, rank=signals.rank, worth=tuple(spectrum)))
    proposal = propose(exact, budget, policy, coarse=True, signal_share=measured.signal_share)
    decision = controller.decisions.iloc[0]
    after = list(proposal.ranks.values())
    return {
        "modules": len(targets),
        "action": decision["action"],
        "exact_action": proposal.action,
        "moved": int(sum(max(a - b, 0) for a, b in zip(decision["ranks_after"], before, strict=True))),
        "exact_moved": int(sum(max(a - b, 0) for a, b in zip(after, before, strict=True))),
        "signal_share": measured.signal_share,
        "correlation": float(spearmanr(decision["ranks_after"], after)[0]) if len(set(after)) > 1 else 1.0,
        "captured_before": captured(exact, before),
        "captured": captured(exact, decision["ranks_after"]),
        "captured_exact": captured(exact, after),
    }


def captured(signals: list[ModuleSignals], ranks: Any) -> float:
    """The share of the energy of all modules within the ranks."""
    total = sum(sum(each.worth) for each in signals)
    return sum(sum(each.worth[:rank]) for each, rank in zip(signals, ranks, strict=True)) / total


if __name__ == "__main__":
    run_benchmark(measure, __doc__ or "")
