"""The sampler in plain Optuna studies: it finds what is worth most, and lives with failures, queues and other processes."""

import copy
import math
import pickle
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
from optuna.distributions import FloatDistribution, IntDistribution
from torch import nn

import rankscope as rs
from rankscope.budget import RankLimits
from rankscope.errors import SettingsError
from rankscope.performance import rank_features
from rankscope.searching.sampler import make_sampler
from rankscope.searching.space import HierarchicalSpace, group_by_depth, make_space
from rankscope.searching.storage import TRIAL_KEY
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
        mine.append(worth(sampler.best(study).allocation))
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
    assert worth(sampler.best(study).allocation) > worth(SPACE.allocation(SPACE.point(tau=0.0)))


@pytest.mark.parametrize("name", ["tpe", "random", optuna.samplers.GPSampler(seed=0)], ids=str)
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_optunas_samplers_search_the_tilts(name: object) -> None:
    study = optuna.create_study(direction="maximize", sampler=make_sampler(name, SPACE, 0))
    study.optimize(objective, n_trials=3)
    assert all(sum(trial.user_attrs["ranks"]) == 48 for trial in study.trials)


def test_an_unknown_sampler_is_named() -> None:
    with pytest.raises(
        SettingsError,
        match="`sampler` must be one of performance-model, tpe, random or an Optuna sampler, but got 'bohb'",
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


# --- one sampler, many users ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("database", [False, True], ids=["in memory", "sqlite"])
def test_threads_share_a_sampler(database: bool, tmp_path: Path) -> None:
    sampler = rs.PerformanceModelSampler(SPACE, seed=0)
    storage = f"sqlite:///{tmp_path}/study.db" if database else None
    study = optuna.create_study(direction="maximize", storage=storage, sampler=sampler)
    study.optimize(objective, n_trials=40, n_jobs=4)
    assert {trial.state.name for trial in study.trials} == {"COMPLETE"}
    allocations = [rs.RankAllocation(TARGETS, tuple(trial.user_attrs["ranks"])) for trial in study.trials]
    assert all(BUDGET.limit - 32 < allocation.parameters <= BUDGET.limit for allocation in allocations)
    assert worth(sampler.best(study).allocation) > worth(SPACE.allocation(SPACE.point(tau=0.0)))


def test_copies_draw_alike_and_learn_again_from_the_study() -> None:
    sampler = rs.PerformanceModelSampler(SPACE, seed=0)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(objective, n_trials=12)
    copies = [copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))]
    proposals = []
    for each in copies:
        study.sampler, trial = each, study.ask()
        proposals.append(rs.suggest_allocation(trial, SPACE).vector)
        study.tell(trial, state=optuna.trial.TrialState.FAIL)  # what is under way is not proposed again
    assert proposals[0] == proposals[1]
    assert len(pickle.dumps(sampler)) < 2 * len(pickle.dumps(rs.PerformanceModelSampler(SPACE, seed=0)))
    assert copies[0].best(study).allocation == sampler.best(study).allocation


def test_a_sampler_learns_each_study_from_scratch() -> None:
    """In both, trial 0 and so on exist: what the first one's were must not count in the second."""
    sampler = rs.PerformanceModelSampler(SPACE, seed=0)
    found = []
    for weights in (WORTH, WORTH[::-1]):
        study = optuna.create_study(direction="maximize", sampler=sampler)
        study.optimize(lambda trial, w=weights: np.log1p(rs.suggest_allocation(trial, SPACE).vector) @ w, n_trials=30)
        found.append(sampler.best(study).allocation)
        assert found[-1] == rs.PerformanceModelSampler(SPACE).best(study).allocation
    assert worth(found[0]) > worth(SPACE.allocation(SPACE.point(tau=0.0))) > worth(found[1])


