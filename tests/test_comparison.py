"""Comparing on equal terms: the rate is tuned per allocation, seeds are shared, and intervals are a bootstrap's."""

import numpy as np
import pytest

import rankscope as rs
from rankscope.comparison import paired_difference, repeat_all
from rankscope.tasks import Task


def test_rates_are_tuned_on_validation_and_seeds_are_shared(
    digits: Task, digits_profile: rs.Profile, digits_budget: rs.ParameterBudget
) -> None:
    options = {"targets": digits_profile.targets, "budget": digits_budget, "profile": digits_profile}
    allocations = [rs.allocate(name, **options) for name in ("uniform", "one-shot")]
    config = rs.TrainingConfig(steps=15)
    arguments = {"learning_rates": [1e-5, 1e-2], "seeds": [7, 8], "tuning_seeds": [0]}
    one, two = (repeat_all(digits, allocations, config, n_jobs=jobs, **arguments) for jobs in (1, 2))
    for sequential, parallel in zip(one, two, strict=True):
        assert sequential.learning_rate == parallel.learning_rate == 1e-2
        assert [run.seed for run in sequential.runs] == [7, 8]
        assert sequential.validation == pytest.approx(parallel.validation, abs=0.01)
        assert len(sequential.test) == 2
    counted: list[tuple[int, int]] = []
    repeat_all(
        digits,
        allocations[:1],
        rs.TrainingConfig(steps=1),
        learning_rates=[1e-2],
        seeds=[1],
        on_run=lambda *n: counted.append(n),
    )
    assert counted == [(1, 1)]


def test_paired_difference_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        noise = rng.normal(size=10)  # shared by the pair: it must cancel
        found = paired_difference((0.5 + noise + 0.1 * rng.normal(size=10)).tolist(), noise.tolist())
        assert found.low < found.mean < found.high
        hits += found.low <= 0.5 <= found.high
    assert 170 <= hits <= 199  # nominally 190; a bootstrap of ten is a little short


def test_paired_difference_of_equal_runs() -> None:
    assert paired_difference([0.5, 0.6, 0.7], [0.4, 0.5, 0.6]) == pytest.approx((0.1, 0.1, 0.1))
