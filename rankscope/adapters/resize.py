"""Live resize: new ranks for a PEFT LoRA model while it trains; function, optimizer and config follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from peft import PeftModel
from torch import Tensor
from torch.optim import Optimizer

Shrink = Literal["svd", "drop"]
UnknownState = Literal["refuse", "reset"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resize:
    """One module's new rank.

    Attributes:
        name: Full dotted name in the base model (`TargetModule.name`).
        rank: The new rank; 0 puts the module's adapter to sleep (a later resize wakes it).
        directions: (added, in_features) rows for the new part of A; None: Kaiming uniform, as PEFT does.
    """

    name: str
    rank: int
    directions: Tensor | None = None


def resize_adapters(
    model: PeftModel,
    optimizer: Optimizer | None,
    resizes: Sequence[Resize],
    *,
    adapter_name: str | None = None,
    shrink: Shrink = "drop",
    unknown_state: UnknownState = "refuse",
    generator: torch.Generator | None = None,
) -> None:
    """Skeleton: all of the resizes happen or none.

    Raises:
        AdapterError: The model or a resize.
        OptimizerError: The optimizer.
    """
    raise NotImplementedError
