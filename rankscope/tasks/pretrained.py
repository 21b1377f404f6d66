"""Loading pretrained models and tokenizers from local folders or hub ids: quietly, and with errors of one line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from rankscope.devices import seeded
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
    from safetensors import SafetensorError

    path = Path(source)
    if not path.exists() and (path.is_absolute() or str(source).startswith(".") or len(path.parts) > 2):
        raise TaskError(f"`{source}` must be a model folder or hub id, but there is no such folder; check the path.")
    if path.is_dir() and not (path / "config.json").exists() and "gguf_file" not in options:
        raise TaskError(
            f"`{source}` must be a model folder, but has no config.json; save the model there with save_pretrained."
        )
    try:
        with seeded(seed), _quiet_transformers():
            return load(source, local_files_only=path.is_dir(), **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        # transformers raises all of them: for files that are missing, unknown, cut or at odds, and for missing packages.
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if "ignore_mismatched_sizes" in reason:  # it points at a report that is kept quiet here
            reason = "its config.json does not fit its weights."
        raise TaskError(f"`{source}` must be a model folder or hub id that loads, but does not: {reason}") from error


def load_model(load: Callable[..., Any], source: str | Path, *, fresh: str | None = None, **options: Any) -> nn.Module:
    """`load_pretrained` for a model, of which only a head may be missing from the checkpoint.

    Args:
        load: A `from_pretrained` of a model.
        source: A local folder, or a hub id.
        fresh: Regex for the beginning of names that may be missing; default: all outside the base model.
        **options: Passed on.

    Raises:
        TaskError: There is nothing that can be loaded, or it lacks other weights: these would be random, unnoticed.
    """
    model, report = load_pretrained(load, source, output_loading_info=True, **options)
    allowed = fresh or rf"(?!{re.escape(model.base_model_prefix)}\.)"
    if missing := sorted(name for name in report["missing_keys"] if not re.match(allowed, name)):
        poolers = all("pooler." in name for name in missing)
        hint = "set `pooling: mean`, which needs no pooler." if poolers else "is it a model of another kind?"
        raise TaskError(
            f"`{source}` must hold the weights of {type(model).__name__}, but lacks {len(missing)} of them, "
            f"as {missing[0]!r}; {hint}"
        )
    assert isinstance(model, nn.Module)
    if Path(source).is_dir():
        model.name_or_path = str(Path(source).resolve())  # type: ignore[assignment]  # goes into saved adapters
    return model


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
