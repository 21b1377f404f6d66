"""Features, the performance model and its validation, on landscapes whose truth is known."""

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

import rankscope as rs
from rankscope.budget import allocate_marginal
from rankscope.errors import SettingsError
from rankscope.performance import PerformanceModel, RankFeatures, prior_gains, rank_features, validate
from rankscope.searching.space import group_by_depth
from rankscope.targets import TargetModule

ROLES = ("q_proj", "v_proj", "fc1")
TARGETS = tuple(
    TargetModule(name=f"h.{i}.{role}", in_features=16, out_features=32 if role == "fc1" else 16, block=i, role=role)
    for i in range(4)
    for role in ROLES
)
BUDGET = rs.ParameterBudget.uniform(TARGETS, 4)
WORTH = np.array([3.0 if t.role == "fc1" else 1.0 for t in TARGETS]) * np.linspace(2.0, 0.5, len(TARGETS))


def worth(ranks: np.ndarray) -> np.ndarray:
    return np.log1p(ranks) @ WORTH


@pytest.fixture(scope="module")
def features() -> RankFeatures:
    return rank_features(TARGETS, BUDGET)


@pytest.fixture(scope="module")
def ranks() -> np.ndarray:
    return np.array([rs.allocate("random", targets=TARGETS, budget=BUDGET, seed=s).vector for s in range(120)])


@pytest.fixture(scope="module")
def model(features: RankFeatures, ranks: np.ndarray) -> PerformanceModel:
    noise = np.random.default_rng(0).normal(0.0, 0.1, len(ranks))
    return PerformanceModel(features).fit(ranks, worth(ranks) + noise)


def test_features_are_differences_to_uniform(features: RankFeatures) -> None:
    assert set(features.levels) == {"model", "block", "role", "module"}  # there is one tower, and no groups are given
    uniform = rs.allocate("uniform", targets=TARGETS, budget=BUDGET).vector
    assert not features.transform([uniform]).any()
    more = list(uniform)
    more[2] += 1  # h.0.fc1
    changed = dict(zip(features.names, features.transform([more])[0], strict=True))
    step = (np.log(6) - np.log(5)) * 48 / np.mean([t.rank_cost for t in TARGETS])
    for name in ("model/all", "block/model/0", "role/fc1", "module/h.0.fc1"):
        assert changed.pop(name) == pytest.approx(step)
    assert not any(changed.values())


def test_labels_are_blocks_in_words() -> None:
    """The names that studies keep stay: `group/model/0`, `block/model/0`."""
    features = rs.rank_features(TARGETS, BUDGET, groups=group_by_depth(TARGETS, 2))
    labels = dict(zip(features.names, features.labels, strict=True))
    assert (labels["group/model/0"], labels["group/model/1"]) == ("blocks 0-1", "blocks 2-3")
    assert [labels[f"block/model/{block}"] for block in range(4)] == ["block 0", "block 1", "block 2", "block 3"]
    assert (labels["role/fc1"], labels["module/h.0.fc1"], labels["model/all"]) == ("fc1", "h.0.fc1", "all")


def test_labels_tell_towers_and_a_users_groups_apart() -> None:
    towers = [replace(t, name=f"{tower}.{t.name}", tower=tower) for tower in ("vision", "language") for t in TARGETS]
    features = rs.rank_features(towers, BUDGET, groups=group_by_depth(towers, 1))
    assert {"vision block 0", "language block 0"} < set(features.labels)
    own = {t.name: "mlp" if t.role.startswith("fc") else "attention" for t in TARGETS}
    features = rs.rank_features(TARGETS, BUDGET, groups=own)
    assert [label for level, label in zip(features.levels, features.labels, strict=True) if level == "group"] == list(
        dict.fromkeys(own.values())
    )


