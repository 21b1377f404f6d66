"""The controller against its own static start, seed by seed, on held-out data: better where the start is poor, never worse.

Differences are judged by their 95 % interval over seeds, and the yardstick is shown to see harm: the same rule finds a
poor static start worse than a good one.
"""

from collections.abc import Iterable

import pytest

import rankscope as rs
from rankscope.comparison.statistics import paired_difference
from rankscope.tasks import Task

CONFIG = rs.TrainingSettings(steps=84, learning_rate=0.01)


def accuracies(task: Task, start: rs.RankAllocation, seeds: Iterable[int], *, moving: bool) -> list[float]:
    """With the controller's default settings, or with ranks that stay."""
    controller = rs.ControllerSettings() if moving else None
    return [rs.train(task, start, CONFIG, seed=seed, controller=controller)[1].metrics["accuracy"] for seed in seeds]


def starts(profile: rs.Profile) -> dict[str, rs.RankAllocation]:
    """All of (nearly) the same parameters; late blocks alone are a poor choice on this task."""
    targets, budget = profile.targets, rs.ParameterBudget.uniform(profile.targets, 1)
    late = {target.name: 2 for target in targets if target.block is not None and target.block >= 3}
    found = {
        name: rs.allocate(name, targets=targets, budget=budget, profile=profile) for name in ("uniform", "one-shot")
    }
    found["late"] = rs.RankAllocation.from_ranks(targets, late, budget=budget.limit)
    assert all(0.99 * budget.limit <= start.parameters <= budget.limit for start in found.values())
    return found


@pytest.mark.slow
def test_no_start_is_made_worse(digits: Task, digits_profile: rs.Profile) -> None:
    """What it gains depends on what there is to gain: much from late blocks, some from uniform, nothing sure from one-shot."""
    seeds = range(6)
    static = {name: accuracies(digits, start, seeds, moving=False) for name, start in starts(digits_profile).items()}
    gains = {
        name: paired_difference(accuracies(digits, start, seeds, moving=True), static[name])
        for name, start in starts(digits_profile).items()
    }
    assert paired_difference(static["late"], static["uniform"]).high < 0  # harm would be seen
    assert gains["late"].low > 0.1
    assert gains["uniform"].low > 0
    assert gains["one-shot"].high > 0
    assert gains["one-shot"].mean > -0.01


def test_a_poor_start_is_mended(digits: Task, digits_profile: rs.Profile) -> None:
    late = starts(digits_profile)["late"]
    static, moving = (accuracies(digits, late, [0, 1], moving=moving) for moving in (False, True))
    assert min(moving) > max(static) + 0.05
