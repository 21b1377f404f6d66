"""Short trials: what a pruned one is worth as an observation, and whether short training ranks like long training."""

import re

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from scipy.stats import kendalltau

import rankscope as rs
from rankscope.errors import SettingsError
from rankscope.searching.confirmation import Agreement, agreements, judge
from rankscope.searching.sampler import observe
from rankscope.searching.storage import TRIAL_KEY, Trial
from rankscope.tasks import Task
from tests.searching.test_finalists import trial as made

optuna.logging.set_verbosity(optuna.logging.WARNING)


def frozen(
    values: dict[int, float], rate: float = 0.01, pruned: bool = False, final: float | None = None, n_seeds: int = 1
) -> FrozenTrial:
    last = list(values.values())[-1]
    return create_trial(
        state=TrialState.PRUNED if pruned else TrialState.COMPLETE,
        value=last if final is None else final,
        params={"learning_rate": rate},
        distributions={"learning_rate": CategoricalDistribution([0.01, 0.02])},
        intermediate_values=values,
        user_attrs={TRIAL_KEY: {"metrics_by_seed": {str(seed): last for seed in range(n_seeds)}}},
    )


COMPLETE = [frozen({10: 0.3, 20: 0.5, 40: 0.8}), frozen({10: 0.5, 20: 0.6, 40: 0.7}), frozen({10: 0.1, 20: 0.1, 40: 0.1}, 0.02)]  # fmt: skip


def test_a_pruned_trial_is_expected_to_gain_what_others_gained_at_its_rate() -> None:
    assert observe(frozen({10: 0.2, 20: 0.4}, pruned=True), COMPLETE, by_seed=False) == pytest.approx((0.4 + 0.2, 0.5))
    assert observe(frozen({10: 0.2}, pruned=True), COMPLETE, by_seed=False) == pytest.approx((0.2 + 0.35, 0.25))
    assert observe(frozen({10: 0.2}, 0.02, pruned=True), COMPLETE, by_seed=False) == pytest.approx((0.2, 0.25))
    assert observe(COMPLETE[0], COMPLETE, by_seed=False) == (0.8, 1.0)


def test_its_difference_to_uniform_is_that_at_equal_steps() -> None:
    uniform = frozen({10: 0.3, 40: 0.8})
    pruned, _ = observe(frozen({10: 0.2}, pruned=True), [uniform], by_seed=False)
    assert pruned - 0.8 == pytest.approx(0.2 - 0.3)


def test_seeds_are_averaged() -> None:
    complete = [frozen({1: 0.8, 2: 0.6, 3: 0.7, 4: 0.9}, final=0.75, n_seeds=4)]
    value, weight = observe(frozen({1: 0.5, 2: 0.4}, pruned=True), complete, by_seed=True)
    assert (value, weight) == pytest.approx((0.45 + 0.75 - 0.7, 2.0))
    assert observe(complete[0], complete, by_seed=True) == (0.75, 4.0)


def test_a_trial_stopped_on_its_way_is_less_than_one_run_however_many_seeds_others_have() -> None:
    complete = [frozen({10: 0.5, 40: 0.8}, n_seeds=3)]
    assert observe(frozen({10: 0.4}, pruned=True), complete, by_seed=False) == pytest.approx((0.7, 0.25))


def test_rates_that_are_numbers_of_their_own_are_not_compared_one_by_one() -> None:
    """`suggest_float("learning_rate")` gives each trial its own rate: no two would ever be alike."""
    trials = [
        create_trial(state=state, value=0.8, params={"learning_rate": rate}, intermediate_values=values,
                     distributions={"learning_rate": FloatDistribution(0.001, 0.1)})
        for state, rate, values in ((TrialState.COMPLETE, 0.01, {1: 0.5, 2: 0.8}), (TrialState.PRUNED, 0.02, {1: 0.4}))
    ]  # fmt: skip
    assert observe(trials[1], trials[:1], by_seed=False) == pytest.approx((0.7, 0.5))


@pytest.mark.parametrize("trial", [
    frozen({15: 0.2}, pruned=True),  # nothing completed was evaluated there
    create_trial(state=TrialState.FAIL),
    create_trial(state=TrialState.PRUNED),
    frozen({10: float("nan")}, pruned=True),
])  # fmt: skip
def test_what_cannot_be_judged_is_no_observation(trial: FrozenTrial) -> None:
    assert observe(trial, COMPLETE, by_seed=False) is None