def test_features_are_those_of_the_dense_weights(features: RankFeatures, ranks: np.ndarray) -> None:
    """Against the definition, with a row of n weights for each feature: x_f = sum_i W[f, i] h(i, r_i)."""
    members = {
        "model": lambda t: "all",
        "block": lambda t: f"model/{t.block}",
        "role": lambda t: t.role,
        "module": lambda t: t.name,
    }
    costs = np.array([t.rank_cost for t in TARGETS])
    dense = np.array(
        [
            [c * (members[level](t) == key) for t, c in zip(TARGETS, costs / costs.mean(), strict=True)]
            for level, _, key in (name.partition("/") for name in features.names)
        ]
    )
    assert (features.weights.toarray() == dense).all()
    assert features.weights.nnz == 4 * len(TARGETS)  # a level of one module a feature adds n, not n ** 2
    log = np.log1p(ranks) - np.log1p(features.reference)
    assert features.transform(ranks) == pytest.approx(log @ dense.T, rel=1e-12, abs=1e-12)
    beta = np.random.default_rng(0).gamma(1.0, size=len(dense))
    gains = features.gains(beta)
    steps = np.diff(np.log1p(np.arange(17)))  # falling, and all weights are positive
    for target, weight in zip(TARGETS, beta @ dense, strict=True):
        assert gains[target.name] == pytest.approx(weight * steps, rel=1e-12)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_gains_add_up_to_the_linear_models_value(seed: int) -> None:
    features = rank_features(TARGETS, BUDGET)
    rng = np.random.default_rng(seed)
    coefficients = rng.uniform(0.0, 1.0, len(features.names))  # none negative: nothing is clipped
    gains = features.gains(coefficients)
    ranks = rng.integers(0, 10, len(TARGETS))
    value = sum(gains[t.name][:r].sum() for t, r in zip(TARGETS, ranks, strict=True))
    reference = sum(gains[t.name][:r].sum() for t, r in zip(TARGETS, features.reference, strict=True))
    assert (features.transform([ranks]) @ coefficients)[0] == pytest.approx(value - reference)
    assert all((np.diff(values) <= 1e-12).all() for values in gains.values())


def test_equal_coefficients_give_uniform_ranks(features: RankFeatures) -> None:
    gains = features.gains([1.0 if level == "model" else 0.0 for level in features.levels])
    assert set(allocate_marginal(TARGETS, gains, BUDGET).vector) == {4}


def test_profile_terms_follow_the_spectrum(digits_profile: rs.Profile, digits_budget: rs.ParameterBudget) -> None:
    targets = digits_profile.targets
    features = rank_features(targets, digits_budget, gains=prior_gains(digits_profile.spectra(), targets))
    for term, options in (("norm", {}), ("energy", {"power": 2.0, "depth": 2.0})):  # the squares
        gains = features.gains([name == f"profile/{term}" for name in features.names])
        solved = allocate_marginal(targets, gains, digits_budget)
        assert solved == rs.allocate(
            "one-shot", targets=targets, budget=digits_budget, profile=digits_profile, **options
        )


def test_it_ranks_allocations_it_has_not_seen(model: PerformanceModel) -> None:
    new = np.array([rs.allocate("random", targets=TARGETS, budget=BUDGET, seed=s).vector for s in range(500, 600)])
    assert model.score(new, worth(new)) > 0.95


def test_water_filling_on_its_utilities_is_nearly_optimal(model: PerformanceModel) -> None:
    uniform = worth(np.array([rs.allocate("uniform", targets=TARGETS, budget=BUDGET).vector]))[0]
    truth = {t.name: w * np.diff(np.log1p(np.arange(17.0))) for t, w in zip(TARGETS, WORTH, strict=True)}
    best = worth(np.array([allocate_marginal(TARGETS, truth, BUDGET).vector]))[0]
    mine = worth(np.array([allocate_marginal(TARGETS, model.utilities(), BUDGET).vector]))[0]
    assert (mine - uniform) / (best - uniform) > 0.9


