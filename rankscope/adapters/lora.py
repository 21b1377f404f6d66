"""Allocations to and from plain PEFT: `LoraConfig` out and in, and the ranks a PEFT model really carries."""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from torch import nn

from rankscope.adapters.dormant import is_dormant
from rankscope.adapters.patterns import alpha_for, exceptions, most_common, target_pattern
from rankscope.adapters.requests import Resize
from rankscope.adapters.resize import resize_adapters
from rankscope.adapters.selection import adapted_targets
from rankscope.allocation import RankAllocation
from rankscope.exceptions import AllocationError, FileFormatError
from rankscope.files import replacing
from rankscope.targets import TargetModule, find_targets

logger = logging.getLogger(__name__)

DEFAULT_SCALING = 2.0
_OURS = (
    "r",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
    "exclude_modules",
    "layers_to_transform",
    "target_parameters",
)


def to_lora_config(allocation: RankAllocation, *, scaling: float | None = None, **peft_kwargs: Any) -> LoraConfig:
    """A plain `peft.LoraConfig` with exactly an allocation's ranks.

    Modules are matched by one anchored, escaped regex, so that no other module of the model is adapted by accident;
    those of rank 0 are left out. By default every module keeps the same scaling, whatever its rank: alpha is
    `scaling * r` (with `use_rslora=True`: `scaling * sqrt(r)`). Passing `lora_alpha` instead gives PEFT's own
    behaviour, one alpha for all: scaling `alpha / r`, or `alpha / sqrt(r)` with `use_rslora=True`
    (rank-stabilised LoRA, Kalajdzievski, arXiv 2312.03732).

    Args:
        allocation: At least one rank must be above 0.
        scaling: The factor on every module's update; default 2 (alpha = 2 r).
        **peft_kwargs: Anything else that `LoraConfig` takes, as in `task_type="SEQ_CLS"`. DoRA's magnitudes and LoRA
            biases come on top of the allocation's parameters; a warning says so.

    Raises:
        AllocationError: All ranks are 0, or an argument contradicts the allocation.
    """
    adapted = {name: rank for name, rank in allocation.ranks.items() if rank > 0}
    if not adapted:
        raise AllocationError("`allocation` must give at least one module a rank above 0 to become a LoRA config.")
    if clash := [key for key in _OURS if key in peft_kwargs]:
        raise AllocationError(f"`{clash[0]}` follows from the allocation and cannot be passed as well; leave it out.")
    if scaling is not None and "lora_alpha" in peft_kwargs:
        raise AllocationError(
            "`scaling` and `lora_alpha` exclude each other: constant scaling, or one alpha; leave one out."
        )
    for key in ("use_dora", "lora_bias"):
        if peft_kwargs.get(key):
            logger.warning(
                "`%s` adds trainable parameters to the %s of the allocation", key, f"{allocation.parameters:,}"
            )

    if "lora_alpha" not in peft_kwargs:
        factor = DEFAULT_SCALING if scaling is None else scaling
        rslora = bool(peft_kwargs.get("use_rslora"))
        alphas = {name: alpha_for(rank, factor, rslora=rslora) for name, rank in adapted.items()}
        peft_kwargs["lora_alpha"] = most_common(alphas)
        peft_kwargs["alpha_pattern"] = exceptions(alphas)
    return LoraConfig(
        r=most_common(adapted),
        target_modules=target_pattern(adapted),
        rank_pattern=exceptions(adapted),
        **peft_kwargs,
    )


def save_lora_config(config: LoraConfig, path: str | os.PathLike[str]) -> Path:
    """Writes the config as PEFT's own `adapter_config.json`, atomically; returns the path."""
    with tempfile.TemporaryDirectory() as folder, replacing(path) as temporary:
        config.save_pretrained(folder)
        shutil.copyfile(Path(folder) / "adapter_config.json", temporary)
    return Path(path)


