"""Allocations to and from plain PEFT: `LoraConfig` out and in, and the ranks a PEFT model really carries."""

from __future__ import annotations

import copy
import logging
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import MultiheadAttention
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from torch import nn
from transformers.pytorch_utils import Conv1D

from rankscope.allocation import RankAllocation
from rankscope.errors import FileError, ModelError, SettingsError
from rankscope.files import read_json, replacing
from rankscope.lora.checkpoint import check_weights_fit
from rankscope.lora.resize import (
    Resize,
    adapted_parameters,
    alpha_for,
    check_block_names,
    check_config,
    check_may_sleep,
    is_dormant,
    is_offloaded,
    lora_layers,
    most_common,
    name_fields,
    resize_adapters,
    value_patterns,
)
from rankscope.naming import is_output_embedding
from rankscope.targets import TargetModule, find_targets, unwrapped

logger = logging.getLogger(__name__)


try:
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
except ImportError:  # transformers before 5 has a linear module for each expert, and PEFT converts nothing
    convert_peft_config_for_transformers = None


# What PEFT's model classes add to `modules_to_save` when they wrap a model for a task.
_SAVED_FOR_TASK = {"SEQ_CLS": SEQ_CLS_HEAD_NAMES, "TOKEN_CLS": SEQ_CLS_HEAD_NAMES, "QUESTION_ANS": ["qa_outputs"]}


def adapted_modules(config: LoraConfig, model: nn.Module) -> list[str]:
    """Names of the modules that `get_peft_model(model, config)` adapts, if any. Neither the model nor the config changes.

    Every rule is PEFT's own: defaults by architecture, `all-linear`, `exclude_modules`, `layers_to_transform`,
    `modules_to_save`, and what PEFT refuses.

    Raises:
        ModelError: The config is not LoRA's, is one that PEFT cannot apply, or names a module that PEFT refuses.
    """
    if not isinstance(config, LoraConfig):
        raise ModelError(f"`selection` must be a peft.LoraConfig, but is a {type(config).__name__}; name the modules.")
    matching = _Matching(model, _prepared(config))
    try:
        with warnings.catch_warnings():  # PEFT says the same again when it wraps
            warnings.simplefilter("ignore")
            matching.inject_adapter(model, "default")
    except (_MatchingDone, NoMatchingPeftModuleError):
        saved = tuple(matching.peft_config["default"].modules_to_save or ())
        return [name for name in matching.found if not _is_saved(name, saved)]
    except (ValueError, OverflowError, re.error) as error:
        raise ModelError(
            f"`selection` must be a config that PEFT can apply, but {' '.join(str(error).split())}"
        ) from None
    raise AssertionError("PEFT's inject_adapter must activate the adapter that it injected")


def adapted_targets(config: LoraConfig, targets: Sequence[TargetModule]) -> set[str]:
    """Names of those target modules that a config adapts, judged by their names and kinds alone.

    Raises:
        ModelError: As `adapted_modules`; also where the config leaves `target_modules` to PEFT's choice by architecture.
    """
    if config.target_modules is None and not config.target_parameters:
        raise ModelError(
            "`config` must name its `target_modules`, but leaves them to PEFT's default for the model's architecture; "
            "set them to [t.name for t in find_targets(model, config)]."
        )
    names = set(adapted_modules(config, _skeleton(targets)))
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        names = {name for name in names if not is_output_embedding(name)}
    return names & {target.name for target in targets}


