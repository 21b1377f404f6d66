"""Tasks whose rows become a model's inputs one at a time, as batches need them; rows that cannot be used are skipped."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from rankscope.errors import TaskError
from rankscope.tasks.pretrained import PretrainedTask
from rankscope.tasks.protocol import Batch, Split

logger = logging.getLogger(__name__)


class UnusableError(Exception):
    """Why a row cannot be used."""


class RowsTask(PretrainedTask):
    """A task on rows that may turn out to be of no use when they are opened. At most a share of them, `max_skipped`, may."""

    max_skipped: float
    _examples: Mapping[Split, Sequence[Any]]  # each has `number`, its place in the data from 1
    _skipped: dict[Split, dict[int, str]]  # why, by place in the split
    _padding: Mapping[str, int] = {}  # of inputs, where it is not 0

    def _hold(self, examples: Mapping[Split, Sequence[Any]], *, max_skipped: float) -> None:
        if not 0 <= max_skipped <= 1:
            raise TaskError(f"`max_skipped` must be a share from 0 to 1, but got {max_skipped}.")
        self.max_skipped, self._examples, self._skipped = max_skipped, examples, {split: {} for split in examples}

    def _inputs(self, row: Any) -> dict[str, Tensor]:
        """One row as the model takes it, in a batch of one, with `labels`; an UnusableError if it cannot be made."""
        raise NotImplementedError

    def train_batches(self, seed: int) -> DataLoader[Batch]:
        """Return one epoch, in an order that depends on the seed only. The place of a skipped row is taken by the next."""
        order = torch.randperm(len(self._examples["train"]), generator=torch.Generator().manual_seed(seed)).tolist()
        return self._batches("train", order, self.batch_size)

    def dataset(self, split: Split) -> Dataset[dict[str, Tensor]]:
        """Return the rows of a split for a DataLoader or Trainer of your own, with `collate` to make batches of them.

        In the place of a row that cannot be used is the next that can.
        """
        return _Rows(self, split)

    def collate(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Make a batch: rows padded with zeros at the end of every dimension but the first; processors pad images so, too."""
        batch = {}
        for name in dict.fromkeys(name for row in rows for name in row):
            values = [row[name] for row in rows if name in row]
            shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
            padded = []
            for value in values:
                ends = [(0, most - size) for size, most in zip(value.shape[1:], shape, strict=True)]
                widths = [width for end in reversed(ends) for width in end]
                padded.append(nn.functional.pad(value, widths, value=self._padding.get(name, 0)))
            batch[name] = torch.cat(padded)
        return batch

    def _evaluated_rows(self, split: Split) -> Sequence[int]:
        """The rows of a split in the order of evaluation."""
        return range(len(self._examples[split]))

    def _batches(self, split: Split, order: Sequence[int], batch_size: int) -> DataLoader[Any]:
        own = torch.Generator()  # without one the loader would draw from torch's global generator
        return DataLoader(_Examples(self, split, order), batch_size, collate_fn=self.collate, generator=own)

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

    def __init__(self, task: RowsTask, split: Split, order: Sequence[int]) -> None:
        self.task, self.split, self.order = task, split, order

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return usable(self.task, self.split, self.order)


class _Rows(Dataset[dict[str, Tensor]]):
    """Rows of a split by their place; that of one which cannot be used is taken by the next."""

    def __init__(self, task: RowsTask, split: Split) -> None:
        self.task, self.split = task, split

    def __len__(self) -> int:
        return len(self.task._examples[self.split])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return next(usable(self.task, self.split, chain(range(index, len(self)), range(index))))


def usable(task: RowsTask, split: Split, order: Iterable[int]) -> Iterator[dict[str, Tensor]]:
    """Yield rows as the model takes them. Those that cannot be used are left out and counted, and told once."""
    rows, skipped = task._examples[split], task._skipped[split]
    n_known = len(skipped)
    try:
        for index in order:
            if index in skipped:
                continue
            try:
                yield task._inputs(rows[index])
            except UnusableError as error:
                task._skip(split, index, str(error))
    except TaskError:  # which says it
        n_known = len(skipped)
        raise
    finally:  # also where the rows are not read to their end
        if len(skipped) > n_known:
            found = f"{len(skipped):,} of {len(rows):,} rows in {split!r}, as {_example_of(rows, skipped)}"
            logger.warning("skipped %s", found)


def _example_of(rows: Sequence[Any], skipped: Mapping[int, str]) -> str:
    index, reason = next(iter(skipped.items()))
    return f"row {rows[index].number:,} ({reason})"
