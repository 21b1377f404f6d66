"""Image-text-to-text: questions about images, answered by a vision-language model of the hub or a local folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from rankscope.distributed import batch_device
from rankscope.errors import TaskError, one_line
from rankscope.files import digest
from rankscope.tasks.conversations import (
    IGNORED,
    Conversation,
    UnusableError,
    encode,
    load_processor,
    open_image,
    read_conversations,
    takes_suffix,
)
from rankscope.tasks.data import split_rows
from rankscope.tasks.pretrained import PretrainedTask, load_model, load_pretrained
from rankscope.tasks.protocol import Batch, Split, check_counts

logger = logging.getLogger(__name__)

_HASHED_BYTES = 2**30  # image files up to this size in all are fingerprinted by content


def image_text_class(source: str | Path) -> str | type:
    """Return the class of a model: the one its `architectures` name if that is rankscope's, else by transformers' table."""
    from rankscope.tasks.mobile_vlm import MobileLlava  # which imports transformers' LLaVA

    named = getattr(load_pretrained("AutoConfig", source), "architectures", None) or ()
    return MobileLlava if MobileLlava.__name__ in named else "AutoModelForImageTextToText"


class ImageTextToText(PretrainedTask):
    """Conversations about images; a vision-language model learns the answers. Its head stays frozen.

    A row has `image` (a path, the bytes of a file, the hub's `{"bytes", "path"}`, or a list of these), and either `messages`
    (a list of `{"role", "content"}` as for `apply_chat_template`, or LLaVA's `{"from", "value"}` with `<image>` in the text) or
    `question` and `answer`. Images may have any mode and size. The model's own processor and chat template make the tokens.

    Loss and metrics count answers only: in each turn the answer's tokens, with the tokens that end the turn. If the template
    ends a conversation without a special token, the tokenizer's EOS is added. `token_accuracy`, the metric, is the share of
    these tokens that are predicted right from all true tokens before; `exact_match` is the share of conversations in which
    all are.

    A row is skipped if its image cannot be read, or if no answer begins within `max_length`.

    Args:
        model: A local model folder or hub id, of any class that `AutoModelForImageTextToText` and `AutoProcessor` load, or a
            `MobileLlava`, which is LLaVA with MobileVLM's projector.
        data: As for `TextClassification`. Without a column `split`, rows with the same image are in the same split. Rows that
            occur twice are kept once.
        columns: Names of the columns for `image`, `question`, `answer` and `messages`, where others.
        image_folder: Where relative paths start. Default: the data file's folder; of a DataFrame, the working directory.
        text_only: Whether rows without an image are taken. Else they are an error.
        max_length: Tokens, those of the image included. Answers are cut, but not questions.
        max_skipped: Largest share of the rows of a split that may be skipped.
    """

    metric = "token_accuracy"
    head_modules = ()
    task_type = None  # PEFT has none; `AutoPeftModel` builds the model

    def __init__(
        self,
        model: str | Path,
        data: str | Path | pd.DataFrame,
        *,
        columns: Mapping[str, str] | None = None,
        image_folder: str | Path | None = None,
        text_only: bool = False,
        batch_size: int = 8,
        max_length: int = 2048,
        max_skipped: float = 0.05,
        split_seed: int = 0,
        name: str = "image-text-to-text",
    ) -> None:
        check_counts(batch_size=batch_size, max_length=max_length)
        if not 0 <= max_skipped <= 1:
            raise TaskError(f"`max_skipped` must be a share from 0 to 1, but got {max_skipped}.")
        self.name, self.model, self.batch_size, self.max_length = name, model, batch_size, max_length
        self.text_only, self.max_skipped = text_only, max_skipped
        if image_folder is not None and not os.path.isdir(image_folder):
            raise TaskError(f"`image_folder` must be a folder, but `{image_folder}` is none; check the path.")
        beside = Path() if isinstance(data, pd.DataFrame) else Path(data).parent
        self._folder = beside if image_folder is None else Path(image_folder)
        self._examples = _split(read_conversations(data, columns, text_only=text_only), seed=split_seed)
        self._skipped: dict[Split, dict[int, str]] = {split: {} for split in self._examples}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the processor as well: worker processes load their own."""
        return {key: value for key, value in super().__getstate__().items() if key not in ("processor", "_limit")}

    @cached_property
    def _loaded(self) -> Any:
        self.processor  # noqa: B018  # its errors are told before weights are loaded
        model = load_model(image_text_class(self.model), self.model, fresh=r"$")
        wanted = getattr(model.config, "image_token_id", None)
        if wanted is not None and wanted != (held := self.processor.image_token_id):
            must = f"`{self.model}` must have one image token"
            found = f"its config.json has token {wanted}, and its processor {held} ({self.processor.image_token!r})"
            raise TaskError(f"{must}, but {found}; save model and processor that belong together.")
        return model

    @cached_property
    def processor(self) -> Any:
        """The model's own processor of images and texts."""
        processor = load_processor(self.model)
        processor.tokenizer.padding_side = "right"
        if takes_suffix(processor):
            for row in self._rows_of_all_splits():
                if [message["role"] for message in row.messages] != ["user", "assistant"]:
                    must = f"each row must hold one question and one answer for {type(processor).__name__}"
                    raise TaskError(f"{must}, but row {row.number:,} holds other turns; split it into rows.")
        return processor

    def _rows_of_all_splits(self) -> Iterator[Conversation]:
        return (row for rows in self._examples.values() for row in rows)

    @cached_property
    def _limit(self) -> int:
        """The most tokens of a row."""
        config = load_pretrained("AutoConfig", self.model).get_text_config()
        positions = getattr(config, "max_position_embeddings", None) or self.max_length
        return cast(int, min(self.max_length, positions, self.processor.tokenizer.model_max_length))

    def train_batches(self, seed: int) -> DataLoader[Batch]:
        """Return one epoch, in an order that depends on the seed only. The place of a skipped row is taken by the next."""
        order = torch.randperm(len(self._examples["train"]), generator=torch.Generator().manual_seed(seed)).tolist()
        return self._batches("train", order, self.batch_size)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy over answer tokens."""
        logits, labels = _answers(model, batch)
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)

    def evaluate(self, model: nn.Module, split: Split = "validation") -> dict[str, float]:
        """Return token accuracy, exact match, and cross-entropy per answer token. The model keeps its mode."""
        device, was_training = batch_device(model), model.training
        sums, n_rows = torch.zeros(4, device=device), 0
        model.eval()
        try:
            with torch.no_grad():
                for batch in self._batches(split, range(len(self._examples[split])), self.batch_size):
                    inputs = {name: value.to(device) for name, value in batch.items()}
                    logits, labels = _answers(model, inputs)
                    counted, logits = labels != IGNORED, logits.float()
                    right = (logits.argmax(-1) == labels) & counted
                    loss = nn.functional.cross_entropy(logits[counted], labels[counted], reduction="sum")
                    exact = (right == counted).all(1)
                    sums += torch.stack([right.sum(), exact.sum(), loss, counted.sum()])
                    n_rows += len(labels)
        finally:
            model.train(was_training)
        right_tokens, exact_rows, loss_sum, n_tokens = sums.tolist()
        metrics = {"token_accuracy": right_tokens / n_tokens, "exact_match": exact_rows / n_rows}
        return {**metrics, "loss": loss_sum / n_tokens}

    def dataset(self, split: Split) -> Dataset[dict[str, Tensor]]:
        """Return the rows of a split for a DataLoader or Trainer of your own, with `collate` to make batches of them.

        In the place of a row that cannot be used is the next that can.
        """
        return _Rows(self, split)

    def collate(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Make a batch: rows padded with zeros at the end of every dimension but the first; processors pad images so, too."""
        padding = {"input_ids": self.processor.tokenizer.pad_token_id or 0, "labels": IGNORED}
        batch = {}
        for name in dict.fromkeys(name for row in rows for name in row):
            values = [row[name] for row in rows if name in row]
            shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
            padded = []
            for value in values:
                ends = [(0, most - size) for size, most in zip(value.shape[1:], shape, strict=True)]
                widths = [width for end in reversed(ends) for width in end]
                padded.append(nn.functional.pad(value, widths, value=padding.get(name, 0)))
            batch[name] = torch.cat(padded)
        return batch

    def fingerprint_data(self) -> str:
        """Return a hash of all rows, and of the processor's files in a local model folder.

        Image files are hashed by content up to 1 GiB in all; above, by name, size and time of change.
        """
        paths = [
            self._folder / each for row in self._rows_of_all_splits() for each in row.images if isinstance(each, str)
        ]
        found = {path: path.stat() for path in dict.fromkeys(paths) if path.is_file()}
        whole = sum(stat.st_size for stat in found.values()) <= _HASHED_BYTES
        files = [path.read_bytes() if whole else (path.name, s.st_size, s.st_mtime_ns) for path, s in found.items()]
        suffixes = (".json", ".txt", ".model", ".jinja")
        own = [path for path in sorted(Path(self.model).glob("*")) if path.suffix in suffixes]
        kept = {path.name: path.read_bytes() for path in own if not path.name.endswith("index.json")}
        rows = {split: [row.content() for row in rows] for split, rows in self._examples.items()}
        return digest([rows, files, kept])

    # --- batches ---------------------------------------------------------------------------------------------------

    def _batches(self, split: Split, order: Sequence[int], batch_size: int) -> DataLoader[Any]:
        own = torch.Generator()  # without one the loader would draw from torch's global generator
        return DataLoader(_Examples(self, split, order), batch_size, collate_fn=self.collate, generator=own)

    def _tokens(self, row: Conversation) -> dict[str, Tensor]:
        """One row as the model takes it, in batches of one, with `labels`; an UnusableError if it cannot be made."""
        images = [open_image(image, self._folder) for image in row.images]
        inputs = encode(self.processor, row, images)
        tokens, answered, limit = inputs["input_ids"], inputs["labels"][0] != IGNORED, self._limit
        if not answered.any():
            raise UnusableError("its answers have no tokens")
        place = int(answered.int().argmax())  # where the first answer begins, or the last image ends
        if (images_at := torch.nonzero(tokens[0] == self.processor.image_token_id)).numel():
            place = max(place, int(images_at.max()))
        if place >= limit:
            raise UnusableError(f"its question takes {place:,} tokens, and `max_length` leaves {limit:,}")
        return {name: value[:, :limit] if value.shape == tokens.shape else value for name, value in inputs.items()}

    def _skip(self, split: Split, index: int, reason: str) -> None:
        """Count a row that cannot be used; raise a TaskError if there are too many."""
        skipped, rows = self._skipped[split], self._examples[split]
        skipped[index] = reason
        if len(skipped) > self.max_skipped * len(rows):
            found = f"{len(skipped):,} of {len(rows):,} in {split!r} already, as {_example_of(rows, skipped)}"
            must = f"at most {self.max_skipped:.3g} of the rows may be skipped (`max_skipped`)"
            raise TaskError(f"{must}, but {found}; repair or drop them.")
        if len(skipped) == len(rows):
            must = f"the data must have rows that can be used in every split, but {split!r} has none"
            raise TaskError(f"{must}, as {_example_of(rows, skipped)}; repair the data.")


class _Examples(IterableDataset[dict[str, Tensor]]):
    """Rows of a split in an order, without those that cannot be used."""

    def __init__(self, task: ImageTextToText, split: Split, order: Sequence[int]) -> None:
        self.task, self.split, self.order = task, split, order

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return _usable(self.task, self.split, self.order)


class _Rows(Dataset[dict[str, Tensor]]):
    """Rows of a split by their place; that of one which cannot be used is taken by the next."""

    def __init__(self, task: ImageTextToText, split: Split) -> None:
        self.task, self.split = task, split

    def __len__(self) -> int:
        return len(self.task._examples[self.split])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return next(_usable(self.task, self.split, chain(range(index, len(self)), range(index))))


def _usable(task: ImageTextToText, split: Split, order: Iterable[int]) -> Iterator[dict[str, Tensor]]:
    """Yield rows as the model takes them. Those that cannot be used are left out and counted, and told once."""
    rows, skipped = task._examples[split], task._skipped[split]
    n_known = len(skipped)
    try:
        for index in order:
            if index in skipped:
                continue
            try:
                yield task._tokens(rows[index])
            except UnusableError as error:
                task._skip(split, index, str(error))
    except TaskError:  # which says it
        n_known = len(skipped)
        raise
    finally:  # also where the rows are not read to their end
        if len(skipped) > n_known:
            found = f"{len(skipped):,} of {len(rows):,} rows in {split!r}, as {_example_of(rows, skipped)}"
            logger.warning("skipped %s", found)


def _example_of(rows: Sequence[Conversation], skipped: Mapping[int, str]) -> str:
    index, reason = next(iter(skipped.items()))
    return f"row {rows[index].number:,} ({reason})"


def _split(rows: Sequence[Conversation], *, seed: int) -> dict[Split, list[Conversation]]:
    """Rows by split; without splits in the data, those with the same images are in the same one."""
    keys = pd.DataFrame({"row": range(len(rows)), "split": [row.split for row in rows]})
    keys["same"] = [digest(row.content()) for row in rows]
    keys["image"] = [
        digest(row.content()[0]) if row.images else same for row, same in zip(rows, keys["same"], strict=True)
    ]
    if keys["split"].isna().all():
        keys = keys.drop(columns="split")
    parts = split_rows(keys, key="same", group="image", seed=seed)
    return {split: [rows[index] for index in part["row"]] for split, part in parts.items()}


def _answers(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits (rows, places, vocabulary) and labels (rows, places) at all places where some row has an answer.

    Only these go through the language model's head, where the model's class can leave others out.
    """
    inputs = dict(batch)
    labels = inputs.pop("labels")[:, 1:]
    places = (labels != IGNORED).any(0).nonzero().squeeze(1)
    try:
        logits = model(**inputs, logits_to_keep=places).logits
    except ValueError as error:
        if "image tokens" not in str(error):
            raise
        must = "the processor must give each image as many tokens as the model gives it features"
        raise TaskError(f"{must}, but does not ({one_line(error)}); correct its `patch_size` or the like.") from error
    return logits if logits.shape[1] == len(places) else logits[:, places], labels[:, places]