def test_draws_scatter_around_the_mean(model: PerformanceModel) -> None:
    rng = np.random.default_rng(0)
    draws = np.array([[model.sample(rng)[0][t.name][0] for t in TARGETS] for _ in range(200)])
    mean = np.array([model.utilities()[t.name][0] for t in TARGETS])
    assert (draws.std(axis=0) > 0).all()
    np.testing.assert_allclose(draws.mean(axis=0), mean, atol=4 * draws.std(axis=0).max() / np.sqrt(200))


def test_intervals_hold_the_truth_as_often_as_they_say(features: RankFeatures, ranks: np.ndarray) -> None:
    inside = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        train = rng.permutation(len(ranks))[:40]
        test = np.setdiff1d(np.arange(len(ranks)), train)
        noisy = worth(ranks) + rng.normal(0.0, 1.0, len(ranks))
        low, high = PerformanceModel(features).fit(ranks[train], noisy[train]).interval(ranks[test], 0.8, repeats=1)
        inside.append(((low <= noisy[test]) & (noisy[test] <= high)).mean())
    assert 0.7 < np.mean(inside) < 0.9


def test_updates_end_where_one_fit_ends(features: RankFeatures, ranks: np.ndarray) -> None:
    y = worth(ranks)
    whole = PerformanceModel(features).fit(ranks, y)
    steps = PerformanceModel(features)
    for part in np.array_split(np.arange(120), 12):
        steps.update(ranks[part], y[part])
    assert steps.score(ranks, y) == pytest.approx(whole.score(ranks, y), abs=0.02)
    assert np.corrcoef(steps.predict(ranks), whole.predict(ranks))[0, 1] > 0.99


def test_conditions_get_offsets(features: RankFeatures, ranks: np.ndarray) -> None:
    rates = [0.01 if i % 2 else 0.001 for i in range(len(ranks))]
    y = worth(ranks) + np.array([5.0 if rate == 0.01 else 0.0 for rate in rates])
    model = PerformanceModel(features).fit(ranks, y, conditions=rates)
    assert model.best_condition == 0.01
    assert model.score(ranks[::2], y[::2]) > 0.95


def test_validation_tells_a_good_model_from_noise(features: RankFeatures, ranks: np.ndarray) -> None:
    good = validate(PerformanceModel(features), ranks, worth(ranks), noise_variance=0.0)
    assert good is not None
    assert good.kendall > 0.8
    assert good.explained > 0.8
    assert good.explained_by_profile is None
    assert good.ceiling == 1.0
    assert good.trustworthy
    noise = np.random.default_rng(1).normal(size=len(ranks))
    bad = validate(PerformanceModel(features), ranks, noise)
    assert bad is not None
    assert abs(bad.kendall) < 0.2
    assert bad.explained < 0.1
    assert validate(PerformanceModel(features), ranks[:5], worth(ranks[:5])) is None
    assert validate(PerformanceModel(features), ranks, np.ones(len(ranks))) is None


def test_validation_compares_with_a_regression_on_the_profile_alone(ranks: np.ndarray) -> None:
    true = {t.name: w / np.arange(1.0, t.full_rank + 1.0) ** 2 for t, w in zip(TARGETS, WORTH, strict=True)}
    reversed_ = dict(zip(true, reversed(true.values()), strict=True))
    noise = np.random.default_rng(0).normal(0.0, 0.5, len(ranks))
    for gains, beaten in ((true, False), (reversed_, True)):
        model = PerformanceModel(rank_features(TARGETS, BUDGET, gains=gains))
        value = model.features.transform(ranks)[:, model.features.names.index("profile/norm")]
        scores = validate(model, ranks, (worth(ranks) if beaten else 3.0 * value) + noise)
        assert scores is not None
        assert scores.explained_by_profile is not None
        assert (scores.explained > scores.explained_by_profile) == scores.trustworthy == beaten


def test_validation_sets_aside_what_conditions_do(features: RankFeatures, ranks: np.ndarray) -> None:
    rates = [0.1 if i % 2 else 0.2 for i in range(len(ranks))]
    shifted = worth(ranks) + np.where(np.array(rates) == 0.1, 20.0, 0.0)
    scores = validate(PerformanceModel(features), ranks, shifted, conditions=rates)
    assert scores is not None
    assert scores.explained > 0.8
    assert scores.coverage is None


