"""LoRA configs: ranks to a plain `peft.LoraConfig` and back, and which modules PEFT adapts under a config."""

from __future__ import annotations

import copy
import logging
import math
import os
import re
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from rankscope.errors import ModelError, SettingsError
from rankscope.files import replacing
from rankscope.naming import is_output_embedding
from rankscope.targets import TargetModule

try:
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
except ImportError:  # transformers before 5 has a linear module for each expert, and PEFT converts nothing
    convert_peft_config_for_transformers = None

if TYPE_CHECKING:
    from rankscope.allocation import RankAllocation

logger = logging.getLogger(__name__)

DEFAULT_SCALING = 2.0
PEFT_PREFIX = "base_model.model."  # of the base model's names inside a PeftModel
_FROM_ALLOCATION = (
    "r",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
    "exclude_modules",
    "layers_to_transform",
    "target_parameters",
)


def to_lora_config(allocation: RankAllocation, *, scaling: float | None = None, **peft_kwargs: Any) -> LoraConfig:
    """Return a plain `peft.LoraConfig` with exactly the allocation's ranks; modules of rank 0 are left out.

    By default every module has the same scaling, whatever its rank: alpha is `scaling * r`, or `scaling * sqrt(r)` with
    `use_rslora=True` (Kalajdzievski, arXiv 2312.03732). Passing `lora_alpha` gives PEFT's own rule instead, one alpha for all.

    Args:
        allocation: At least one rank must be above 0.
        scaling: Factor on every module's update; default 2 (alpha = 2 r).
        **peft_kwargs: Other fields of `LoraConfig`, such as `task_type="SEQ_CLS"`. DoRA magnitudes and LoRA biases add
            parameters to the allocation's; a warning says so.

    Raises:
        SettingsError: All ranks are 0, or an argument contradicts the allocation.
    """
    adapted = {name: rank for name, rank in allocation.ranks.items() if rank > 0}
    if not adapted:
        raise SettingsError("`allocation` must give at least one module a rank above 0 to become a LoRA config.")
    if clash := [key for key in _FROM_ALLOCATION if key in peft_kwargs]:
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
    if "lora_alpha" in peft_kwargs:
        alphas = dict.fromkeys(adapted, peft_kwargs.pop("lora_alpha"))
    else:
        factor, rslora = DEFAULT_SCALING if scaling is None else scaling, bool(peft_kwargs.get("use_rslora"))
        alphas = {name: alpha_for(rank, factor, rslora=rslora) for name, rank in adapted.items()}
    return LoraConfig(**rank_fields(adapted, alphas), **name_fields(adapted), **peft_kwargs)


def save_lora_config(config: LoraConfig, path: str | os.PathLike[str]) -> Path:
    """Write the config as PEFT's own `adapter_config.json`, atomically; return the path."""
    with tempfile.TemporaryDirectory() as folder, replacing(path) as temporary:
        config.save_pretrained(folder)
        shutil.copyfile(Path(folder) / "adapter_config.json", temporary)
    return Path(path)


def from_lora_config(config: LoraConfig, targets: Sequence[TargetModule]) -> dict[str, int]:
    """The ranks that a `peft.LoraConfig` gives to those target modules that it adapts, by PEFT's own matching rules.

    Raises:
        SettingsError: The config adapts none of them.
        ModelError: PEFT cannot apply it, or it leaves `target_modules` to PEFT.
    """
    if config.target_modules is None and not config.target_parameters:
        raise ModelError(
            "`config` must name its `target_modules`, but leaves them to PEFT's default for the model's architecture; "
            "set them to [t.name for t in find_targets(model, config)]."
        )
    names = set(adapted_modules(config, _skeleton(targets)))
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        names = {name for name in names if not is_output_embedding(name)}
    ranks = {target.name: config.r for target in targets if target.name in names}
    if not ranks:
        raise SettingsError(f"`config` must adapt at least one of the {len(targets)} target modules, but adapts none.")
    patterns = config.rank_pattern or {}
    if not isinstance(patterns, Mapping):
        raise SettingsError(f"`rank_pattern` must be a mapping from regexes to ranks, but got {patterns!r}.")
    left = set(ranks)
    for pattern, rank in patterns.items():  # the first match wins; pattern by pattern, so that each is compiled once
        found = {name for name in left if get_pattern_key([pattern], name) == pattern}
        ranks |= dict.fromkeys(found, rank)
        left -= found
    return ranks


