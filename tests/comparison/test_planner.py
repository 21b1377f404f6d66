"""The budget planner: on curves whose truth is known, on digits in small, and what it refuses."""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rankscope as rs
from rankscope.comparison import compare
from rankscope.comparison.planner import FULL, HEAD, Assessment, Cell, budget_grid, explore
from rankscope.errors import SettingsError
from rankscope.settings import AllocationSettings, PlanSettings, TrainingSettings
from rankscope.tasks import Task
from tests.inventories import vit_inventory

VIT = vit_inventory()  # rank 1 costs 6,912 parameters, the cheapest rank 128
GRID = budget_grid(VIT, PlanSettings())
# What digits-shift looks like: uniform needs some 13,000 parameters for what placed ranks reach with 900.
UNIFORM = (0.885, 0.890, 0.893, 0.895, 0.897, 0.917, 0.921, 0.922, 0.924)
PLACED = (0.900, 0.913, 0.924, 0.930, 0.931, 0.931, 0.931, 0.931, 0.931)


def world(seed: int, uniform: Sequence[float] = UNIFORM, placed: Sequence[float] = PLACED, noise: float = 0.006) -> Any:
    """Measures cells of known curves: a part of the noise is the seed's, shared by all cells."""
    rng = np.random.default_rng(seed)
    shared, kept, scores = rng.normal(0, 0.006, 64), dict[Cell, Any](), dict[Cell, list[float]]()

    def measure(cells: Sequence[Cell], n: int) -> dict[Cell, list[float]]:
        for cell in cells:
            curve = {"uniform": uniform, "one-shot": placed}.get(cell[0], [0.935 if cell == FULL else 0.7])
            mean = curve[GRID.index(cell[1])] if cell[1] else curve[0]
            kept.setdefault(cell, mean + shared + rng.normal(0, noise, 64))
            scores[cell] = kept[cell][: max(n, len(scores.get(cell, ())))].tolist()
        return dict(scores)

    return measure


def needed(curve: Sequence[float], level: float) -> float:
    """Where a rising curve reaches a level, by straight lines over log parameters."""
    return math.exp(np.interp(level, np.array(curve) + 1e-9 * np.arange(len(curve)), np.log(GRID)))


def test_the_grid_doubles_from_a_sixteenth_of_rank_1_to_rank_16() -> None:
    assert tuple(432 * 2**power for power in range(9)) == GRID
    assert budget_grid(VIT, PlanSettings(step=4, reference=20_000)) == (432, 1728, 6912, 20_000, 27_648, 110_592)
    ends = budget_grid(VIT, PlanSettings(lowest=1e-6, highest=1e6, step=1000))
    assert (ends[0], ends[-1]) == (128, 442_368)  # one rank of the cheapest module, and full rank
    bounded = budget_grid(VIT, PlanSettings(step=4), AllocationSettings(min_rank=1, max_rank=2))
    assert bounded == (6912, 13_824)  # nothing else has such ranks


def test_on_known_curves_the_answer_is_right_and_its_interval_covers() -> None:
    """The bound on the number of trainings is what keeps digits-shift within 20 minutes."""
    found, covered, trainings = [], [], []
    for seed in range(25):
        plan = explore(GRID, PlanSettings(), world(seed))
        saved, level = plan.saved(), UNIFORM[GRID.index(plan.reference[1])] - plan.margin
        truth = needed(UNIFORM, level) / needed(PLACED, level)
        found.append(plan.smallest("one-shot"))
        covered.append(saved.low <= truth <= saved.high)
        trainings.append(sum(len(scores) + 6 for scores in plan.scores.values()))
        assert 3 < saved.mean < 60
    assert set(found) <= {864, 1728, 3456}
    assert sum(covered) >= 22
    assert max(trainings) <= 400


def test_where_capacity_does_not_matter_the_least_budget_is_enough() -> None:
    flat = [0.9] * 9
    found = [explore(GRID, PlanSettings(), world(seed, flat, flat)).smallest("one-shot") for seed in range(10)]
    assert found.count(432) >= 6
    assert None not in found


def test_where_placement_loses_nothing_is_recommended() -> None:
    plan = explore(GRID, PlanSettings(), world(0, placed=[0.8] * 9))
    assert plan.smallest("one-shot") is None
    assert plan.smallest("uniform") is not None


def test_full_fine_tuning_or_a_budget_may_be_the_reference() -> None:
    assert explore(GRID, PlanSettings(reference="full", ceiling=False), world(0)).reference == FULL
    plan = explore(GRID, PlanSettings(reference=3456, ceiling=False), world(0))
    assert plan.reference == ("uniform", 3456)
    assert FULL not in plan.scores
    assert HEAD in plan.scores
    assert plan.smallest("one-shot") in (432, 864)


def test_seeds_are_added_where_the_decision_is_open_only() -> None:
    """Never at the ends of the curves, which are clearly too little or clearly enough."""
    added = 0
    for seed in range(6):
        plan = explore(GRID, PlanSettings(margin=0.008, max_seeds=16), world(seed))
        seeds = {cell: len(scores) for cell, scores in plan.scores.items()}
        assert seeds["uniform", 432] == seeds["uniform", 6912] == seeds[FULL] == 8
        assert set(seeds.values()) <= {8, 16}
        added += 16 in seeds.values()
        assert (16 in seeds.values()) is (seeds[plan.reference] == 16)
    assert 1 <= added <= 5


