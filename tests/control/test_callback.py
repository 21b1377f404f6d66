"""The callback in a real Trainer on the digits task: ranks move, resuming and the best model get theirs, plain PEFT loads it."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import rankscope as rs
from rankscope.adapters import apply_allocation, count_adapter_parameters, from_peft_model
from rankscope.control import Policy
from rankscope.control.callback import STATE_FILE
from rankscope.exceptions import ControlError
from rankscope.tasks import Task


class Rows(Dataset):
    def __init__(self, task: Task) -> None:
        batches = list(task.train_batches(0))
        self.images = torch.cat([b["pixel_values"] for b in batches])
        self.labels = torch.cat([b["labels"] for b in batches])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def build(task: Task, budget: rs.ParameterBudget) -> PeftModel:
    model = task.build_model()
    uniform = rs.allocate("uniform", targets=rs.find_targets(model), budget=budget)
    torch.manual_seed(0)
    return apply_allocation(model, uniform, modules_to_save=["classifier"])


def trainer(task: Task, budget: rs.ParameterBudget, folder: Path, **options: Any) -> Trainer:
    settings = {
        "learning_rate": 0.01,
        "max_steps": 12,
        "per_device_train_batch_size": 8,
        "report_to": [],
        "save_steps": 5,
        "logging_steps": 4,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    policy = Policy(margin=0.0)
    callback = rs.RankControllerCallback(budget=budget, every=3, freeze_fraction=0.8, samples=2, policy=policy)
    arguments = TrainingArguments(output_dir=str(folder), **(settings | options))
    rows = Rows(task)
    return Trainer(build(task, budget), arguments, train_dataset=rows, eval_dataset=rows, callbacks=[callback])


def callback_of(run: Trainer) -> rs.RankControllerCallback:
    return next(c for c in run.callback_handler.callbacks if isinstance(c, rs.RankControllerCallback))


def weights(model: PeftModel) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if "lora_" in name}


def test_ranks_move_and_resuming_ends_the_same(digits: Task, digits_budget: rs.ParameterBudget, tmp_path: Path) -> None:
    whole = trainer(digits, digits_budget, tmp_path / "whole")
    whole.train()
    controller = callback_of(whole).controller
    assert controller is not None
    assert controller.decisions["step"].tolist() == [3, 6, 9]
    assert controller.decisions["action"].tolist()[0] == "moved"
    assert count_adapter_parameters(whole.model) <= digits_budget.limit
    logged = [entry for entry in whole.state.log_history if "ranks/moved" in entry]
    assert [entry["step"] for entry in logged] == [3, 6, 9]
    assert logged[0]["ranks/moved"] > 0

    for step in (5, 10):
        resumed = trainer(digits, digits_budget, tmp_path / f"resumed-{step}")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert weights(resumed.model).keys() == weights(whole.model).keys()
        for name, value in weights(whole.model).items():
            torch.testing.assert_close(weights(resumed.model)[name], value, rtol=0, atol=0)
        assert callback_of(resumed).controller.decisions.equals(controller.decisions)

    whole.model.save_pretrained(str(tmp_path / "adapter"))
    plain = PeftModel.from_pretrained(digits.build_model(), str(tmp_path / "adapter")).eval()
    images = Rows(digits).images[:16]
    with torch.no_grad():
        assert torch.equal(plain(pixel_values=images).logits, whole.model.eval()(pixel_values=images).logits)


def test_the_best_model_comes_back_with_its_ranks(
    digits: Task, digits_budget: rs.ParameterBudget, tmp_path: Path
) -> None:
    """The rate is far too high, so that the best checkpoint is an early one, before later moves."""
    run = trainer(
        digits,
        digits_budget,
        tmp_path,
        learning_rate=0.3,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
    )
    run.train()
    best = Path(run.state.best_model_checkpoint)
    fresh = PeftModel.from_pretrained(digits.build_model(), str(best))
    targets = rs.find_targets(digits.build_model())
    assert from_peft_model(run.model, targets) == from_peft_model(fresh, targets)
    assert all(torch.equal(value, weights(run.model)[name]) for name, value in weights(fresh).items())


def test_accumulation_and_scalars_through_the_trainer(
    digits: Task, digits_budget: rs.ParameterBudget, tmp_path: Path
) -> None:
    """A decision and the Trainer's own logging fall on the same step; a callback that reports sees both, each once."""
    run = trainer(
        digits,
        digits_budget,
        tmp_path,
        max_steps=4,
        gradient_accumulation_steps=2,
        save_strategy="no",
        logging_steps=3,
    )
    seen = Recorder()
    run.add_callback(seen)
    run.callback_handler.callbacks.insert(0, run.callback_handler.callbacks.pop())  # where TensorBoard's is
    run.train()
    controller = callback_of(run).controller
    assert controller is not None
    assert controller.decisions["batches"].tolist() == [4]
    (entry,) = [entry for entry in run.state.log_history if "ranks/moved" in entry]
    assert entry["step"] == 3
    assert entry["ranks/parameters"] == controller.allocation.parameters
    assert entry["epoch"] > 0
    assert [(step, "ranks/moved" in logs, "loss" in logs) for step, logs in seen.logs] == [
        (3, True, False),
        (3, False, True),
        (4, False, False),  # the Trainer's summary at the end
    ]
    assert seen.logs[0][1] == {name: value for name, value in entry.items() if name != "step"}


class Recorder(TrainerCallback):
    """What a logger is given."""

    def __init__(self) -> None:
        self.logs: list[tuple[int, dict[str, float]]] = []

    def on_log(self, args: Any, state: Any, control: Any, *, logs: dict[str, float], **kwargs: Any) -> None:
        self.logs.append((state.global_step, dict(logs)))


def test_tensorboard_gets_the_scalars(digits: Task, digits_budget: rs.ParameterBudget, tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = {"max_steps": 4, "save_strategy": "no", "report_to": ["tensorboard"]}
    run = trainer(digits, digits_budget, tmp_path, **options)
    run.train()
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    read = event_accumulator.EventAccumulator(str(events.parent)).Reload()
    (scalar,) = read.Scalars("train/ranks/parameters")
    assert (scalar.step, scalar.value) == (3, callback_of(run).controller.allocation.parameters)


def test_a_checkpoint_without_the_controllers_state(
    digits: Task, digits_budget: rs.ParameterBudget, tmp_path: Path
) -> None:
    run = trainer(digits, digits_budget, tmp_path / "first", max_steps=4, save_steps=4)
    run.train()
    shutil.copytree(tmp_path / "first" / "checkpoint-4", tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / STATE_FILE).unlink()
    message = (
        f"the checkpoint of step 4 must hold {STATE_FILE} to be resumed with a controller, but does not; it was trained without "
        "one, or not finished: resume from another."
    )
    with pytest.raises(ControlError, match=f"^{re.escape(message)}$"):
        trainer(digits, digits_budget, tmp_path / "second").train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_what_the_trainer_says_cannot_be_passed(digits_budget: rs.ParameterBudget) -> None:
    message = "`total_steps` comes from the Trainer and cannot be passed; leave it out."
    with pytest.raises(ControlError, match=f"^{re.escape(message)}$"):
        rs.RankControllerCallback(budget=digits_budget, total_steps=10)
