"""Adapters as files: read and written without the base model, and padded to one rank for servers."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from rankscope.allocation import RankAllocation
from rankscope.early import ADAPTER_CONFIG as CONFIG
from rankscope.early import ADAPTER_WEIGHTS as WEIGHTS
from rankscope.early import check_adapter
from rankscope.errors import FileError, ModelError, checked, one_line
from rankscope.files import AnyPath, read_json, read_tensors, replacing, seal_tensors
from rankscope.lora.config import PEFT_PREFIX, check_config, save_lora_config
from rankscope.naming import describe_modules
from rankscope.targets import Kind, TargetModule

# What vLLM takes as `max_lora_rank`: https://docs.vllm.ai/en/v0.14.0/api/vllm/config/lora/ (MaxLoRARanks).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

_FACTOR_A = re.compile(rf"(?:{re.escape(PEFT_PREFIX)})?(.*)\.lora_(?:A\.weight|embedding_A)")
CARD, RANKS_TITLE = "README.md", "## Ranks"  # the model card, and its first section that is of this adapter only
_OPTIONS = "model_kwargs.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedAdapter:
    """A LoRA adapter as PEFT's `save_pretrained` wrote it; modules have their names in the base model."""

    folder: Path
    config: LoraConfig
    tensors: Mapping[str, Tensor]  # all that the file holds, trained modules and magnitudes included
    keys: Mapping[str, tuple[str, str]]  # of A, (rank, inputs), and B, (outputs, rank), in `tensors`, by module
    scalings: Mapping[str, float]  # the factor on `B @ A`

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each module, from the shape of its factors."""
        return {name: len(self.tensors[key]) for name, (key, _) in self.keys.items()}

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A module's (rank, inputs) and (outputs, rank); kernels of convolutions are flattened."""
        a, b = (self.tensors[key].flatten(1) for key in self.keys[name])
        return a, b

    @property
    def allocation(self) -> RankAllocation:
        """The ranks, over targets whose shapes the factors tell."""
        places, targets = describe_modules(list(self.keys)), []
        for name, (key, _) in self.keys.items():
            a, b = self.factors(name)
            shape = {"in_features": a.shape[1], "out_features": len(b)}
            kind: Kind = "embedding" if "embedding" in key else "conv2d" if self.tensors[key].ndim == 4 else "linear"
            above = len(a) if len(a) > min(shape.values()) else None
            tower, block, role = places[name]
            targets.append(
                TargetModule(name=name, **shape, tower=tower, block=block, role=role, kind=kind, existing_rank=above)
            )
        return RankAllocation.from_ranks(targets, self.ranks, strategy="adapter")


def read_adapter(folder: AnyPath) -> SavedAdapter:
    """Read an adapter's folder; a FileError if it holds none, a ModelError if its ranks cannot be changed in the file."""
    folder = Path(folder)
    config = _read_config(folder / CONFIG)
    path = next(folder / name for name in WEIGHTS if (folder / name).exists())  # which `check_adapter` has looked for
    tensors = read_tensors(path, what="an adapter's weights")
    keys, scalings = {}, {}
    for key, a in sorted(tensors.items(), key=lambda item: _natural(item[0])):  # nearly the model's order
        if not (match := _FACTOR_A.fullmatch(key)):
            continue
        name, twin = match[1], key.replace(".lora_A.", ".lora_B.").replace(".lora_embedding_A", ".lora_embedding_B")
        if ".base_layer" in f".{name}":
            what = "an nn.MultiheadAttention or fused experts"
            raise ModelError(f"the adapter must be on modules of one weight, but `{name}` is of {what}; adapt others.")
        if (b := tensors.get(twin)) is None or min(a.ndim, b.ndim) < 2:
            raise FileError(f"`{path}` must hold both factors of `{name}`, but does not; save the adapter again.")
        if b.shape[1] != len(a):
            why = "as on convolutions with groups" if a.ndim > 2 else "the file mixes two adapters"
            raise ModelError(f"the factors of `{name}` must have one rank, but have {len(a)} and {b.shape[1]}, {why}.")
        rank, alpha = (
            _pattern(config.rank_pattern, name, config.r),
            _pattern(config.alpha_pattern, name, config.lora_alpha),
        )
        if rank != len(a):
            where = f"{len(a)} in the weights and {rank} in {CONFIG}"
            raise FileError(
                f"`{folder}` must be of one adapter, but `{name}` has rank {where}; save the adapter again."
            )
        keys[name] = key, twin
        scalings[name] = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    if not keys:
        raise FileError(f"`{path}` must hold LoRA factors, but holds none; save the adapter again.")
    return SavedAdapter(folder=folder, config=config, tensors=tensors, keys=keys, scalings=scalings)


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts block 10 behind block 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _read_config(path: Path) -> LoraConfig:
    """The config of a LoRA adapter whose ranks can change."""
    check_adapter(path.parent)
    values = read_json(path, what="an adapter's config")
    if (kind := values.get("peft_type")) != "LORA":
        raise ModelError(f"`{path.parent}` must hold a LoRA adapter, but `peft_type` is {kind!r}; use another.")
    known = {field.name for field in fields(LoraConfig)} - {"task_type"}
    try:
        config = LoraConfig(**{key: value for key, value in values.items() if key in known})
        ranks = [config.r, *(config.rank_pattern or {}).values()]
        alphas = [config.lora_alpha, *(config.alpha_pattern or {}).values()]
        if not all(type(rank) is int and rank > 0 for rank in ranks) or not all(
            float(alpha) == alpha for alpha in alphas
        ):
            raise ValueError(f"ranks {ranks}, alphas {alphas}")
        config.task_type = values.get("task_type")  # PEFT refuses those of `load_adapter`, a class of rankscope's own
    except Exception as error:  # PEFT checks no values: a wrong one raises whatever its first use raises
        raise FileError(
            f"`{path}` must hold a LoRA config, but cannot be read ({one_line(error)}); save it again."
        ) from None
    if config.target_parameters:
        raise ModelError(
            f"the adapter must be on modules, but `{path.parent}` also adapts parameters (fused experts): "
            f"{', '.join(sorted(config.target_parameters))}; adapt modules only."
        )
    check_config(config, to_zero=False)
    return config