def test_reseeding_changes_the_draws() -> None:
    sampler = rs.PerformanceModelSampler(SPACE, seed=0)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(objective, n_trials=10)
    other = copy.deepcopy(sampler)
    other.reseed_rng()
    drawn = []
    for study.sampler in (sampler, other):
        drawn.append([rs.suggest_allocation(study.ask(), SPACE).vector for _ in range(4)])
    assert drawn[0] != drawn[1]


# --- studies that are not only ours -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_tilts_that_are_fixed_from_outside_hold_for_the_allocation() -> None:
    sampler = rs.PerformanceModelSampler(SPACE, seed=0)
    fixed = {"one-shot weight": 0.5, "role fc1": 1.5}
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.PartialFixedSampler(fixed, sampler))
    study.optimize(objective, n_trials=15)
    for trial in study.trials:
        assert fixed.items() <= trial.params.items()
        assert trial.user_attrs["ranks"] == list(SPACE.allocation(trial.params).vector)


def test_only_the_given_search_space_is_sampled_and_within_its_bounds() -> None:
    sampler = rs.PerformanceModelSampler(SPACE, seed=0)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(objective, n_trials=10)
    trial = study.ask()
    frozen = study.get_trials(deepcopy=False)[trial.number]
    space = {
        "blocks 0-1": FloatDistribution(-2.0, 2.0),
        "one-shot weight": FloatDistribution(0.0, 0.1),
        "x": IntDistribution(1, 3),
    }
    for _ in range(5):
        found = sampler.sample_relative(study, frozen, space)
        assert set(found) == set(space)
        assert 0.0 <= found["one-shot weight"] <= 0.1
        assert found["x"] in (1, 2, 3)
    assert sampler.sample_relative(study, frozen, {}) == {}


def test_other_parameters_and_rates_that_are_numbers_stand_beside_the_tilts() -> None:
    """`suggest_float` gives every trial a rate of its own: as a condition each it would explain everything away."""
    sampler = rs.PerformanceModelSampler(SPACE, seed=0)
    study = optuna.create_study(direction="maximize", sampler=sampler)

    def conditional(trial: optuna.Trial) -> float:
        value = objective(trial)
        trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)
        if trial.suggest_categorical("dropout", [True, False]):
            trial.suggest_float("p", 0.0, 0.5)
        return value

    study.optimize(conditional, n_trials=40)
    model = sampler.model(study)
    assert model is not None
    assert model.conditions_ == [None]
    assert worth(sampler.best(study).allocation) > worth(SPACE.allocation(SPACE.point(tau=0.0)))
    assert sampler.best(study).learning_rate is None


def test_a_rate_of_a_few_goes_with_the_draw() -> None:
    sampler = rs.PerformanceModelSampler(SPACE, seed=0)
    study = optuna.create_study(direction="maximize", sampler=sampler)

    def tuned(trial: optuna.Trial) -> float:
        return objective(trial) + 10.0 * trial.suggest_categorical("learning_rate", [0.1, 0.9])

    study.optimize(tuned, n_trials=30)
    assert sampler.best(study).learning_rate == 0.9
    assert [trial.params["learning_rate"] for trial in study.trials[-10:]].count(0.9) >= 8  # a draw may differ


@pytest.mark.parametrize("ranks", [5, "ranks", [1] * 5, [1.5] * 12, [99] * 12, [-1] * 12, None])
def test_trials_of_another_space_are_passed_over(ranks: object) -> None:
    sampler = rs.PerformanceModelSampler(SPACE, seed=0)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.add_trials([optuna.trial.create_trial(value=9.0 + i, user_attrs={"ranks": ranks}) for i in range(12)])
    study.optimize(objective, n_trials=9)
    assert sampler.model(study) is not None
    assert len({tuple(trial.user_attrs["ranks"]) for trial in study.trials[12:]}) == 9


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_values_without_bound_teach_nothing(value: float) -> None:
    sampler = rs.PerformanceModelSampler(SPACE, seed=0)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(lambda trial: value if trial.number % 3 else objective(trial), n_trials=30)
    assert sampler.model(study) is not None


