"""What a profile notes of its batches: sizes, losses, tokens, what was skipped, and the data's fingerprint."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rankscope.exceptions import ProfileError


@dataclass
class Tally:
    """Batch by batch; a batch weighs its number of examples over that of the first.

    Attributes:
        losses: Of the batches that counted.
        sizes: Their numbers of examples.
        tokens: That they hold.
        skipped: Batches whose loss was not finite.
        first_size: Of the first batch.
        digests: One hash a batch.
    """

    losses: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    tokens: int = 0
    skipped: int = 0
    first_size: int = 0
    digests: list[str] = field(default_factory=list)

    def weigh(self, batch: Any) -> float:
        """The batch's weight."""
        size = _size(batch)
        self.first_size = self.first_size or size
        return size / self.first_size

    def count(self, batch: Any, loss: float) -> None:
        """Takes note of a batch that counts."""
        self.losses.append(loss)
        self.sizes.append(_size(batch))
        if isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), Tensor):
            mask = attention_mask(batch)
            self.tokens += int(mask.sum()) if mask is not None else batch["input_ids"].numel()
        text = "".join(repr((tuple(tensor.shape), float(tensor.double().sum()))) for tensor in _tensors(batch))
        self.digests.append(hashlib.sha256(text.encode()).hexdigest())

    @classmethod
    def together(cls, tallies: Sequence[Tally]) -> Tally:
        """One tally of all processes."""
        return cls(
            losses=[loss for tally in tallies for loss in tally.losses],
            sizes=[size for tally in tallies for size in tally.sizes],
            tokens=sum(tally.tokens for tally in tallies),
            skipped=sum(tally.skipped for tally in tallies),
            first_size=tallies[0].first_size,
            digests=[digest for tally in tallies for digest in tally.digests],
        )

    @property
    def weights(self) -> list[float]:
        """Sizes over the first size."""
        return [size / self.first_size for size in self.sizes]

    @property
    def loss(self) -> float:
        """The mean loss over examples."""
        return sum(size * loss for size, loss in zip(self.sizes, self.losses, strict=True)) / sum(self.sizes)

    @property
    def fingerprint(self) -> str:
        """A short hash of shapes and sums of all tensors, whichever process saw them."""
        return hashlib.sha256("".join(sorted(self.digests)).encode()).hexdigest()[:16]

    def check(self, max_skipped: float) -> None:
        """Checks that enough batches counted.

        Raises:
            ProfileError: Fewer than two did, or more than the stated share were skipped.
        """
        total = self.skipped + len(self.losses)
        if self.skipped > max_skipped * total:
            raise ProfileError(
                f"the loss must be finite, but is not in {self.skipped} of {total} batches (at most {max_skipped:.0%} "
                "are skipped); look at these batches, or use float32 or bfloat16."
            )
        if len(self.losses) < 2:
            raise ProfileError(
                f"`batches` must hold at least 2 batches, so that signal can be told from noise, but held "
                f"{len(self.losses)}; pass more, or smaller ones."
            )


def check_loss(loss: Any) -> float:
    """The loss as a number, which may not be finite.

    Raises:
        ProfileError: It is no scalar tensor.
    """
    if not isinstance(loss, Tensor) or loss.ndim:
        raise ProfileError(
            f"`loss_fn` must return a scalar tensor, but returned {type(loss).__name__}; do the batches have labels?"
        )
    value = float(loss.detach())
    if math.isfinite(value) and not loss.requires_grad:
        raise ProfileError(
            "the loss must depend on a target module, but depends on none; check `targets` and `loss_fn`."
        )
    return value


def attention_mask(batch: Any) -> Tensor | None:
    """The batch's mask of tokens against padding, (batch, length), if it has one of that shape."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _tensors(batch: Any) -> list[Tensor]:
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else [batch]
    return [value for value in values if isinstance(value, Tensor)]


def _size(batch: Any) -> int:
    tensors = _tensors(batch)
    return tensors[0].shape[0] if tensors and tensors[0].ndim else 1
