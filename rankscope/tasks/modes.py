"""What the tasks at hand share: the model's own loss, and evaluation that leaves the model in the mode it was in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rankscope.devices import batch_device
from rankscope.tasks.protocol import Batch


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """`model(**batch).loss`."""
    loss = model(**batch).loss
    assert isinstance(loss, Tensor)
    return loss


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients; yields the model's device, and gives the training mode back."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield batch_device(model)
    finally:
        model.train(was_training)