def test_several_objectives_are_refused_as_optunas_samplers_refuse_them() -> None:
    sampler = rs.PerformanceModelSampler(SPACE, seed=0)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    message = "If the study is being used for multi-objective optimization, PerformanceModelSampler cannot be used."
    for call in (sampler.best, sampler.model, sampler.believed, sampler.validate):
        with pytest.raises(ValueError, match=f"^{message}$"):
            call(study)
    with pytest.raises(ValueError, match=f"^{message}$"):
        study.optimize(lambda trial: (objective(trial), 1.0), n_trials=1)


def test_too_few_trials_have_no_best() -> None:
    sampler = rs.PerformanceModelSampler(SPACE, seed=0)
    study = optuna.create_study(study_name="new", direction="maximize", sampler=sampler)
    message = "study `new` must hold at least 2 trials with ranks of these modules and a metric, but holds fewer; run more trials."
    with pytest.raises(SettingsError, match=f"^{message}$"):
        sampler.best(study)


@pytest.mark.parametrize("n_seeds", [1, 8])
def test_the_noise_of_a_mean_over_seeds_is_not_that_of_one_fresh_run(n_seeds: int) -> None:
    """80 % intervals of a new single run hold one, however many seeds the trials had."""
    inside = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        noise, points = 3.0, [{t.name: rng.uniform(t.low, t.high) for t in SPACE.tilts} for _ in range(80)]
        allocations = [SPACE.allocation(point) for point in points]
        study = optuna.create_study(direction="maximize")
        for allocation in allocations[:40]:
            runs = {str(i): worth(allocation) + rng.normal(0.0, noise) for i in range(n_seeds)}
            attributes = {"ranks": list(allocation.vector), TRIAL_KEY: {"metrics_by_seed": runs}}
            study.add_trial(optuna.trial.create_trial(value=np.mean(list(runs.values())), user_attrs=attributes))
        model = rs.PerformanceModelSampler(SPACE).model(study)
        low, high = model.interval([a.vector for a in allocations[40:]], 0.8, repeats=1)
        fresh = np.array([worth(a) for a in allocations[40:]]) + rng.normal(0.0, noise, 40)
        inside += ((low <= fresh) & (fresh <= high)).tolist()
    assert 0.7 < np.mean(inside) < 0.9


# --- spaces at the edge ----------------------------------------------------------------------------------------------


def space_of(n: int, **options: object) -> HierarchicalSpace:
    targets = TARGETS[:n]
    arguments = {
        "targets": targets, "gains": {t.name: 1.0 / np.arange(1, 17) for t in targets},
        "budget": rs.ParameterBudget.uniform(targets, 4), "groups": group_by_depth(targets), **options,
    }  # fmt: skip
    return HierarchicalSpace(**arguments)


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        (space_of(1), {(4,)}),
        (space_of(3, budget=rs.ParameterBudget(32)), {(1, 0, 0), (0, 1, 0), (0, 0, 1)}),
        (space_of(3, budget=rs.ParameterBudget.uniform(TARGETS[:3], 16)), {(16, 16, 16)}),
        (space_of(3, limits=RankLimits(max_rank=1)), {(1, 1, 1)}),
        (space_of(3, limits=RankLimits(min_rank=4)), {(4, 4, 4)}),
        (space_of(2, gains={TARGETS[0].name: np.zeros(16), TARGETS[1].name: np.ones(16)}, limits=RankLimits(max_rank=8)), None),
        (space_of(2, gains={TARGETS[0].name: np.zeros(0), TARGETS[1].name: np.full(16, 1e-300)}), None),
    ],
    ids=["one module", "one rank", "full rank", "bound below", "bound above", "no gain in one", "tiny gains"],
)  # fmt: skip
def test_spaces_with_little_room(space: HierarchicalSpace, expected: set | None) -> None:
    sampler = rs.PerformanceModelSampler(space, seed=0)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(lambda trial: float(np.log1p(rs.suggest_allocation(trial, space).vector[0])), n_trials=14)
    seen = {tuple(trial.user_attrs["ranks"]) for trial in study.trials} | {sampler.best(study).allocation.vector}
    assert expected is None or seen <= expected
    most = min(space.budget.limit, sum(t.rank_cost * t.full_rank for t in space.targets))
    assert all(rs.RankAllocation(space.targets, ranks).parameters <= most for ranks in seen)


