"""PEFT's AdaLoRA as a method: it ends at its budget of ranks, and they are read as they are."""

import re

import pytest
import torch

import rankscope as rs
from rankscope.exceptions import AdapterError
from rankscope.tasks import Task
from rankscope.training import AdaLora


def test_adalora_ends_at_its_mean_rank(digits: Task, digits_profile: rs.Profile) -> None:
    method = AdaLora(digits_profile.targets, 2, alpha=32.0)
    model, result = rs.train(digits, method, rs.TrainingConfig(steps=20, learning_rate=0.02))
    assert result.allocation is not None
    assert sum(result.allocation.vector) == 2 * len(digits_profile.targets)
    assert max(result.allocation.vector) <= method.initial_rank == 3
    assert result.parameters == result.allocation.parameters
    alive = {
        name.split(".lora_E")[0].removeprefix("base_model.model."): int(torch.count_nonzero(value))
        for name, value in model.named_parameters()
        if "lora_E" in name
    }
    assert alive == dict(result.allocation.ranks)


def test_too_short_a_run_is_refused(digits: Task, digits_profile: rs.Profile) -> None:
    message = "`steps` must be at least 10 for AdaLoRA, but got 9; train longer."
    with pytest.raises(AdapterError, match=f"^{re.escape(message)}$"):
        rs.train(digits, AdaLora(digits_profile.targets, 2, alpha=32.0), rs.TrainingConfig(steps=9))