def refused_by_peft(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Which of these modules PEFT cannot adapt by name, and why."""
    names = list(names)
    config = LoraConfig(target_modules=["unused"])
    matching = _Matching(model, config)
    refused = dict.fromkeys(taken_for_experts(model, names), "it takes the name for the model's fused experts")
    for name in names:
        try:
            matching._check_target_module_compatiblity(config, model, name.rsplit(".", 1)[-1])
        except ValueError as error:
            refused[name] = str(error)
    return refused


def taken_for_experts(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Which of these modules cannot be adapted by name, since PEFT turns the name into the model's fused experts.

    transformers 5 fused the experts of Mixtral, Qwen, DeepSeek and others; PEFT converts what used to be their names
    (`gate_proj`, `down_proj`), though dense layers and shared experts are still called so.
    """
    if convert_peft_config_for_transformers is None:
        return set()
    last_parts: dict[str, set[str]] = {}
    for name in names:
        last_parts.setdefault(name.rsplit(".", 1)[-1], set()).add(name)
    return set().union(*(found for part, found in last_parts.items() if not _survives(part, model)))


def _survives(last_part: str, model: nn.Module) -> bool:
    config = LoraConfig(target_modules=[last_part])
    try:
        convert_peft_config_for_transformers(config, model=model, conversions=None)
    except ValueError:  # one half of a fused pair
        return False
    return last_part in config.target_modules


class _MatchingDone(Exception):  # noqa: N818
    """Raised where PEFT's injection would begin to change the model."""


class _Matching(LoraModel):  # type: ignore[misc]
    """PEFT's tuner with the parts that change a model taken out: it records what it would adapt, then stops."""

    def __init__(self, model: nn.Module, config: LoraConfig) -> None:
        nn.Module.__init__(self)
        self.model = model
        self.peft_config = {"default": config}
        self.active_adapter = "default"
        self.targeted_module_names: list[str] = []
        self.targeted_parameter_names: list[str] = []
        self.found: list[str] = []

    def _prepare_model(self, peft_config: LoraConfig, model: nn.Module) -> None:
        if peft_config.layer_replication:
            raise ValueError("`layer_replication` makes modules that the base model lacks.")

    def _create_and_replace(
        self,
        lora_config: Any,
        adapter_name: Any,
        target: Any,
        target_name: Any,
        parent: Any,
        current_key: str,
        **options: Any,
    ) -> None:
        if options.get("parameter_name") is not None:  # one of `target_parameters`, which are no modules
            return
        ours = type(target).__module__.startswith(("torch.nn", "transformers.")) or any(target.children())
        if ours and not isinstance(target, _ADAPTABLE):
            raise ValueError(
                f"LoRA does not adapt a {type(target).__name__}, which `{current_key}` is; name the modules inside it."
            )
        self.found.append(current_key)

    def set_adapter(self, adapter_name: Any, inference_mode: bool = False) -> None:
        raise _MatchingDone


# What PEFT has LoRA layers for, beside the quantised linear modules of other libraries.
_ADAPTABLE = (
    nn.Linear,
    nn.Embedding,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.MultiheadAttention,
    Conv1D,
    BaseTunerLayer,
)


def _is_saved(name: str, saved: tuple[str, ...]) -> bool:
    """Whether PEFT will train the module, or one around it, in full: it wraps what ends with a name of `modules_to_save`."""
    parts = name.split(".")
    return any(".".join(parts[:end]).endswith(saved) for end in range(1, len(parts) + 1))


def _prepared(config: LoraConfig) -> LoraConfig:
    """A copy that PEFT may write into, with the heads that its model classes save for the task."""
    config = copy.deepcopy(config)
    if saved := _SAVED_FOR_TASK.get(str(getattr(config.task_type, "value", config.task_type))):
        config.modules_to_save = [*(config.modules_to_save or []), *saved]
    return config


def _skeleton(targets: Sequence[TargetModule]) -> nn.Module:
    """A model of empty modules with the names and kinds of the targets."""
    root = nn.Module()
    for target in targets:
        parent = root
        *path, last = target.name.split(".")
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, _EMPTY[target.kind]())
    return root


_EMPTY: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(1, 1, device="meta"),
    "conv1d": lambda: Conv1D(1, 1),
    "conv2d": lambda: nn.Conv2d(1, 1, 1, device="meta"),
    "embedding": lambda: nn.Embedding(1, 1, device="meta"),
}


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
        SettingsError: All ranks are 0, or an argument contradicts the allocation.
    """
    adapted = {name: rank for name, rank in allocation.ranks.items() if rank > 0}
    if not adapted:
        raise SettingsError("`allocation` must give at least one module a rank above 0 to become a LoRA config.")
    if clash := [key for key in _OURS if key in peft_kwargs]:
        raise SettingsError(f"`{clash[0]}` follows from the allocation and cannot be passed as well; leave it out.")
    if scaling is not None and "lora_alpha" in peft_kwargs:
        raise SettingsError(
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
        SettingsError: The config adapts none of them.
        ModelError: PEFT cannot apply the config, or needs the model to know its target modules.
    """
    matched = adapted_targets(config, targets)
    if not matched:
        raise SettingsError(f"`config` must adapt at least one of the {len(targets)} target modules, but adapts none.")
    return _allocation(targets, _pattern_ranks(config, matched), "lora-config")


