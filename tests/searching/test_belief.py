"""What an earlier search believes: the same model as the search's own, and none of another budget's."""

import re

import optuna
import pytest

import rankscope as rs
from rankscope.errors import SettingsError
from rankscope.searching.sampler import belief_of
from rankscope.searching.space import make_space
from rankscope.tasks import Task


def test_a_stored_search_is_believed_as_when_it_ended(
    digits: Task, digits_profile: rs.Profile, digits_budget: rs.ParameterBudget
) -> None:
    storage = optuna.storages.InMemoryStorage()
    training = rs.TrainingSettings(steps=20, learning_rate=0.02)
    result = rs.search(
        digits, budget=digits_budget, profile=digits_profile, n_trials=14, confirm_fraction=0.0, training=training, storage=storage
    )  # fmt: skip
    space = make_space(digits_profile, digits_profile.targets, digits_budget)
    found = belief_of(result.study, space)
    ranks = [trial.allocation.vector for trial in result.trials]
    assert found is not None
    assert result.belief is not None
    assert found.predict(ranks) == pytest.approx(result.belief.predict(ranks))

    other = make_space(digits_profile, digits_profile.targets, rs.ParameterBudget(9000))
    message = "study `digits-shift` must be about budget 9000, but its trials are about 6912; search again, or use another output folder."
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
        belief_of(result.study, other)
