"""Pruners by name, what each needs, and a search in which each of them prunes what it should."""

import re

import optuna
import pytest
from optuna.trial import TrialState

import rankscope as rs
from rankscope.errors import SettingsError
from rankscope.searching.sampler import make_pruner
from rankscope.searching.storage import STEPS_KEY
from rankscope.tasks import Task

EVALUATED = rs.TrainingSettings(steps=8, evaluate_every=2)
optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("none", optuna.pruners.NopPruner), ("median", optuna.pruners.MedianPruner),
     ("hyperband", optuna.pruners.HyperbandPruner), (optuna.pruners.WilcoxonPruner(), optuna.pruners.WilcoxonPruner)],
)  # fmt: skip
def test_names_and_objects(name: object, expected: type) -> None:
    assert type(make_pruner(name, EVALUATED)) is expected


@pytest.mark.parametrize(
    ("pruner", "training", "message"),
    [
        ("median", rs.TrainingSettings(steps=8), "`evaluate_every` must be below the 8 steps of a trial, for a pruner to "
         "judge by, but is None; lower it, or prune nothing."),
        (optuna.pruners.HyperbandPruner(), rs.TrainingSettings(steps=8, evaluate_every=8), "`evaluate_every` must be below "
         "the 8 steps of a trial, for a pruner to judge by, but is 8; lower it, or prune nothing."),
        ("mean", EVALUATED, "`pruner` must be one of none, median, hyperband or an Optuna pruner, but got 'mean'."),
    ],
)  # fmt: skip
def test_pruners_without_anything_to_judge_by(pruner: object, training: rs.TrainingSettings, message: str) -> None:
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
        make_pruner(pruner, training)


def test_wilcoxon_can_prune_after_four_seeds_and_not_before() -> None:
    """Which is why a trial must have five: pruned after its last seed, nothing is saved."""
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.WilcoxonPruner())

    def objective(trial: optuna.Trial) -> float:
        for seed in range(1, 6):
            trial.report(0.9 - 0.5 * (trial.number > 0) + 0.01 * seed, seed)
            if trial.should_prune():
                raise optuna.TrialPruned
        return 0.9

    study.optimize(objective, n_trials=2)
    assert sorted(study.trials[1].intermediate_values) == [1, 2, 3, 4]


class Starved(type(rs.load_task("digits-shift"))):
    """Uniform and one-shot learn; every other allocation is wrong about everything."""

    def evaluate(self, model, split="validation"):
        found = super().evaluate(model, split)
        self.evaluated = getattr(self, "evaluated", 0) + 1
        return {**found, "accuracy": found["accuracy"] * (self.evaluated <= self.good)}


def search(task: Task, profile: rs.Profile, budget: rs.ParameterBudget, **options) -> rs.SearchResult:
    return rs.search(task, budget=budget, profile=profile, storage=None, confirm_fraction=0.0, **options)


def test_wilcoxon_compares_seed_by_seed(digits_profile: rs.Profile, digits_budget: rs.ParameterBudget) -> None:
    task = Starved()
    task.good = 10  # two trials of five seeds
    short = rs.TrainingSettings(steps=3, learning_rate=0.01)
    pruner = optuna.pruners.WilcoxonPruner()
    found = search(task, digits_profile, digits_budget, training=short, n_trials=15, n_seeds=5, pruner=pruner)
    assert [t.state for t in found.study.trials] == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.PRUNED]
    assert [t.user_attrs[STEPS_KEY] for t in found.study.trials] == [15, 15, 12]
    assert found.steps == 42
    best = found.best_trial
    assert found.study.trials[best.number].intermediate_values == {
        int(seed) + 1: metric for seed, metric in best.metrics_by_seed.items()
    }


@pytest.mark.parametrize("name", ["median", "hyperband"])
def test_a_search_with_a_pruner_of_evaluations(
    name: str, digits: Task, digits_profile: rs.Profile, digits_budget: rs.ParameterBudget
) -> None:
    training = rs.TrainingSettings(steps=9, learning_rate=0.01, evaluate_every=3)
    found = search(digits, digits_profile, digits_budget, training=training, n_trials=14, pruner=name)
    states = [trial.state for trial in found.study.trials]
    assert states[:2] == [TrialState.COMPLETE, TrialState.COMPLETE]
    assert TrialState.PRUNED in states
    pruned = next(t for t in found.study.trials if t.state == TrialState.PRUNED)
    assert pruned.user_attrs[STEPS_KEY] == max(pruned.intermediate_values) < 9
    assert found.steps == sum(trial.user_attrs[STEPS_KEY] for trial in found.study.trials)
    complete = [trial for trial in found.trials if trial.reused is None]
    assert all(list(trial.history) == [3, 6, 9] and trial.history[9] == trial.metric for trial in complete)