def with_history(number: int, history: dict[int, float], rate: float = 0.01) -> Trial:
    base = made(number, "sampler", (number % 5, 0, 0), list(history.values())[-1])
    return Trial(
        **{name: getattr(base, name) for name in Trial.__slots__} | {"history": history, "learning_rate": rate}
    )


def test_agreement_is_of_allocations_and_not_of_rates() -> None:
    early, late = [1.0, 2.0, 3.0, 2.5, 1.5], [0.5, 0.6, 0.8, 0.9, 0.4]  # sums are exact: ties stay ties
    trials = [with_history(i, {20: a, 40: a, 80: b}) for i, (a, b) in enumerate(zip(early, late, strict=True))]
    expected = kendalltau(early, late)[0]
    assert [(a.steps, a.of_steps, a.pairs) for a in agreements(trials, [], 1, 1)] == [(20, 80, 5), (40, 80, 5)]
    assert all(a.kendall == pytest.approx(expected) for a in agreements(trials, [], 1, 1))
    faster = [with_history(i + 5, {20: t.history[20] + 10, 40: t.history[40] + 10, 80: t.history[80]}, 0.02) for i, t in enumerate(trials)]  # fmt: skip
    both = agreements([*trials, *faster], [], 1, 1)
    assert both[0].kendall == pytest.approx(kendalltau(early * 2, late * 2)[0])


def test_too_few_or_equal_trials_tell_nothing() -> None:
    assert agreements([], [], 1, 1) == []
    assert agreements([with_history(i, {20: 0.1 * i, 80: 0.1 * i}) for i in range(4)], [], 1, 1) == []
    assert agreements([with_history(i, {20: 0.5, 80: 0.1 * i}) for i in range(9)], [], 1, 1) == []
    assert agreements([with_history(i, {80: 0.1 * i}) for i in range(9)], [], 1, 1) == []


def test_agreement_of_finalists_with_their_short_trials() -> None:
    trials = [made(i, "uniform" if i == 0 else "sampler", (i, 0, 0), 0.1 * i) for i in range(5)]
    finalists = judge(trials, [{"500": 0.5 - 0.1 * i} for i in range(5)])
    assert agreements([], finalists, 10, 50) == [
        Agreement(steps=10, of_steps=50, kendall=pytest.approx(-1.0), pairs=5, fresh=True)
    ]
    assert agreements([], finalists, 50, 50) == []
    assert str(agreements([], finalists, 10, 50)[0]) == (
        "10 of 50 steps rank 5 finalists, trained in full on fresh seeds: Kendall's tau -1.00"
    )


def test_trials_are_short_and_confirmation_is_in_full(
    digits: Task, digits_profile: rs.Profile, digits_budget: rs.ParameterBudget
) -> None:
    training = rs.TrainingSettings(steps=10, learning_rate=0.01)
    options = {"budget": digits_budget, "profile": digits_profile, "training": training, "study_name": "short"}
    found = rs.search(digits, n_trials=15, confirm_fraction=1 / 3, fidelity=0.2, storage=None, **options)
    assert len(found.trials) == 10
    assert found.confirming_runs <= 5
    trained = sum(trial.reused is None for trial in found.trials)
    assert found.steps == trained * 2 + found.confirming_runs * 10
    uniform = found.finalists[0]
    _, full = rs.train(digits, uniform.trial.allocation, training, seed=500)
    _, short = rs.train(digits, uniform.trial.allocation, rs.TrainingSettings(steps=2, learning_rate=0.01), seed=0)
    assert uniform.metrics_by_seed == {"500": full.metrics["accuracy"]}
    assert uniform.trial.metric == short.metrics["accuracy"]
    message = (
        "study `short` must be about trial_steps 5, but its trials are about 2; use another study name or storage."
    )
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
        rs.search(digits, n_trials=15, fidelity=0.5, storage=found.study._storage, **options)
    with pytest.raises(SettingsError, match=r"^`fidelity`: input should be greater than 0, but got 0\.0\.$"):
        rs.search(digits, fidelity=0.0, storage=None, **options)
