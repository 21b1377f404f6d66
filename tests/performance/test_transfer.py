"""The prior that earlier studies give: what it recovers, how it widens, and that it cannot do much harm."""

import re

import numpy as np
import pytest

import rankscope as rs
from rankscope.exceptions import PerformanceModelError
from rankscope.performance import EarlierStudy, PerformanceModel, RankFeatures, learn_prior, rank_features
from rankscope.performance.transfer import transferable
from rankscope.space import group_by_depth
from rankscope.targets import TargetModule

ROLES = ("q_proj", "v_proj", "fc1")
WORTH = {"role/q_proj": -0.4, "role/v_proj": 0.0, "role/fc1": 0.6, "group/model/0": 0.3, "profile/norm": 0.5}


def features_of(n_blocks: int, width: int = 16, roles: tuple[str, ...] = ROLES, seed: int = 0) -> RankFeatures:
    """A model of so many blocks, whose modules differ in gradient energy."""
    targets = tuple(
        TargetModule(name=f"h.{i}.{role}", in_features=width, out_features=width, block=i, role=role)
        for i in range(n_blocks)
        for role in roles
    )
    energies = np.random.default_rng(seed).lognormal(size=len(targets))
    return rank_features(
        targets,
        rs.ParameterBudget.uniform(targets, 4),
        gains={t.name: e / np.arange(1, width + 1) ** 2 for t, e in zip(targets, energies, strict=True)},
        groups=group_by_depth(targets),
    )


def ranks_of(features: RankFeatures, n: int, seed: int = 0) -> np.ndarray:
    budget = rs.ParameterBudget.uniform(features.targets, 4)
    return np.array(
        [rs.allocate("random", targets=features.targets, budget=budget, seed=1000 * seed + s).vector for s in range(n)]
    )


def study(
    seed: int,
    worth: dict[str, float] = WORTH,
    *,
    n: int = 60,
    noise: float = 0.3,
    scatter: float = 0.0,
    **model: object,
) -> EarlierStudy:
    """Trials whose metric is what the model says: coefficients in shared units, a scatter of its own, and noise."""
    features = features_of(**{"n_blocks": 4 + seed % 3, "width": 16 + 4 * (seed % 2), "seed": seed, **model})
    rng = np.random.default_rng(seed)
    unit, ranks = features.unit, ranks_of(features, n, seed)
    truth = np.array([worth.get(name, 0.0) for name in features.names])
    truth += rng.normal(0.0, scatter, len(truth)) * transferable(features)
    value = features.transform(ranks) @ np.divide(truth, unit, out=np.zeros_like(unit), where=unit > 0)
    metric = 0.7 + 0.02 * (1 + seed) * (value + rng.normal(0.0, noise, n))  # of another scale in each study
    return EarlierStudy(
        name=f"s{seed}", task=f"s{seed}", features=features, ranks=ranks, metric=metric, conditions=[None] * n
    )


def test_it_recovers_what_studies_have_in_common() -> None:
    prior = learn_prior([study(seed) for seed in range(6)])
    names = sorted(WORTH)
    found, truth = np.array([prior.means[n] for n in names]), np.array([WORTH[n] for n in names])
    found, truth = found / np.linalg.norm(found), truth / np.linalg.norm(truth)  # a metric's scale is not transferred
    assert found @ truth > 0.9
    assert prior.means["role/fc1"] > 2 * prior.deviations["role/fc1"]
    assert prior.means["role/q_proj"] < -2 * prior.deviations["role/q_proj"]


def test_it_ranks_allocations_of_a_model_and_task_never_seen() -> None:
    prior = learn_prior([study(seed) for seed in range(6)])
    new = study(7, n_blocks=8, width=24, noise=0.0)
    predicted = prior.predict(new.features, new.ranks)
    assert np.corrcoef(predicted, new.metric)[0, 1] > 0.85
    profile = new.features.transform(new.ranks)[:, new.features.names.index("profile/norm")]
    assert np.corrcoef(predicted, new.metric)[0, 1] > np.corrcoef(profile, new.metric)[0, 1] + 0.1


def test_one_study_is_believed_half_and_many_in_full() -> None:
    one, many = learn_prior([study(0)]), learn_prior([study(seed) for seed in range(6)])
    assert 0.2 < one.means["role/fc1"] / many.means["role/fc1"] < 0.9
    assert one.deviations["role/fc1"] > 2 * many.deviations["role/fc1"]


def test_studies_that_differ_widen_the_prior() -> None:
    alike = learn_prior([study(seed) for seed in range(5)])
    different = learn_prior([study(seed, scatter=0.5) for seed in range(5)])
    for name in ("role/q_proj", "role/v_proj", "role/fc1"):
        assert different.deviations[name] > 1.5 * alike.deviations[name]


