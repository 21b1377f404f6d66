"""Every public function and constructor with arguments of wrong types: one line of ours, or a result."""

import inspect
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import rankscope as rs
from rankscope.errors import RankscopeError, TaskError
from rankscope.searching import STUDY_KEY
from rankscope.training.loop import _body_and_head

WRONG: list[Any] = [
    None, True, 3, -1, 2.5, float("nan"), "x", b"x", Path("x"), [], ["q_proj"], [1, "a"], (2,), {1}, {}, {"a": 1}, {1: None}, object(),
    torch.ones(2), torch.ones(2, 2), np.ones(3), np.int64(2), rs.ParameterBudget(40), rs.TrainingSettings(steps=1), range(2),
]  # fmt: skip


class Mine:
    """A task of a user's own that trains in milliseconds."""

    name, metric = "mine", "score"

    def build_model(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))

    def train_batches(self, seed: int) -> list[dict[str, torch.Tensor]]:
        return [{"x": torch.full((2, 4), 0.5 + seed % 3)}, {"x": torch.ones(2, 4)}]

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if not isinstance(batch, dict) or "x" not in batch:
            raise TaskError("this is no batch of this task")
        return model(batch["x"]).square().mean()

    def evaluate(self, model: nn.Module, split: str = "validation") -> dict[str, float]:
        return {"score": 0.5, "loss": 1.0}


TASK = Mine()
TARGETS = rs.find_targets(TASK.build_model(), ["0", "2"])
BUDGET = rs.ParameterBudget.uniform(TARGETS, 1)
SHORT = rs.TrainingSettings(steps=1)


@cache
def profile() -> rs.Profile:
    return rs.profile(TASK.build_model(), TASK.train_batches(0), targets=TARGETS, loss_fn=TASK.loss)


@cache
def space() -> rs.HierarchicalSpace:
    return rs.HierarchicalSpace(
        targets=TARGETS,
        gains={t.name: np.ones(2) for t in TARGETS},
        budget=BUDGET,
        groups={t.name: "model/0" for t in TARGETS},
    )


def trial() -> optuna.Trial:
    return optuna.create_study().ask()


def peft() -> dict[str, Any]:
    model = get_peft_model(TASK.build_model(), LoraConfig(target_modules=["0", "2"], r=1))
    return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}


@cache
def adapter() -> Path:
    """A folder with an adapter that changes the model."""
    folder, model = Path(tempfile.mkdtemp()), peft()["model"]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.1)
    model.save_pretrained(folder)
    return folder


CONTROLLED = {"budget": BUDGET, "every": 1, "total_steps": 9}
GOOD: dict[str, Callable[[], dict[str, Any]]] = {  # arguments with which each works
    "allocate": lambda: {"strategy": "one-shot", "targets": TARGETS, "budget": BUDGET, "profile": profile()},
    "compare": lambda: {"task": TASK, "methods": ["one-shot"], "budget": BUDGET, "targets": TARGETS, "profile": profile(),
                        "training": SHORT, "seeds": [0], "settings": {"n_tuning_seeds": 1}},
    "export": lambda: {"allocation": rs.allocate("uniform", targets=TARGETS, budget=BUDGET), "to": "axolotl"},
    "hp_space": lambda: {"profile": profile(), "budget": BUDGET},
    "find_targets": lambda: {"model": TASK.build_model(), "selection": ["0"]},
    "load_task": lambda: {"spec": "digits-shift"},
    "measure_moments": lambda: {"model": peft()["model"], "batches": TASK.train_batches(0), "loss": TASK.loss},
    "pad_adapter": lambda: {"adapter": adapter(), "out": Path(tempfile.mkdtemp())},
    "plan_budget": lambda: {"task": TASK, "targets": TARGETS, "profile": profile(), "training": SHORT, "seeds": range(2),
                            "settings": {"n_seeds": 2, "max_seeds": 2, "n_tuning_seeds": 1, "highest": 1.0, "ceiling": False}},
    "profile": lambda: {"model": TASK.build_model(), "batches": TASK.train_batches(0), "targets": TARGETS, "loss_fn": TASK.loss},
    "rank_features": lambda: {"targets": TARGETS, "budget": BUDGET},
    "read_profile": lambda: {"path": "none"},
    "read_study": lambda: {"path": "studies/digits.yaml"},
    "search": lambda: {"task": TASK, "budget": BUDGET, "profile": profile(), "training": SHORT, "n_trials": 1, "confirm_fraction": 0.0},
    "shrink": lambda: {"adapter": adapter(), "parameters": 8, "out": Path(tempfile.mkdtemp())},
    "suggest_allocation": lambda: {"trial": trial(), "space": space()},
    "train": lambda: {"task": TASK, "method": rs.allocate("uniform", targets=TARGETS, budget=BUDGET), "settings": SHORT},
    "HierarchicalSpace": lambda: {"targets": TARGETS, "gains": space().gains, "budget": BUDGET, "groups": space().groups},
    "ParameterBudget": lambda: {"limit": 3},
    "PerformanceModelSampler": lambda: {"space": space()},
    "RankController": lambda: {**peft(), **CONTROLLED},
    "RankControllerCallback": lambda: {"budget": BUDGET},
}  # fmt: skip


