"""The sampler in plain Optuna studies: it finds what is worth most, and lives with failures, queues and other processes."""

import math

import numpy as np
import optuna
import pytest

import rankscope as rs
from rankscope.exceptions import StudyError
from rankscope.searching.sampler import make_sampler
from rankscope.space import HierarchicalSpace, group_by_depth
from rankscope.targets import TargetModule

optuna.logging.set_verbosity(optuna.logging.WARNING)
TARGETS = tuple(
    TargetModule(name=f"h.{i}.{role}", in_features=16, out_features=16, block=i, role=role)
    for i in range(6)
    for role in ("q_proj", "fc1")
)
BUDGET = rs.ParameterBudget.uniform(TARGETS, 4)
WORTH = np.linspace(0.0, 2.0, len(TARGETS)) ** 2
SPACE = HierarchicalSpace(
    targets=TARGETS,
    gains={t.name: 1.0 / np.arange(1, 17) for t in TARGETS},
    budget=BUDGET,
    groups=group_by_depth(TARGETS),
)


def worth(allocation: rs.RankAllocation) -> float:
    return float(np.log1p(allocation.vector) @ WORTH)


def objective(trial: optuna.Trial) -> float:
    return worth(rs.suggest_allocation(trial, SPACE)) + np.random.default_rng(trial.number).normal(0.0, 0.3)


def best_found(sampler: optuna.samplers.BaseSampler, n_trials: int) -> float:
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(objective, n_trials=n_trials)
    return worth(rs.RankAllocation(TARGETS, tuple(study.best_trial.user_attrs["ranks"])))


def test_its_recommendation_beats_random_tilts() -> None:
    mine, random = [], []
    for seed in range(4):
        sampler = rs.PerformanceModelSampler(SPACE, seed=seed)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        study.optimize(objective, n_trials=40)
        mine.append(worth(sampler.best(study)[0]))
        random.append(best_found(optuna.samplers.RandomSampler(seed), 40))
    assert np.mean(mine) > np.mean(random)


def test_proposals_fit_the_budget_and_are_stored(tmp_path) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    study = optuna.create_study(
        direction="maximize", storage=storage, sampler=rs.PerformanceModelSampler(SPACE, seed=0)
    )
    study.optimize(objective, n_trials=12)
    for trial in study.trials:
        allocation = rs.RankAllocation(TARGETS, tuple(trial.user_attrs["ranks"]))
        assert BUDGET.limit - 32 < allocation.parameters <= BUDGET.limit
        assert set(trial.params) == {tilt.name for tilt in SPACE.tilts}
        assert all(tilt.low <= trial.params[tilt.name] <= tilt.high for tilt in SPACE.tilts)
    again = optuna.load_study(study_name=study.study_name, storage=storage, sampler=rs.PerformanceModelSampler(SPACE))
    again.optimize(objective, n_trials=1)
    assert len(again.trials) == 13


def test_ask_and_tell_with_several_trials_open() -> None:
    study = optuna.create_study(direction="maximize", sampler=rs.PerformanceModelSampler(SPACE, seed=0))
    study.optimize(objective, n_trials=10)
    asked = [study.ask() for _ in range(4)]
    allocations = [rs.suggest_allocation(trial, SPACE) for trial in asked]
    assert len(set(allocations)) == 4  # draws differ by nature
    for trial, allocation in zip(asked, allocations, strict=True):
        study.tell(trial, worth(allocation))


def test_failed_pruned_and_foreign_trials_are_passed_over() -> None:
    study = optuna.create_study(direction="maximize", sampler=rs.PerformanceModelSampler(SPACE, seed=0))
    study.add_trial(optuna.trial.create_trial(value=99.0))  # without ranks

    def sometimes(trial: optuna.Trial) -> float:
        value = objective(trial)
        if trial.number % 4 == 1:
            raise optuna.TrialPruned
        return math.nan if trial.number % 4 == 2 else value

    study.optimize(sometimes, n_trials=30)
    assert {trial.state for trial in study.trials} == {
        optuna.trial.TrialState.COMPLETE,
        optuna.trial.TrialState.PRUNED,
        optuna.trial.TrialState.FAIL,
    }
    assert all("ranks" in trial.user_attrs for trial in study.trials[1:])


def test_queued_points_and_queued_ranks_are_kept() -> None:
    study = optuna.create_study(direction="maximize", sampler=rs.PerformanceModelSampler(SPACE, seed=0))
    study.optimize(objective, n_trials=10)
    study.enqueue_trial(SPACE.point(tau=0.0))
    study.enqueue_trial({}, user_attrs={"ranks": [1] * 12})
    study.optimize(objective, n_trials=2)
    assert study.trials[10].user_attrs["ranks"] == [4] * 12
    assert study.trials[11].user_attrs["ranks"] == [1] * 12


def test_a_minimised_value_is_worth_the_less_the_higher_it_is() -> None:
    sampler = rs.PerformanceModelSampler(SPACE, seed=0)
    study = optuna.create_study(direction="minimize", sampler=sampler)
    study.optimize(lambda trial: -objective(trial), n_trials=40)
    assert worth(sampler.best(study)[0]) > worth(SPACE.allocation(SPACE.point(tau=0.0)))


@pytest.mark.parametrize("name", ["tpe", "random", optuna.samplers.GPSampler(seed=0)], ids=str)
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_optunas_samplers_search_the_tilts(name: object) -> None:
    study = optuna.create_study(direction="maximize", sampler=make_sampler(name, SPACE, 0))
    study.optimize(objective, n_trials=3)
    assert all(sum(trial.user_attrs["ranks"]) == 48 for trial in study.trials)


def test_an_unknown_sampler_is_named() -> None:
    with pytest.raises(
        StudyError, match="`sampler` must be one of performance-model, tpe, random or an Optuna sampler, but got 'bohb'"
    ):
        make_sampler("bohb", SPACE, 0)


def test_a_constant_metric_is_explored_until_it_varies() -> None:
    sampler = rs.PerformanceModelSampler(SPACE, seed=0)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(lambda trial: 0.5 * len(rs.suggest_allocation(trial, SPACE).targets), n_trials=12)
    assert sampler.model(study) is None
    assert len({tuple(trial.user_attrs["ranks"]) for trial in study.trials}) > 8


def test_pruned_trials_teach_the_model() -> None:
    """Ten complete trials and forty pruned half way, where all values are 5 lower: offset out, they rank allocations too."""
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(0))

    def halting(trial: optuna.Trial) -> float:
        value = objective(trial)
        trial.report(value - 5.0, 1)
        if trial.number >= 10:
            raise optuna.TrialPruned
        trial.report(value, 2)
        return value

    study.optimize(halting, n_trials=50)
    complete = optuna.create_study(direction="maximize")
    complete.add_trials(study.trials[:10])
    rng = np.random.default_rng(1)
    unseen = [SPACE.allocation({t.name: rng.uniform(t.low, t.high) for t in SPACE.tilts}) for _ in range(100)]
    ranks, values = [a.vector for a in unseen], [worth(a) for a in unseen]
    taught, untaught = (rs.PerformanceModelSampler(SPACE).model(s) for s in (study, complete))
    assert taught.score(ranks, values) > untaught.score(ranks, values)
    assert taught.predict(ranks).mean() == pytest.approx(untaught.predict(ranks).mean(), abs=1.0)
