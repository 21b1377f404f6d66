"""Warm starts between studies in databases: what a study stores, what a later one makes of it, and bad sources."""

import json
import re
from pathlib import Path

import numpy as np
import optuna
import pytest

import rankscope as rs
from rankscope.exceptions import PerformanceModelError, StudyError
from rankscope.performance import rank_features
from rankscope.searching import search
from rankscope.searching.study import STUDY_KEY
from rankscope.searching.warm_start import PRIOR_KEY, SPACE_KEY, describe_space, read_earlier
from rankscope.space import HierarchicalSpace, group_by_depth
from rankscope.tasks import Task

SHORT = rs.TrainingConfig(steps=4, learning_rate=0.01)
optuna.logging.set_verbosity(optuna.logging.WARNING)


def run(digits: Task, profile: rs.Profile, rank: int, storage: str | None, **options) -> rs.SearchResult:
    budget = rs.ParameterBudget.uniform(profile.targets, rank)
    arguments = {"n_trials": 4, "training": SHORT, "confirm_fraction": 0.0, "study_name": "later", **options}
    return search(digits, budget=budget, profile=profile, storage=storage, **arguments)


@pytest.fixture(scope="module")
def earlier(digits: Task, digits_profile: rs.Profile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with a search under twice the budget, at two learning rates."""
    path = tmp_path_factory.mktemp("earlier") / "earlier.db"
    run(digits, digits_profile, 2, f"sqlite:///{path}", study_name="earlier", n_trials=12, learning_rates=[0.005, 0.01])
    return path


def test_a_study_describes_itself(earlier: Path, digits_profile: rs.Profile) -> None:
    (found,) = read_earlier(earlier)
    targets = digits_profile.targets
    expected = rank_features(
        targets,
        rs.ParameterBudget.uniform(targets, 2),
        gains={name: values**2 for name, values in digits_profile.spectra().items()},
        groups=group_by_depth(targets),
    )
    assert (found.name, found.task) == ("earlier", "digits-shift")
    assert found.features.targets == targets
    np.testing.assert_allclose(
        found.features.transform(found.ranks), expected.transform(found.ranks), rtol=2e-3, atol=2e-3
    )
    assert found.ranks[0].tolist() == [2] * 36
    assert set(found.conditions) == {0.005, 0.01}
    assert found.metric.shape == (12,)


def test_the_description_is_compact(digits_profile: rs.Profile) -> None:
    space = HierarchicalSpace(
        targets=digits_profile.targets,
        gains={name: values**2 for name, values in digits_profile.spectra().items()},
        budget=rs.ParameterBudget.uniform(digits_profile.targets, 1),
        groups=group_by_depth(digits_profile.targets),
    )
    assert len(json.dumps(describe_space(space))) < 1000 * len(digits_profile.targets)


def test_a_warm_started_search_proposes_from_the_third_trial_on_and_keeps_its_prior(
    earlier: Path, digits: Task, digits_profile: rs.Profile, tmp_path: Path
) -> None:
    storage = f"sqlite:///{tmp_path}/later.db"
    (tmp_path / "copy.db").write_bytes(earlier.read_bytes())
    first = run(digits, digits_profile, 1, storage, warm_start=[tmp_path / "copy.db"])
    assert first.prior is not None
    assert first.prior.studies == (("earlier", 12),)
    assert str(first.prior) == "12 trials of earlier studies (earlier: 12)"
    assert {"profile/norm", "role/fc1", "group/model/0", "model/all"} <= set(first.prior.means)
    assert first.model is not None  # with four trials, when a cold search still explores
    assert first.model.prior == first.prior
    (tmp_path / "copy.db").unlink()
    for sources in ([], [tmp_path / "copy.db"]):
        again = run(digits, digits_profile, 1, storage, n_trials=5, warm_start=sources)
        assert again.prior == first.prior
        assert len(again.trials) == 5


def test_a_cold_search_has_no_prior(digits: Task, digits_profile: rs.Profile) -> None:
    result = run(digits, digits_profile, 1, None)
    assert result.prior is None
    assert result.model is None
    assert PRIOR_KEY not in result.study.user_attrs
    assert SPACE_KEY in result.study.user_attrs


def test_a_study_of_an_earlier_version_describes_itself_when_resumed(
    earlier: Path, digits: Task, digits_profile: rs.Profile, tmp_path: Path
) -> None:
    path = tmp_path / "old.db"
    storage = f"sqlite:///{path}"
    source = optuna.load_study(study_name="earlier", storage=f"sqlite:///{earlier}")
    old = optuna.create_study(storage=storage, study_name="earlier", direction="maximize")
    old.set_user_attr(STUDY_KEY, source.user_attrs[STUDY_KEY])
    old.add_trials(source.trials)
    message = (
        "study `earlier` must describe its modules for a warm start, but is of an earlier version of rankscope; "
        "resume it once, or leave it out."
    )
    with pytest.raises(StudyError, match=f"^{re.escape(message)}$"):
        read_earlier(path)
    run(digits, digits_profile, 2, storage, study_name="earlier", n_trials=12, learning_rates=[0.005, 0.01])
    assert len(read_earlier(path)) == 1


def test_a_database_may_hold_the_search_and_what_it_starts_from(
    earlier: Path, digits: Task, digits_profile: rs.Profile, tmp_path: Path
) -> None:
    path = tmp_path / "both.db"
    path.write_bytes(earlier.read_bytes())
    result = run(digits, digits_profile, 1, f"sqlite:///{path}", n_trials=2, warm_start=[path])
    assert result.prior is not None
    assert [name for name, _ in result.prior.studies] == ["earlier"]


def test_bad_sources_are_one_line(earlier: Path, digits: Task, digits_profile: rs.Profile, tmp_path: Path) -> None:
    missing, empty, broken, other = (tmp_path / f"{name}.db" for name in ("missing", "empty", "broken", "other"))
    optuna.create_study(storage=f"sqlite:///{empty}", study_name="foreign")
    broken.write_text("this is no database, and long enough to be taken for one" * 100)
    other.write_bytes(earlier.read_bytes())
    changed = optuna.load_study(study_name="earlier", storage=f"sqlite:///{other}")
    changed.set_user_attr(SPACE_KEY, {**changed.user_attrs[SPACE_KEY], "schema": 7})
    cases = {
        missing: f"`warm_start` must name databases of earlier studies, but there is no `{missing}`; check the path.",
        empty: f"`warm_start` must name databases of earlier studies, but `{empty}` holds none of rankscope's.",
        broken: f"`warm_start` must name databases that Optuna can open, but `{broken}` is not: "
        "(sqlite3.DatabaseError) file is not a database",
        other: "study `earlier` must have schema 1 for a warm start, but has 7: it is of another version of rankscope; "
        "leave it out, or search again.",
    }
    for source, message in cases.items():
        with pytest.raises(StudyError, match=f"^{re.escape(message)}$"):
            run(digits, digits_profile, 1, None, warm_start=[source])
    assert not missing.exists()
    message = "`warm_start` needs the sampler 'performance-model', but got 'tpe'; drop one of the two, or use another study name."
    with pytest.raises(StudyError, match=f"^{re.escape(message)}$"):
        run(digits, digits_profile, 1, None, warm_start=[earlier], sampler="tpe")


def test_studies_too_short_or_too_flat_are_named(
    earlier: Path, digits: Task, digits_profile: rs.Profile, tmp_path: Path
) -> None:
    short = f"sqlite:///{tmp_path}/short.db"
    run(digits, digits_profile, 1, short, study_name="short", n_trials=2)
    message = "study `short` must hold at least 10 completed trials for a warm start, but holds 2; run more of it, or leave it out."
    with pytest.raises(PerformanceModelError, match=f"^{re.escape(message)}$"):
        run(digits, digits_profile, 1, None, warm_start=[short])
    source = optuna.load_study(study_name="earlier", storage=f"sqlite:///{earlier}")
    flat = optuna.create_study(storage=f"sqlite:///{tmp_path}/flat.db", study_name="flat", direction="maximize")
    for key in (STUDY_KEY, SPACE_KEY):
        flat.set_user_attr(key, source.user_attrs[key])
    flat.add_trials([optuna.trial.create_trial(value=0.5, user_attrs=t.user_attrs) for t in source.trials])
    message = "study `flat` must have metrics that differ for a warm start, but all 12 are 0.5; leave it out."
    with pytest.raises(PerformanceModelError, match=f"^{re.escape(message)}$"):
        run(digits, digits_profile, 1, None, warm_start=[tmp_path / "flat.db"])
