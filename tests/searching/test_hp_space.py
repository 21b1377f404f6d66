"""`rs.hp_space` in the `hyperparameter_search` of a real Trainer: every trial trains ranks of its own, within the budget."""

import math
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from transformers import Trainer, TrainingArguments

import rankscope as rs
from rankscope.errors import SettingsError
from rankscope.lora import from_peft_model
from tests.architectures import build
from tests.refusals import refused

ROWS = [
    {"input_ids": ids, "labels": ids}
    for ids in torch.randint(0, 50, (16, 6), generator=torch.Generator().manual_seed(0))
]


def make_model() -> Any:
    torch.manual_seed(0)
    return build("llama")


@pytest.fixture(scope="module")
def profile() -> rs.Profile:
    batches = [{key: torch.stack([row[key] for row in ROWS[i : i + 4]]) for key in ROWS[0]} for i in (0, 4, 8)]
    return rs.profile(make_model(), batches)


class Seen(Trainer):
    """Notes the ranks and the rate of each training."""

    seen: list[Any]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        result = super().train(*args, **kwargs)
        self.seen.append(({k: v for k, v in from_peft_model(self.model).items() if v}, self.args.learning_rate))
        return result


def trainer_of(space: Any, folder: Path, **options: Any) -> Seen:
    arguments = TrainingArguments(
        folder, max_steps=2, per_device_train_batch_size=4, report_to=[], save_strategy="no", eval_strategy="steps",
        eval_steps=2, use_cpu=True, disable_tqdm=True, learning_rate=0.125,
    )  # fmt: skip
    trainer = Seen(
        model_init=space.model_init(make_model, **options), args=arguments, train_dataset=ROWS, eval_dataset=ROWS[:4]
    )
    trainer.seen = []
    return trainer


@pytest.mark.parametrize("own", [True, False], ids=["performance-model", "tpe"])
def test_a_trainers_search(profile: rs.Profile, tmp_path: Path, own: bool) -> None:
    budget = rs.ParameterBudget.uniform(profile.targets, 2)
    space = rs.hp_space(profile, budget, learning_rate=[0.01, 0.02], others=lambda trial: {"seed": trial.number})
    trainer = trainer_of(space, tmp_path, scaling=1.0)
    start = rs.allocate("one-shot", targets=profile.targets, budget=budget, profile=profile)
    assert from_peft_model(trainer.model) == {name: rank for name, rank in start.ranks.items() if rank}
    assert set(trainer.model.peft_config["default"].alpha_pattern) | {trainer.model.peft_config["default"].lora_alpha}
    sampler = space.sampler(seed=1) if own else optuna.samplers.TPESampler(seed=1)
    best = trainer.hyperparameter_search(
        hp_space=space, sampler=sampler, backend="optuna", direction="minimize", n_trials=4
    )
    assert len(trainer.seen) == 4
    assert {rate for _, rate in trainer.seen} <= {0.01, 0.02}
    assert trainer.args.seed == 3
    for number, (ranks, _) in enumerate(trainer.seen):
        given = space.allocation(number)
        assert {name: rank for name, rank in given.ranks.items() if rank} == ranks
        assert given.parameters <= budget.limit
    assert len({str(ranks) for ranks, _ in trainer.seen}) > 2
    if own:
        uniform = rs.allocate("uniform", targets=profile.targets, budget=budget)
        assert [space.allocation(number).ranks for number in (0, 1)] == [start.ranks, uniform.ranks]
    assert space.allocation(best) == space.allocation(int(best.run_id))
    assert "learning_rate" in best.hyperparameters


def test_the_model_learns_from_a_search_that_minimises(profile: rs.Profile) -> None:
    """In a plain study, as an objective of one's own would use it; the loss falls with the ranks of the first block."""
    space = rs.hp_space(profile, rs.ParameterBudget.uniform(profile.targets, 2))
    study = optuna.create_study(direction="minimize", sampler=space.sampler(seed=0))

    def objective(trial: optuna.Trial) -> float:
        assert space(trial) == {}
        return -sum(math.log1p(rank) for rank in space.allocation(trial.number).vector[:7])

    study.optimize(objective, n_trials=20)
    losses = [trial.value for trial in study.trials]
    assert sum(losses[12:]) / 8 < min(sum(losses[2:8]) / 6, losses[1])  # uniform's is the second


def test_bad_input(profile: rs.Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    space = rs.hp_space(profile, 10_000)
    refused(
        "`run` must be of a search with this space, but got 3, and it has seen none.",
        lambda: space.allocation(3),
        SettingsError,
    )
    with pytest.raises(SettingsError, match="`learning_rate`: input should be greater than 0, but got -1"):
        rs.hp_space(profile, 10_000, learning_rate=-1.0)
    monkeypatch.setattr("rankscope.searching.trainers.n_processes", lambda: 2)
    refused(
        "`hp_space` must run in one process, since a Trainer tells the others nothing of the ranks, but there are 2; start it "
        "without a launcher.",
        lambda: space(optuna.create_study().ask()),
        SettingsError,
    )
