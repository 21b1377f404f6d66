"""LoRA configs: ranks to a plain `peft.LoraConfig` and back, and what PEFT adapts and rank changes allow under a config."""

from __future__ import annotations

import copy
import logging
import math
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import get_pattern_key
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from rankscope.errors import ModelError, SettingsError, one_line
from rankscope.files import AnyPath, write_json
from rankscope.naming import OUTPUT_EMBEDDING
from rankscope.targets import TargetModule

if TYPE_CHECKING:
    from rankscope.allocation import RankAllocation

logger = logging.getLogger(__name__)

PEFT_PREFIX = "base_model.model."  # of the base model's names inside a PeftModel
MOST_ALTERNATIVES = 256  # side by side in a regex


def to_lora_config(allocation: RankAllocation, *, scaling: float | None = None, **peft_kwargs: Any) -> LoraConfig:
    """Return a plain `peft.LoraConfig` with exactly the allocation's ranks; modules of rank 0 are left out.

    `scaling` is that of every module's update, whatever its rank (default 2): alpha is `scaling * r`, or `scaling * sqrt(r)` with
    `use_rslora=True` (Kalajdzievski, arXiv 2312.03732). `lora_alpha` gives PEFT's own rule instead, one alpha for all. The other
    arguments are fields of `LoraConfig`. A SettingsError if one contradicts the allocation, or if all ranks are 0.
    """
    adapted = {name: rank for name, rank in allocation.ranks.items() if rank > 0}
    if not adapted:
        raise SettingsError("`allocation` must give at least one module a rank above 0 to become a LoRA config.")
    if scaling is not None and "lora_alpha" in peft_kwargs:
        raise SettingsError("`scaling` and `lora_alpha` exclude each other; leave one out.")
    for key in filter(peft_kwargs.get, ("use_dora", "lora_bias")):
        logger.warning("`%s` adds trainable parameters to the %s of the allocation", key, f"{allocation.parameters:,}")
    factor, rslora = 2.0 if scaling is None else scaling, bool(peft_kwargs.get("use_rslora"))
    alphas = {name: alpha_for(rank, factor, rslora=rslora) for name, rank in adapted.items()}
    if "lora_alpha" in peft_kwargs:
        alphas = dict.fromkeys(adapted, peft_kwargs.pop("lora_alpha"))
    ours = rank_fields(adapted, alphas) | name_fields(adapted)
    if clash := [key for key in (*ours, "layers_to_transform", "target_parameters") if key in peft_kwargs]:
        raise SettingsError(f"`{clash[0]}` follows from the allocation and cannot be passed as well; leave it out.")
    return LoraConfig(**ours, **peft_kwargs)


def config_values(config: LoraConfig) -> dict[str, Any]:
    """The config as plain values, as PEFT's own `adapter_config.json` has them."""
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}


def save_lora_config(config: LoraConfig, path: AnyPath) -> Path:
    """Write the config as PEFT's own `adapter_config.json`, atomically; return the path."""
    write_json(path, config_values(config))
    return Path(path)


def from_lora_config(config: LoraConfig, targets: Sequence[TargetModule]) -> dict[str, int]:
    """The ranks that a `peft.LoraConfig` gives to those target modules that it adapts, by PEFT's own matching rules.

    A SettingsError if it adapts none, a ModelError if PEFT cannot apply it or it leaves `target_modules` to PEFT.
    """
    if config.target_modules is None and not config.target_parameters:
        must = "`config` must name its `target_modules`, but leaves them to PEFT's default for the model's architecture"
        raise ModelError(f"{must}; set them to [t.name for t in find_targets(model, config)].")
    patterns, config = config.rank_pattern or {}, _prepared(config)
    config.target_modules = config.target_modules or []
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        linear = (target.name for target in targets if target.kind in ("linear", "conv1d"))
        config.target_modules = {name for name in linear if not OUTPUT_EMBEDDING.fullmatch(name)}
    entries = {field: getattr(config, field) or () for field in ("target_modules", "exclude_modules")}
    lists = {field: frozenset(listed) for field, listed in entries.items() if not isinstance(listed, str)}
    with applied_by_peft("config"):
        names = [target.name for target in targets if _adapts(config, lists, target.name)]
    ranks = dict.fromkeys(_not_saved(names, config), config.r)
    if not ranks:
        raise SettingsError(f"`config` must adapt at least one of the {len(targets)} target modules, but adapts none.")
    if not isinstance(patterns, Mapping):
        raise SettingsError(f"`rank_pattern` must be a mapping from regexes to ranks, but got {patterns!r}.")
    return ranks | {name: patterns[key] for name, key in first_matches(list(patterns), list(ranks)).items()}


