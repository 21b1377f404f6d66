"""Tokenised texts: tokenised once, padded batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankscope.exceptions import TaskError
from rankscope.tasks.pretrained import load_pretrained
from rankscope.tasks.protocol import Split


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
