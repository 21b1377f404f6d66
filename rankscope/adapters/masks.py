"""Skeleton of mask mode: fixed capacity per module, ranks masked; for DDP, FSDP and torch.compile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peft import PeftModel
from torch.optim import Optimizer

from rankscope.adapters.resize import Resize


class RankMasks:
    """The active ranks of every adapter of a model whose parameters keep their shapes (the capacity)."""

    def __init__(self, model: PeftModel, ranks: Mapping[str, int], *, adapter_name: str | None = None) -> None: ...

    @property
    def ranks(self) -> Mapping[str, int]:
        """The active rank of each module."""
        raise NotImplementedError

    def resize(self, resizes: Sequence[Resize], optimizer: Optimizer | None) -> None:
        """As `resize_adapters`, within the capacity; moments of masked components are zeroed."""
        raise NotImplementedError

    def compress(self) -> None:
        """Removes the masks and resizes the adapters to their true ranks."""
        raise NotImplementedError
