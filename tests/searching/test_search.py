"""The search on the real digits task, with trials of a few steps: pairing, reuse, resumption, and foreign studies."""

import dataclasses
import gc
import re
import weakref
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import pytest
from matplotlib.figure import Figure
from torch import nn

import rankscope as rs
from rankscope.errors import SettingsError, TrainingError
from rankscope.plotting import plot_belief, plot_predictions
from rankscope.searching import search
from rankscope.searching.claims import Claims, Job
from rankscope.searching.confirmation import choose_finalists, recommend
from rankscope.searching.storage import Trial
from rankscope.tasks import Task

SHORT = rs.TrainingSettings(steps=4, learning_rate=0.01)
BOTH_RATES = rs.TrainingSettings(steps=4, learning_rate=[0.005, 0.01])
optuna.logging.set_verbosity(optuna.logging.WARNING)


def run(
    digits: Task, profile: rs.Profile, budget: rs.ParameterBudget, storage: str | None, **options
) -> rs.SearchResult:
    arguments = {"n_trials": 6, "training": SHORT, "confirm_fraction": 0.0, "study_name": "short", **options}
    return search(digits, budget=budget, profile=profile, storage=storage, **arguments)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('study')}/study.db"


@pytest.fixture(scope="module")
def result(
    digits: Task, digits_profile: rs.Profile, digits_budget: rs.ParameterBudget, storage: str
) -> rs.SearchResult:
    return run(
        digits,
        digits_profile,
        digits_budget,
        storage,
        training=BOTH_RATES,
        confirm_fraction=10 / 18,
        n_trials=18,
    )


def test_uniform_and_one_shot_come_first_at_every_rate(
    result: rs.SearchResult, digits_profile: rs.Profile, digits_budget: rs.ParameterBudget
) -> None:
    starts = [(t.origin, t.learning_rate) for t in result.trials[:4]]
    assert starts == [("uniform", 0.005), ("uniform", 0.01), ("one-shot", 0.005), ("one-shot", 0.01)]
    assert {t.origin for t in result.trials[4:]} == {"sampler"}
    assert set(result.trials[0].allocation.vector) == {1}
    expected = rs.allocate("one-shot", targets=result.targets, budget=digits_budget, profile=digits_profile)
    assert result.trials[2].allocation == expected


def test_each_trial_stores_what_it_did(result: rs.SearchResult) -> None:
    for trial in result.trials:
        assert trial.allocation.parameters <= 6_912
        assert 6_912 - trial.allocation.parameters < 128  # the cheapest rank
        assert set(trial.metrics_by_seed) == {"0"}
        assert trial.metric == trial.metrics_by_seed["0"] == result.study.trials[trial.number].value
        assert (trial.wall_seconds > 0) == (trial.reused is None)
    best_uniform = max(result.trials[:2], key=lambda t: t.metric)
    for trial in result.trials[2:]:
        assert trial.difference == pytest.approx(trial.metric - best_uniform.metric)


def test_finalists_are_trained_on_fresh_seeds(result: rs.SearchResult) -> None:
    assert [f.trial.origin for f in result.finalists[:2]] == ["uniform", "one-shot"]
    assert len({f.trial.allocation for f in result.finalists}) == len(result.finalists) <= 5
    assert all(set(f.metrics_by_seed) == {"500", "501"} for f in result.finalists)
    fresh = [list(finalist.metrics_by_seed.values()) for finalist in result.finalists]
    assert result.recommendation == recommend(
        [finalist.trial for finalist in result.finalists], fresh, None if result.belief is None else result.model
    )
    assert result.study.user_attrs["recommendation"] == f"{result.best_trial.number}: {result.recommendation.reason}"


def test_parquet_holds_the_trials(result: rs.SearchResult, tmp_path: Path) -> None:
    table = pd.read_parquet(result.to_parquet(tmp_path / "trials.parquet"))
    assert table["trial"].tolist() == [t.number for t in result.trials]
    assert table["ranks"].iloc[0].tolist() == [1] * 36