def calls() -> list[tuple[str, str]]:
    """Every function and constructor with each of its arguments, those of its settings included."""
    found = []
    for name in GOOD:
        parameters = inspect.signature(getattr(rs, name)).parameters.values()
        found += [(name, each.name) for each in parameters if each.kind is not inspect.Parameter.VAR_KEYWORD]
    return [
        *found,
        ("search", "sampler"),
        ("search", "storage"),
        ("search", "pruner"),
        ("RankControllerCallback", "start"),
    ]


@pytest.mark.parametrize(("name", "argument"), calls(), ids=map("-".join, calls()))
def test_an_argument_of_a_wrong_type_is_one_line(name: str, argument: str, tmp_path: Path, monkeypatch: Any) -> None:
    found = []
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    for wrong in WRONG:
        if wrong is None and (name, argument) == ("profile", "loss_fn"):
            continue  # the loss is then the model's own, and this model has none
        given = {**GOOD[name](), argument: wrong}
        monkeypatch.chdir(tmp_path) if argument in ("kept_in", "storage", "out") else None
        try:
            with warnings.catch_warnings(action="ignore"):
                getattr(rs, name)(**given)
        except RankscopeError as error:
            if len(str(error).splitlines()) != 1:
                found.append(f"{wrong!r:.40}: {error}")
        except Exception as error:
            found.append(f"{wrong!r:.40}: {type(error).__name__}: {error}")
    assert not found, "\n" + "\n".join(found)


def test_every_public_function_is_tried_with_wrong_types() -> None:
    assert {name for name in rs.__all__ if inspect.isfunction(getattr(rs, name))} <= GOOD.keys()


def test_plain_values_are_taken_where_they_can_mean_one_thing(tmp_path: Path) -> None:
    uniform = rs.allocate("uniform", targets=TARGETS, budget=14)
    assert uniform == rs.allocate("uniform", targets=TARGETS, budget=rs.ParameterBudget(14))
    found = rs.search(
        TASK, budget=14, profile=profile(), settings={"n_trials": 1, "confirm_fraction": 0.0}, training={"steps": 1},
        storage=tmp_path / "a.db",
    )  # fmt: skip
    assert (len(found.trials), (tmp_path / "a.db").exists()) == (1, True)
    about = found.study.user_attrs[STUDY_KEY]
    older = {key: value for key, value in about["training"].items() if key != "lora_dropout"}
    found.study.set_user_attr(STUDY_KEY, {**about, "training": older})  # as before there was such a setting
    rs.search(
        TASK, budget=14, profile=profile(), n_trials=1, confirm_fraction=0.0, training=SHORT, storage=tmp_path / "a.db"
    )
    compared = rs.compare(TASK, "uniform", budget=14, targets=TARGETS, training={"steps": 1}, seeds=[0])
    assert set(compared.runs["method"]) == {"uniform"}
    compared = rs.compare(TASK, [even], budget=14, targets=TARGETS, profile=profile(), training=SHORT, seeds=[0])
    assert dict(zip(compared.runs["method"], compared.runs["ranks"], strict=True))["even"] == '{"0": 1, "2": 1}'
    few = {"n_seeds": 2, "max_seeds": 2, "lowest": 0.5, "highest": 1, "step": 2, "ceiling": False}
    planned = rs.plan_budget(TASK, targets=TARGETS, profile=profile(), training={"steps": 1}, settings=few)
    assert set(planned.table()["method"]) == {"uniform", "one-shot"}  # the task has no head
    _, trained = rs.train("digits-shift", digits(), {"steps": 1, "learning_rate": 0.01}, controller={"mode": "off"})
    assert trained.decisions is None


def even(request: Any) -> dict[str, float]:
    return {target.name: float(target.rank_cost) for target in request.targets}


def digits() -> rs.RankAllocation:
    targets = rs.find_targets(rs.load_task("digits-shift").build_model())
    return rs.allocate("uniform", targets=targets, budget=rs.ParameterBudget.uniform(targets, 1))


def test_a_head_inside_another_module_has_its_own_rate() -> None:
    class Nested(Mine):
        head_modules = ("model.score",)

        def build_model(self) -> nn.Module:
            model = nn.Module()
            model.model = nn.ModuleDict({"body": nn.Linear(4, 4), "score": nn.Linear(4, 2)})
            model.forward = lambda x: model.model["score"](model.model["body"](x))
            return model

    body, head = _body_and_head(Nested(), Nested().build_model())
    assert ([tuple(p.shape) for p in body], [tuple(p.shape) for p in head]) == ([(4, 4), (4,)], [(2, 4), (2,)])
