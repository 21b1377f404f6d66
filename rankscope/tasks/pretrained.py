"""Pretrained models: the base of the tasks on them, and loading that is quiet and gives errors of one line."""

from __future__ import annotations

import os
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache, cached_property
from importlib.util import find_spec
from logging import getLogger
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from rankscope.distributed import batch_device, seeded
from rankscope.errors import TaskError, did_you_mean, one_line
from rankscope.files import replacing
from rankscope.tasks.protocol import Batch, Split

T = TypeVar("T")


class PretrainedTask:
    """A task on a model that computes its own loss, and on rows that a `DataLoader` batches."""

    batch_size: int

    @cached_property
    def _loaded(self) -> nn.Module:
        raise NotImplementedError

    @cached_property
    def _rows(self) -> dict[Split, list[dict[str, Any]]]:
        """By split; each row has `labels` and what the model takes."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        """Leave out loaded weights and tokens: worker processes load their own."""
        return {key: value for key, value in vars(self).items() if key not in ("_loaded", "_rows", "_tokenizer")}

    def build_model(self) -> nn.Module:
        """Return the model, with a fresh head if the task has one. Weights are the same at every call."""
        return deepcopy(self._loaded)

    def train_batches(self, seed: int) -> DataLoader[Batch]:
        """Return one epoch, in an order that depends on the seed only."""
        order = torch.randperm(len(self._rows["train"]), generator=torch.Generator().manual_seed(seed))
        return self._batches("train", order.tolist(), self.batch_size)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the model's own loss: the mean cross-entropy."""
        return cast(Tensor, model(**batch).loss)

    def _batches(self, split: Split, order: Sequence[int], batch_size: int) -> DataLoader[Any]:
        # Without a generator of its own, the loader would draw from torch's global one.
        rows: Any = self._rows[split]
        return DataLoader(rows, batch_size, sampler=order, collate_fn=self._collate, generator=torch.Generator())

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return cast(dict[str, Tensor], default_collate(rows))

    def _predictions(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, classes) and labels (n,) that count."""
        return logits, labels

    def _totals(self, model: nn.Module, split: Split, batch_size: int) -> tuple[Tensor, Tensor, int]:
        """Number of correct predictions, summed cross-entropy, and number of labels. The model keeps its mode."""
        from accelerate.utils import send_to_device

        rows, device, was_training = self._rows[split], batch_device(model), model.training
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].get("input_ids", ())))  # wastes least on padding
        correct, loss, count = torch.zeros((), device=device), torch.zeros((), device=device), 0
        model.eval()
        try:
            with torch.no_grad():
                for batch in self._batches(split, order, batch_size):
                    inputs = send_to_device(batch, device)
                    labels = inputs.pop("labels")
                    logits, labels = self._predictions(model(**inputs).logits, labels)
                    correct += (logits.float().argmax(-1) == labels).sum()
                    loss += nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
                    count += len(labels)
        finally:
            model.train(was_training)
        return correct, loss, count


def load_pretrained(load: Callable[..., T], source: str | Path, **options: Any) -> T:
    """Return `load(source, **options)` of a `from_pretrained`. Weights that the checkpoint lacks come from a fixed seed."""
    from safetensors import SafetensorError
    from transformers.utils import logging

    check_source(source)
    path = Path(source)
    if path.is_dir() and not (path / "config.json").exists() and "gguf_file" not in options:
        must = f"`{source}` must be a model folder"
        raise TaskError(f"{must}, but has no config.json; save the model there with save_pretrained.")
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # a fresh head is on purpose
    logging.disable_progress_bar()
    try:
        with seeded(0):
            return load(source, local_files_only=path.is_dir() or not hub_answers(), **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        # transformers raises all of them: for files that are missing, unknown, cut or at odds, and for missing packages.
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if "ignore_mismatched_sizes" in reason:  # it points at a report that is kept quiet here
            reason = "its config.json does not fit its weights."
        raise TaskError(f"`{source}` must be a model folder or hub id that loads, but does not: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def load_model(load: Callable[..., Any], source: str | Path, *, fresh: str | None = None, **options: Any) -> nn.Module:
    """Load a model; raise a TaskError if the checkpoint lacks more than a head, which transformers would draw at random.

    `fresh` is a regex for the beginning of names that may be missing; default: all outside the base model.
    """
    model, report = load_pretrained(load, source, output_loading_info=True, **options)
    allowed = fresh or rf"(?!{re.escape(model.base_model_prefix)}\.)"
    if missing := sorted(name for name in report["missing_keys"] if not re.match(allowed, name)):
        poolers = all("pooler." in name for name in missing)
        hint = "set `pooling: mean`, which needs no pooler." if poolers else "is it a model of another kind?"
        must = f"`{source}` must hold the weights of {type(model).__name__}"
        raise TaskError(f"{must}, but lacks {len(missing)} of them, as {missing[0]!r}; {hint}")
    assert isinstance(model, nn.Module)
    if Path(source).is_dir():
        model.name_or_path = str(Path(source).resolve())  # type: ignore[assignment]  # goes into saved adapters
    return model


def dequantised(folder: Path, gguf_file: str) -> Path:
    """Return the folder beside `folder` with the model of its GGUF file in plain form, made at the first call."""
    plain = folder.with_name(f"{folder.name}-plain")
    if plain.is_dir():
        return plain
    if find_spec("gguf") is None:
        raise TaskError(f"`{gguf_file}` needs the package gguf, but it is not installed; install rankscope[gguf].")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    getLogger(__name__).warning("dequantising %s into %s, once", gguf_file, plain)
    loaded = load_pretrained(AutoModelForCausalLM.from_pretrained, folder, gguf_file=gguf_file)
    tokenizer = load_pretrained(AutoTokenizer.from_pretrained, folder, gguf_file=gguf_file)
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    fresh = type(loaded)(loaded.config)  # `save_pretrained` refuses a model that was loaded from GGUF
    fresh.load_state_dict(loaded.state_dict())
    with replacing(plain, folder=True) as temporary:
        fresh.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return plain


def check_source(source: str | Path, *, base: Path = Path()) -> None:
    """Raise a TaskError if there is no such model folder, looked for in `base`, and the hub cannot be asked for the model."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if not str(source).strip():
        raise TaskError("`model` must be a model folder or hub id, but is empty.")
    path, is_id = Path(source), not looks_like_path(source)
    if os.path.isdir(path):
        return
    try:
        if is_id and (isinstance(try_to_load_from_cache(str(source), "config.json"), str) or hub_answers()):
            return
    except HFValidationError as error:
        raise TaskError(f"`{source}` must be a model folder or hub id, but is neither: {one_line(error)}") from None
    parent = (base / path).parent
    near = (each.name for each in parent.glob("*") if each.is_dir())
    hint = did_you_mean(path.name, near, "check the path.", quoted=lambda name: f"`{path.with_name(name)}`")
    where = f" in {parent.resolve()}, and the hub cannot be asked for it" if is_id else ""
    raise TaskError(f"`{source}` must be a model folder or hub id, but there is no such folder{where}; {hint}")


def looks_like_path(source: str | Path) -> bool:
    """Whether a name cannot be a hub id, which is `name` or `owner/name`."""
    path = Path(source)
    return path.is_absolute() or str(source).startswith((".", "~")) or len(path.parts) > 2


@cache
def hub_answers() -> bool:
    """Whether HF_HUB_OFFLINE is unset and the hub answers within 5 seconds, where its client would try for a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError as error:
        return isinstance(getattr(error, "reason", None), ssl.SSLError)  # the hub's client may know other certificates
    return True