# --- ranks, alphas and names as fields of a config ----------------------------------------------------------------
#
# PEFT takes regexes in `rank_pattern`, matches `target_modules` by the last parts of a name, and rewrites a regex in
# `target_modules` on mixture-of-experts models. Beyond 512 patterns it compiles one at each look-up, so there is one pattern
# for each distinct value, and names that share parts are factored.


def alpha_for(rank: int, scaling: float, *, rslora: bool) -> float:
    """The alpha at which PEFT's scaling (alpha / r, or alpha / sqrt(r)) is `scaling`; an int where it is one.

    >>> alpha_for(3, 2.0, rslora=False), alpha_for(4, 0.7, rslora=True)
    (6, 1.4)
    """
    alpha = scaling * (math.sqrt(rank) if rslora else rank)
    return int(alpha) if float(alpha).is_integer() else alpha


def rank_fields(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """`r`, `lora_alpha` and their patterns; the most frequent value, the first among equals, is the config's own."""
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": rank,
        "rank_pattern": value_patterns(ranks, rank),
        "lora_alpha": alpha,
        "alpha_pattern": value_patterns(alphas, alpha),
    }


def name_fields(names: Collection[str]) -> dict[str, Any]:
    r"""`target_modules` and `exclude_modules` that adapt exactly the modules of these full names, on every model.

    The last parts of the names select, and a regex excludes all other modules. PEFT leaves this form as it is on
    mixture-of-experts models, and matches it in linear time.

    >>> name_fields(["h.0.q", "h.1.q"])
    {'target_modules': {'q'}, 'exclude_modules': '(?!h\\.(?:0|1)\\.q$).*'}
    """
    last_parts = {name.rpartition(".")[2] for name in names}
    return {"target_modules": last_parts, "exclude_modules": f"(?!{names_regex(names)}$).*"}


def value_patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    r"""A `rank_pattern` or `alpha_pattern`: one regex for each value that is not the default.

    >>> value_patterns({"a": 2, "b.c": 8, "d": 2, "b.e": 8}, default=2)
    {'^b\\.(?:c|e)': 8}
    """
    names: dict[Any, list[str]] = {}
    for name, value in values.items():
        if value != default:
            names.setdefault(value, []).append(name)
    return {f"^{names_regex(members)}": value for value, members in names.items()}  # PEFT appends `$`


def names_regex(names: Iterable[str]) -> str:
    r"""A regex that fully matches these dotted names and no others; common parts are written once.

    >>> names_regex(["h.0.q", "h.0.k", "h.1.q", "h.1.k", "head"])
    '(?:h\\.(?:0|1)\\.(?:q|k)|head)'
    """
    return _factored([name.split(".") for name in names])


def _factored(paths: Iterable[Sequence[str]]) -> str:
    following: dict[str, list[Sequence[str]]] = {}
    for first, *rest in paths:
        following.setdefault(first, []).append(rest)
    alike: dict[str, list[str]] = {}
    for part, rests in following.items():
        longer = [rest for rest in rests if rest]
        regex = rf"\.{_factored(longer)}" if longer else ""
        if longer and len(longer) < len(rests):
            regex = f"(?:{regex})?"
        alike.setdefault(regex, []).append(re.escape(part))
    return _either([_either(parts) + regex for regex, parts in alike.items()])


def _either(choices: Sequence[str]) -> str:
    return choices[0] if len(choices) == 1 else f"(?:{'|'.join(choices)})"


# --- what PEFT adapts ---------------------------------------------------------------------------------------------

# What PEFT's model classes add to `modules_to_save` when they wrap a model for a task.
_SAVED_FOR_TASK = {"SEQ_CLS": SEQ_CLS_HEAD_NAMES, "TOKEN_CLS": SEQ_CLS_HEAD_NAMES, "QUESTION_ANS": ["qa_outputs"]}

