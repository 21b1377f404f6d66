"""What an earlier search believes: the same model as the search's own."""

import optuna
import pytest

import rankscope as rs
from rankscope.searching.space import make_space
from rankscope.tasks import Task


def test_a_stored_search_is_believed_as_when_it_ended(
    digits: Task, digits_profile: rs.Profile, digits_budget: rs.ParameterBudget
) -> None:
    storage = optuna.storages.InMemoryStorage()
    training = rs.TrainingSettings(steps=20, learning_rate=0.02)
    result = rs.search(
        digits, budget=digits_budget, profile=digits_profile, n_trials=14, seed=3, confirm_fraction=0.0, training=training, storage=storage
    )  # fmt: skip
    space = make_space(digits_profile, digits_profile.targets, digits_budget)
    found = rs.PerformanceModelSampler(space).believed(result.study)
    ranks = [trial.allocation.vector for trial in result.trials]
    assert found is not None
    assert result.belief is not None
    assert found.predict(ranks) == pytest.approx(result.belief.predict(ranks))