def _adapts(config: LoraConfig, lists: Mapping[str, frozenset[str]], name: str) -> bool:
    """Whether PEFT adapts a module: its own rule, shown only those entries of the config's lists that the name ends with."""
    for field, listed in lists.items():
        setattr(config, field, listed.intersection(_ends(name)))
    return bool(check_target_module_exists(config, name))


def _ends(name: str) -> list[str]:
    """The name, and what is left of it after each of its dots."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def first_matches(patterns: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """By name, the first pattern that matches it by PEFT's rule (`get_pattern_key`); names that none matches are left out.

    Tools that write one pattern for each module write plain names. These are looked up, so that the time is linear in them.
    """
    found = dict.fromkeys(names, len(patterns))
    plain, rest, single = _sorted_out(patterns)
    ends: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for name in names:
        for end in _ends(name):
            ends[len(end)].append((end, name))
    for (length, *dots), numbers in plain.items():
        for end, name in ends[length]:
            letters = list(end)
            for place in dots:
                letters[place] = "."
            found[name] = min(found[name], numbers.get("".join(letters), len(patterns)))
    either = re.compile("|".join(rf"(?=(?:.*\.)?(?:{patterns[number]})$)(?P<_{number}>)" for number in rest) or "(?!)")
    for name in names:
        if (match := either.match(name)) and match.lastgroup:
            found[name] = min(found[name], int(match.lastgroup[1:]))
        for number in single:
            if found[name] > number and get_pattern_key(patterns[number : number + 1], name) == patterns[number]:
                found[name] = number
    return {name: patterns[number] for name, number in found.items() if number < len(patterns)}


def _sorted_out(patterns: Sequence[str]) -> tuple[dict[tuple[int, ...], dict[str, int]], list[int], list[int]]:
    """Patterns by number: plain names by length and places of dots for any character, regexes to try together, and the others."""
    plain: dict[tuple[int, ...], dict[str, int]] = defaultdict(dict)
    together, single = list[int](), list[int]()
    for number, pattern in enumerate(patterns):
        if re.fullmatch(r"(?:[\w-]|\\?\.)+", pattern):
            text = pattern.replace("\\.", "\0")
            shape = (len(text), *(place for place, letter in enumerate(text) if letter == "."))
            plain[shape].setdefault(text.replace("\0", "."), number)
        else:
            (together if _stands_alone(pattern) else single).append(number)
    return plain, together, single


def _stands_alone(pattern: str) -> bool:
    """Whether a regex means the same within another: it has no groups, which would be counted differently, nor flags."""
    try:
        compiled = re.compile(pattern)
    except re.error:  # PEFT has it within another
        return False
    return not compiled.groups and compiled.flags == re.UNICODE


# PEFT rewrites a regex in `target_modules` on mixture-of-experts models, but not in `exclude_modules`. Beyond 512 patterns it
# compiles one at each look-up, so there is one pattern for each distinct value, and names that share parts are factored.


def alpha_for(rank: int, scaling: float, *, rslora: bool) -> float:
    """The alpha at which PEFT's scaling (alpha / r, or alpha / sqrt(r)) is `scaling`; an int where it is one."""
    alpha = scaling * (math.sqrt(rank) if rslora else rank)
    return int(alpha) if float(alpha).is_integer() else alpha


