"""Ready task `digits-shift`: a small vision transformer that knows the digits 0-4 learns 5-9 from 200 images."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from functools import cached_property

import torch
from torch import Tensor, nn

from rankscope.tasks.folders import data_folder
from rankscope.tasks.modes import evaluating, model_loss
from rankscope.tasks.pretrained import load_model
from rankscope.tasks.protocol import Batch, Split, check_counts

N_TRAIN = 200
N_VALIDATION = 200


class DigitsShift:
    """scikit-learn's digits 5-9 for the encoder of data/digits_vit: 200 images to train, 200 to validate, 496 to test.

    Args:
        batch_size: Images a training batch; the last of an epoch is smaller.
    """

    name = "digits-shift"
    metric = "accuracy"
    head_modules = ("classifier",)

    def __init__(self, *, batch_size: int = 32) -> None:
        check_counts(batch_size=batch_size)
        self.batch_size = batch_size

    @cached_property
    def _splits(self) -> dict[Split, tuple[Tensor, Tensor]]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        keep = digits.target >= 5
        images = torch.tensor(digits.images[keep] / 8.0 - 1.0, dtype=torch.float32).unsqueeze(1)
        labels = torch.tensor(digits.target[keep] - 5)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        train, validation, test = order.tensor_split([N_TRAIN, N_TRAIN + N_VALIDATION])
        rows: dict[Split, Tensor] = {"train": train, "validation": validation, "test": test}
        return {split: (images[index], labels[index]) for split, index in rows.items()}

    @cached_property
    def _loaded(self) -> nn.Module:
        from transformers import ViTForImageClassification

        return load_model(ViTForImageClassification.from_pretrained, data_folder("digits_vit"), num_labels=5)

    def build_model(self) -> nn.Module:
        """The encoder with a fresh head of five classes, the same at every call."""
        return deepcopy(self._loaded)

    def train_batches(self, seed: int) -> Iterator[Batch]:
        """One epoch, shuffled by the seed."""
        images, labels = self._splits["train"]
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        for rows in order.split(self.batch_size):
            yield {"pixel_values": images[rows], "labels": labels[rows]}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy."""
        return model_loss(model, batch)

    def evaluate(self, model: nn.Module, split: Split = "validation") -> dict[str, float]:
        """Accuracy and mean cross-entropy; the model's training mode is kept."""
        images, labels = self._splits[split]
        with evaluating(model) as device:
            logits = model(pixel_values=images.to(device)).logits.float()
            labels = labels.to(device)
            accuracy = (logits.argmax(-1) == labels).float().mean()
            return {"accuracy": float(accuracy), "loss": float(nn.functional.cross_entropy(logits, labels))}