def _pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """A module's value by PEFT's own matching."""
    return (patterns or {}).get(get_pattern_key((patterns or {}).keys(), name), default)


def write_adapter(adapter: SavedAdapter, folder: AnyPath, config: LoraConfig, tensors: Mapping[str, Tensor]) -> Path:
    """Write weights and config as PEFT reads them, with what stands beside the adapter; the folder is replaced as a whole."""
    from safetensors.torch import save_file

    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG).exists():
        raise FileError(f"`{folder}` must be new or an adapter's folder, but holds other files; choose another.")
    with replacing(folder, folder=True) as new:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, new / WEIGHTS[0], {"format": "pt"})
        seal_tensors(new / WEIGHTS[0])
        save_lora_config(config, new / CONFIG)
        if (options := adapter.folder / _OPTIONS).exists():
            shutil.copyfile(options, new / _OPTIONS)
        if (card := adapter.folder / CARD).exists():  # its ranks and results are the old adapter's
            text = card.read_text(encoding="utf-8", errors="replace").partition(f"\n{RANKS_TITLE}\n")[0]
            parameters = sum(tensors[key].numel() for pair in adapter.keys.values() for key in pair if key in tensors)
            ranks = f"{parameters:,} adapter parameters. Made from the adapter `{adapter.folder.resolve().name}`."
            (new / CARD).write_text(f"{text}\n{RANKS_TITLE}\n\n{ranks}\n", encoding="utf-8")
    return folder


# --- one rank for all -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedAdapter:
    """What `pad_adapter` wrote."""

    path: Path
    largest: int  # the largest rank that a module needs
    rank: int  # that of every module in the file
    not_in_vllm: tuple[str, ...]  # features of the adapter that vLLM does not load


@checked
def pad_adapter(adapter: AnyPath, out: AnyPath) -> PaddedAdapter:
    """Write a LoRA adapter with one rank and one scaling, which computes the same function: factors are padded with zeros.

    The rank is the least of those that vLLM takes as `--max-lora-rank` (1, 8, 16, 32, 64, 128, 256, 320, 512;
    https://docs.vllm.ai/en/v0.14.0/api/vllm/config/lora/) at which every module fits. Modules without an adapter stay without.
    Where scalings differ, B takes up the difference, in float32 unless a power of two tells them apart.

    A FileError if `adapter` is no adapter's folder, a ModelError if it is not plain LoRA, rsLoRA or DoRA, or above rank 512.
    """
    saved = read_adapter(adapter)
    largest = max(saved.ranks.values())
    if largest > VLLM_RANKS[-1]:
        raise ModelError(
            f"the largest rank must be at most {VLLM_RANKS[-1]} for vLLM, but is {largest}; shrink it first."
        )
    rank = next(each for each in VLLM_RANKS if each >= largest)
    common = max(saved.scalings.values())
    tensors = dict(saved.tensors)
    for name, (key_a, key_b) in saved.keys.items():
        a, b = tensors[key_a], tensors[key_b]
        bias, added = key_b.replace(".weight", ".bias"), rank - len(a)
        if (ratio := saved.scalings[name] / common) != 1.0:
            b = _times(b, ratio)
            if bias != key_b and bias in tensors:
                tensors[bias] = _times(tensors[bias], ratio)
        tensors[key_a] = torch.cat([a, a.new_zeros(added, *a.shape[1:])])
        tensors[key_b] = torch.cat([b, b.new_zeros(len(b), added, *b.shape[2:])], dim=1)
    config = _read_config(saved.folder / CONFIG)
    config.r, config.rank_pattern, config.alpha_pattern, config.use_rslora = rank, {}, {}, False
    config.lora_alpha = int(common * rank) if float(common * rank).is_integer() else common * rank
    missing = {"DoRA": config.use_dora, "`modules_to_save`": config.modules_to_save, "biases": config.bias != "none"}
    path = write_adapter(saved, out, config, tensors)
    not_in_vllm = tuple(what for what, used in missing.items() if used)
    return PaddedAdapter(path=path, largest=largest, rank=rank, not_in_vllm=not_in_vllm)


def _times(tensor: Tensor, ratio: float) -> Tensor:
    """The product, in the tensor's own type where that is exact."""
    exact = math.frexp(ratio)[0] == 0.5
    return tensor * ratio if exact else (tensor.double() * ratio).to(torch.promote_types(tensor.dtype, torch.float32))
