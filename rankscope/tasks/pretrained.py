"""Loading pretrained models and tokenizers from local folders or hub ids: quietly, and with errors of one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from rankscope.exceptions import TaskError

T = TypeVar("T")


def load_pretrained(load: Callable[..., T], source: str | Path, *, seed: int = 0, **options: Any) -> T:
    """`load(source, **options)`, with fresh weights (a new head) drawn from `seed`, the global generator left alone.

    Args:
        load: A `from_pretrained`.
        source: A local folder, or a hub id.
        seed: Of weights that the checkpoint lacks.
        **options: Passed on.

    Raises:
        TaskError: There is nothing that can be loaded.
    """
    if Path(source).is_dir() and not (Path(source) / "config.json").exists():
        raise TaskError(
            f"`{source}` must be a model folder, but has no config.json; save the model there with save_pretrained."
        )
    try:
        with torch.random.fork_rng(), _quiet_transformers():
            torch.manual_seed(seed)
            return load(source, local_files_only=Path(source).is_dir(), **options)
    except (OSError, ValueError, KeyError) as error:  # transformers raises all three for missing or unknown files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TaskError(f"`{source}` must be a model folder or hub id that loads, but does not: {reason}") from error


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """A fresh head is on purpose: no load report, no progress bar; the user's settings come back."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
