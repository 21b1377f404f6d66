"""`CausalLM`: next-token prediction of a language model on texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from rankscope.errors import TaskError
from rankscope.files import digest
from rankscope.tasks.data import read_table, split_rows
from rankscope.tasks.pretrained import load_model, load_pretrained
from rankscope.tasks.protocol import Batch, Split, check_counts, evaluating, model_loss


@dataclass(frozen=True)
class TokenRows:
    """Token ids of many texts.

    Attributes:
        ids: One list of token ids a text.
        pad: The id that fills short rows; it is masked, so its value does not matter.
    """

    ids: list[list[int]]
    pad: int

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` of some rows, (rows, longest), padded on the right."""
        rows = [self.ids[i] for i in index.tolist()]
        width = max(len(row) for row in rows)
        return {
            "input_ids": torch.tensor([row + [self.pad] * (width - len(row)) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
        }

    def by_length(self, batch_size: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """All rows in batches of like length, which wastes least on padding, each with its row indices."""
        order = torch.tensor(sorted(range(len(self.ids)), key=lambda i: (len(self.ids[i]), i)))
        for index in order.split(batch_size):
            yield index, self.batch(index)


def tokenize(
    model: str | Path, texts: Mapping[Split, list[str]], *, max_length: int, **options: Any
) -> dict[Split, TokenRows]:
    """Tokenises every split with the model's own tokenizer; longer texts are cut.

    Args:
        model: A local model folder or hub id.
        texts: By split.
        max_length: Tokens; the tokenizer's own limit holds where it is lower.
        **options: For the tokenizer's `from_pretrained`.

    Raises:
        TaskError: The model has no tokenizer.
    """
    from transformers import AutoTokenizer

    tokenizer = load_pretrained(AutoTokenizer.from_pretrained, model, **options)
    if set(tokenizer.get_vocab()) <= set(
        tokenizer.all_special_tokens
    ):  # what transformers makes up where it finds none
        raise TaskError(f"`{model}` must hold the model's tokenizer, but has none; save it there with save_pretrained.")
    max_length = min(max_length, tokenizer.model_max_length)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    return {
        split: TokenRows(tokenizer(rows, truncation=True, max_length=max_length)["input_ids"], pad)
        for split, rows in texts.items()
    }


def tokenizer_files(model: str | Path) -> dict[str, bytes]:
    """The small files of a local model folder, those of its tokenizer among them; of a hub id, none."""
    kinds = (".json", ".txt", ".model", ".jinja")
    names = sorted(
        path.name for path in Path(model).glob("*") if path.suffix in kinds and not path.name.endswith("index.json")
    )
    return {name: (Path(model) / name).read_bytes() for name in names}


def check_positions(rows: Mapping[Split, TokenRows], config: Any) -> None:
    """Checks that every text fits the model's positions, as far as its config tells them.

    Raises:
        TaskError: The longest does not.
    """
    positions = getattr(config, "max_position_embeddings", None)
    longest = max(len(ids) for split in rows.values() for ids in split.ids)
    if positions is not None and longest > positions:
        raise TaskError(
            f"`max_length` must be at most {positions:,}, the model's positions, but the longest text has {longest:,} tokens; "
            "lower it."
        )


IGNORED = -100  # the label that cross-entropy passes over


class CausalLM:
    """Texts, continued by a causal language model; its own head is kept and stays frozen.

    Args:
        model: A local model folder or hub id.
        data: A .parquet, .jsonl or .csv file, a hub data set id, or a DataFrame. A column `split` is used as it is; else
            the rows are split 70 / 15 / 15 by `split_seed`. Texts that occur twice are kept once;
            texts of fewer than two tokens, which predict nothing, are left out.
        text_column: The column with the texts.
        batch_size: Texts a training batch; the last of an epoch is smaller.
        max_length: Tokens; longer texts are cut.
        gguf_file: Name of a GGUF file in the model folder, where the weights come as one.
        split_seed: Of the splits.
        name: Of the task.

    Raises:
        TaskError: Model or data cannot be loaded.
    """

    metric = "token_accuracy"
    head_modules = ()
    task_type = "CAUSAL_LM"

    def __init__(
        self,
        model: str | Path,
        data: str | Path | pd.DataFrame,
        *,
        text_column: str = "text",
        batch_size: int = 8,
        max_length: int = 256,
        gguf_file: str | None = None,
        split_seed: int = 0,
        name: str = "causal-lm",
    ) -> None:
        check_counts(batch_size=batch_size, max_length=max_length)
        self.name, self.model, self.gguf_file = name, model, gguf_file
        self.batch_size, self.max_length = batch_size, max_length
        table = read_table(data, (text_column,)).dropna(subset=text_column)
        parts = split_rows(table, key=text_column, seed=split_seed)
        self._texts = {split: rows[text_column].astype(str).tolist() for split, rows in parts.items()}

    def __getstate__(self) -> dict[str, Any]:
        """Leaves loaded weights and tokens behind: worker processes load their own."""
        return {key: value for key, value in vars(self).items() if key not in ("_loaded", "_rows")}

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """What the base model's `from_pretrained` needs to be given for a trained adapter to fit."""
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}

    @cached_property
    def _loaded(self) -> nn.Module:
        from transformers import AutoModelForCausalLM

        model = load_model(AutoModelForCausalLM.from_pretrained, self.model, fresh=r"$", **self.model_kwargs)
        check_positions(self._rows, model.config)
        return model

    @cached_property
    def _rows(self) -> dict[Split, TokenRows]:
        tokens = tokenize(self.model, self._texts, max_length=self.max_length, **self.model_kwargs)
        rows = {split: TokenRows([ids for ids in r.ids if len(ids) > 1], r.pad) for split, r in tokens.items()}
        if empty := [split for split, r in rows.items() if not r.ids]:
            raise TaskError(
                f"the data must have texts of two tokens or more in every split, but {empty[0]!r} has none; "
                "check texts and `max_length`."
            )
        return rows

    def fingerprint_data(self) -> str:
        """A hash of all texts, by split, and of what tokenises them."""
        return digest([self._texts, tokenizer_files(self.model)])

    def build_model(self) -> nn.Module:
        """The language model, the same at every call."""
        return deepcopy(self._loaded)

    def train_batches(self, seed: int) -> Iterator[Batch]:
        """One epoch, shuffled by the seed, each batch padded to its longest text; padding carries no label."""
        rows = self._rows["train"]
        order = torch.randperm(len(rows.ids), generator=torch.Generator().manual_seed(seed))
        for index in order.split(self.batch_size):
            yield _labelled(rows.batch(index))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy over the predicted tokens."""
        return model_loss(model, batch)

    def evaluate(self, model: nn.Module, split: Split = "validation") -> dict[str, float]:
        """Share of tokens predicted right, cross-entropy a token, and perplexity; the model's training mode is kept."""
        with evaluating(model) as device:
            correct, loss, count = (torch.zeros((), device=device) for _ in range(3))
            for _, batch in self._rows[split].by_length(self.batch_size):
                labels = _labelled(batch)["labels"][:, 1:].to(device)
                kept = labels != IGNORED
                labels = labels[kept]
                logits = model(**{key: value.to(device) for key, value in batch.items()}).logits[:, :-1][kept].float()
                correct += (logits.argmax(-1) == labels).sum()
                loss += nn.functional.cross_entropy(logits, labels, reduction="sum")
                count += len(labels)
        mean = loss / count
        # torch's exp: a diverged model has infinite perplexity, where math.exp would raise.
        return {"token_accuracy": float(correct / count), "loss": float(mean), "perplexity": float(mean.exp())}


def _labelled(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)}
