"""Allocations to and from plain PEFT: `LoraConfig` out and in, and the ranks a PEFT model really carries."""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from peft.tuners.lora.layer import MultiheadAttention
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from torch import nn

from rankscope.adapters.dormant import is_dormant
from rankscope.adapters.live import (
    adapted_parameters,
    check_block_names,
    check_config,
    check_may_sleep,
    is_offloaded,
    lora_layers,
)
from rankscope.adapters.patterns import alpha_for, most_common, name_fields, value_patterns
from rankscope.adapters.requests import Resize
from rankscope.adapters.resize import resize_adapters
from rankscope.adapters.selection import adapted_targets, taken_for_experts
from rankscope.adapters.sidecar import check_weights_fit
from rankscope.allocation import RankAllocation
from rankscope.exceptions import AllocationError, FileFormatError
from rankscope.files import read_json, replacing
from rankscope.targets import TargetModule, find_targets, unwrapped

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

    Modules are selected by the last parts of their names, and an anchored, escaped regex excludes all others, so that no
    other module is adapted by accident; those of rank 0 are left out. By default every module keeps the same scaling,
    whatever its rank: alpha is
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
        peft_kwargs["alpha_pattern"] = value_patterns(alphas, peft_kwargs["lora_alpha"])
    rank = most_common(adapted)
    return LoraConfig(r=rank, rank_pattern=value_patterns(adapted, rank), **name_fields(adapted), **peft_kwargs)


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
    return _allocation(targets, _pattern_ranks(config, matched), "lora-config")


def _pattern_ranks(config: LoraConfig, names: Iterable[str]) -> dict[str, int]:
    """The rank of each module by `rank_pattern`, whose first match wins: pattern by pattern, so that each is compiled once."""
    patterns = config.rank_pattern or {}
    if not isinstance(patterns, Mapping):
        raise AllocationError(f"`rank_pattern` must be a mapping from regexes to ranks, but got {patterns!r}.")
    ranks = dict.fromkeys(names, config.r)
    left = set(ranks)
    for pattern, rank in patterns.items():
        found = {name for name in left if get_pattern_key([pattern], name) == pattern}
        ranks.update(dict.fromkeys(found, rank))
        left -= found
    return ranks


def _allocation(targets: Sequence[TargetModule], ranks: Mapping[str, int], strategy: str) -> RankAllocation:
    """Of adapters that exist, whose ranks may be above the full one."""
    known = tuple(
        replace(
            t, existing_rank=ranks[t.name] if type(ranks.get(t.name)) is int and ranks[t.name] > t.full_rank else None
        )
        for t in targets
    )
    return RankAllocation.from_ranks(known, ranks, strategy=strategy)


def from_peft_model(
    model: PeftModel, targets: Sequence[TargetModule] | None = None, *, adapter_name: str | None = None
) -> RankAllocation:
    """The ranks that a PEFT model really carries, read from its LoRA layers and not from its config.

    Args:
        model: A `peft.PeftModel` with a LoRA adapter, also as `torch.compile` or DDP wraps it.
        targets: The target modules to report; modules without an adapter get rank 0. Default: the adapted modules. Adapters on
            parameters (fused experts, PEFT's `target_parameters`) have no place in an allocation and are left out.
        adapter_name: Which adapter; default: the active one.

    Raises:
        AllocationError: The model has no such LoRA adapter, or several active ones and none is named.
    """
    model = unwrapped(model)
    if not isinstance(model, PeftModel):
        raise AllocationError(
            f"`model` must be a peft.PeftModel, but is a {type(model).__name__}; wrap it with get_peft_model."
        )
    active = [adapter_name] if adapter_name else model.active_adapters
    if len(active) > 1:
        raise AllocationError(f"`adapter_name` must say which of the active adapters {active} is meant, but is None.")
    adapter = next(iter(active), "default")
    kind = model.peft_config[adapter].peft_type if adapter in model.peft_config else PeftType.LORA
    if kind != PeftType.LORA:
        raise AllocationError(f"adapter {adapter!r} must be LoRA to be read as ranks, but is {kind.value}.")
    layers = lora_layers(model, adapter)
    if attention := [name for name, layer in layers.items() if isinstance(layer, MultiheadAttention)]:
        raise AllocationError(
            f"`model` must carry adapters on modules of one weight, but `{attention[0]}` is an nn.MultiheadAttention; "
            "adapt others."
        )
    ranks = {name: 0 if is_dormant(layer, adapter) else layer.r[adapter] for name, layer in layers.items()}
    if not ranks:
        fused = sorted(adapted_parameters(model, adapter))
        only = f" on modules, only on parameters such as `{fused[0]}`" if fused else ""
        raise AllocationError(
            f"`model` must carry a LoRA adapter {adapter!r}, but has none{only}; it has {sorted(model.peft_config)}."
        )
    return _allocation(find_targets(model, list(ranks)) if targets is None else targets, ranks, "peft-model")


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
    # PEFT takes the name of torch.compile's wrapper for a part of every module's.
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, PeftModel):
        raise AllocationError("`model` must be a base model, but is a PeftModel already; pass `model.unload()`.")
    present = dict(model.named_modules())
    check_block_names(present)
    if missing := [name for name, rank in allocation.ranks.items() if (rank or dormant) and name not in present]:
        raise AllocationError(
            f"`allocation` must be for this model, but {type(model).__name__} has no module {missing[0]!r} "
            f"({len(missing)} missing in all); find targets on this model and allocate again."
        )
    asleep = [Resize(name=name, rank=0) for name, rank in allocation.ranks.items() if rank == 0 and dormant]
    wrapped = dict(allocation.ranks) | {resize.name: 1 for resize in asleep}
    config = to_lora_config(RankAllocation.from_ranks(allocation.targets, wrapped), **peft_kwargs)
    if dormant:
        check_config(config)
    if asleep:
        check_may_sleep(config)
    peft_model = wrap(model, config, wrapped)
    resize_adapters(peft_model, None, asleep)
    return peft_model