def test_a_finished_search_is_not_repeated_and_a_longer_one_goes_on(
    result: rs.SearchResult,
    digits: Task,
    digits_profile: rs.Profile,
    digits_budget: rs.ParameterBudget,
    storage: str,
) -> None:
    runs_done = []
    options = {"training": BOTH_RATES, "confirm_fraction": 10 / 18}
    again = run(
        digits,
        digits_profile,
        digits_budget,
        storage,
        n_trials=18,
        on_progress=lambda *run: runs_done.append(run),
        **options,
    )
    assert {stage for stage, _, _ in runs_done} == {"confirming"}
    assert runs_done[-1] == ("confirming", 10, 10)
    assert [t.metric for t in again.trials] == [t.metric for t in result.trials]
    assert [f.metrics_by_seed for f in again.finalists] == [f.metrics_by_seed for f in result.finalists]
    runs = stored_runs(result)
    longer = run(digits, digits_profile, digits_budget, storage, n_trials=27, **options)
    assert [t.number for t in longer.trials] == list(range(12))
    assert runs.items() <= stored_runs(longer).items()
    assert len(longer.study.trials) + len(stored_runs(longer)) <= 27
    assert {len(f.metrics_by_seed) for f in longer.finalists} <= {1, 2, 3}  # finalists that changed cost seeds


def stored_runs(result: rs.SearchResult) -> dict[str, float]:
    return {key: value for key, value in result.study.user_attrs.items() if key.startswith("confirmation:")}


def test_an_equal_allocation_is_reused(
    digits: Task, digits_profile: rs.Profile, digits_budget: rs.ParameterBudget
) -> None:
    first = run(digits, digits_profile, digits_budget, None, n_trials=2)
    one_shot = first.study.trials[1]
    first.study.enqueue_trial({**one_shot.params, "one-shot weight": 1.0})
    counted = []
    again = search(
        digits, budget=digits_budget, profile=digits_profile, n_trials=3, training=SHORT, confirm_fraction=0.0,
        storage=first.study._storage, study_name="short", on_progress=lambda *run: counted.append(run),
    )  # fmt: skip
    assert counted == [("searching", 3, 3)]
    assert again.trials[2].reused == 1
    assert again.trials[2].wall_seconds == 0.0
    assert again.trials[2].metric == again.trials[1].metric


@pytest.mark.parametrize("key", ["budget", "training", "profile", "min_rank", "grouping"])
def test_a_study_about_something_else_is_refused(
    key: str, digits: Task, digits_profile: rs.Profile, digits_budget: rs.ParameterBudget, tmp_path: Path
) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    run(digits, digits_profile, digits_budget, storage, n_trials=1)
    change = {
        "budget": {"budget": rs.ParameterBudget(5_000)},
        "min_rank": {"min_rank": 1},
        "grouping": {"grouping": "gradient"},
        "training": {"training": rs.TrainingSettings(steps=5, learning_rate=0.01)},
        "profile": {"profile": rs.Profile(digits_profile.table, {**digits_profile.metadata, "seed": 5})},
    }[key]
    arguments = {"profile": digits_profile, "budget": digits_budget, "storage": storage, "n_trials": 1, **change}
    with pytest.raises(
        SettingsError, match=rf"^study `short` must be about {key} .*use another study name or storage\.$"
    ):
        run(digits, **arguments)


def test_foreign_trials_and_broken_databases_are_refused(
    digits: Task, digits_profile: rs.Profile, digits_budget: rs.ParameterBudget, tmp_path: Path
) -> None:
    storage = f"sqlite:///{tmp_path}/foreign.db"
    foreign = optuna.create_study(storage=storage, study_name="short", direction="maximize")
    foreign.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    message = "study `short` must be rankscope's, but holds foreign trials; use another study name or storage."
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
        run(digits, digits_profile, digits_budget, storage)
    (tmp_path / "broken.db").write_text("this is no database, and long enough to be taken for one" * 100)
    with pytest.raises(
        SettingsError, match=r"^`storage` must be a database that Optuna can open, but 'sqlite:.*broken\.db' is not"
    ):
        run(digits, digits_profile, digits_budget, f"sqlite:///{tmp_path}/broken.db")
    with pytest.raises(SettingsError, match=r"can open, but 'nosuch://me:\*\*\*@host/db' is not") as shown:
        run(digits, digits_profile, digits_budget, "nosuch://me:secret@host/db")
    assert "secret" not in str(shown.value)


