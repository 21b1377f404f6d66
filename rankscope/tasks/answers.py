"""Conversations whose answers a model learns: the base of their tasks, and that of conversations in text."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor, nn

from rankscope.distributed import batch_device
from rankscope.errors import TaskError, one_line
from rankscope.files import digest, read_text
from rankscope.settings import ModelSettings
from rankscope.tasks.conversations import IGNORED, Conversation, encode_chat, read_chats
from rankscope.tasks.data import split_by_image
from rankscope.tasks.pretrained import evaluating, load_tokenizer, own_files
from rankscope.tasks.protocol import Batch, Split, check_counts
from rankscope.tasks.rows import RowsTask, UnusableError


class AnswerTask(RowsTask):
    """A task on `Conversation`s. The model's head stays frozen."""

    metric = "token_accuracy"
    head_modules = ()
    max_length: int

    @property
    def _tokenizer_used(self) -> Any:
        raise NotImplementedError

    @property
    def _padding(self) -> Mapping[str, int]:  # type: ignore[override]
        return {"input_ids": self._tokenizer_used.pad_token_id or 0, "labels": IGNORED}

    @cached_property
    def _limit(self) -> int:
        """The most tokens of a row."""
        config = self._config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None) or self.max_length
        return cast(int, min(self.max_length, positions, self._tokenizer_used.model_max_length))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy over answer tokens."""
        logits, labels = answers(model, batch)
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)

    def evaluate(self, model: nn.Module, split: Split = "validation") -> dict[str, float]:
        """Return token accuracy, exact match, and cross-entropy per answer token. The model keeps its mode."""
        device = batch_device(model)
        sums, n_rows = torch.zeros(4, device=device), 0
        with evaluating(model):
            for batch in self._batches(split, self._evaluated_rows(split), self.batch_size):
                logits, labels = answers(model, {name: value.to(device) for name, value in batch.items()})
                sums += answer_sums(logits, labels)
                n_rows += len(labels)
        return answer_metrics(sums, n_rows)

    def _cut(self, inputs: dict[str, Tensor], *, begins: int = 0) -> dict[str, Tensor]:
        """Inputs of at most `_limit` tokens; an UnusableError if no answer begins in them, nor the place `begins` lies there."""
        tokens, answered, limit = inputs["input_ids"], inputs["labels"][0] != IGNORED, self._limit
        if not answered.any():
            raise UnusableError("its answers have no tokens")
        place = max(int(answered.int().argmax()), begins)
        if place >= limit:
            raise UnusableError(f"its question takes {place:,} tokens, and `max_length` leaves {limit:,}")
        return {name: value[:, :limit] if value.shape == tokens.shape else value for name, value in inputs.items()}


def answers(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits (rows, places, vocabulary) and labels (rows, places) at all places where some row has an answer.

    Only these go through the language model's head, where the model's class can leave others out.
    """
    inputs = dict(batch)
    labels = inputs.pop("labels")[:, 1:]
    places = (labels != IGNORED).any(0).nonzero().squeeze(1)
    base: Any = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    known = inspect.signature(base.forward).parameters
    try:
        logits = model(**inputs, **({"logits_to_keep": places} if "logits_to_keep" in known else {})).logits
    except ValueError as error:
        if "image tokens" not in str(error):
            raise
        must = "the processor must give each image as many tokens as the model gives it features"
        raise TaskError(f"{must}, but does not ({one_line(error)}); correct its `patch_size` or the like.") from error
    return logits if logits.shape[1] == len(places) else logits[:, places], labels[:, places]