def from_lora_config(config: LoraConfig, targets: Sequence[TargetModule]) -> RankAllocation:
    """The ranks that a `peft.LoraConfig` gives to these target modules, by PEFT's own matching rules.

    Raises:
        AllocationError: The config adapts none of them.
        TargetError: PEFT cannot apply the config, or needs the model to know its target modules.
    """
    matched = adapted_targets(config, targets)
    if not matched:
        raise AllocationError(
            f"`config` must adapt at least one of the {len(targets)} target modules, but adapts none."
        )
    patterns = config.rank_pattern or {}
    ranks = {name: patterns.get(get_pattern_key(list(patterns), name), config.r) for name in matched}
    return RankAllocation.from_ranks(targets, ranks, strategy="lora-config")


def from_peft_model(
    model: PeftModel, targets: Sequence[TargetModule] | None = None, *, adapter_name: str | None = None
) -> RankAllocation:
    """The ranks that a PEFT model really carries, read from its LoRA layers and not from its config.

    Args:
        model: A `peft.PeftModel` with a LoRA adapter.
        targets: The target modules to report; modules without an adapter get rank 0. Default: the adapted modules.
        adapter_name: Which adapter; default: the active one.

    Raises:
        AllocationError: The model has no such LoRA adapter.
    """
    if not isinstance(model, PeftModel):
        raise AllocationError(
            f"`model` must be a peft.PeftModel, but is a {type(model).__name__}; wrap it with get_peft_model."
        )
    adapter = adapter_name or model.active_adapter
    ranks = {
        name: 0 if is_dormant(layer, adapter) else layer.r[adapter]
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, LoraLayer) and (adapter in layer.r or is_dormant(layer, adapter))
    }
    if not ranks:
        raise AllocationError(
            f"`model` must carry a LoRA adapter {adapter!r}, but has none; it has {sorted(model.peft_config)}."
        )
    if targets is None:
        targets = find_targets(model, list(ranks))
    return RankAllocation.from_ranks(targets, ranks, strategy="peft-model")


def apply_allocation(
    model: nn.Module, allocation: RankAllocation, *, dormant: bool = False, **peft_kwargs: Any
) -> PeftModel:
    """Wraps `model` (in place) with LoRA of exactly these ranks, and checks that PEFT built what was asked.

    Args:
        model: The base model.
        allocation: For its target modules.
        dormant: True: modules of rank 0 get an adapter too, which sleeps and which `resize_adapters` can wake.
        **peft_kwargs: As `to_lora_config` takes them.

    Raises:
        AllocationError: PEFT built other ranks or another parameter count: the model is not the allocation's.
    """
    if dormant and "lora_alpha" in peft_kwargs:
        raise AllocationError("`dormant` needs one scaling at every rank, which `lora_alpha` is not; pass `scaling`.")
    present = {name for name, _ in model.named_modules()}
    if missing := [name for name, rank in allocation.ranks.items() if (rank or dormant) and name not in present]:
        raise AllocationError(
            f"`allocation` must be for this model, but {type(model).__name__} has no module {missing[0]!r} "
            f"({len(missing)} missing in all); find targets on this model and allocate again."
        )
    asleep = [Resize(name=name, rank=0) for name, rank in allocation.ranks.items() if rank == 0 and dormant]
    wrapped = dict(allocation.ranks) | {resize.name: 1 for resize in asleep}
    config = to_lora_config(RankAllocation.from_ranks(allocation.targets, wrapped), **peft_kwargs)
    peft_model = get_peft_model(model, config)
    resize_adapters(peft_model, None, asleep)
    if from_peft_model(peft_model, allocation.targets) != allocation:
        raise AllocationError(
            "`allocation` must become exactly its ranks in PEFT, but PEFT built others; please report this."
        )
    return peft_model


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> PeftModel:
    """Wraps `model` (in place) with the adapter that `PeftModel.save_pretrained` left in a folder, trained modules included.

    Raises:
        FileFormatError: The folder does not hold an adapter of this model.
    """
    try:
        return PeftModel.from_pretrained(model, str(folder))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise FileFormatError(
            f"`{folder}` must hold an adapter of this model, but cannot be loaded ({str(error).splitlines()[0]}); delete it."
        ) from None


def count_adapter_parameters(model: nn.Module) -> int:
    """The LoRA parameters in a model, counted by `numel` over the factors A and B."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if _FACTOR.search(name))


_FACTOR = re.compile(r"\.lora_(embedding_)?[AB]\.[^.]+(\.weight)?$")  # not the bias that `lora_bias` adds to B