def rank_fields(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """`r`, `lora_alpha` and their patterns; the most frequent value, the first among equals, is the config's own."""
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    patterns = {"rank_pattern": value_patterns(ranks, rank), "alpha_pattern": value_patterns(alphas, alpha)}
    return {"r": rank, "lora_alpha": alpha} | patterns


def name_fields(names: Collection[str]) -> dict[str, Any]:
    """`target_modules` and `exclude_modules` that adapt exactly these modules; last parts select, a regex excludes others."""
    last_parts = {name.rpartition(".")[2] for name in names}
    return {"target_modules": last_parts, "exclude_modules": f"(?!{names_regex(names)}$).*"}


def with_ranks(
    config: LoraConfig,
    ranks: Mapping[str, int],
    scalings: Mapping[str, float],
    others: Mapping[str, tuple[int, float]] = {},
) -> LoraConfig:
    """A copy of the config with exactly these ranks and scalings; modules of rank 0 are left out.

    `others` are ranks and alphas, by name, of what the config adapts beside modules.
    """
    config = copy.deepcopy(config)  # the object may be another adapter's, too
    ranks = {name: rank for name, rank in ranks.items() if rank > 0}
    alphas = {name: alpha_for(rank, scalings[name], rslora=config.use_rslora) for name, rank in ranks.items()}
    values = name_fields(ranks) | rank_fields(
        ranks | {name: rank for name, (rank, _) in others.items()},
        alphas | {name: alpha for name, (_, alpha) in others.items()},
    )
    for field, value in (values | {"layers_to_transform": None, "layers_pattern": None}).items():
        setattr(config, field, value)
    if config.init_lora_weights == "orthogonal":  # takes even ranks only; weights are loaded over it
        config.init_lora_weights = True
    return config


def value_patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """A `rank_pattern` or `alpha_pattern`: one regex for each value that is not the default."""
    names: dict[Any, list[str]] = defaultdict(list)
    for name, value in values.items():
        names[value].append(name)
    return {f"^{names_regex(mine)}": value for value, mine in names.items() if value != default}  # PEFT appends `$`


def names_regex(names: Iterable[str]) -> str:
    r"""A regex that fully matches these dotted names and no others; common parts are written once.

    >>> names_regex(["h.0.q", "h.1.q"])
    'h\\.(?:0|1)\\.q'
    """
    following: dict[str, list[str]] = {}
    for name in names:
        first, dot, rest = name.partition(".")
        following.setdefault(first, []).append(dot + rest)
    after: dict[str, str] = {}
    for part, rests in following.items():
        longer = [rest[1:] for rest in rests if rest]
        regex = rf"\.{names_regex(longer)}" if longer else ""
        after[part] = f"(?:{regex})?" if 0 < len(longer) < len(rests) else regex
    return _told_apart(after)


def _told_apart(after: Mapping[str, str]) -> str:
    """A regex for any of these texts, each with its regex behind it.

    An engine tries alternatives one by one, so that many of them are told apart letter by letter.
    """
    if len(after) <= MOST_ALTERNATIVES:
        alike: dict[str, list[str]] = {}
        for part, regex in after.items():
            alike.setdefault(regex, []).append(re.escape(part))
        return _either([_either(parts) + regex for regex, parts in alike.items()])
    by_letter: dict[str, dict[str, str]] = defaultdict(dict)
    for part, regex in after.items():
        by_letter[part[:1]][part[1:]] = regex
    return _either([re.escape(letter) + _told_apart(rests) for letter, rests in by_letter.items()])


def _either(choices: Sequence[str]) -> str:
    return choices[0] if len(choices) == 1 else f"(?:{'|'.join(choices)})"


# --- what PEFT adapts ---------------------------------------------------------------------------------------------

# What PEFT's model classes add to `modules_to_save` when they wrap a model for a task.
_SAVED_FOR_TASK = {"SEQ_CLS": SEQ_CLS_HEAD_NAMES, "TOKEN_CLS": SEQ_CLS_HEAD_NAMES, "QUESTION_ANS": ["qa_outputs"]}

# What PEFT has LoRA layers for, beside the quantised linear modules of other libraries.
_CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.Conv3d
_ADAPTABLE = nn.Linear, nn.Embedding, *_CONVOLUTIONS, nn.MultiheadAttention, Conv1D, BaseTunerLayer


def adapted_modules(config: LoraConfig, model: nn.Module) -> list[str]:
    """Names of the modules that `get_peft_model(model, config)` would adapt, by PEFT's own code; nothing changes."""
    if not isinstance(config, LoraConfig):
        raise ModelError(f"`selection` must be a peft.LoraConfig, but is a {type(config).__name__}; name the modules.")
    matching = _Matching(model, _prepared(config))
    with applied_by_peft("selection"), suppress(_MatchingDone, NoMatchingPeftModuleError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns again when it wraps
        matching.inject_adapter(model, "default")
    return _not_saved(matching.found, matching.peft_config["default"])


@contextmanager
def applied_by_peft(argument: str) -> Iterator[None]:
    """Turn what PEFT raises for a config that it cannot apply, which the caller was given as `argument`, into a ModelError."""
    try:
        yield
    except (ValueError, OverflowError, re.error) as error:
        raise ModelError(f"`{argument}` must be a config that PEFT can apply, but {one_line(error)}") from None


def _prepared(config: LoraConfig) -> LoraConfig:
    """A copy that PEFT may write into, with the heads that its model classes save for the task."""
    config = copy.deepcopy(config)
    heads = _SAVED_FOR_TASK.get(str(getattr(config.task_type, "value", config.task_type)), [])
    config.modules_to_save = [*(config.modules_to_save or []), *heads] or None
    return config


def _not_saved(names: Iterable[str], config: LoraConfig) -> list[str]:
    """Without modules that end, or are in one that ends, with a name of `modules_to_save`: they are trained in full."""
    saved = tuple(config.modules_to_save or ())
    return [
        name for name in names if not any(part.endswith(saved) for part in accumulate(name.split("."), "{}.{}".format))
    ]


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

    transformers 5 fuses the experts of Mixtral, Qwen and others; dense layers and shared experts still have their former names.
    """
    kept = set()
    for last_part in {name.rpartition(".")[2] for name in names}:
        config = LoraConfig(target_modules=[last_part])
        with suppress(ValueError):  # one half of a fused pair
            convert_peft_config_for_transformers(config, model=model, conversions=None)
            kept |= {last_part} & set(config.target_modules)
    return {name for name in names if name.rpartition(".")[2] not in kept}


class _MatchingDone(Exception):  # noqa: N818
    """Raised where PEFT's injection would begin to change the model."""


class _Matching(LoraModel):  # type: ignore[misc]
    """PEFT's tuner without what changes a model: it records the modules that it would adapt, then stops."""

    def __init__(self, model: nn.Module, config: LoraConfig) -> None:
        nn.Module.__init__(self)
        self.model, self.peft_config, self.active_adapter = model, {"default": config}, "default"
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
        kind = type(target)
        known = kind.__module__.startswith(("torch.nn", "transformers.")) or any(target.children())
        if known and not isinstance(target, _ADAPTABLE):
            which = f"a {kind.__name__}, which `{current_key}` is; name the modules inside it."
            raise ValueError(f"LoRA does not adapt {which}")
        self.found.append(current_key)

    def set_adapter(self, adapter_name: Any, inference_mode: bool = False) -> None:
        raise _MatchingDone


# --- configs under which ranks can change -------------------------------------------------------------------------

# These take a part of the initial rank off the base weights, and another part when PEFT loads the adapter.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_config(config: LoraConfig, *, to_zero: bool) -> None:
    """Raise a ModelError unless the ranks of an adapter with this config can change, and fall to 0."""
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(_CHANGE_THE_BASE):
        must = "`init_lora_weights` must leave the base weights as they are where ranks change"
        raise ModelError(f"{must}, but {init!r} takes a part off them; use True, 'gaussian' or 'eva'.")
    variants = {field.name for field in fields(config) if field.metadata.get("is_lora_variant")} - {"use_dora"}
    if used := [init] * (init == "mica") or sorted(name for name in variants if getattr(config, name)):
        raise ModelError(f"the adapter must be plain LoRA or DoRA for its ranks to change; leave out `{used[0]}`.")
    if tied := getattr(config, "target_modules_to_tie", None):
        but = f"but `ensure_weight_tying` ties those of {sorted(tied)}; adapt other modules only."
        raise ModelError(f"adapters must have factors of their own for their ranks to change, {but}")
    if to_zero and config.bias != "none":
        but = f"but is {config.bias!r}, and PEFT would lose their biases; keep rank 1 at least."
        raise ModelError(f'`bias` must be "none" for modules to have rank 0 while they train, {but}')


def check_block_names(names: Collection[str]) -> None:
    """Raise a ModelError if `torch.compile` wraps blocks: PEFT would save adapters under names that no other model has."""
    if wrapped := [name.partition("._orig_mod")[0] for name in names if "._orig_mod" in name]:
        but = f"but `{wrapped[0]}` is wrapped by `torch.compile`, whose name PEFT would save; call its `compile()` instead."
        raise ModelError(f"blocks must be compiled in place, {but}")


def count_adapter_parameters(model: nn.Module) -> int:
    """Count the LoRA parameters of a model, by `numel` over the factors A and B."""
    factor = re.compile(r"\.lora_(embedding_)?[AB]\.[^.]+(\.weight)?$")  # not the bias that `lora_bias` adds to B
    return sum(parameter.numel() for name, parameter in model.named_parameters() if factor.search(name))
