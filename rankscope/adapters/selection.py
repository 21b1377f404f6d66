"""The modules that PEFT adapts under a `LoraConfig`, found by PEFT's own code without touching the model."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn
from transformers.pytorch_utils import Conv1D

try:
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
except ImportError:  # transformers before 5 has a linear module for each expert, and PEFT converts nothing
    convert_peft_config_for_transformers = None

from rankscope.exceptions import TargetError
from rankscope.naming import is_output_embedding
from rankscope.targets import TargetModule

# What PEFT's model classes add to `modules_to_save` when they wrap a model for a task.
_SAVED_FOR_TASK = {"SEQ_CLS": SEQ_CLS_HEAD_NAMES, "TOKEN_CLS": SEQ_CLS_HEAD_NAMES, "QUESTION_ANS": ["qa_outputs"]}


def adapted_modules(config: LoraConfig, model: nn.Module) -> list[str]:
    """Names of the modules that `get_peft_model(model, config)` adapts, if any. Neither the model nor the config changes.

    Every rule is PEFT's own: defaults by architecture, `all-linear`, `exclude_modules`, `layers_to_transform`,
    `modules_to_save`, and what PEFT refuses.

    Raises:
        TargetError: The config is not LoRA's, is one that PEFT cannot apply, or names a module that PEFT refuses.
    """
    if not isinstance(config, LoraConfig):
        raise TargetError(f"`selection` must be a peft.LoraConfig, but is a {type(config).__name__}; name the modules.")
    matching = _Matching(model, _prepared(config))
    try:
        with warnings.catch_warnings():  # PEFT says the same again when it wraps
            warnings.simplefilter("ignore")
            matching.inject_adapter(model, "default")
    except (_MatchingDone, NoMatchingPeftModuleError):
        saved = tuple(matching.peft_config["default"].modules_to_save or ())
        return [name for name in matching.found if not _is_saved(name, saved)]
    except (ValueError, OverflowError, re.error) as error:
        raise TargetError(
            f"`selection` must be a config that PEFT can apply, but {' '.join(str(error).split())}"
        ) from None
    raise AssertionError("PEFT's inject_adapter must activate the adapter that it injected")


def adapted_targets(config: LoraConfig, targets: Sequence[TargetModule]) -> set[str]:
    """Names of those target modules that a config adapts, judged by their names and kinds alone.

    Raises:
        TargetError: As `adapted_modules`; also where the config leaves `target_modules` to PEFT's choice by architecture.
    """
    if config.target_modules is None and not config.target_parameters:
        raise TargetError(
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
