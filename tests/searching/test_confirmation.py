"""Confirmation within the budget: how the trainings are split, and how many fresh seeds are left for the finalists."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rankscope.errors import SettingsError
from rankscope.searching.confirmation import FIRST_SEED, Run, affordable_seeds, split_budget
from rankscope.searching.storage import Trial
from rankscope.settings import SearchSettings
from tests.searching.test_finalists import trial


@example(32, 0.90625, 1)  # where confirming in whole seeds leaves more finalists than the share does
@given(st.integers(1, 300), st.floats(0, 0.99), st.integers(1, 4))
def test_the_split_keeps_the_budget(n_trials: int, fraction: float, n_seeds: int) -> None:
    if n_trials < n_seeds:
        return
    exploring, confirming = split_budget(n_trials, fraction, n_seeds)
    assert exploring >= 1
    assert n_trials - n_seeds < exploring * n_seeds + confirming <= n_trials
    assert confirming <= fraction * n_trials + 1e-6
    assert confirming % min(5, exploring) == 0 or exploring < 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 0.3, 2), "`n_trials` must cover one trial of 2 seeds, but got 1; raise it."),
        ((0, 0.3, 1), "`n_trials` must cover one trial of 1 seeds, but got 0; raise it."),
    ],
)
def test_bad_budgets(arguments: tuple[int, float, int], message: str) -> None:
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
        split_budget(*arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"confirm_fraction": 1.0}, "`confirm_fraction`: input should be less than 1, but got 1.0."),
        ({"n_seeds": 0}, "`n_seeds`: input should be greater than 0, but got 0."),
        ({"sampler": "bohb"}, "`sampler`: input should be 'performance-model', 'tpe' or 'random', but got 'bohb'."),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
        SearchSettings(**settings)


def jobs(*runs: tuple[Trial, int]) -> set[str]:
    return {Run(*run).job for run in runs}


def test_known_runs_count_and_are_not_paid_twice() -> None:
    a, b, old = trial(0, "uniform", (1, 1, 1)), trial(1, "one-shot", (3, 0, 0)), trial(2, "sampler", (0, 3, 0))
    first, second = FIRST_SEED, FIRST_SEED + 1
    assert affordable_seeds(set(), [a, b], 5) == 2
    assert affordable_seeds(set(), [a, b], 1) == 0
    known = jobs((a, first), (b, first), (a, second))
    assert affordable_seeds(known, [a, b], 0) == 1  # nothing is left: what is there counts
    assert affordable_seeds(known, [a, b], 4) == 2
    assert affordable_seeds(jobs((old, first), (old, second)), [a, b], 4) == 1  # an earlier finalist's runs
