"""Bad input of a search: each is one clear line, or a fall-back that can be seen."""

import math
import re

import optuna
import pytest
from optuna.trial import TrialState

import rankscope as rs
from rankscope.errors import RankscopeError, SettingsError, TrainingError
from rankscope.tasks import Task

SHORT = rs.TrainingSettings(steps=2, learning_rate=0.01)
Digits = type(rs.load_task("digits-shift"))
optuna.logging.set_verbosity(optuna.logging.WARNING)


def run(task: Task, profile: rs.Profile, budget: rs.ParameterBudget, **options) -> rs.SearchResult:
    arguments = {
        "n_trials": 3,
        "training": SHORT,
        "confirm_fraction": 0.0,
        "storage": None,
        "study_name": "bad",
        **options,
    }
    return rs.search(task, budget=budget, profile=profile, **arguments)


class Constant(Digits):
    def evaluate(self, model, split="validation"):
        return {"accuracy": 0.5, "loss": 1.0}


def test_a_constant_metric_recommends_one_shot_and_leaves_the_model_out(
    digits_profile: rs.Profile, digits_budget: rs.ParameterBudget
) -> None:
    training = rs.TrainingSettings(steps=4, learning_rate=0.01, evaluate_every=2)
    found = run(
        Constant(), digits_profile, digits_budget, n_trials=24, confirm_fraction=0.5, training=training, pruner="median"
    )
    assert (found.model, found.validation, found.agreements) == (None, None, [])
    assert found.recommendation.trial.origin == "one-shot"
    assert {f.interval for f in found.finalists[1:]} == {None}


class Failing(Digits):
    """Its loss is not a number, for all ranks or for uniform's."""

    def __init__(self, only_uniform: bool) -> None:
        super().__init__()
        self.only_uniform = only_uniform

    def loss(self, model, batch):
        ranks = {module.r["default"] for module in model.modules() if hasattr(module, "lora_A")}
        fails = not self.only_uniform or ranks == {1}
        return super().loss(model, batch) * (math.nan if fails else 1.0)


def test_all_trials_failed(digits_profile: rs.Profile, digits_budget: rs.ParameterBudget) -> None:
    message = "study `bad` must have a trial that completes, but every one failed; lower `learning_rate`."
    with pytest.raises(TrainingError, match=f"^{re.escape(message)}$"):
        run(Failing(only_uniform=False), digits_profile, digits_budget)


def test_without_uniform_there_is_no_difference_and_the_search_says_why(
    digits_profile: rs.Profile, digits_budget: rs.ParameterBudget, caplog: pytest.LogCaptureFixture
) -> None:
    found = run(Failing(only_uniform=True), digits_profile, digits_budget, n_trials=8, confirm_fraction=0.5)
    assert [t.state for t in found.study.trials][:2] == [TrialState.FAIL, TrialState.COMPLETE]
    assert all(trial.difference is None for trial in found.trials)
    assert all(f.difference is f.interval is None for f in found.finalists)
    assert found.finalists
    assert caplog.messages[0] == (
        "trial 0 failed: the loss must be finite, but is not by step 2 of 2; lower `learning_rate`, now 0.01."
    )
    assert "uniform completed no trial: differences to it are not known" in caplog.messages


class WithoutLoss(Digits):
    def evaluate(self, model, split="validation"):
        return {**super().evaluate(model, split), "loss": math.nan}


def test_a_loss_that_is_not_a_number_breaks_no_ties(
    digits_profile: rs.Profile, digits_budget: rs.ParameterBudget
) -> None:
    found = run(WithoutLoss(), digits_profile, digits_budget)
    assert found.best_of_origin(None).metric == max(trial.metric for trial in found.trials)
    assert found.best_trial.metric == max(trial.metric for trial in found.trials if not trial.proposed)


def test_a_foreign_trial_in_a_study_of_rankscope(
    digits: Task, digits_profile: rs.Profile, digits_budget: rs.ParameterBudget
) -> None:
    first = run(digits, digits_profile, digits_budget, n_trials=1)
    first.study.add_trial(optuna.trial.create_trial(value=0.9))
    message = "the study must hold trials of rankscope only, but trial 1 is foreign; use another study name."
    for n_trials in (1, 4):  # nothing to do, and something
        with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
            run(digits, digits_profile, digits_budget, n_trials=n_trials, storage=first.study._storage)


def test_fewer_trials_than_were_run_change_nothing(
    digits: Task, digits_profile: rs.Profile, digits_budget: rs.ParameterBudget
) -> None:
    options = {"confirm_fraction": 0.5}
    first = run(digits, digits_profile, digits_budget, n_trials=8, **options)
    again = run(digits, digits_profile, digits_budget, n_trials=4, storage=first.study._storage, **options)
    assert again.finalists == first.finalists
    assert again.steps == first.steps


def test_copies_of_a_process_cannot_search_from_python(
    digits: Task, digits_profile: rs.Profile, digits_budget: rs.ParameterBudget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = (
        "a search from Python must run as one process, but WORLD_SIZE is 2; start `rankscope search` so, whose processes share "
        "each trial."
    )
    with pytest.raises(RankscopeError, match=f"^{re.escape(message)}$"):
        run(digits, digits_profile, digits_budget)
