"""Where a vision-language model's gradient comes from: image tokens or words, by role and depth; what telling them apart costs.

    python studies/bench/modalities.py --out studies/results/modalities.json

The language model of the small MobileVLM, before stage II, on emoji and digit scenes. `image` is image / (image + text), each
part's squared gradient norm on its own; `cross` is what their inner product adds to the energy of the sum, as a share of it. The
first token of a scene is an image token, and language models keep huge activations at the first token whatever it is (attention
sinks, Xiao et al., arXiv 2309.17453): `image_without_first` counts it as text. `moved` is the share of uniform rank 1's budget
that go elsewhere if one-shot's gains count by one part of the energy alone. Cost: CPU seconds of profiles with and without the
parts, in turns.

Does the split help to allocate? On emoji scenes, at a quarter of rank 1 over all towers, one-shot counts the whole gradient
energy of the language model's modules, or the image's share of it, or the text's; each at its own best learning rate, three
seeds, as in studies/compare/budgets/emoji-scenes.yaml, whose profile and runs it reads and adds to: 16 CPU minutes where they are
missing. `--quick`: emoji scenes, fewer batches, and no training.
"""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path
from statistics import fmean, median
from time import process_time
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from _compared import RESULTS, STUDIES
from _harness import Claim, run_benchmark
from torch import Tensor, nn

import rankscope as rs
from rankscope.budget import allocate_marginal
from rankscope.comparison import make_grid, paired_difference, run_tuned
from rankscope.performance import prior_gains
from rankscope.profiling import profiler
from rankscope.tasks import Task
from rankscope.training import Lora

sys.path.insert(0, str(Path(__file__).parents[1]))
from evidence import pack, unpack

MASK = "image_mask"


