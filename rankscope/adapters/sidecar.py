"""Skeleton: ranks saved beside a checkpoint (`ranks.json`), restored before its weights are loaded."""

from __future__ import annotations

import os
from pathlib import Path

from peft import PeftModel
from torch.optim import Optimizer


def save_ranks(model: PeftModel, folder: str | os.PathLike[str], *, adapter_name: str | None = None) -> Path:
    """Writes the true ranks (0 included) into the checkpoint's folder."""
    raise NotImplementedError


def restore_ranks(
    model: PeftModel,
    folder: str | os.PathLike[str],
    *,
    optimizer: Optimizer | None = None,
    adapter_name: str | None = None,
) -> None:
    """Gives the model the ranks of a checkpoint, so that its weights (and the optimizer's state) can be loaded."""
    raise NotImplementedError
