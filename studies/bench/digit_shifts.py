"""More shifts for the digits encoder of data/digits_vit (6 blocks, knows 0-4 upright): tasks that no default was chosen on.

task: studies/bench/digit_shifts.py:turned
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from rankscope.tasks import DigitsShift, data_folder
from rankscope.tasks.pretrained import load_model


class Turned(DigitsShift):
    """All ten digits, turned by a quarter, under pixel noise of a quarter of the grey scale. 200 images to train."""

    name = "digits-turned"

    @cached_property
    def _rows(self) -> dict[Any, list[dict[str, Any]]]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = torch.Generator().manual_seed(0)
        images = torch.tensor(digits.images / 8.0 - 1.0, dtype=torch.float32).rot90(1, (1, 2)).unsqueeze(1)
        images = images + 0.5 * torch.randn(images.shape, generator=order)
        rows = [
            {"pixel_values": images[i], "labels": torch.tensor(digits.target[i])}
            for i in torch.randperm(len(images), generator=order).tolist()
        ]
        return {"train": rows[:200], "validation": rows[200:600], "test": rows[600:]}

    @cached_property
    def _loaded(self) -> Any:
        return load_model("ViTForImageClassification", data_folder("digits_vit"), num_labels=10)


def turned() -> Turned:
    """The task."""
    return Turned()
