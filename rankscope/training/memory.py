"""How much memory a fine-tuning takes, estimated from a model's shapes alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rankscope.allocation import RankAllocation
from rankscope.distributed import best_device, mixed_dtype
from rankscope.naming import name_towers
from rankscope.targets import find_targets

_ORDER = {"vision": 0, "audio": 0, "projector": 1}  # of towers in a forward pass; all others come last
_FLOAT = 4  # bytes


def estimate_memory(
    model: nn.Module, allocation: RankAllocation, *, batch_size: int, max_length: int
) -> dict[str, int]:
    """Estimate the bytes that training an allocation takes on one device, by what they are for. The model may be on meta.

    With P adapter parameters, b rows and T tokens a row (`max_length`; in a vision tower, patches of one image):

    - `weights`: elements of the frozen model times the bytes of their dtype.
    - `adapters`, `gradients`, `optimizer`: 4 P, 4 P and 8 P, as adapters train in float32, and AdamW keeps two moments.
    - `activations`: b T (in + out) c, summed over all linear modules from the first adapter on, heads apart; c is 2 in mixed
      precision, else 4. What precedes the first adapter keeps nothing. In GPT's layer of width h that is 16 h c, beside 17 h c
      in Korthikanti et al. (arXiv 2205.05198, equation 1 without attention scores, which fused attention does not keep).
    - `logits`: 8 b T V, for float32 logits over V words and their gradient.

    Buffers of kernels, fragmentation and the device's context are not counted, nor is gradient checkpointing.
    """
    parameters = list(model.parameters())
    half = any(p.dtype in (torch.bfloat16, torch.float16) for p in parameters) or mixed_dtype(best_device())
    bytes_each = 2 if half else _FLOAT
    tokens = tokens_by_tower(model, max_length=max_length)
    first = min((_depth(t.tower, t.block) for t in allocation.targets if allocation.ranks[t.name]), default=(9, 0))
    kept = [target for target in find_targets(model) if _depth(target.tower, target.block) >= first]
    widths = sum(tokens.get(target.tower, max_length) * target.rank_cost for target in kept)
    vocabulary = getattr(_text_config(model), "vocab_size", 0) if getattr(model, "lm_head", None) is not None else 0
    return {
        "weights": sum(p.numel() * p.element_size() for p in parameters),
        "adapters": _FLOAT * allocation.parameters,
        "gradients": _FLOAT * allocation.parameters,
        "optimizer": 2 * _FLOAT * allocation.parameters,
        "activations": batch_size * widths * bytes_each,
        "logits": 2 * _FLOAT * batch_size * max_length * vocabulary,
    }


def describe_towers(model: nn.Module, allocation: RankAllocation) -> list[dict[str, Any]]:
    """Each tower's weights, blocks and target modules, the cost of rank 1 there, and what the allocation gives it."""
    owned: Counter[str] = Counter()
    for name, parameter in model.named_parameters():  # tied ones once
        owned[name.rpartition(".")[0]] += parameter.numel()
    weights: Counter[str] = Counter()
    for module, tower in name_towers(list(owned)).items():
        weights[tower] += owned[module]
    rows, spent = [], allocation.parameters_by_tower
    for tower in sorted(weights, key=lambda tower: _ORDER.get(tower, 2)):
        members = [target for target in allocation.targets if target.tower == tower]
        ranks = [allocation.ranks[target.name] for target in members]
        parameters = spent.get(tower, 0)
        row = {"tower": tower, "weights": weights[tower], "blocks": len({t.block for t in members} - {None})}
        row |= {"modules": len(members), "rank_cost": sum(t.rank_cost for t in members), "parameters": parameters}
        row |= {"share": parameters / max(allocation.parameters, 1), "mean_rank": sum(ranks) / max(len(ranks), 1)}
        rows.append(row)
    return rows


def tokens_by_tower(model: nn.Module, *, max_length: int) -> Mapping[str, int]:
    """Tokens of a row in the vision tower and the projector, for one image a row; other towers have `max_length`.

    Where images have any size, as in Qwen2-VL, their tokens fill the whole row.
    """
    config: Any = getattr(model, "config", None)
    vision = getattr(config, "vision_config", None)
    if vision is None:
        return {}
    merged = (getattr(vision, "spatial_merge_size", None) or getattr(config, "scale_factor", None) or 1) ** 2
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    patches = (size // patch) ** 2 if isinstance(size, int) and isinstance(patch, int) else merged * max_length
    return {"vision": patches, "projector": patches // merged}


def _text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _depth(tower: str, block: int | None) -> tuple[int, int]:
    """How late in a forward pass a module comes."""
    return _ORDER.get(tower, 2), -1 if block is None else block
