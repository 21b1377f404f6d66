"""What a profile notes of its batches: sizes, losses, tokens, what was skipped, and the data's fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
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
        scale: The factor on every loss; see `observer.in_range`.
    """

    losses: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    tokens: int = 0
    skipped: int = 0
    first_size: int = 0
    digests: list[str] = field(default_factory=list)
    scale: float = 1.0

    def weigh(self, batch: Any) -> float:
        """The batch's weight; 0 for an empty one."""
        size = _size(batch)
        if not size:
            return 0.0
        self.first_size = self.first_size or size
        return size / self.first_size

    def count(self, batch: Any, loss: float) -> None:
        """Takes note of a batch that counts."""
        self.losses.append(loss)
        self.sizes.append(_size(batch))
        if (ids := _entry(batch, "input_ids")) is not None:
            mask = attention_mask(batch)
            self.tokens += int(mask.sum()) if mask is not None else ids.numel()
        shapes_and_sums = ((tuple(tensor.shape), float(tensor.cpu().double().sum())) for tensor in _tensors(batch))
        text = "".join(repr(each) for each in shapes_and_sums)  # on the CPU, since MPS has no doubles
        self.digests.append(hashlib.sha256(text.encode()).hexdigest())

    @classmethod
    def together(cls, tallies: Sequence[Tally]) -> Tally:
        """One tally of all processes, in units of the first that has a batch."""
        first = next((tally for tally in tallies if tally.losses), tallies[0])
        return cls(
            losses=[loss for tally in tallies for loss in tally.losses],
            sizes=[size for tally in tallies for size in tally.sizes],
            tokens=sum(tally.tokens for tally in tallies),
            skipped=sum(tally.skipped for tally in tallies),
            first_size=first.first_size,
            digests=[digest for tally in tallies for digest in tally.digests],
            scale=first.scale,
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


def check_loss(loss: Any) -> Tensor:
    """The loss, if it is one that can be differentiated; it may not be finite.

    Raises:
        ProfileError: It is no scalar tensor, or needs no gradient.
    """
    if not isinstance(loss, Tensor) or loss.ndim:
        raise ProfileError(f"`loss_fn` must return a scalar tensor, but returned {_describe(loss)}")
    if not loss.requires_grad and bool(loss.isfinite()):
        raise ProfileError(
            "the loss must depend on a target module, but depends on none; check `targets` and `loss_fn`."
        )
    return loss


def _describe(loss: Any) -> str:
    if loss is None:
        return "None; do the batches have labels?"
    if isinstance(loss, Tensor):
        return f"a tensor of shape {tuple(loss.shape)}; take its mean or sum."
    return f"{type(loss).__name__}; return the loss alone."


def attention_mask(batch: Any) -> Tensor | None:
    """The batch's mask of tokens against padding, (batch, length), if it has one of that shape."""
    mask = _entry(batch, "attention_mask")
    return mask if mask is not None and mask.ndim == 2 else None


def _leaves(batch: Any, name: Any = None) -> Iterator[tuple[Any, Tensor]]:
    """The tensors of a batch of nested mappings and sequences in their order, each with the key that it stands under."""
    if isinstance(batch, Tensor):
        yield name, batch
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from _leaves(value, key)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _leaves(value, name)


def _tensors(batch: Any) -> list[Tensor]:
    return [tensor for _, tensor in _leaves(batch)]


def _entry(batch: Any, key: str) -> Tensor | None:
    """The first tensor under a key, at any depth."""
    return next((tensor for name, tensor in _leaves(batch) if name == key), None)


def _size(batch: Any) -> int:
    """Examples: the first dimension of the first tensor that has one; 1 without."""
    return next((len(tensor) for tensor in _tensors(batch) if tensor.ndim), 1)