def test_studies_of_one_task_are_no_more_than_one_task() -> None:
    copies = [study(seed) for seed in range(4)]
    same = [
        EarlierStudy(
            name=c.name, task="t", features=c.features, ranks=c.ranks, metric=c.metric, conditions=c.conditions
        )
        for c in copies
    ]
    assert learn_prior(same).deviations["role/fc1"] > 1.5 * learn_prior(copies).deviations["role/fc1"]


def test_the_order_of_studies_does_not_matter() -> None:
    studies = [study(seed, n=30) for seed in range(3)]
    forth, back = learn_prior(studies), learn_prior(studies[::-1])
    assert forth.means == pytest.approx(back.means, abs=1e-3)
    assert forth.deviations == pytest.approx(back.deviations, rel=1e-2)


def test_an_offset_of_each_learning_rate_is_no_effect_of_the_ranks() -> None:
    plain = study(0)
    rates = [0.01 if i % 2 else 0.001 for i in range(60)]
    shifted = EarlierStudy(
        name="s0", task="s0", features=plain.features, ranks=plain.ranks,
        metric=plain.metric + np.where(np.array(rates) == 0.01, 0.05, 0.0), conditions=rates,
    )  # fmt: skip
    first, second = learn_prior([plain]), learn_prior([shifted])
    assert np.sign(second.means["role/fc1"]) == np.sign(first.means["role/fc1"]) == 1
    assert second.means["role/q_proj"] < 0


def test_unknown_roles_and_groups_that_are_no_thirds_get_nothing() -> None:
    prior = learn_prior([study(seed) for seed in range(2)])
    features = features_of(4, roles=("q_proj", "gate_proj"))
    means, deviations = prior.coefficients(features)
    known = {name for name, mean in zip(features.names, means, strict=True) if np.isfinite(mean)}
    assert known == {
        "model/all", "group/model/0", "group/model/1", "group/model/2", "role/q_proj", "profile/energy", "profile/norm",
    }  # fmt: skip
    assert (np.isfinite(means) == np.isfinite(deviations)).all()
    shuffled = {
        t.name: f"model/{2 - int(key[-1])}"
        for t in features.targets
        for key in [group_by_depth(features.targets)[t.name]]
    }
    regrouped = rank_features(features.targets, rs.ParameterBudget.uniform(features.targets, 4), groups=shuffled)
    means, _ = prior.coefficients(regrouped)
    named = {name for name, mean in zip(regrouped.names, means, strict=True) if np.isfinite(mean)}
    assert named == {"model/all", "group/model/1", "role/q_proj"}  # the middle third is where it was


@pytest.mark.parametrize("seed", range(3))
def test_an_unrelated_prior_moves_predictions_by_less_than_their_uncertainty(seed: int) -> None:
    opposite = {name: -value for name, value in WORTH.items()}
    prior = learn_prior([study(10 + seed, opposite)])
    new = study(seed, n=140)
    train, test = slice(0, 40), slice(40, None)
    plain = PerformanceModel(new.features).fit(new.ranks[train], new.metric[train])
    warm = PerformanceModel(new.features, prior=prior).fit(new.ranks[train], new.metric[train])
    mean, deviation = plain.predict(new.ranks[test], return_std=True)
    moved = np.abs(warm.predict(new.ranks[test]) - mean)
    assert (moved <= 2.0 * deviation).mean() > 0.95
    assert warm.score(new.ranks[test], new.metric[test]) > plain.score(new.ranks[test], new.metric[test]) - 0.05


def test_a_fitting_prior_helps_when_trials_are_few() -> None:
    prior = learn_prior([study(seed) for seed in range(6)])
    plain, warm = [], []
    for seed in range(20, 26):
        new = study(seed, n=108)
        for scores, given in ((plain, None), (warm, prior)):
            model = PerformanceModel(new.features, prior=given).fit(new.ranks[:8], new.metric[:8])
            scores.append(model.score(new.ranks[8:], new.metric[8:]))
    assert np.mean(warm) > np.mean(plain) + 0.1


def test_bad_input() -> None:
    few, flat = study(0, n=9), study(1)
    flat = EarlierStudy(
        name="s1",
        task="s1",
        features=flat.features,
        ranks=flat.ranks,
        metric=np.full(60, 0.7),
        conditions=flat.conditions,
    )
    for studies, message in (
        ([], "a warm start needs at least one earlier study, but got none; name one."),
        ([few], "study `s0` must hold at least 10 completed trials for a warm start, but holds 9; run more of it, or leave it out."),
        ([flat], "study `s1` must have metrics that differ for a warm start, but all 60 are 0.7; leave it out."),
    ):  # fmt: skip
        with pytest.raises(PerformanceModelError, match=f"^{re.escape(message)}$"):
            learn_prior(studies)
