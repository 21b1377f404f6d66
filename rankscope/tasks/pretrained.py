"""Loading pretrained models and tokenizers from local folders or hub ids: quietly, and with errors of one line."""

from __future__ import annotations

import difflib
import logging
import os
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from rankscope.distributed import seeded
from rankscope.errors import TaskError, one_line
from rankscope.files import replacing_folder

logger = logging.getLogger(__name__)


def dequantised(folder: Path, gguf_file: str) -> Path:
    """The folder beside `folder` with model and tokenizer in plain form, made now or at an earlier call.

    `save_pretrained` refuses a model that was loaded from GGUF, so its weights move into a fresh one.

    Args:
        folder: Holds the GGUF file.
        gguf_file: Its name.

    Raises:
        TaskError: It cannot be read, or the package gguf is missing.
    """
    plain = folder.with_name(f"{folder.name}-plain")
    if plain.is_dir():
        return plain
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise TaskError(
            f"`{gguf_file}` needs the package gguf, but it is not installed; install rankscope[gguf]."
        ) from None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.warning("dequantising %s into %s, once", gguf_file, plain)
    loaded = load_pretrained(AutoModelForCausalLM.from_pretrained, folder, gguf_file=gguf_file)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = type(loaded)(config)
    fresh.load_state_dict(loaded.state_dict())
    with replacing_folder(plain) as temporary:
        fresh.save_pretrained(temporary)
        load_pretrained(AutoTokenizer.from_pretrained, folder, gguf_file=gguf_file).save_pretrained(temporary)
    return plain


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

    check_source(source)
    path = Path(source)
    if path.is_dir() and not (path / "config.json").exists() and "gguf_file" not in options:
        raise TaskError(
            f"`{source}` must be a model folder, but has no config.json; save the model there with save_pretrained."
        )
    try:
        with seeded(seed), _quiet_transformers():
            return load(source, local_files_only=path.is_dir() or is_offline() or not hub_answers(), **options)
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


def check_source(source: str | Path, *, base: Path = Path()) -> None:
    """Checks, without a download, that there is a model that can be loaded.

    Args:
        source: A model folder, or a hub id.
        base: Where a folder of this name was looked for.

    Raises:
        TaskError: There is no such folder (the nearest is named), and it is no hub id, or the hub cannot be asked for it.
    """
    if not str(source).strip():
        raise TaskError("`model` must be a model folder or hub id, but is empty.")
    path = Path(source)
    if os.path.isdir(path):
        return
    is_id = not looks_like_path(source)
    if is_id and (_is_cached(str(source)) or (not is_offline() and hub_answers())):
        return
    parent = (base / path).parent
    near = difflib.get_close_matches(path.name, [p.name for p in parent.glob("*") if p.is_dir()], n=1)
    hint = f"did you mean `{path.with_name(near[0])}`?" if near else "check the path."
    where = f" in {parent.resolve()}, and the hub cannot be asked for it" if is_id else ""
    raise TaskError(f"`{source}` must be a model folder or hub id, but there is no such folder{where}; {hint}")


def looks_like_path(source: str | Path) -> bool:
    """Whether a name cannot be a hub id, which is `name` or `owner/name`."""
    path = Path(source)
    return path.is_absolute() or str(source).startswith((".", "~")) or len(path.parts) > 2


def is_offline() -> bool:
    """Whether the user keeps the hub's client from the network, by HF_HUB_OFFLINE."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


@cache
def hub_answers() -> bool:
    """Whether the hub can be reached; its client would try for a minute."""
    from huggingface_hub import constants

    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # the hub's client may know other certificates
    except OSError:
        return False
    return True


def _is_cached(repo: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(repo, "config.json"), str)
    except HFValidationError as error:
        raise TaskError(f"`{repo}` must be a model folder or hub id, but is neither: {one_line(error)}") from None


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