def test_an_infeasible_budget_leaves_no_study_behind(digits: Task, digits_profile: rs.Profile, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="must cover one rank of the cheapest target module"):
        run(digits, digits_profile, rs.ParameterBudget(100), f"sqlite:///{tmp_path}/study.db")
    assert not (tmp_path / "study.db").exists()


def test_a_search_in_which_every_trial_fails_says_so(
    digits_profile: rs.Profile, digits_budget: rs.ParameterBudget
) -> None:
    class Broken(type(rs.load_task("digits-shift"))):
        def loss(self, model, batch):
            return super().loss(model, batch) * float("nan")

    with pytest.raises(TrainingError, match=r"^study `short` must have a trial that completes, but every one failed"):
        run(Broken(), digits_profile, digits_budget, None, n_trials=2)


def test_bad_trials_are_pruned(digits: Task, digits_profile: rs.Profile, digits_budget: rs.ParameterBudget) -> None:
    training = rs.TrainingSettings(steps=4, learning_rate=0.01, evaluate_every=2)
    pruner = optuna.pruners.ThresholdPruner(lower=1.1)  # no accuracy is that high: all but the start points are pruned
    found = run(digits, digits_profile, digits_budget, None, n_trials=4, training=training, pruner=pruner)
    assert [t.origin for t in found.trials] == ["uniform", "one-shot"]
    assert [t.state.name for t in found.study.trials] == ["COMPLETE", "COMPLETE", "PRUNED", "PRUNED"]
    assert len(found.trials) == 2


