"""Image-text-to-text: questions about images, answered by a vision-language model of the hub or a local folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from rankscope.errors import TaskError
from rankscope.files import digest
from rankscope.settings import ModelSettings
from rankscope.tasks.answers import AnswerTask, split_conversations
from rankscope.tasks.conversations import (
    Conversation,
    encode,
    load_processor,
    open_image,
    read_conversations,
    takes_suffix,
)
from rankscope.tasks.data import folder_of_images, hashed_files
from rankscope.tasks.pretrained import hub_options, load_pretrained, own_files
from rankscope.tasks.protocol import check_counts


def image_text_class(source: str | Path, settings: ModelSettings = ModelSettings()) -> str | type:  # noqa: B008  # frozen
    """Return the class of a model: the one its `architectures` name if that is rankscope's, else by transformers' table."""
    from rankscope.tasks.mobile_vlm import MobileLlava  # which imports transformers' LLaVA

    named = getattr(load_pretrained("AutoConfig", source, **hub_options(settings)), "architectures", None) or ()
    return MobileLlava if MobileLlava.__name__ in named else "AutoModelForImageTextToText"


class ImageTextToText(AnswerTask):
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
        model_options: `ModelSettings`, or single ones of them by name.
    """

    name = "image-text-to-text"
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
        model_options: ModelSettings | Mapping[str, Any] | None = None,
        split_seed: int = 0,
    ) -> None:
        check_counts(batch_size=batch_size, max_length=max_length)
        self._take(model, model_options)
        self.batch_size, self.max_length, self.text_only = batch_size, max_length, text_only
        self._folder = folder_of_images(data, image_folder)
        rows = read_conversations(data, columns, text_only=text_only)
        self._hold(split_conversations(rows, seed=split_seed), max_skipped=max_skipped)

    @cached_property
    def _loaded(self) -> Any:
        self.processor  # noqa: B018  # its errors are told before weights are loaded
        model = self._load_model(image_text_class(self.model, self.model_options), fresh=r"$")
        wanted = getattr(model.config, "image_token_id", None)
        if wanted is not None and wanted != (held := self.processor.image_token_id):
            must = f"`{self.model}` must have one image token"
            found = f"its config.json has token {wanted}, and its processor {held} ({self.processor.image_token!r})"
            raise TaskError(f"{must}, but {found}; save model and processor that belong together.")
        return model

    @cached_property
    def processor(self) -> Any:
        """The model's own processor of images and texts."""
        processor = load_processor(self.model, **hub_options(self.model_options))
        processor.tokenizer.padding_side = "right"
        if takes_suffix(processor):
            for row in self._rows_of_all_splits():
                if [message["role"] for message in row.messages] != ["user", "assistant"]:
                    must = f"each row must hold one question and one answer for {type(processor).__name__}"
                    raise TaskError(f"{must}, but row {row.number:,} holds other turns; split it into rows.")
        return processor

    def _rows_of_all_splits(self) -> Iterator[Conversation]:
        return (row for rows in self._examples.values() for row in rows)

    @property
    def _tokenizer_used(self) -> Any:
        return self.processor.tokenizer

    def fingerprint_data(self) -> str:
        """Return a hash of all rows, and of the processor's files in a local model folder.

        Image files are hashed by content up to 1 GiB in all; above, by name, size and time of change.
        """
        images = (each for row in self._rows_of_all_splits() for each in row.images if isinstance(each, str))
        files = hashed_files(self._folder / each for each in images)
        rows = {split: [row.content() for row in rows] for split, rows in self._examples.items()}
        return digest([rows, files, own_files(self.model)])

    def _inputs(self, row: Conversation) -> dict[str, Tensor]:
        images = [open_image(image, self._folder) for image in row.images]
        inputs = encode(self.processor, row, images)
        images_at = torch.nonzero(inputs["input_ids"][0] == self.processor.image_token_id)
        return self._cut(inputs, begins=int(images_at.max()) if images_at.numel() else 0)