def wrap(model: nn.Module, config: PeftConfig, ranks: Mapping[str, int], **options: Any) -> PeftModel:
    """`get_peft_model`, and the proof that PEFT adapts exactly these modules at these ranks.

    Raises:
        AllocationError: It would not, or did not; the model is as it was, but for weights that an initialisation changes.
    """
    names = [name for name, rank in ranks.items() if rank]
    if offloaded := [name for name in names if is_offloaded(model.get_submodule(name))]:
        raise AllocationError(
            f"the weights of `{offloaded[0]}` must be in memory to be adapted, but are offloaded ({len(offloaded)} such), "
            "and PEFT would make an adapter without values; load the model without offloading."
        )
    if config.peft_type == PeftType.LORA and (taken := sorted(taken_for_experts(model, names))):
        raise AllocationError(
            f"the allocation must leave out `{taken[0]}` ({len(taken)} such), whose name PEFT takes for the fused experts of "
            f"{type(model).__name__}; give it rank 0."
        )
    peft_model = get_peft_model(model, config, **options)
    built = {name: layer.r["default"] for name, layer in lora_layers(peft_model, "default").items()}
    built |= {name: layer.r["default"] for name, layer in adapted_parameters(peft_model, "default").items()}
    if odd := sorted(name for name in {*built, *names} if built.get(name, 0) != ranks.get(name, 0)):
        peft_model.unload()
        raise AllocationError(
            f"PEFT must build exactly the ranks asked for, but `{odd[0]}` got {built.get(odd[0], 0)} instead of "
            f"{ranks.get(odd[0], 0)} ({len(odd)} such); leave it out of the target modules."
        )
    return peft_model


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> PeftModel:
    """Wraps `model` (in place) with the adapter that `PeftModel.save_pretrained` left in a folder, trained modules included.

    An adapter whose `task_type` names a class of rankscope's own, which plain PEFT refuses, is loaded into that class only.

    Raises:
        FileFormatError: The folder does not hold an adapter of this model.
    """
    path = Path(folder) / "adapter_config.json"
    values = read_json(path, what="an adapter's config")
    if "peft_type" not in values:
        raise FileFormatError(
            f"`{path}` must hold an adapter's config, but has no `peft_type`; save the adapter again."
        )
    if values.get("task_type") == f"{type(model).__module__}.{type(model).__name__}":
        values["task_type"] = None
    try:
        loaded = PeftModel.from_pretrained(model, str(folder), config=LoraConfig.from_peft_type(**values))
        if loaded.peft_config["default"].peft_type == PeftType.LORA:
            check_weights_fit(loaded, Path(folder), "default")  # PEFT loads what it finds
    except _PEFT_RAISES as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise FileFormatError(
            f"`{folder}` must hold an adapter of this model, but cannot be loaded ({reason}); delete it."
        ) from None
    return loaded


# PEFT does not check a config's values: a wrong one raises whatever its first use raises.
_PEFT_RAISES = (
    OSError,
    ValueError,
    RuntimeError,
    TypeError,
    LookupError,
    AttributeError,
    ImportError,
    SafetensorError,
    re.error,
)


def count_adapter_parameters(model: nn.Module) -> int:
    """The LoRA parameters in a model, counted by `numel` over the factors A and B."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if _FACTOR.search(name))


_FACTOR = re.compile(r"\.lora_(embedding_)?[AB]\.[^.]+(\.weight)?$")  # not the bias that `lora_bias` adds to B