def test_a_finalist_that_diverges_on_a_fresh_seed_is_dropped(
    digits_profile: rs.Profile, digits_budget: rs.ParameterBudget
) -> None:
    class Fragile(type(rs.load_task("digits-shift"))):
        """Its loss explodes in the confirming runs of all allocations but uniform."""

        runs = 0

        def build_model(self):
            self.runs += 1
            return super().build_model()

        def loss(self, model, batch):
            ranks = {module.r["default"] for module in model.modules() if hasattr(module, "lora_A")}
            return super().loss(model, batch) * (
                float("nan") if self.runs > 3 and len(ranks) > 1 else 1.0
            )  # one for the fingerprint

    found = run(Fragile(), digits_profile, digits_budget, None, n_trials=4, confirm_fraction=0.5)
    assert [f.trial.origin for f in found.finalists] == ["uniform"]
    assert found.best_trial.origin == "uniform"
    assert found.recommendation.trial == found.finalists[0].trial


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_trials": 2}, "0 trainings are left, too few to confirm 2 finalists on a fresh seed each; "
         "raise `n_trials` to 17, or to 50 for the three seeds that an interval needs."),
        ({"n_trials": 1}, "there are fewer than two allocations to compare; raise `n_trials`."),
    ],
)  # fmt: skip
def test_a_search_too_short_to_confirm_says_so(
    options: dict, message: str, digits: Task, digits_profile: rs.Profile, digits_budget: rs.ParameterBudget,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    found = run(digits, digits_profile, digits_budget, None, confirm_fraction=0.3, **options)
    assert (found.finalists, found.unconfirmed) == ((), message)
    assert found.recommendation.reason == (
        f"{found.best_trial.origin} is recommended: these are too few trainings to tell proposals from it"
    )
    assert caplog.messages == [f"nothing is confirmed: {message}"]
    assert len(found.trials) == options["n_trials"]


def test_a_metric_that_is_not_finite_fails_its_trial(
    digits_profile: rs.Profile, digits_budget: rs.ParameterBudget
) -> None:
    class Blind(type(rs.load_task("digits-shift"))):
        def evaluate(self, model, split="validation"):
            return {**super().evaluate(model, split), "accuracy": float("nan")}

    with pytest.raises(TrainingError, match="must have a trial that completes, but every one failed"):
        run(Blind(), digits_profile, digits_budget, None, n_trials=2)


@pytest.fixture(scope="module")
def modelled(digits: Task, digits_profile: rs.Profile, digits_budget: rs.ParameterBudget) -> rs.SearchResult:
    return run(digits, digits_profile, digits_budget, None, n_trials=23, confirm_fraction=10 / 23)


def test_the_model_proposes_once_it_has_seen_enough(
    modelled: rs.SearchResult, digits_budget: rs.ParameterBudget
) -> None:
    assert modelled.model is not None
    assert modelled.validation is not None
    assert modelled.validation.allocations >= 10
    assert len({trial.allocation for trial in modelled.trials}) >= 12
    assert all(trial.allocation.parameters <= digits_budget.limit for trial in modelled.trials)
    origins = [trial.origin for trial in modelled.trials]
    assert origins[:2] == ["uniform", "one-shot"]
    assert origins.count("posterior-mean") <= 1


def test_finalists_of_a_model_are_posterior_mean_smoothed_and_observed(modelled: rs.SearchResult) -> None:
    trials, model = modelled.trials, modelled.model
    assert model is not None

    def smoothed(trial: Trial) -> float:
        return float(model.predict([trial.allocation.vector])[0])

    chosen = choose_finalists(trials, model)
    assert [t.origin for t in chosen[:2]] == ["uniform", "one-shot"]
    others = [t for t in trials if t.origin in ("sampler", "posterior-mean") and t.reused is None]
    if any(t.origin == "posterior-mean" for t in others):
        assert chosen[2].origin == "posterior-mean"
    assert max(others, key=smoothed).allocation in {t.allocation for t in chosen}
    assert len(chosen) == 5
    observed = choose_finalists(trials)
    assert [t.metric for t in observed[2:]] == sorted((t.metric for t in observed[2:]), reverse=True)


def test_the_posterior_of_trials_and_fresh_seeds_is_in_the_table(modelled: rs.SearchResult, tmp_path: Path) -> None:
    believing = dataclasses.replace(modelled, belief=modelled.model)
    table = pd.read_parquet(believing.to_parquet(tmp_path / "trials.parquet"))
    expected = [believing.posterior[trial.allocation] for trial in believing.trials]
    assert table["posterior"].tolist() == [each.mean for each in expected]
    assert (table["posterior"].iloc[0], table["posterior_low"].iloc[0]) == (0.0, 0.0)  # uniform's to itself
    assert (table["posterior_low"] <= table["posterior_high"]).all()
    trials_alone = dataclasses.replace(believing, finalists=())
    assert trials_alone.posterior != believing.posterior
    assert (
        pd.read_parquet(dataclasses.replace(modelled, belief=None).to_parquet(tmp_path / "t.parquet"))["posterior"]
        .isna()
        .all()
    )
    sizes, front = [trial.allocation.parameters for trial in believing.front], believing.front
    assert sizes == sorted(set(sizes))
    means = [believing.posterior[trial.allocation].mean for trial in front]
    assert means == sorted(set(means))
    assert max(means) == max(each.mean for each in expected)


def test_plots_of_the_model(modelled: rs.SearchResult) -> None:
    assert modelled.model is not None
    axis = plot_predictions(modelled.model, modelled, figure=Figure())
    assert axis.get_xlabel().startswith("predicted accuracy")
    (axis,) = plot_belief(modelled.model, figure=Figure())
    cells = [text.get_text() for text in axis.texts]
    means, intervals = cells[::2], [[float(end) for end in cell.split("..")] for cell in cells[1::2]]
    assert len(means) == len(intervals) == 36
    assert np.mean([float(cell) for cell in means]) == pytest.approx(1.0, abs=0.05)
    assert all(low <= high for low, high in intervals)
    inside = [low <= float(mean) <= high for mean, (low, high) in zip(means, intervals, strict=True)]
    assert np.mean(inside) > 0.9


@pytest.mark.parametrize("sampler", ["tpe", optuna.samplers.GPSampler(seed=0)], ids=["tpe", "an object"])
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_other_samplers_have_no_model(
    sampler: object, digits: Task, digits_profile: rs.Profile, digits_budget: rs.ParameterBudget
) -> None:
    result = run(digits, digits_profile, digits_budget, None, sampler=sampler, n_trials=3)
    assert result.model is None
    assert result.validation is None


def test_a_trial_whose_worker_is_gone_is_run_again(
    digits: Task, digits_profile: rs.Profile, digits_budget: rs.ParameterBudget, caplog: pytest.LogCaptureFixture
) -> None:
    first = run(digits, digits_profile, digits_budget, None, n_trials=1)
    gone = Claims(first.study, 1.0).take(Job("one-shot at 0.01"))
    again = run(digits, digits_profile, digits_budget, first.study._storage, n_trials=2, grace_seconds=1.0)
    assert gone is not None
    assert gone.number == 1
    assert again.study.trials[1].state.name == "FAIL"
    assert [(trial.number, trial.origin) for trial in again.trials] == [(0, "uniform"), (2, "one-shot")]
    assert "trial 1 is lost: its worker gave no sign of life" in caplog.messages


def test_a_study_that_was_deleted_is_not_mixed_up_with_one_of_its_name(
    digits: Task, digits_profile: rs.Profile, digits_budget: rs.ParameterBudget
) -> None:
    """Its confirming runs stay, and count; the finalists and the recommendation are the new one's."""
    options = {"n_trials": 8, "confirm_fraction": 0.5}
    first = run(digits, digits_profile, digits_budget, None, **options)
    storage = first.study._storage
    optuna.delete_study(study_name="short", storage=storage)
    again = run(digits, digits_profile, digits_budget, storage, seed=7, **options)
    assert {f.trial.number for f in again.finalists} <= {trial.number for trial in again.trials}
    assert all(again.trials[f.trial.number].allocation == f.trial.allocation for f in again.finalists)
    assert again.best_trial in again.trials
    optuna.delete_study(study_name="short", storage=storage)
    with pytest.raises(SettingsError, match="^study `short-confirming` must be about training steps 5"):
        run(
            digits,
            digits_profile,
            digits_budget,
            storage,
            training=rs.TrainingSettings(steps=5, learning_rate=0.01),
            **options,
        )


def test_no_model_outlives_its_trial(
    digits: Task, digits_profile: rs.Profile, digits_budget: rs.ParameterBudget
) -> None:
    """Also of a pruned trial, whose error Optuna keeps, and of a trial's earlier seeds, without the garbage collector."""
    built: list[weakref.ref[nn.Module]] = []
    most_alive = []

    class Counted(type(digits)):
        def build_model(self) -> nn.Module:
            most_alive.append(sum(ref() is not None for ref in built))
            built.append(weakref.ref(model := super().build_model()))
            return model

    pruner = optuna.pruners.ThresholdPruner(lower=1.1)  # all but the start points are pruned
    training = rs.TrainingSettings(steps=4, learning_rate=0.01, evaluate_every=2)
    gc.collect()
    gc.disable()
    try:
        run(Counted(), digits_profile, digits_budget, None, n_trials=8, training=training, pruner=pruner, n_seeds=2)
        assert len(built) >= 6
        assert max(most_alive) == 0
        assert not [ref() for ref in built if ref() is not None]
    finally:
        gc.enable()


def test_a_search_over_budgets_has_a_front(digits: Task, digits_profile: rs.Profile) -> None:
    budget = rs.ParameterBudget.uniform(digits_profile.targets, 1, search=True)
    found = run(digits, digits_profile, budget, None, n_trials=20, confirm_fraction=0.25)
    assert found.over_budgets
    sizes = [trial.allocation.parameters for trial in found.trials if trial.proposed]
    assert max(sizes) <= 6_912
    assert min(sizes) < 6_912 / 4
    last = [trial.allocation.parameters for trial in found.trials if trial.origin == "posterior-mean"]
    assert last == sorted(last)
    assert len(found.finalists) == 5
    believing = dataclasses.replace(found, belief=found.model)
    front = [trial.allocation.parameters for trial in believing.front]
    assert front == sorted(set(front))
    one = rs.ParameterBudget.uniform(digits_profile.targets, 1)
    with pytest.raises(SettingsError, match="^study `short` must be about tilts"):
        run(digits, digits_profile, one, found.study._storage, n_trials=20)