def test_weighing_draws_towards_new_measurements_as_far_as_they_tell(
    model: PerformanceModel, ranks: np.ndarray
) -> None:
    chosen = ranks[:4]
    metric = model.predict(chosen)
    before = metric - metric[1]

    def after(retests: np.ndarray | None, repeats: float = 1.0) -> np.ndarray:
        return model.posterior_differences(chosen, 1, retests=retests, repeats=repeats)

    np.testing.assert_allclose(after(None)[:, 0], before)
    np.testing.assert_allclose(after(metric, 2)[:, 0], before, atol=0.02)
    np.testing.assert_allclose(after(metric + 3.0, 2)[:, 0], before, atol=0.3)  # a common shift says nothing
    little, much = (after(metric + np.array([0.5, 0.0, 0.0, -0.5]), n)[:, 0] - before for n in (1, 1e6))
    assert 0 < little[0] < much[0]
    np.testing.assert_allclose(much, [0.5, 0.0, 0.0, -0.5], atol=0.1)
    partly = after(np.array([metric[0] + 0.5, metric[1], np.nan, np.nan]), 1e6)
    assert partly[0, 0] - before[0] == pytest.approx(0.5, abs=0.1)
    mean, low, high = after(metric, 2).T
    assert (low[[0, 2, 3]] < mean[[0, 2, 3]]).all()
    assert (mean[[0, 2, 3]] < high[[0, 2, 3]]).all()
    assert (high - low)[1] == 0.0
    assert (
        high - low < np.diff(after(None)[:, 1:], axis=1).ravel() + 1e-12
    ).all()  # what is measured again is known better


WHOLE = "`ranks` must be whole numbers from 0 on, without NaN or inf, but hold {}; correct them."
WEIGHTS = "`sample_weight` must be finite and not negative, but holds {}."
OK_RANKS, OK_Y = [[4] * 12, [5] * 12, [3] * 12], [0.5, 0.6, 0.4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": [[4] * 12], "y": [0.5]}, "`y` must hold at least 2 metrics, but holds 1 sample; run more trials."),
        ({"ranks": np.zeros((0, 12)), "y": []}, "`y` must hold at least 2 metrics, but holds 0 samples; run more trials."),
        ({"y": [0.5, np.nan, 0.4]}, "`y` must be finite, but 1 of 3 metrics are not; drop them."),
        ({"y": [0.5, 0.4]}, "`ranks` must have a row for each of 2 metrics, but has 3."),
        ({"y": None}, "PerformanceModel requires y to be passed, but the target y is None; pass metrics."),
        ({"ranks": [[4] * 5] * 3}, "`ranks` must have a column for each of 12 modules, but has shape (3, 5)."),
        ({"ranks": [[[4] * 12]] * 3}, "`ranks` must have a column for each of 12 modules, but has shape (3, 1, 12)."),
        ({"ranks": [[np.nan] + [4] * 11] * 3}, WHOLE.format("nan")),
        ({"ranks": [[np.inf] + [4] * 11] * 3}, WHOLE.format("inf")),
        ({"ranks": [[-1] + [4] * 11] * 3}, WHOLE.format("-1")),
        ({"ranks": [[1.9] + [4] * 11] * 3}, WHOLE.format("1.9")),
        ({"ranks": [["many"] * 12] * 3}, "`ranks` must be a dense array of real numbers, but: could not convert string to float: 'many'."),
        ({"ranks": csr_array(OK_RANKS)}, "`ranks` must be a dense array of real numbers, but: a sparse matrix."),
        ({"sample_weight": [1.0, 2.0]}, "`sample_weight` must hold a weight for each of 3 metrics, but has shape (2,)."),
        ({"sample_weight": [1.0, np.nan, 1.0]}, WEIGHTS.format("nan")),
        ({"sample_weight": [1.0, -1.0, 1.0]}, WEIGHTS.format("-1")),
        ({"sample_weight": [0, 0, 0]}, "`sample_weight` must not be zero for every observation, but is; weigh some."),
        ({"conditions": [0.1]}, "`conditions` must hold one for each of 3 metrics, but hold 1."),
    ],
)  # fmt: skip
def test_bad_observations(features: RankFeatures, change: dict, message: str) -> None:
    arguments = {"ranks": OK_RANKS, "y": OK_Y, **change}
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
        PerformanceModel(features).fit(**arguments)
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
        PerformanceModel(features).update(**arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.predict([[-1] * 12]), WHOLE.format("-1")),
        (lambda m: m.interval(OK_RANKS, 1.0), "`confidence` must lie between 0 and 1, but is 1."),
        (lambda m: m.interval(OK_RANKS, repeats=0), "`repeats` must be above 0, but is 0."),
        (lambda m: m.posterior_differences(OK_RANKS, retests=OK_Y, repeats=-1), "`repeats` must be above 0, but is -1."),
        (lambda m: m.posterior_differences(OK_RANKS, retests=[0.5, np.inf, 0.4]), "`retests` must hold 3 metrics, one for each allocation, but does not."),
        (lambda m: m.posterior_differences(OK_RANKS, retests=[0.5]), "`retests` must hold 3 metrics, one for each allocation, but does not."),
    ],
)  # fmt: skip
def test_bad_questions(model: PerformanceModel, call: Callable, message: str) -> None:
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
        call(model)


