"""Language models that come as GGUF, dequantised once into an ordinary model folder, which then loads in a tenth of a second."""

from __future__ import annotations

import logging
from pathlib import Path

from rankscope.exceptions import TaskError
from rankscope.files import replacing_folder
from rankscope.tasks.pretrained import load_pretrained

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
