"""Shards of a batch: each process takes some of its rows, and their losses add up to that of the whole batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankscope.distributed import (
    batch_device,
    check_same,
    failing_together,
    mixed_precision,
    n_processes,
    process_index,
)
from rankscope.errors import TrainingError
from rankscope.files import digest
from rankscope.profiling import leaves
from rankscope.tasks import IGNORED, Batch, Task, evaluating

_TOLERANCES = {True: 2e-2, False: 1e-3}  # of a loss in half precision, and in float32


class Shards:
    """How a task's batches are shared out over processes.

    A loss must be a mean over rows, or over the labels that count. `count` tells of how many: the task's own
    `count_examples(batch)` if it has one, else the labels other than -100 (in a causal language model, those from the second
    on), else the rows.
    """

    def __init__(self, task: Task, model: nn.Module) -> None:
        self._task = task
        config: Any = getattr(model, "config", None)
        shifted = getattr(task, "task_type", "") not in ("TOKEN_CLS", "SEQ_2_SEQ_LM")
        self._shifted = shifted and not getattr(config, "is_encoder_decoder", False)

    def of(self, batch: Batch) -> tuple[Batch, float]:
        """This process's rows, and what their mean loss counts in that of the batch; all rows and 1 in one process.

        With fewer rows than processes, those left over take the first row, which counts nothing.
        """
        n = n_processes()
        if n == 1:
            return batch, 1.0
        rows = self._rows(batch)
        places = torch.arange(rows).tensor_split(n)[process_index()].tolist()
        part = rows_of(batch, slice(places[0], places[-1] + 1) if places else slice(0, 1))
        return part, self.count(part) / max(self.count(batch), 1) if places else 0.0

    def count(self, batch: Batch) -> int:
        """Of how many rows or labels a batch's loss is the mean."""
        if (own := getattr(self._task, "count_examples", None)) is not None:
            return int(own(batch))
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            return self._rows(batch)
        return int((labels[:, 1:] if self._shifted and labels.ndim == 2 else labels).ne(IGNORED).sum())

    def check(self, model: nn.Module, batch: Batch) -> None:
        """Raise unless all processes have this first batch, and its loss is the mean that `count` makes it.

        The two rows that count most and least are tried, in evaluation mode.
        """
        check_same(digest(batch), what="the first training batch")
        with failing_together():
            self._check(model, batch)

    def _check(self, model: nn.Module, batch: Batch) -> None:
        norms = [name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if norms:
            raise self._unfit("the model must normalise each row by itself", f"`{norms[0]}` is a batch normalisation")
        rows = [rows_of(batch, slice(index, index + 1)) for index in range(self._rows(batch))]
        counts = list(map(self.count, rows))
        low, high = counts.index(min(filter(None, counts), default=0)), counts.index(max(counts))
        low = (high + 1) % len(rows) if low == high else low
        pair = rows_of(batch, [low, high])
        whole, first, second = (self._loss(model, each) for each in (pair, rows[low], rows[high]))
        shares = [counts[index] / max(self.count(pair), 1) for index in (low, high)]
        parts = math.fsum(share * loss for share, loss in zip(shares, (first, second), strict=True) if share)
        half = any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
        if not math.isclose(whole, parts, rel_tol=_TOLERANCES[half or batch_device(model).type != "cpu"], abs_tol=1e-6):
            must = "the loss must be a mean over rows or labels"
            raise self._unfit(must, f"that of two rows is {whole:.6g}, and the mean of theirs {parts:.6g}")

    def _unfit(self, must: str, found: str) -> TrainingError:
        n = n_processes()
        remedy = "train in one process, or give the task a method `count_examples(batch)`"
        return TrainingError(f"`{self._task.name}`: {must} to be shared over {n} processes, but {found}; {remedy}.")

    def _loss(self, model: nn.Module, batch: Batch) -> float:
        from accelerate.utils import send_to_device

        with evaluating(model), mixed_precision(model):
            return float(self._task.loss(model, send_to_device(batch, batch_device(model))))

    def _rows(self, batch: Any) -> int:
        """Rows of a batch, each of whose tensors has as many."""
        sizes = {name: len(each) if each.ndim else 0 for name, each in leaves(batch, "batch")}
        n = next(iter(sizes.values()), 0)
        for name, size in sizes.items():
            if size != n or not size:
                raise TrainingError(
                    f"`{self._task.name}`: each tensor of a batch must have a row for each example to be shared over "
                    f"{n_processes()} processes, but `{name}` has {size} and the first {n}; train in one process."
                )
        if not n:
            raise TrainingError(f"`{self._task.name}` must give batches of tensors to be shared, but gave none in one.")
        return n


def rows_of(batch: Any, rows: Any) -> Any:
    """Some rows of every tensor in a batch of nested mappings and sequences."""
    if isinstance(batch, Tensor):
        return batch[rows]
    if isinstance(batch, Mapping):
        return {name: rows_of(each, rows) for name, each in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(rows_of(each, rows) for each in batch)
    return batch
