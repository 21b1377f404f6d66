"""Image classification: a folder or a table of labelled images, for any of transformers' image classifiers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from rankscope.distributed import batch_device
from rankscope.errors import TaskError, one_line
from rankscope.files import digest
from rankscope.settings import ModelSettings
from rankscope.tasks.conversations import images_of, open_image
from rankscope.tasks.data import (
    check_cells,
    folder_of_images,
    hashed_files,
    in_words,
    read_columns,
    split_by_image,
)
from rankscope.tasks.pretrained import FreshHead, evaluating, hub_options, load_pretrained, own_files
from rankscope.tasks.protocol import Split, check_counts
from rankscope.tasks.rows import RowsTask, UnusableError
from rankscope.tasks.text import classes_of, named_labels

_SPLITS = {"train": "train", "test": "test", **dict.fromkeys(("validation", "valid", "val", "dev"), "validation")}


class Labelled(NamedTuple):
    """One image."""

    number: int  # in the data, from 1
    image: Any  # a path, the bytes of a file, or a PIL image
    label: int  # its class's place

    def content(self) -> list[Any]:
        """For hashes."""
        return [self.image if isinstance(self.image, str | bytes) else np.asarray(self.image), self.label]


class ImageClassification(FreshHead, RowsTask):
    """Labelled images, classified by a model with a fresh head that is trained beside the adapters.

    The model's own image processor resizes and normalises; there is no augmentation. An image that cannot be read is skipped.

    Args:
        model: A local model folder or hub id of any class that `AutoModelForImageClassification` and `AutoImageProcessor` load,
            such as ViT, DINOv2, Swin and ConvNeXt. A head of other classes is replaced.
        data: A folder with one folder of images for each class, perhaps below `train`, `validation` and `test`; or as for
            `TextClassification`, with `image` (a path, the bytes of a file, or the hub's `{"bytes", "path"}`) and `label`.
            Without splits, rows with the same image are in the same one. Rows that occur twice are kept once.
        columns: Names of the columns for `image` and `label`, where others.
        image_folder: Where relative paths start. Default: the data file's folder; of a DataFrame, the working directory.
        max_skipped: Largest share of the rows of a split that may be skipped.
        model_options: `ModelSettings`, or single ones of them by name.
    """

    metric = "accuracy"
    task_type = None  # PEFT has none; `AutoPeftModel` builds the model
    _head_class = "AutoModelForImageClassification"

    def __init__(
        self,
        model: str | Path,
        data: str | Path | pd.DataFrame,
        *,
        columns: Mapping[str, str] | None = None,
        image_folder: str | Path | None = None,
        batch_size: int = 16,
        max_skipped: float = 0.05,
        model_options: ModelSettings | Mapping[str, Any] | None = None,
        split_seed: int = 0,
        name: str = "image-classification",
    ) -> None:
        check_counts(batch_size=batch_size)
        self._take(model, model_options)
        self.name, self.batch_size = name, batch_size
        self._folder = folder_of_images(data, image_folder)
        if not isinstance(data, pd.DataFrame) and os.path.isdir(data):
            self._folder, data, columns = Path(data), read_image_folder(Path(data)), None
        table, found = read_columns("image-classification", data, columns)
        image_column, label_column = found.values()
        check_cells(table, label_column, filled=True, what=in_words(data))
        self.classes = classes_of(table[label_column], name=label_column)
        codes = {value: code for code, value in enumerate(self.classes)}
        pairs = zip(table[image_column], table[label_column], strict=True)
        rows = [
            Labelled(number, _single(image, number), codes[label]) for number, (image, label) in enumerate(pairs, 1)
        ]
        parts = split_by_image([row.content() for row in rows], table.get("split"), seed=split_seed)
        self._hold({split: [rows[i] for i in part] for split, part in parts.items()}, max_skipped=max_skipped)
        self._head_options = {**named_labels(self.classes), "problem_type": "single_label_classification"}

    @cached_property
    def processor(self) -> Any:
        """The model's own image processor."""
        return load_pretrained("AutoImageProcessor", self.model, **hub_options(self.model_options))

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """What `from_pretrained` of the base model needs so that a trained adapter fits."""
        return {**super().model_kwargs, "ignore_mismatched_sizes": True}

    @cached_property
    def _loaded(self) -> Any:
        self.processor  # noqa: B018  # its errors are told before weights are loaded
        model = self._load_model(self._head_class, ignore_mismatched_sizes=True, **self._head_options)
        if (channels := getattr(model.config, "num_channels", 3)) != 3:
            raise TaskError(f"`{self.model}` must take images of 3 channels, but takes {channels}; take another model.")
        return model

    def _inputs(self, row: Labelled) -> dict[str, Tensor]:
        image = open_image(row.image, self._folder)
        try:
            pixels = self.processor(images=[image], return_tensors="pt")["pixel_values"]
        except (ValueError, TypeError, IndexError) as error:  # for sizes that it does not take
            raise UnusableError(f"the processor fails: {one_line(error)}") from error
        return {"pixel_values": pixels, "labels": torch.tensor([row.label])}

    def evaluate(self, model: nn.Module, split: Split = "validation") -> dict[str, float]:
        """Return accuracy and mean cross-entropy. The model keeps its mode."""
        device = batch_device(model)
        sums, n_rows = torch.zeros(2, device=device), 0
        with evaluating(model):
            for batch in self._batches(split, self._evaluated_rows(split), self._evaluated * self.batch_size):
                labels, logits = batch["labels"].to(device), model(pixel_values=batch["pixel_values"].to(device)).logits
                right = (logits.float().argmax(-1) == labels).sum()
                sums += torch.stack([right, nn.functional.cross_entropy(logits.float(), labels, reduction="sum")])
                n_rows += len(labels)
        right_rows, loss_sum = sums.tolist()
        return {"accuracy": right_rows / n_rows, "loss": loss_sum / n_rows}

    def fingerprint_data(self) -> str:
        """Return a hash of all images and labels, as `hashed_files` does, and of the processor's files in a local folder."""
        rows = {split: [row.content() for row in rows] for split, rows in self._examples.items()}
        images = [row.image for rows in self._examples.values() for row in rows if isinstance(row.image, str)]
        return digest([rows, hashed_files(self._folder / each for each in images), own_files(self.model)])


def read_image_folder(folder: Path) -> pd.DataFrame:
    """The table of a folder with one folder of images for each class, perhaps below folders of splits, as `datasets` reads it."""
    from PIL import Image

    suffixes = Image.registered_extensions().keys()
    paths = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.suffix.lower() in suffixes]
    must = f"`{folder}` must hold a folder of images for each class"
    if not paths:
        raise TaskError(f"{must}, but holds no images; check the path.")
    splits = all(path.parts[0] in _SPLITS for path in paths)
    if stray := [path for path in paths if len(path.parts) < 2 + splits]:
        raise TaskError(f"{must}, but `{stray[0]}` is in none; move it.")
    table = pd.DataFrame({"image": [str(path) for path in paths], "label": [path.parts[splits] for path in paths]})
    return table.assign(split=[_SPLITS[path.parts[0]] for path in paths]) if splits else table


def image_tokens(source: str | Path, config: Any, settings: ModelSettings) -> int:
    """Patches of an image after the model's own processor, with the class token; of a pyramid, those of its first stage."""
    processor = load_pretrained("AutoImageProcessor", source, **hub_options(settings))
    size = dict(getattr(processor, "crop_size", None) or getattr(processor, "size", None) or {})
    side: Any = size.get("height") or size.get("shortest_edge") or getattr(config, "image_size", 224)
    patch: Any = getattr(config, "patch_size", None) or 16
    side, patch = (each[0] if isinstance(each, list | tuple) else each for each in (side, patch))
    return int((side // patch) ** 2 + 1)


def _single(value: Any, number: int) -> Any:
    where = f"row {number:,}"
    images = images_of(value, where=where)
    if len(images) != 1:
        raise TaskError(f"each row must hold one image, but {where} holds {len(images)}; correct or drop it.")
    return images[0]
