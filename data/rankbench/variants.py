"""Other tasks for the encoder of `digits-shift`: other digits, labels or images. They are earlier studies for a warm start."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

import torch
from torch import Tensor, nn

from rankscope.tasks import Split, Task
from rankscope.tasks.digits import N_TRAIN, N_VALIDATION, DigitsShift
from rankscope.tasks.folders import data_folder
from rankscope.tasks.pretrained import load_model


class DigitsVariant(DigitsShift):
    """As `digits-shift`: 200 images to train, 200 to validate, the rest to test.

    Args:
        name: Of the task.
        digits: Which are kept.
        image: From images (n, 1, 8, 8) in [-1, 1] to images.
        label: From digits (n,) to classes (n,).
        n_labels: Classes.
    """

    def __init__(
        self,
        name: str,
        digits: range,
        image: Callable[[Tensor], Tensor],
        label: Callable[[Tensor], Tensor],
        n_labels: int,
    ) -> None:
        super().__init__()
        self.name = name
        self._digits, self._image, self._label, self._n_labels = digits, image, label, n_labels

    @cached_property
    def _splits(self) -> dict[Split, tuple[Tensor, Tensor]]:
        from sklearn.datasets import load_digits

        loaded = load_digits()
        digits, images = torch.tensor(loaded.target), torch.tensor(loaded.images / 8.0 - 1.0, dtype=torch.float32)
        keep = torch.isin(digits, torch.tensor(self._digits))
        images, labels = self._image(images[keep].unsqueeze(1)), self._label(digits[keep])
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        train, validation, test = order.tensor_split([N_TRAIN, N_TRAIN + N_VALIDATION])
        rows: dict[Split, Tensor] = {"train": train, "validation": validation, "test": test}
        return {split: (images[index], labels[index]) for split, index in rows.items()}

    @cached_property
    def _loaded(self) -> nn.Module:
        from transformers import ViTForImageClassification

        return load_model(
            ViTForImageClassification.from_pretrained, data_folder("digits_vit"), num_labels=self._n_labels
        )


def _same(images: Tensor) -> Tensor:
    return images


def _turned(images: Tensor) -> Tensor:
    return images.rot90(1, dims=(2, 3))


def _inverted(images: Tensor) -> Tensor:
    return -images


def _mirrored(images: Tensor) -> Tensor:
    return images.flip(3)


def _from_five(digits: Tensor) -> Tensor:
    return digits - 5


def _parity(digits: Tensor) -> Tensor:
    return digits % 2


VARIANTS: Mapping[str, Callable[[], Task]] = {
    "digits-turned": lambda: DigitsVariant("digits-turned", range(5, 10), _turned, _from_five, 5),
    "digits-inverted": lambda: DigitsVariant("digits-inverted", range(5, 10), _inverted, _from_five, 5),
    "digits-parity": lambda: DigitsVariant("digits-parity", range(10), _same, _parity, 2),
    "digits-mirrored": lambda: DigitsVariant("digits-mirrored", range(10), _mirrored, _same, 10),
}
