"""Tokenised texts: tokenised once, padded batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

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


def tokenize(model: str | Path, texts: Mapping[Split, list[str]], *, max_length: int) -> dict[Split, TokenRows]:
    """Tokenises every split with the model's own tokenizer; longer texts are cut.

    Raises:
        TaskError: The model has no tokenizer.
    """
    from transformers import AutoTokenizer

    tokenizer = load_pretrained(AutoTokenizer.from_pretrained, model)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    return {
        split: TokenRows(tokenizer(rows, truncation=True, max_length=max_length)["input_ids"], pad)
        for split, rows in texts.items()
    }
