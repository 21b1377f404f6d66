"""Conversations whose answers a model learns: the base of their tasks, and that of conversations in text."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from rankscope.distributed import batch_device
from rankscope.early import no_chat_template
from rankscope.errors import TaskError, one_line
from rankscope.files import digest, read_text
from rankscope.settings import ModelSettings
from rankscope.tasks.conversations import IGNORED, Conversation, encode_chat, read_chats
from rankscope.tasks.data import split_by_image
from rankscope.tasks.pretrained import evaluating, load_tokenizer, own_files
from rankscope.tasks.protocol import Batch, Split, check_counts
from rankscope.tasks.rows import RowsTask, UnusableError, usable


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
    options: dict[str, Any] = {"logits_to_keep": places} if "logits_to_keep" in known else {}
    if "use_cache" in known:  # with a cache transformers looks for no packed sequences
        options["use_cache"] = False
    try:
        logits = model(**inputs, **options).logits
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


# --- packing ------------------------------------------------------------------------------------------------------

OPEN = 32  # sequences that wait for a conversation which fits


class _Packed(IterableDataset[dict[str, Tensor]]):
    """Conversations of an order, several to a sequence of at most `length` tokens; a full one goes before one that is not."""

    def __init__(self, task: RowsTask, split: Split, order: Sequence[int], length: int) -> None:
        self.task, self.split, self.order, self.length = task, split, order, length

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        waiting: list[list[dict[str, Tensor]]] = []
        sizes: list[int] = []
        for row in usable(self.task, self.split, self.order):
            size = row["input_ids"].shape[1]
            place = next((i for i, used in enumerate(sizes) if used + size <= self.length), None)
            if place is None:
                if len(waiting) == OPEN:
                    fullest = sizes.index(max(sizes))
                    sizes.pop(fullest)
                    yield pack(waiting.pop(fullest))
                waiting.append([row])
                sizes.append(size)
            else:
                waiting[place].append(row)
                sizes[place] += size
        yield from map(pack, waiting)


def pack(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One sequence, (1, tokens), of conversations of (1, tokens) each. Positions begin again with each conversation.

    There is no attention mask, so that transformers keeps conversations apart by their positions; the first token of each has
    no label, since the conversation before would predict it.
    """
    tokens, labels = ([row[name][0] for row in rows] for name in ("input_ids", "labels"))
    positions = [torch.arange(len(each)) for each in tokens]
    labels = [torch.cat([each.new_full((1,), IGNORED), each[1:]]) for each in labels]
    parts = {"input_ids": tokens, "labels": labels, "position_ids": positions}
    return {name: torch.cat(each).unsqueeze(0) for name, each in parts.items()}


