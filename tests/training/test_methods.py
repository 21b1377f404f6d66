"""PEFT's AdaLoRA as a method: it ends at its budget of ranks, and they are read as they are."""

import re
from typing import Any

import pytest
import torch

import rankscope as rs
from rankscope.errors import ModelError
from rankscope.tasks import Task
from rankscope.training import AdaLora


def test_adalora_ends_at_its_mean_rank(digits: Task, digits_profile: rs.Profile) -> None:
    method = AdaLora(digits_profile.targets, 2, alpha=32.0)
    model, result = rs.train(digits, method, rs.TrainingSettings(steps=20, learning_rate=0.02))
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


def test_ranks_settle_as_early_as_asked(digits: Task, digits_profile: rs.Profile) -> None:
    usual, early = (AdaLora(digits_profile.targets, 2, alpha=32.0, settled=share) for share in (0.7, 0.4))
    assert (usual.variant, early.variant) == ("alpha 32, 100% of ranks", "alpha 32, 100% of ranks, settled at 40%")
    kept = 2 * len(digits_profile.targets)
    for method, over in ((usual, True), (early, False)):
        model: Any = method.adapt(digits.build_model(), digits, rs.TrainingSettings(steps=20), seed=0)
        budget, _ = model.base_model.rankallocator.budget_schedule(8)
        assert (budget > kept) is over


def test_too_short_a_run_is_refused(digits: Task, digits_profile: rs.Profile) -> None:
    message = "`steps` must be at least 10 for AdaLoRA, but got 9; train longer."
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        rs.train(digits, AdaLora(digits_profile.targets, 2, alpha=32.0), rs.TrainingSettings(steps=9))
