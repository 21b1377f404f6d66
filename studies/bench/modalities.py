"""Where a vision-language model's gradient comes from: image tokens or words, by role and depth; what telling them apart costs.

    python studies/bench/modalities.py --out studies/results/modalities.json

The language model of the small MobileVLM, before stage II, on emoji and digit scenes. `image` is image / (image + text), each
part's squared gradient norm on its own; `cross` is what their inner product adds to the energy of the sum, as a share of it. The
first token of a scene is an image token, and language models keep huge activations at the first token whatever it is (attention
sinks, Xiao et al., arXiv 2309.17453): `image_without_first` counts it as text. `moved` is the share of uniform rank 1's budget
that go elsewhere if one-shot's gains count by one part of the energy alone. Cost: CPU seconds of profiles with and without the
parts, in turns. `--quick`: emoji scenes, fewer batches.
"""

from __future__ import annotations

from itertools import islice
from statistics import median
from time import process_time
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from _harness import Claim, run_benchmark
from torch import Tensor, nn

import rankscope as rs
from rankscope.budget import allocate_marginal
from rankscope.profiling import profiler
from rankscope.tasks import Task

MASK = "image_mask"


def measure(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """One row a task, one for the cost, and the claims."""
    torch.set_num_threads(1)
    rows = [
        task_row(name, 3 if quick else 8) for name in (["emoji-scenes"] if quick else ["emoji-scenes", "digit-scenes"])
    ]
    cost = cost_row(2 if quick else 3)
    claims = []
    for row in rows:
        without = row["image_without_first"] / row["image_tokens"]
        claims += [
            Claim.at_least(f"{row['task']}: image's share of energy over its share of tokens", row["density"], 1.2),
            Claim.at_most(f"{row['task']}: the same, the first token counted as text", without, 1.0),
        ]
    return [*rows, cost], [*claims, Claim.at_most("CPU time with the parts over without", cost["ratio"], 1.15)]


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
    gains = {name: values**2 for name, values in found.spectra().items()}
    of_module = found.table.set_index("module")[part] / found.table.set_index("module")["gradient_norm"] ** 2
    weighted = {name: each * float(of_module[name]) for name, each in gains.items()}
    before, after = (np.array(allocate_marginal(targets, each, budget).vector) for each in (gains, weighted))
    costs = np.array([target.rank_cost for target in targets])
    return float(costs @ np.maximum(after - before, 0) / budget.limit)


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