def _pattern_ranks(config: LoraConfig, names: Iterable[str]) -> dict[str, int]:
    """The rank of each module by `rank_pattern`, whose first match wins: pattern by pattern, so that each is compiled once."""
    patterns = config.rank_pattern or {}
    if not isinstance(patterns, Mapping):
        raise SettingsError(f"`rank_pattern` must be a mapping from regexes to ranks, but got {patterns!r}.")
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
        SettingsError: The model has no such LoRA adapter, or several active ones and none is named.
    """
    model = unwrapped(model)
    if not isinstance(model, PeftModel):
        raise SettingsError(
            f"`model` must be a peft.PeftModel, but is a {type(model).__name__}; wrap it with get_peft_model."
        )
    active = [adapter_name] if adapter_name else model.active_adapters
    if len(active) > 1:
        raise SettingsError(f"`adapter_name` must say which of the active adapters {active} is meant, but is None.")
    adapter = next(iter(active), "default")
    kind = model.peft_config[adapter].peft_type if adapter in model.peft_config else PeftType.LORA
    if kind != PeftType.LORA:
        raise SettingsError(f"adapter {adapter!r} must be LoRA to be read as ranks, but is {kind.value}.")
    layers = lora_layers(model, adapter)
    if attention := [name for name, layer in layers.items() if isinstance(layer, MultiheadAttention)]:
        raise SettingsError(
            f"`model` must carry adapters on modules of one weight, but `{attention[0]}` is an nn.MultiheadAttention; "
            "adapt others."
        )
    ranks = {name: 0 if is_dormant(layer, adapter) else layer.r[adapter] for name, layer in layers.items()}
    if not ranks:
        fused = sorted(adapted_parameters(model, adapter))
        only = f" on modules, only on parameters such as `{fused[0]}`" if fused else ""
        raise SettingsError(
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
        SettingsError: PEFT built other ranks or another parameter count: the model is not the allocation's.
    """
    if dormant and "lora_alpha" in peft_kwargs:
        raise SettingsError("`dormant` needs one scaling at every rank, which `lora_alpha` is not; pass `scaling`.")
    # PEFT takes the name of torch.compile's wrapper for a part of every module's.
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, PeftModel):
        raise SettingsError("`model` must be a base model, but is a PeftModel already; pass `model.unload()`.")
    present = dict(model.named_modules())
    check_block_names(present)
    if missing := [name for name, rank in allocation.ranks.items() if (rank or dormant) and name not in present]:
        raise SettingsError(
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
        SettingsError: It would not, or did not; the model is as it was, but for weights that an initialisation changes.
    """
    names = [name for name, rank in ranks.items() if rank]
    if offloaded := [name for name in names if is_offloaded(model.get_submodule(name))]:
        raise SettingsError(
            f"the weights of `{offloaded[0]}` must be in memory to be adapted, but are offloaded ({len(offloaded)} such), "
            "and PEFT would make an adapter without values; load the model without offloading."
        )
    if config.peft_type == PeftType.LORA and (taken := sorted(taken_for_experts(model, names))):
        raise SettingsError(
            f"the allocation must leave out `{taken[0]}` ({len(taken)} such), whose name PEFT takes for the fused experts of "
            f"{type(model).__name__}; give it rank 0."
        )
    peft_model = get_peft_model(model, config, **options)
    built = {name: layer.r["default"] for name, layer in lora_layers(peft_model, "default").items()}
    built |= {name: layer.r["default"] for name, layer in adapted_parameters(peft_model, "default").items()}
    if odd := sorted(name for name in {*built, *names} if built.get(name, 0) != ranks.get(name, 0)):
        peft_model.unload()
        raise SettingsError(
            f"PEFT must build exactly the ranks asked for, but `{odd[0]}` got {built.get(odd[0], 0)} instead of "
            f"{ranks.get(odd[0], 0)} ({len(odd)} such); leave it out of the target modules."
        )
    return peft_model


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> PeftModel:
    """Wraps `model` (in place) with the adapter that `PeftModel.save_pretrained` left in a folder, trained modules included.

    An adapter whose `task_type` names a class of rankscope's own, which plain PEFT refuses, is loaded into that class only.

    Raises:
        FileError: The folder does not hold an adapter of this model.
    """
    path = Path(folder) / "adapter_config.json"
    values = read_json(path, what="an adapter's config")
    if "peft_type" not in values:
        raise FileError(f"`{path}` must hold an adapter's config, but has no `peft_type`; save the adapter again.")
    if values.get("task_type") == f"{type(model).__module__}.{type(model).__name__}":
        values["task_type"] = None
    try:
        loaded = PeftModel.from_pretrained(model, str(folder), config=LoraConfig.from_peft_type(**values))
        if loaded.peft_config["default"].peft_type == PeftType.LORA:
            check_weights_fit(loaded, Path(folder), "default")  # PEFT loads what it finds
    except _PEFT_RAISES as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise FileError(
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