def measure(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """One row a task, one for the cost, and the claims."""
    torch.set_num_threads(1)
    names = ["emoji-scenes"] if quick else ["emoji-scenes", "digit-scenes"]
    rows = [task_row(name, 3 if quick else 8) for name in names]
    cost = cost_row(2 if quick else 3)
    claims = []
    for row in rows:
        without = row["image_without_first"] / row["image_tokens"]
        claims += [
            Claim.at_least(f"{row['task']}: image's share of energy over its share of tokens", row["density"], 1.2),
            Claim.at_most(f"{row['task']}: the same, the first token counted as text", without, 1.0),
        ]
    placed = [] if quick else placed_rows("emoji-scenes", 1 / 4)
    return [*rows, *placed, cost], [*claims, Claim.at_most("CPU time with the parts over without", cost["ratio"], 1.15)]


def loss_of(task: Task) -> Any:
    """The task's loss, of batches that may hold the mask as well."""

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return task.loss(model, {name: each for name, each in batch.items() if name != MASK})

    return loss


def task_row(name: str, n_batches: int) -> dict[str, Any]:
    """What image tokens have of each role's and depth's energy."""
    task = rs.load_task({"name": name, "towers": ["language"]})
    model, batches = task.build_model(), list(islice(iter(task.train_batches(0)), n_batches))
    token = model.config.image_token_index
    later = [{**each, MASK: (each["input_ids"] == token).index_fill(1, torch.tensor([0]), False)} for each in batches]
    targets = [target for target in rs.find_targets(model) if target.block is not None]
    found, others = (rs.profile(model, each, targets=targets, loss_fn=loss_of(task)) for each in (batches, later))
    table = found.table.assign(total=found.table["gradient_norm"] ** 2, third=found.table["block"] // 10)
    of_tokens = found.metadata["image_tokens"] / found.metadata["tokens"]
    parts = table["image_energy"] + table["text_energy"]
    return {
        "task": name,
        "batches": n_batches,
        "image_tokens": of_tokens,
        "image": share(table),
        "density": share(table) / of_tokens,
        "image_without_first": share(others.table),
        "cross": float((table["total"] - parts).sum() / table["total"].sum()),
        "by_role": by(table, "role"),
        "by_role_without_first": by(others.table, "role"),
        "by_third_of_depth": by(table, "third"),
        "moved": {part: moved(found, f"{part}_energy") for part in ("image", "text")},
        "moved_without_first": {part: moved(others, f"{part}_energy") for part in ("image", "text")},
    }


def share(table: pd.DataFrame) -> float:
    """Image tokens' share of the energy of both parts."""
    image, text = table["image_energy"].sum(), table["text_energy"].sum()
    return float(image / (image + text))


def by(table: pd.DataFrame, column: str) -> dict[str, float]:
    """That share for each value of a column."""
    return {str(key): round(share(mine), 3) for key, mine in table.groupby(column, sort=False)}


def moved(found: rs.Profile, part: str) -> float:
    """How much of uniform rank 1's parameters one-shot places elsewhere if only a part of each module's energy counts."""
    targets, budget = found.targets, rs.ParameterBudget.uniform(found.targets, 1)
    before, after = (np.array(place(found, budget, each).vector) for each in (None, part))
    costs = np.array([target.rank_cost for target in targets])
    return float(costs @ np.maximum(after - before, 0) / budget.limit)


def place(found: rs.Profile, budget: rs.ParameterBudget, part: str | None) -> rs.RankAllocation:
    """One-shot, with only a part of the energy of each module that has parts; None: with all of it."""
    spectra = found.spectra()
    if part is not None:
        table = found.table.set_index("module")
        shares = (table[part] / table["gradient_norm"] ** 2).fillna(1.0)  # vision tower and projector have no parts
        spectra = {name: values * float(shares[name]) ** 0.5 for name, values in spectra.items()}
    return allocate_marginal(found.targets, prior_gains(spectra, found.targets), budget).renamed("one-shot")


def placed_rows(name: str, factor: float) -> list[dict[str, Any]]:
    """One-shot by the whole energy, the image's and the text's at one budget: accuracies on the comparison's seeds."""
    study, folder = rs.read_study(STUDIES / "budgets" / f"{name}.yaml"), RESULTS / "budgets" / name
    unpack(folder)
    task, found = rs.load_task(study.task), rs.read_profile(folder / "profile.parquet")
    budget = rs.ParameterBudget(round(factor * rs.ParameterBudget.uniform(found.targets, 1).limit))
    parts = {"all": None, "image": "image_energy", "text": "text_energy"}
    placed = {key: place(found, budget, part) for key, part in parts.items()}
    grids = [make_grid(Lora(each), study.training, name=key, factor=factor) for key, each in placed.items()]
    seeds, tuning = range(1000, 1000 + study.compare.n_seeds), range(10_000, 10_000 + study.compare.n_tuning_seeds)
    results = run_tuned(task, grids, seeds=seeds, tuning_seeds=tuning, kept_in=folder / "runs", n_jobs=2)
    pack(folder)
    reported = [[run for run in runs if run.role == "reported"] for runs in results]
    scores = [[run.test or 0.0 for run in runs] for runs in reported]
    return [
        {
            "task": name,
            "one-shot by": key,
            "parameters": placed[key].parameters,
            "by_tower": placed[key].parameters_by_tower,
            "learning_rate": runs[0].learning_rate,
            "validation": fmean(run.validation for run in runs),
            "test": fmean(mine),
            "minus_all": list(paired_difference(mine, scores[0])),
            "test_by_seed": mine,
        }
        for key, runs, mine in zip(placed, reported, scores, strict=True)
    ]  # fmt: skip


def cost_row(repeats: int) -> dict[str, Any]:
    """CPU seconds of profiles of two batches, with and without the parts, in turns."""
    task = rs.load_task({"name": "emoji-scenes", "towers": ["language"]})
    model, batches = task.build_model(), list(islice(iter(task.train_batches(0)), 2))
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(2 * repeats + 1):
        told = turn % 2 == 0
        with patch.object(profiler, "image_positions", profiler.image_positions if told else lambda *_: None):
            start = process_time()
            rs.profile(model, batches, loss_fn=loss_of(task))
        if turn:  # the first warms up
            seconds[told].append(process_time() - start)
    both = {"with_seconds": median(seconds[True]), "without_seconds": median(seconds[False])}
    return {"what": "cost", **both, "ratio": both["with_seconds"] / both["without_seconds"]}


if __name__ == "__main__":
    run_benchmark(measure, __doc__.splitlines()[0])