def test_gains_that_are_all_zero_are_refused() -> None:
    space = space_of(2, gains=dict.fromkeys([t.name for t in TARGETS[:2]], np.zeros(16)))
    message = "`gains` must not all be zero; choose targets that the loss depends on, or profile on other data."
    with pytest.raises(SettingsError, match=f"^{message}$"):
        rs.PerformanceModelSampler(space)


def test_proposals_at_rank_64_follow_the_spectra_beyond_the_sketch() -> None:
    """The sketch holds 16 of 160 singular values; the metric asks for ranks in the last module."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(160, 160) for _ in range(4)))
    batches = [torch.randn(64, 160) for _ in range(6)]
    profile = rs.profile(model, batches, loss_fn=lambda m, x: m(x).square().mean(), sketch_size=16)
    budget = rs.ParameterBudget.uniform(profile.targets, 64)
    space = make_space(profile, profile.targets, budget)
    assert all(len(gains) == 160 and gains[60] > gains[150] > 0.0 for gains in space.gains.values())
    features = rank_features(space.targets, budget, gains=space.gains)
    assert (np.diff(features.curves["energy"]) > 0).all()  # every rank counts, up to full rank
    sampler = rs.PerformanceModelSampler(space, seed=0)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(lambda trial: float(np.log1p(rs.suggest_allocation(trial, space).vector[3])), n_trials=20)
    one_shot = rs.allocate("one-shot", targets=profile.targets, budget=budget, profile=profile)
    assert space.allocation(space.point(tau=1.0)) == one_shot
    assert len(set(one_shot.vector)) > 1
    drawn = [trial.user_attrs["ranks"] for trial in study.trials[8:]]
    assert sum(ranks[3] > 64 for ranks in drawn) >= 10  # a draw in which nothing helps is uniform
    assert max(ranks[3] for ranks in drawn) > 128
    assert sampler.best(study).allocation.vector[3] == max(sampler.best(study).allocation.vector)


# --- budgets are searched as well ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["performance-model", "tpe"])
def test_a_search_over_budgets_tries_all_sizes(sampler: str) -> None:
    space = space_of(
        12,
        budget=rs.ParameterBudget.uniform(TARGETS, 4, search=True),
        gains={t.name: 1.0 / np.arange(1, 17) for t in TARGETS},
    )
    assert space.tilts[1] == ("log2 of budget share", -4.0, 0.0)
    assert space.allocation(space.point(tau=0.0)).vector == (4,) * 12
    assert space.allocation(space.point(tau=1.0) | {"log2 of budget share": -2.0}).parameters == BUDGET.limit // 4
    study = optuna.create_study(direction="maximize", sampler=make_sampler(sampler, space, 0))
    study.optimize(lambda trial: worth(rs.suggest_allocation(trial, space)), n_trials=40)
    sizes = np.array([sum(trial.user_attrs["ranks"]) for trial in study.trials])
    assert sizes.max() <= 48
    assert (sizes <= 12).sum() >= 5
    assert (sizes > 24).sum() >= 5
    if sampler == "performance-model":
        full, quarter = (study.sampler.best(study, share).allocation for share in (1.0, 0.25))
        assert (full.parameters, quarter.parameters) == (BUDGET.limit, BUDGET.limit // 4)
        even = space.allocation(space.point(tau=0.0) | {"log2 of budget share": -2.0})
        assert worth(full) > worth(quarter) > worth(even)
        assert -2.6 < study.trials[-1].params["log2 of budget share"] - math.log2(sizes[-1] / 48) < 0.1


def test_a_search_over_budgets_keeps_to_the_least_ranks() -> None:
    gains = {t.name: 1.0 / np.arange(1, 17) for t in TARGETS[:3]}
    space = space_of(
        3, budget=rs.ParameterBudget.uniform(TARGETS[:3], 4, search=True), gains=gains, limits=RankLimits(min_rank=2)
    )
    assert space.tilts[1] == ("log2 of budget share", -1.0, 0.0)
    assert space.allocation(space.point(tau=1.0) | {"log2 of budget share": -4.0}).vector == (2, 2, 2)


# --- an allocation of a trial ----------------------------------------------------------------------------------------


def test_a_finished_or_fixed_trial_gives_its_allocation_again() -> None:
    study = optuna.create_study(direction="maximize", sampler=rs.PerformanceModelSampler(SPACE, seed=0))
    study.optimize(objective, n_trials=12)
    for trial in study.trials:
        assert list(rs.suggest_allocation(trial, SPACE).vector) == trial.user_attrs["ranks"]
    fixed = optuna.trial.FixedTrial(SPACE.point(tau=0.0))
    assert set(rs.suggest_allocation(fixed, SPACE).vector) == {4}


@pytest.mark.parametrize(
    ("ranks", "error", "message"),
    [
        ([9] * 12, SettingsError,
         "the trial's ranks must keep within the budget of 1,536 parameters, but take 3,456; queue lower ones."),
        (7, SettingsError, "`vector` must hold one rank for each of the 12 targets, but holds 1."),
        ([1] * 5, SettingsError, "`vector` must hold one rank for each of the 12 targets, but holds 5."),
    ],
)  # fmt: skip
def test_queued_ranks_are_checked(ranks: object, error: type, message: str) -> None:
    study = optuna.create_study(direction="maximize", sampler=rs.PerformanceModelSampler(SPACE, seed=0))
    study.enqueue_trial({}, user_attrs={"ranks": ranks})
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        rs.suggest_allocation(study.ask(), SPACE)


def test_proposals_keep_the_bounds_of_towers() -> None:
    """Vision pays most, and gets what it may; a queued allocation that gives it more is named."""
    towers = ["vision" if t.block is not None and t.block < 2 else "language" for t in TARGETS]
    targets = tuple(replace(t, tower=tower) for t, tower in zip(TARGETS, towers, strict=True))
    budget = rs.ParameterBudget.uniform(targets, 4, towers={"vision": 0.25, "language": {"at_least": 0.5}})
    space = HierarchicalSpace(
        targets=targets,
        gains={t.name: 1.0 / np.arange(1, 17) for t in targets},
        budget=budget,
        groups=group_by_depth(targets),
    )
    vision = np.array([tower == "vision" for tower in towers])
    study = optuna.create_study(direction="maximize", sampler=rs.PerformanceModelSampler(space, seed=0))
    study.optimize(lambda trial: float(np.log1p(rs.suggest_allocation(trial, space).vector) @ vision), n_trials=20)
    for trial in study.trials:
        budget.require(rs.RankAllocation(targets, tuple(trial.user_attrs["ranks"])), "the trial's ranks")
        assert all(tilt.low <= trial.params[tilt.name] <= tilt.high for tilt in space.tilts)
    best = rs.RankAllocation(targets, tuple(study.best_trial.user_attrs["ranks"]))
    assert best.parameters_by_tower["vision"] == budget.bounds["vision"][1]
    study.enqueue_trial({}, user_attrs={"ranks": [5 * int(mine) for mine in vision]})
    message = (
        r"^the trial's ranks must give tower `vision` 0 to [\d,]+ parameters, but give it [\d,]+; change its ranks, or"
    )
    with pytest.raises(SettingsError, match=message):
        study.optimize(lambda trial: float(rs.suggest_allocation(trial, space).parameters), n_trials=1)
