"""Allocations in the words of other tools: PEFT, axolotl, kohya's sd-scripts, unsloth and TRL."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pprint import pformat
from typing import Any

import yaml
from peft import LoraConfig

from rankscope.allocation import RankAllocation
from rankscope.early import check_tool
from rankscope.errors import SettingsError, checked
from rankscope.lora.config import config_values, names_regex, to_lora_config

_UNSLOTH_SAVES = ("embed_tokens", "lm_head")


@checked
def export(
    allocation: RankAllocation,
    to: str,
    *,
    scaling: float | None = None,
    lora_dropout: float = 0.0,
    modules_to_save: Sequence[str] = (),
) -> str:
    r"""The allocation as another tool takes it, as text: exactly these ranks, and modules of rank 0 left out.

    Args:
        allocation: Of the model that the tool will train.
        to: `peft`: `adapter_config.json` of a `LoraConfig`. `axolotl`: keys of its YAML (`lora_target_modules`,
            `lora_rank_pattern`, `lora_alpha_pattern`, docs/lora.qmd there). `kohya`: keys of the TOML that sd-scripts takes as
            `--config_file`, with `network_reg_dims` (docs/flux_train_network.md there), which its networks for Flux, Anima
            and HunyuanImage read. `unsloth` and `trl`: Python.
        scaling: Of every module's update (default 2; alpha is `scaling * r`). kohya has one alpha for all ranks; its alpha 0
            stands for a scaling of 1, the only one that is the same at every rank, and so the default there.
        lora_dropout: Of adapters' inputs.
        modules_to_save: Modules that are trained in full, such as a fresh classifier.

    Raises:
        SettingsError: The tool cannot express this, or all ranks are 0.

    >>> from rankscope import RankAllocation, TargetModule
    >>> targets = tuple(TargetModule(name=f"layers.{i}.q_proj", in_features=8, out_features=8) for i in range(3))
    >>> print(export(RankAllocation(targets, (4, 0, 2)), "axolotl"), end="")
    adapter: lora
    lora_r: 4
    lora_alpha: 8
    lora_dropout: 0.0
    lora_target_modules: layers\.(?:0|2)\.q_proj
    lora_rank_pattern:
      ^layers\.2\.q_proj: 2
    lora_alpha_pattern:
      ^layers\.2\.q_proj: 4
    """
    check_tool(to)
    if scaling is not None and not 0 < scaling < math.inf:
        raise SettingsError(f"`scaling` must be above 0 and finite, but got {scaling:g}; leave it out for the default.")
    if not 0 <= lora_dropout < 1:
        raise SettingsError(f"`lora_dropout` must be at least 0 and below 1, but got {lora_dropout:g}.")
    lora_dropout = float(lora_dropout)
    if to == "kohya":
        return _kohya(allocation, scaling, lora_dropout, modules_to_save)
    options = {"lora_dropout": lora_dropout, "modules_to_save": sorted(modules_to_save) or None}
    return _BY_CONFIG[to](to_lora_config(allocation, scaling=scaling, **options))


def _peft(config: LoraConfig) -> str:
    return json.dumps(config_values(config), indent=2) + "\n"


def _axolotl(config: LoraConfig) -> str:
    """`lora_target_modules` as a regex, which PEFT matches with the whole name; axolotl passes no `exclude_modules` on.

    Its schema (src/axolotl/utils/schemas/peft.py) takes whole numbers as alpha.
    """
    alphas = {"lora_alpha": config.lora_alpha, **config.alpha_pattern}
    if odd := [alpha for alpha in alphas.values() if int(alpha) != alpha or alpha < 1]:
        must = "must give whole numbers as alpha (scaling times rank) for axolotl"
        raise SettingsError(f"`scaling` {must}, but gives {odd[0]:g}; choose another.")
    values: dict[str, Any] = {
        "adapter": "lora",
        "lora_r": config.r,
        "lora_alpha": int(config.lora_alpha),
        "lora_dropout": config.lora_dropout,
        "lora_target_modules": adapted_regex(config),
    }
    if config.rank_pattern:
        values["lora_rank_pattern"] = dict(config.rank_pattern)
    if config.alpha_pattern:
        values["lora_alpha_pattern"] = {pattern: int(alpha) for pattern, alpha in config.alpha_pattern.items()}
    if config.modules_to_save:
        values["lora_modules_to_save"] = list(config.modules_to_save)
    return yaml.safe_dump(values, sort_keys=False, width=10**6, allow_unicode=True)


def adapted_regex(config: LoraConfig) -> str:
    """The regex of exactly the modules that a config of `to_lora_config` adapts: its `exclude_modules` excludes all others."""
    excluded: str = config.exclude_modules
    return excluded.removeprefix("(?!").removesuffix("$).*")


def _kohya(
    allocation: RankAllocation, scaling: float | None, lora_dropout: float, modules_to_save: Sequence[str]
) -> str:
    """Ranks by regex, the first match wins; the last one gives rank 0, no adapter, to all other modules.

    Networks match either the whole name (Anima) or search in the name with underscores behind a prefix (Flux, HunyuanImage).
    """
    if scaling not in (None, 1, 1.0):
        why = "which has one alpha for all ranks; with its alpha 0 every module's scaling is 1"
        raise SettingsError(f"`scaling` must be 1 for kohya, {why}, but got {scaling:g}; leave it out.")
    if modules_to_save:
        raise SettingsError(
            f"kohya trains adapters only, so that `{min(modules_to_save)}` cannot be saved; leave it out."
        )
    ranks = {name: rank for name, rank in allocation.ranks.items() if rank}
    if not ranks:
        raise SettingsError("`allocation` must give at least one module a rank above 0 to be exported.")
    if odd := [name for name in ranks if set(name) & set(",='\"")]:
        raise SettingsError(f"kohya separates patterns by `,` and `=`, which `{odd[0]}` holds; give it rank 0.")
    pairs = []
    for rank in dict.fromkeys(ranks.values()):
        regex = names_regex(name for name in ranks if ranks[name] == rank).replace(r"\.", "[._]")
        pairs.append(f"^(?:lora_(?:unet|te[0-9]*)_)?{regex}$={rank}")
    dropout = f"network_dropout = {lora_dropout}\n" if lora_dropout else ""
    return (
        f"network_dim = {Counter(ranks.values()).most_common(1)[0][0]}\n"
        "network_alpha = 0 # alpha is each module's rank: scaling 1\n"
        f"{dropout}network_args = ['network_reg_dims={','.join(pairs)},.*=0']\n"
    )


def _unsloth(config: LoraConfig) -> str:
    """Keyword arguments of `get_peft_model`, which passes those that it does not know on to `LoraConfig`."""
    saved = list(config.modules_to_save or ())
    targets = sorted(config.target_modules)
    if wrong := [name for name in saved if name not in _UNSLOTH_SAVES]:
        raise SettingsError(
            f"unsloth trains only embed_tokens and lm_head in full, but got `{wrong[0]}`; leave it out."
        )
    if wrong := [name for name in targets if name in _UNSLOTH_SAVES]:
        raise SettingsError(f"unsloth trains `{wrong[0]}` in full instead of an adapter on it; give it rank 0.")
    lines = ["model = FastLanguageModel.get_peft_model(", "    model,", *_arguments(config), ")"]
    return "\n".join(["from unsloth import FastLanguageModel", "", *lines]) + "\n"


def _trl(config: LoraConfig) -> str:
    head = ["from peft import LoraConfig", "from trl import SFTTrainer", ""]
    config.task_type = "CAUSAL_LM"  # what SFTTrainer trains
    tail = ["trainer = SFTTrainer(model, args=args, train_dataset=train_dataset, peft_config=peft_config)"]
    return "\n".join([*head, "peft_config = LoraConfig(", *_arguments(config), ")", *tail]) + "\n"


def _arguments(config: LoraConfig) -> list[str]:
    """The fields that an allocation sets, as lines of keyword arguments."""
    fields: Mapping[str, Any] = {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": sorted(config.target_modules),
        "exclude_modules": config.exclude_modules,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
    }
    if config.task_type:
        fields = {"task_type": config.task_type, **fields}
    if config.modules_to_save:
        fields = {**fields, "modules_to_save": list(config.modules_to_save)}
    return [
        f"    {name}={pformat(value, width=10**6, compact=True, sort_dicts=False)}," for name, value in fields.items()
    ]


_BY_CONFIG: Mapping[str, Callable[[LoraConfig], str]] = {
    "peft": _peft, "axolotl": _axolotl, "unsloth": _unsloth, "trl": _trl,
}  # fmt: skip