def answer_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Of a batch (rows, places[, vocabulary]): tokens that are right, rows that are, the loss of all tokens, and their number."""
    counted, logits = labels != IGNORED, logits.float()
    right = (logits.argmax(-1) == labels) & counted
    loss = nn.functional.cross_entropy(logits[counted], labels[counted], reduction="sum")
    return torch.stack([right.sum(), (right == counted).all(1).sum(), loss, counted.sum()])


def answer_metrics(sums: Tensor, n_rows: int) -> dict[str, float]:
    """Metrics of the sums over all batches."""
    right_tokens, exact_rows, loss_sum, n_tokens = sums.tolist()
    metrics = {"token_accuracy": right_tokens / n_tokens, "exact_match": exact_rows / n_rows}
    return {**metrics, "loss": loss_sum / n_tokens}


def split_conversations(rows: Sequence[Conversation], *, seed: int) -> dict[Split, list[Conversation]]:
    """Rows by split; without splits in the data, those with the same images are in the same one."""
    parts = split_by_image([row.content() for row in rows], pd.Series([row.split for row in rows]), seed=seed)
    return {split: [rows[i] for i in part] for split, part in parts.items()}


class Chat(AnswerTask):
    """Conversations and instructions in text; a causal language model learns the answers. Its head stays frozen.

    A row has `messages` (a list of `{"role", "content"}`, or of ShareGPT's `{"from", "value"}`), or `prompt` and `completion`:
    texts, which become a user's turn and the answer, or lists of messages. The tokenizer's chat template makes the tokens.

    Loss and metrics count answers only: each assistant's turn, or the completion, with the tokens that end it. If the template
    ends a conversation without a special token, the tokenizer's EOS is added. `token_accuracy`, the metric, is the share of
    these tokens that are predicted right from all true tokens before; `exact_match` is the share of conversations in which
    all are.

    A row is skipped if the template refuses it, or if no answer begins within `max_length`.

    Args:
        model: A local model folder or hub id.
        data: As for `TextClassification`. Rows that occur twice are kept once.
        columns: Names of the columns for `messages`, `prompt` and `completion`, where others.
        chat_template: A file with a Jinja template, in place of the tokenizer's.
        max_length: Tokens. Answers are cut, but not what comes before the first.
        max_skipped: Largest share of the rows of a split that may be skipped.
        model_options: `ModelSettings`, or single ones of them by name.
    """

    task_type = "CAUSAL_LM"

    def __init__(
        self,
        model: str | Path,
        data: str | Path | pd.DataFrame,
        *,
        columns: Mapping[str, str] | None = None,
        chat_template: str | Path | None = None,
        batch_size: int = 8,
        max_length: int = 1024,
        max_skipped: float = 0.05,
        model_options: ModelSettings | Mapping[str, Any] | None = None,
        split_seed: int = 0,
        name: str = "chat",
    ) -> None:
        check_counts(batch_size=batch_size, max_length=max_length)
        self._take(model, model_options)
        self.name, self.batch_size, self.max_length = name, batch_size, max_length
        self._template = None if chat_template is None else read_text(chat_template, what="a chat template")
        self._hold(split_conversations(read_chats(data, columns), seed=split_seed), max_skipped=max_skipped)

    @cached_property
    def _tokenizer(self) -> Any:
        tokenizer = load_tokenizer(self.model, self.model_options)
        must, has = f"`{self.model}` must have a tokenizer", type(tokenizer).__name__
        if self._template is not None:
            tokenizer.chat_template = self._template
        if not tokenizer.chat_template:
            remedy = "set `chat_template` to a file with one, or take `type: causal-lm` for plain texts."
            raise TaskError(f"{must} with a chat template, but {has} has none; {remedy}")
        if not tokenizer.is_fast:
            raise TaskError(f"{must} that is fast, but has {has}; convert it.")
        return tokenizer

    @property
    def _tokenizer_used(self) -> Any:
        return self._tokenizer

    @cached_property
    def _loaded(self) -> Any:
        self._tokenizer  # noqa: B018  # its errors are told before weights are loaded
        return self._load_model("AutoModelForCausalLM", fresh=r"$")

    def _inputs(self, row: Conversation) -> dict[str, Tensor]:
        return self._cut(encode_chat(self._tokenizer, row))

    def _evaluated_rows(self, split: Split) -> Sequence[int]:
        rows = self._examples[split]  # rows of like lengths together waste least on padding
        return sorted(range(len(rows)), key=lambda i: sum(len(message["content"]) for message in rows[i].messages))

    def fingerprint_data(self) -> str:
        """Return a hash of all rows, the template, and the tokenizer's files in a local model folder."""
        rows = {split: [(*row.content(), row.given) for row in rows] for split, rows in self._examples.items()}
        return digest([rows, self._template, own_files(self.model)])
