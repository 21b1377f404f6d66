"""The shared-weights evaluator: one nested super-adapter, trained once, judges any allocation by a validation pass.

At each training step a random allocation within the budget is drawn, and only the leading ranks of each module are active, as
many as it says (as in DyLoRA, arXiv 2210.07558; LoNAS; Shears, arXiv 2404.10934). Afterwards an allocation is judged without
training, by the adapter's own leading ranks. Whether such judgements rank allocations as training each alone does is
another question, which `screening.py` asks before it believes them.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from rankscope.adapters import RankPrefix, load_adapter
from rankscope.allocation import RankAllocation
from rankscope.exceptions import StudyError
from rankscope.files import read_json, replacing_folder, write_json
from rankscope.space import HierarchicalSpace
from rankscope.tasks import Task, evaluate
from rankscope.training import TrainingConfig, train

logger = logging.getLogger(__name__)

STEPS = 4  # of the super-adapter's training, times those of a trial
CAPACITY = 16  # ranks of a module in the super-adapter, times uniform's rank; more are judged as so many
MODULE_NOISE = (0.0, 0.5, 1.5)  # standard deviations of the log-normal noise on a module's gains, one of them a draw
WIDTHS = (0.25, 0.5, 1.0)  # shares of the tilts' offsets, one of them a draw
MANIFEST = "shared.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedEvaluator:
    """A trained super-adapter.

    Attributes:
        task: Whose validation split judges.
        model: The PEFT model.
        prefix: Its active ranks.
    """

    task: Task
    model: nn.Module
    prefix: RankPrefix

    def judge(self, allocation: RankAllocation) -> dict[str, float]:
        """The task's validation metrics with the allocation's ranks active; ranks beyond the adapter's count as all of its."""
        self.prefix.activate(_within(allocation, self.prefix.capacity))
        return evaluate(self.task, self.model, "validation")

    def save(self, folder: str | os.PathLike[str], about: Mapping[str, Any]) -> None:
        """Writes the adapter, in PEFT's own format, and what it is about, as a whole or not at all."""
        with replacing_folder(folder) as temporary:
            self.model.save_pretrained(str(temporary))  # type: ignore[operator]
            write_json(temporary / MANIFEST, dict(about))


def load_shared(task: Task, folder: str | os.PathLike[str], about: Mapping[str, Any]) -> SharedEvaluator | None:
    """The evaluator that `save` left in a folder; None where there is no such folder.

    Raises:
        StudyError: It is about something else.
        FileFormatError: The folder does not hold an evaluator.
    """
    if not Path(folder).exists():
        return None
    stored = read_json(Path(folder) / MANIFEST, what="what a shared evaluator is about")
    wanted = json.loads(json.dumps(dict(about)))
    if differing := [key for key in wanted if stored.get(key) != wanted[key]]:
        key = differing[0]
        raise StudyError(
            f"`{folder}` must hold a shared evaluator about {key} {wanted[key]!r}, but its is about {stored.get(key)!r}; "
            "delete it, or use another folder."
        )
    model = load_adapter(task.build_model(), folder)
    return SharedEvaluator(task=task, model=model, prefix=RankPrefix(model))


def train_shared(
    task: Task,
    space: HierarchicalSpace,
    training: TrainingConfig,
    *,
    seed: int = 0,
    draws: Iterable[RankAllocation] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> SharedEvaluator:
    """Trains the super-adapter.

    Args:
        task: Where model, data, loss and metric come from.
        space: Of the allocations to be judged.
        training: A trial's schedule; the super-adapter's has `STEPS` times its steps.
        seed: Of the training and of the draws.
        draws: One allocation a step; default: `draw_allocation` of the space.
        on_step: Called with the number of steps done and of steps in all.

    Raises:
        TrainingError: The loss or the metric is not finite.
    """
    rng = np.random.default_rng(seed)
    drawn = iter(draws) if draws is not None else iter(lambda: draw_allocation(space, rng), None)
    schedule = replace(training, steps=STEPS * training.steps, evaluate_every=None)
    prefixes: list[RankPrefix] = []

    def start(model: Any) -> None:
        prefixes.append(RankPrefix(model))
        advance(0)

    def advance(step: int) -> None:
        prefix = prefixes[0]
        prefix.activate(_within(next(drawn), prefix.capacity))
        if on_step and step:
            on_step(step, schedule.steps)

    model, _ = train(task, capacity(space), schedule, seed=seed, on_model=start, on_step=advance)
    return SharedEvaluator(task=task, model=model, prefix=prefixes[0])


def capacity(space: HierarchicalSpace) -> RankAllocation:
    """The super-adapter's own ranks: `CAPACITY` times uniform's, as far as module, bound and budget allow."""
    limit = space.budget.limit
    ranks = ceil(CAPACITY * limit / sum(target.rank_cost for target in space.targets))
    bound = space.max_rank
    vector = []
    for target in space.targets:
        most = bound.get(target.name) if isinstance(bound, Mapping) else bound
        highest = target.full_rank if most is None else min(most, target.full_rank)
        vector.append(min(highest, ranks, limit // target.rank_cost))
    return RankAllocation(space.targets, tuple(vector), strategy="super-adapter")


def draw_allocation(space: HierarchicalSpace, rng: np.random.Generator) -> RankAllocation:
    """A random allocation within the budget: a point of the space, from uniform to beyond one-shot, with noise on modules."""
    spread = float(rng.choice(MODULE_NOISE))
    noisy = {name: values * np.exp(rng.normal(0.0, spread)) for name, values in space.gains.items()}
    width = float(rng.choice(WIDTHS))
    point = {tilt.name: float(rng.uniform(tilt.low, tilt.high)) * width for tilt in space.tilts}
    return replace(space, gains=noisy).allocation(point | {"tau": float(rng.uniform(0.0, 1.25))})


def _within(allocation: RankAllocation, most: Mapping[str, int]) -> RankAllocation:
    """The allocation, with ranks above `most` lowered to it."""
    vector = tuple(min(r, most.get(t.name, 0)) for t, r in zip(allocation.targets, allocation.vector, strict=True))
    return RankAllocation(allocation.targets, vector)