def keeps_apart(model: Any) -> bool:
    """Whether nothing in a packed sequence reaches the next conversation, and that one is as it is by itself."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = inspect.signature(base.forward).parameters
    if "position_ids" not in known:
        return False
    options = {"use_cache": False} if "use_cache" in known else {}
    device, size = batch_device(model), model.config.get_text_config().vocab_size
    own = torch.Generator().manual_seed(0)
    one, other, third = torch.randint(0, size, (3, 1, 8), generator=own).to(device)
    positions = torch.arange(8, device=device).unsqueeze(0)

    def last(*rows: Tensor) -> Tensor:
        places = torch.cat([positions] * len(rows), dim=1)
        logits: Tensor = model(input_ids=torch.cat(rows, dim=1), position_ids=places, **options).logits
        return logits[:, -8:].float()

    with evaluating(model):
        alone, after_one, after_other = last(third), last(one, third), last(other, third)
    coarse = model.dtype in (torch.float16, torch.bfloat16) or hasattr(model, "quantization_method")
    scale = float(alone.abs().max())
    return torch.allclose(after_one, after_other, rtol=0, atol=1e-5 * scale) and torch.allclose(
        alone, after_one, rtol=0, atol=(0.05 if coarse else 1e-4) * scale
    )


class Chat(AnswerTask):
    """Conversations and instructions in text; a causal language model learns the answers. Its head stays frozen.

    A row has `messages` (a list of `{"role", "content"}`, or of ShareGPT's `{"from", "value"}`), or `prompt` and `completion`:
    texts, which become a user's turn and the answer, or lists of messages. The tokenizer's chat template makes the tokens.

    Loss and metrics count answers only: each assistant's turn, or the completion, with the tokens that end it. If the template
    ends a conversation without a special token, the tokenizer's EOS is added. `token_accuracy`, the metric, is the share of
    these tokens that are predicted right from all true tokens before; `exact_match` is the share of conversations in which
    all are.

    A row is skipped if the template refuses it, or if no answer begins within `max_length`.

    With `packing`, a training sequence of at most `max_length` tokens holds several conversations. Positions begin again with
    each, and none attends to another; a model that cannot do this is an error. Evaluation goes by single conversations.

    Args:
        model: A local model folder or hub id.
        data: As for `TextClassification`. Rows that occur twice are kept once.
        columns: Names of the columns for `messages`, `prompt` and `completion`, where others.
        chat_template: A file with a Jinja template, in place of the tokenizer's.
        batch_size: Conversations; with `packing`, sequences.
        max_length: Tokens. Answers are cut, but not what comes before the first.
        packing: Whether training sequences hold several conversations.
        max_skipped: Largest share of the rows of a split that may be skipped.
        model_options: `ModelSettings`, or single ones of them by name.
    """

    name = "chat"
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
        packing: bool = False,
        max_skipped: float = 0.05,
        model_options: ModelSettings | Mapping[str, Any] | None = None,
        split_seed: int = 0,
    ) -> None:
        check_counts(batch_size=batch_size, max_length=max_length)
        self._take(model, model_options)
        self.batch_size, self.max_length, self.packing = batch_size, max_length, packing
        self._template = None if chat_template is None else read_text(chat_template, what="a chat template")
        self._hold(split_conversations(read_chats(data, columns), seed=split_seed), max_skipped=max_skipped)

    @cached_property
    def _tokenizer(self) -> Any:
        tokenizer = load_tokenizer(self.model, self.model_options)
        if self._template is not None:
            tokenizer.chat_template = self._template
        if not tokenizer.chat_template:
            raise no_chat_template(self.model)
        if not tokenizer.is_fast:
            must = f"`{self.model}` must have a tokenizer that is fast, but has {type(tokenizer).__name__}"
            raise TaskError(f"{must}; convert it.")
        return tokenizer

    @property
    def _tokenizer_used(self) -> Any:
        return self._tokenizer

    @cached_property
    def _loaded(self) -> Any:
        self._tokenizer  # noqa: B018  # its errors are told before weights are loaded
        model = self._load_model("AutoModelForCausalLM", fresh=r"$")
        if self.packing and not keeps_apart(model):
            kind, attention = type(model).__name__, getattr(model.config, "_attn_implementation", None)
            must = "`packing` needs a model that keeps the conversations of a sequence apart by their positions"
            raise TaskError(f"{must}, but {kind} with {attention} attention does not; leave it out.")
        return model

    def train_batches(self, seed: int) -> DataLoader[Batch]:
        """Return one epoch, in an order that depends on the seed only; with `packing`, of sequences of several conversations."""
        if not self.packing:
            return super().train_batches(seed)
        order = torch.randperm(len(self._examples["train"]), generator=torch.Generator().manual_seed(seed)).tolist()
        rows, own = _Packed(self, "train", order, self._limit), torch.Generator()
        return DataLoader(rows, self.batch_size, collate_fn=self._collate_packed, generator=own)

    def _collate_packed(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """A batch of packed sequences: padded at their ends; for flash attention, which takes no others, of one sequence."""
        if "flash" in (self.model_options.attn_implementation or ""):
            return {name: torch.cat([row[name] for row in rows], dim=1) for name in rows[0]}
        return self.collate(rows)

    def _inputs(self, row: Conversation) -> dict[str, Tensor]:
        return self._cut(encode_chat(self._tokenizer, row))

    def _evaluated_rows(self, split: Split) -> Sequence[int]:
        rows = self._examples[split]  # rows of like lengths together waste least on padding
        return sorted(range(len(rows)), key=lambda i: sum(len(message["content"]) for message in rows[i].messages))

    def fingerprint_data(self) -> str:
        """Return a hash of all rows, the template, and the tokenizer's files in a local model folder."""
        rows = {split: [(*row.content(), row.given) for row in rows] for split, rows in self._examples.items()}
        return digest([rows, self._template, own_files(self.model)])