def test_decisions_by_hand() -> None:
    scores = {
        ("uniform", 432): [0.80, 0.81, 0.82], ("uniform", 6912): [0.90, 0.91, 0.92],
        ("one-shot", 432): [0.80, 0.812, 0.818], ("one-shot", 6912): [0.90, 0.91, 0.92],
    }  # fmt: skip
    plan = Assessment(grid=GRID, placed="one-shot", scores=scores, settings=PlanSettings(margin=0.01))
    assert plan.reference == ("uniform", 6912)
    assert plan.level == pytest.approx(0.90)
    assert [plan.enough(("one-shot", budget)) for budget in (432, 6912)] == [False, True]  # equal on every seed
    assert plan.next_step("one-shot") == (("one-shot", 1728), 8)  # half-way on the grid
    assert plan.saved().mean == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference": 100}, "`reference` must lie between 128 parameters (one rank of the cheapest module) and 442,368 (full rank), "
         "but got 100; choose one of these."),
        ({"reference": 10**6}, "`reference` must lie between 128 parameters (one rank of the cheapest module) and 442,368 (full rank), "
         "but got 1,000,000; choose one of these."),
        ({"lowest": 1e-5, "highest": 1e-4}, "`lowest` and `highest` must leave two budgets between 128 parameters (one rank of the "
         "cheapest module) and 442,368 (full rank); move them apart."),
        ({"lowest": 2, "highest": 1}, "`plan`: `lowest` must be below `highest`, but got 2 and 1."),
        ({"n_seeds": 1}, "`n_seeds`: input should be greater than or equal to 2, but got 1."),
        ({"n_seeds": 8, "max_seeds": 4}, "`plan`: `n_seeds` must not exceed `max_seeds`, but got 8 and 4."),
        ({"margin": 0.0}, "`margin`: input should be greater than 0, but got 0.0."),
        ({"reference": "best"}, "`reference`: input should be 'uniform' or 'full', but got 'best'."),
        ({"strategy": "random"}, "`strategy` must place ranks, but got 'random'; take `one-shot`."),
        ({"strategy": "one_shot"}, "`methods` must be known or `path/to/file.py:function`, but 'one_shot' is not; did you mean "
         "'one-shot'?"),
        ({"seeds": range(3)}, "`seeds` must hold `max_seeds` = 32 seeds, but holds 3."),
        ({"seeds": range(9_990, 10_022)}, "`tuning_seeds` must be none of `seeds`, but share 10000; take others."),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_one_line_before_anything_runs(
    digits: Task, digits_profile: rs.Profile, change: dict[str, Any], message: str
) -> None:
    def done(number: int, total: int) -> None:
        raise AssertionError("a run was made")

    with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
        rs.plan_budget(digits, profile=digits_profile, on_run=done, **change)


def test_a_margin_below_the_noise_says_how_many_seeds_it_takes() -> None:
    with pytest.raises(SettingsError) as caught:
        explore(GRID, PlanSettings(margin=0.001, max_seeds=16), world(0))
    found = re.fullmatch(
        r"`margin` must be at least (0\.00\d+), the noise of 16 seeds, but got 0\.001; raise it, or set `max_seeds` to (\d+)\.",
        str(caught.value),
    )
    assert found
    assert 0.003 < float(found[1]) < 0.006
    plan = explore(GRID, PlanSettings(margin=0.02), world(0))
    assert plan.half_width(int(found[2])) == pytest.approx(0.001, rel=0.5)


@pytest.fixture(scope="module")
def small(
    digits: Task, digits_profile: rs.Profile, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path, Callable]:
    folder = tmp_path_factory.mktemp("plan")
    options = {
        "profile": digits_profile,
        "training": TrainingSettings(steps=6, learning_rate=[0.005, 0.02]),
        "kept_in": folder,
    }
    options |= {"n_seeds": 2, "max_seeds": 3, "n_tuning_seeds": 1, "lowest": 0.25, "highest": 1, "step": 4}
    return rs.plan_budget(digits, **options), folder, lambda: rs.plan_budget(digits, **options)


def test_a_small_plan_on_digits(small: tuple[Any, Path, Callable]) -> None:
    plan, folder, again = small
    table = plan.table().set_index(["method", "budget"])
    assert set(table.index) >= {(name, budget) for name in ("uniform", "one-shot") for budget in (1728, 6912)} | {
        FULL,
        HEAD,
    }
    limited = table[table.index.get_level_values(1) > 0]
    assert (limited["parameters"] <= limited.index.get_level_values(1)).all()
    assert table["seeds"].isin((2, 3)).all()
    assert plan.budget in (None, 1728, 6912)
    assert (plan.allocation is None) is (plan.budget is None)
    assert plan.answers().keys() >= {"reference", "enough", "capacity"}
    runs = plan.all_runs()
    assert len(runs) == len(list(folder.glob("*.json")))
    assert runs.loc[runs["role"] == "tuning", "test"].isna().all()
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert again().answers() == plan.answers()
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_compare_reads_what_the_planner_trained(
    digits: Task, digits_profile: rs.Profile, small: tuple[Any, Path, Callable]
) -> None:
    plan, folder, _ = small
    before = set(folder.iterdir())
    training = TrainingSettings(steps=6, learning_rate=[0.005, 0.02])
    budget = rs.ParameterBudget(6912)
    options = {
        "budget": budget,
        "profile": digits_profile,
        "training": training,
        "kept_in": folder,
        "n_tuning_seeds": 1,
    }
    found = compare(digits, ["one-shot", "full", "head"], seeds=range(2), budgets=[0.25, 1.0], **options)
    assert set(folder.iterdir()) == before
    ours = plan.table().set_index(["method", "budget"])["seeds"]
    theirs = found.runs[(found.runs["method"] == "one-shot") & (found.runs["role"] == "reported")]
    assert len(theirs) == 4 <= ours["one-shot"].sum()