# What PEFT has LoRA layers for, beside the quantised linear modules of other libraries.
_ADAPTABLE = (
    *(nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.MultiheadAttention, Conv1D, BaseTunerLayer),
)

_EMPTY: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(1, 1, device="meta"),
    "conv1d": lambda: Conv1D(1, 1),
    "conv2d": lambda: nn.Conv2d(1, 1, 1, device="meta"),
    "embedding": lambda: nn.Embedding(1, 1, device="meta"),
}


def adapted_modules(config: LoraConfig, model: nn.Module) -> list[str]:
    """Names of the modules that `get_peft_model(model, config)` would adapt. Neither the model nor the config changes.

    PEFT's own code decides: defaults by architecture, `all-linear`, `exclude_modules`, `layers_to_transform`, `modules_to_save`.

    Raises:
        ModelError: The config is not LoRA's, PEFT cannot apply it, or it names a module that PEFT cannot adapt.
    """
    if not isinstance(config, LoraConfig):
        raise ModelError(f"`selection` must be a peft.LoraConfig, but is a {type(config).__name__}; name the modules.")
    config = copy.deepcopy(config)  # PEFT writes into it
    if heads := _SAVED_FOR_TASK.get(str(getattr(config.task_type, "value", config.task_type))):
        config.modules_to_save = [*(config.modules_to_save or []), *heads]
    matching = _Matching(model, config)
    try:
        with warnings.catch_warnings():  # PEFT warns again when it wraps
            warnings.simplefilter("ignore")
            matching.inject_adapter(model, "default")
    except (_MatchingDone, NoMatchingPeftModuleError):
        saved = tuple(matching.peft_config["default"].modules_to_save or ())
        return [name for name in matching.found if not _is_saved(name, saved)]
    except (ValueError, OverflowError, re.error) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"`selection` must be a config that PEFT can apply, but {reason}") from None
    raise AssertionError("PEFT's inject_adapter must activate the adapter that it injected")


def refused_by_peft(model: nn.Module, names: Collection[str]) -> dict[str, str]:
    """Which of these modules PEFT cannot adapt by name, and why."""
    config = LoraConfig(target_modules=["unused"])
    matching = _Matching(model, config)
    refused = dict.fromkeys(taken_for_experts(model, names), "it takes the name for the model's fused experts")
    for name in names:
        try:
            matching._check_target_module_compatiblity(config, model, name.rpartition(".")[2])
        except ValueError as error:
            refused[name] = str(error)
    return refused


def taken_for_experts(model: nn.Module, names: Collection[str]) -> set[str]:
    """Which of these modules cannot be adapted by name, since PEFT turns the name into the model's fused experts.

    transformers 5 fuses the experts of Mixtral, Qwen, DeepSeek and others. PEFT converts the experts' former names
    (`gate_proj`, `down_proj`), which dense layers and shared experts still have.
    """
    if convert_peft_config_for_transformers is None:
        return set()
    taken = set()
    for last_part in {name.rpartition(".")[2] for name in names}:
        config = LoraConfig(target_modules=[last_part])
        try:
            convert_peft_config_for_transformers(config, model=model, conversions=None)
        except ValueError:  # one half of a fused pair
            taken.add(last_part)
        else:
            taken |= {last_part} - set(config.target_modules)
    return {name for name in names if name.rpartition(".")[2] in taken}


class _MatchingDone(Exception):  # noqa: N818
    """Raised where PEFT's injection would begin to change the model."""


class _Matching(LoraModel):  # type: ignore[misc]
    """PEFT's tuner without what changes a model: it records the modules that it would adapt, then stops."""

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
        self, config: Any, adapter: Any, target: nn.Module, *_: Any, current_key: str, **options: Any
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


def _is_saved(name: str, saved: tuple[str, ...]) -> bool:
    """Whether the module, or one around it, ends with a name of `modules_to_save`, and is trained in full."""
    parts = name.split(".")
    return any(".".join(parts[:end]).endswith(saved) for end in range(1, len(parts) + 1))


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
