"""The digits task in a real Trainer with the controller's callback, as tests and the processes that they start run it."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import rankscope as rs
from rankscope.lora import apply_allocation, masks_on
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


def build(task: Task, rank: int = 1, **options: Any) -> PeftModel:
    model = task.build_model()
    targets = rs.find_targets(model)
    uniform = rs.RankAllocation(targets, (rank,) * len(targets))
    torch.manual_seed(0)
    return apply_allocation(model, uniform, modules_to_save=["classifier"], **options)


MASKED = {"rank_change": "mask", "start": "uniform"}  # of a model that is built at a larger rank


def trainer(
    task: Task,
    folder: Path,
    *,
    model: PeftModel | None = None,
    controller: dict[str, Any] | None = None,
    callbacks: tuple[TrainerCallback, ...] = (),
    kind: type[Trainer] = Trainer,
    bind: bool = False,
    **options: Any,
) -> Trainer:
    """A run of 12 steps with decisions after 3, 6 and 9, at the parameters of uniform rank 1."""
    model = model or build(task)
    moves = {
        "budget": rs.ParameterBudget.uniform(rs.find_targets(task.build_model()), 1),
        "every": 3,
        "freeze_fraction": 0.8,
        "samples": 2,
        "hysteresis": 0.0,
        "min_gain_ratio": 0.0,
    }
    callback = rs.RankControllerCallback(**(moves | (controller or {})))
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
    arguments = TrainingArguments(output_dir=str(folder), **(settings | options))
    rows = Rows(task)
    run = kind(model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=[callback, *callbacks])
    if bind:
        callback.bind(run)
    return run


def controller_of(run: Trainer) -> rs.RankController:
    callback = next(c for c in run.callback_handler.callbacks if isinstance(c, rs.RankControllerCallback))
    return callback.controller


def losses_of(run: Trainer) -> list[float]:
    """Of each step, where `logging_steps` is 1."""
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def weights(model: PeftModel) -> dict[str, Tensor]:
    """All that is trained."""
    return {name: value for name, value in model.state_dict().items() if "lora_" in name or "modules_to_save" in name}


def ends_the_same(run: Trainer, other: Trainer) -> None:
    """Ranks, decisions and weights, to the bit; of what is masked, only what is active matters."""
    assert controller_of(run).decisions.equals(controller_of(other).decisions)
    ours, theirs = weights(run.model), weights(other.model)
    assert ours.keys() == theirs.keys()
    masks, others = masks_on(run.model), masks_on(other.model)
    if masks is not None and others is not None:
        assert masks.active == others.active
        ours, theirs = (m.true_state_dict(w) for m, w in ((masks, ours), (others, theirs)))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
