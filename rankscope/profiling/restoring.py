"""What a profile changes in a model while it runs, and gives back whatever happens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def values_restored(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """On leaving, the parameters have the values that they had."""
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Freezes the model in evaluation mode; on leaving, training modes and `requires_grad` flags are as they were."""
    training = {name: module.training for name, module in model.named_modules()}
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for name, module in model.named_modules():
            module.training = training[name]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])