def test_a_constant_metric_is_predicted(features: RankFeatures, ranks: np.ndarray) -> None:
    constant = PerformanceModel(features).fit(ranks[:9], np.full(9, 0.7))
    np.testing.assert_allclose(constant.predict(ranks[:3]), 0.7)


@pytest.mark.parametrize("n_seeds", [2, 5])
def test_the_mean_of_several_runs_has_less_noise_and_the_same_posterior(
    features: RankFeatures, ranks: np.ndarray, n_seeds: int
) -> None:
    y = worth(ranks) + np.random.default_rng(0).normal(0.0, 1.0, len(ranks))
    single, several = (PerformanceModel(features).fit(ranks, y, sample_weight=n) for n in (1, n_seeds))
    noise = [model.regressor_.variances_["noise"] for model in (single, several)]
    assert noise[1] == pytest.approx(n_seeds * noise[0], rel=1e-3)
    np.testing.assert_allclose(several.predict(ranks), single.predict(ranks), rtol=1e-3)
    fresh = single.predict(ranks[:4]) + np.array([3.0, 0.0, 0.0, -3.0])
    np.testing.assert_allclose(
        several.posterior_differences(ranks[:4], retests=fresh, repeats=n_seeds),
        single.posterior_differences(ranks[:4], retests=fresh),
        rtol=1e-3,
    )  # as many fresh runs weigh as much as one trial


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        ((), {}, "`targets` must hold at least one target module, but is empty; find others."),
        (TARGETS, {"gains": {}}, "`gains` must hold every target module, but lacks `h.0.q_proj`."),
        (TARGETS, {"groups": {"h.0.q_proj": "a"}}, "`groups` must hold every target module, but lacks `h.0.v_proj`."),
        (TARGETS, {"gains": {t.name: [1.0, np.nan] for t in TARGETS}},
         "`gains` of `h.0.q_proj` must be finite and not negative; take the profile again."),
    ],
)  # fmt: skip
def test_features_of_bad_input(targets: tuple, options: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
        rank_features(targets, BUDGET, **options)


def test_ranks_count_up_to_full_rank_in_all_but_very_large_models() -> None:
    wide = [rs.TargetModule(name=f"h.{i}", in_features=4096, out_features=4096, block=i) for i in range(4)]
    found = rank_features(wide, rs.ParameterBudget.uniform(wide, 1024))
    assert found.curves["log"].shape == (4, 4097)
