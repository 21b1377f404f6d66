"""How true a profile is, on real gradients of three models: sketched spectra, few batches, quantised bases.

    python studies/bench/profile_fidelity.py --out studies/results/profile_fidelity.json

Spectra: leading 8 singular values and leading 4-dimensional subspaces, left and right, of the mean gradient of 8
batches against those of autograd's own gradient, at default settings, over three seeds of the sketch. Modules that are kept
whole are exact; the claims are made on the sketched ones alone (digits has none). Few batches: Spearman correlation over
modules between the ranks that one-shot gives from 8 batches and from 256, on signal and on raw spectra, the mean of four
disjoint sets of 8; digits has 200 images, so there it is 8 images and all 200, behind heads that were trained on others.
Quantised: the same correlation between a base in 8 or 4 bits (bitsandbytes, on the CPU) and in full precision, from 16
batches. One thread; about 10 minutes. `--quick`: MiniLM's spectra only, one seed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from statistics import fmean
from typing import Any

import numpy as np
import torch
from _harness import Claim, batches_of, run_benchmark
from scipy.stats import spearmanr
from torch import nn

import rankscope as rs
from rankscope.profiling import head_warmed, profile
from rankscope.tasks import Task

MODELS = ("digits-shift", "supersense", "glosses")


def measure(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """All rows and claims."""
    torch.set_num_threads(1)
    rows, claims = [], []
    for name in ("supersense",) if quick else MODELS:
        row = spectra(rs.load_task(name), seeds=range(1 if quick else 3))
        rows.append(row)
        if row["sketched"]:
            claims += spectra_claims(name, row)
    for name in () if quick else MODELS:
        row = few_batches(rs.load_task(name))
        rows.append(row)
        better = row["signal"] - row["raw"]
        claims.append(
            Claim(
                name=f"{name}: agreement of 8 batches with 256, signal minus raw",
                value=better,
                bound="> 0",
                holds=better > 0,
            )
        )
    if not quick:
        for row in quantised(rs.load_task("glosses")):
            rows.append(row)
            claims.append(Claim.at_least(f"glosses: one-shot on {row['bits']} bits and on 32", row["correlation"], 0.9))
    return rows, claims


def warmed(task: Task, model: nn.Module) -> AbstractContextManager[None]:
    """A trained head, where the task has a fresh one; on batches that are not profiled."""
    head = getattr(task, "head_modules", ())
    return head_warmed(model, head, batches_of(task, 16, 300), task.loss, steps=100) if head else nullcontext()


# --- spectra -----------------------------------------------------------------------------------------------------


def spectra(task: Task, seeds: Sequence[int]) -> dict[str, Any]:
    """Errors of singular values and overlaps of subspaces."""
    model = task.build_model().eval().requires_grad_(False)
    targets, data = rs.find_targets(model), batches_of(task, 8)
    with warmed(task, model):
        weights = {t.name: model.get_submodule(t.name).weight.requires_grad_() for t in targets}
        sizes = [len(next(iter(batch.values()))) for batch in data]
        for batch, size in zip(data, sizes, strict=True):
            (task.loss(model, batch) * (size / sum(sizes))).backward()
        gradients = {name: weight.grad.detach() for name, weight in weights.items()}
        for weight in weights.values():
            weight.grad = None
        found = [profile(model, data, targets=targets, loss_fn=task.loss, seed=s, keep_directions=4) for s in seeds]
    errors, overlaps = [], []
    for name, gradient in gradients.items():
        left, values, right = torch.linalg.svd(gradient, full_matrices=False)
        for taken in found:
            if taken.table.set_index("module").loc[name, "exact"]:
                continue
            mine, (u, v) = taken.spectra(signal=False)[name][:8], taken.directions(name)
            errors.append(np.abs(mine / values[:8].numpy() - 1.0))
            sides = (torch.from_numpy(u) @ left[:, :4], torch.from_numpy(v) @ right[:4].T)
            overlaps.append([float(side.square().sum()) / 4 for side in sides])
    row = {"model": task.name, "modules": len(targets), "sketched": len(errors) // len(found), "seeds": len(found)}
    if errors:
        error = np.array(errors)
        row |= {"median_8": float(np.median(error)), "worst_8": float(error.max()), "median_first": float(np.median(error[:, 0])),
                "median_left_4": float(np.median(overlaps, axis=0)[0]), "median_right_4": float(np.median(overlaps, axis=0)[1]),
            "worst_overlap_4": float(np.min(overlaps)),
        }  # fmt: skip
    return row


def spectra_claims(name: str, row: dict[str, Any]) -> list[Claim]:
    """The four bounds."""
    return [
        Claim.at_most(f"{name}: leading 8 values, median error", row["median_8"], 0.03),
        Claim.at_most(f"{name}: leading 8 values, worst error", row["worst_8"], 0.1),
        Claim.at_most(f"{name}: first value, median error", row["median_first"], 0.01),
        Claim.at_least(f"{name}: leading 4-dimensional left subspaces, median overlap", row["median_left_4"], 0.95),
        Claim.at_least(f"{name}: leading 4-dimensional right subspaces, median overlap", row["median_right_4"], 0.95),
    ]


# --- allocations -------------------------------------------------------------------------------------------------


def few_batches(task: Task) -> dict[str, Any]:
    """Correlation of ranks from 8 batches with ranks from 256, for signal and raw spectra, at two budgets."""
    model = task.build_model()
    if task.name == "digits-shift":  # an epoch is 200 images: one a batch, none of them twice
        task = rs.load_task({"name": "digits-shift", "batch_size": 1})
        data, arguments = list(task.train_batches(0)), {"loss_fn": task.loss, "head": ("classifier",)}
        many = profile(model, data, **arguments)
        few = [profile(model, data[s : s + 8], head_batches=data[32:], **arguments) for s in range(0, 32, 8)]
    else:
        data = batches_of(task, 256)
        with warmed(task, model):
            many = profile(model, data, loss_fn=task.loss)
            few = [profile(model, data[start : start + 8], loss_fn=task.loss) for start in range(0, 32, 8)]
    row: dict[str, Any] = {"model": task.name, "sets": len(few)}
    for rank in (2, 8):
        for kind, signal in (("signal", True), ("raw", False)):
            truth = ranks(many, rank, signal=signal)
            row[f"{kind}_rank_{rank}"] = fmean(correlation(ranks(taken, rank, signal=signal), truth) for taken in few)
    return row | {"signal": row["signal_rank_8"], "raw": row["raw_rank_8"]}


def quantised(task: Any) -> list[dict[str, Any]]:
    """The same base in 8 and in 4 bits."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    data = batches_of(task, 16)
    full = ranks(profile(task.build_model(), data, loss_fn=task.loss), 8)
    rows = []
    for bits in (8, 4):
        config = BitsAndBytesConfig(
            load_in_8bit=bits == 8,
            load_in_4bit=bits == 4,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float32,
        )
        model = AutoModelForCausalLM.from_pretrained(task.model, quantization_config=config, device_map="cpu")
        taken = profile(model, data, loss_fn=task.loss)
        rows.append({"model": task.name, "bits": bits, "correlation": correlation(ranks(taken, 8), full)})
    return rows


def ranks(taken: rs.Profile, rank: int, *, signal: bool = True) -> tuple[int, ...]:
    """What one-shot gives at uniform's budget of that rank."""
    targets = taken.targets
    budget = rs.ParameterBudget.uniform(targets, rank)
    return rs.allocate("one-shot", targets=targets, budget=budget, profile=taken, signal=signal).vector


def correlation(one: Sequence[int], other: Sequence[int]) -> float:
    """Spearman's."""
    return float(spearmanr(one, other)[0])


if __name__ == "__main__":
    run_benchmark(measure, __doc__ or "")
