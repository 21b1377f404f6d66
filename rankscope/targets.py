"""Target modules: which modules of a model may carry an adapter, and where each of them sits."""

from __future__ import annotations

import difflib
import hashlib
import logging
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

from rankscope.errors import ModelError, shown
from rankscope.naming import NOT_LINEAR, READS_WEIGHT, describe_modules, find_heads

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

Kind = Literal["linear", "conv1d", "conv2d", "embedding"]
Selection = str | tuple[str, ...]
ALL_LINEAR = "all-linear"

_LEFT_OUT = ("heads", "embeddings", "tied")  # unless they are named in full
_REGEX_SECONDS = 1.0  # for one name
_SAVED = "PEFT trains the module itself (`modules_to_save`)"


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetModule:
    """A module that may carry an adapter.

    >>> TargetModule(name="h.0.fc", in_features=64, out_features=256).rank_cost
    320
    """

    name: str  # dotted, in the base model
    in_features: int  # of a convolution, input channels times the kernel's area; of an embedding, its rows
    out_features: int  # of a convolution, output channels; of an embedding, its width
    tower: str = "model"  # or vision, audio, projector, language, encoder, decoder where a model has several
    block: int | None = None  # index of the transformer block, unique in its tower; None outside blocks
    role: str = ""  # the projection, normalised over architectures: q_proj, o_proj, fc1, …
    kind: Kind = "linear"  # conv1d is transformers' transposed linear module
    # The rank of an adapter that the module already carries, where above the full rank.
    existing_rank: int | None = field(default=None, compare=False, repr=False)

    @property
    def rank_cost(self) -> int:
        """Trainable parameters that one more rank adds: a row of A and a column of B."""
        return self.in_features + self.out_features

    @property
    def full_rank(self) -> int:
        """The largest rank a weight update of this module can have."""
        return min(self.in_features, self.out_features)


def find_targets(model: nn.Module, selection: str | Iterable[str] | Any = ALL_LINEAR) -> tuple[TargetModule, ...]:
    """Finds the target modules of a model, in the model's order.

    Linear modules (also quantised), transformers' Conv1D, convolutions without groups and embeddings may carry an adapter.
    Output heads, embeddings and modules that share their weight are left out unless a list names them in full. Always left out
    are modules where PEFT supports no adapter, those whose parent reads the weight without calling them (nn.MultiheadAttention,
    parts of Mamba), and those that PEFT trains in full (`modules_to_save`).

    Args:
        model: Any torch module. Names are those of the base model inside PEFT, torch.compile, DDP and FSDP.
        selection: `"all-linear"`; a regex for the full name; full names or last parts of names, as PEFT takes them; or a
            `peft.LoraConfig`. What matches nothing raises a `ModelError` that lists near misses.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 8), nn.Linear(8, 2))
    >>> [(target.name, target.rank_cost) for target in find_targets(model)]
    [('1', 12), ('2', 10)]
    """
    if not hasattr(model, "named_modules"):
        raise ModelError(f"`model` must be a torch module, but is {shown(model)}; load it first.")
    targets, why = _candidates(_base_model(model))
    if hasattr(selection, "peft_type"):
        kept = _selected_by_peft(selection, model, targets, why)
    else:
        kept = _selected(_checked(selection), type(model).__name__, targets, why)
    return tuple(target for name, target in targets.items() if name in kept)


def fingerprint_targets(targets: Sequence[TargetModule]) -> str:
    """A short hash of names and shapes: equal for models between which an allocation can be moved."""
    rows = sorted(f"{t.name} {t.in_features} {t.out_features} {t.kind}" for t in targets)
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]


def fused_experts(model: nn.Module) -> list[str]:
    """Parameters that hold several experts in one 3-D tensor, as transformers 5 stores Mixtral's. No adapter here takes them."""
    found = {}
    for name, module in base_modules(model):
        layer = base_layer(module)
        for weight, parameter in layer.named_parameters(prefix=name, recurse=False):
            if parameter.ndim == 3:
                found[weight] = f"{type(layer).__name__} {'.'.join(weight.split('.')[-2:])}"
    return [weight for weight, words in found.items() if re.search("expert|moe", words, re.IGNORECASE)]


_SHARDED = "_fsdp_wrapped_module"
_INNER = {  # the attribute by which each wrapper class holds its module
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "DeepSpeedEngine": "module",
    "FullyShardedDataParallel": _SHARDED,
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}


def unwrapped(model: nn.Module, *, keep: str = _SHARDED) -> nn.Module:
    """The model inside its wrappers; FullyShardedDataParallel stays, as the model does not run without it."""
    while (inner := next((_INNER[kind] for kind in _classes(model) if kind in _INNER), keep)) != keep:
        model = cast("nn.Module", model._modules[inner])
    return model


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names in the base model and modules, PEFT layers for those they wrap, as `named_modules`, without `modules_to_save`."""
    yield from ((name, module) for name, module, saved in _walk(_base_model(model)) if not saved)


def base_layer(module: nn.Module) -> nn.Module:
    """The layer that a PEFT layer wraps; any other module itself."""
    while (inner := module._modules.get("base_layer")) is not None and "BaseTunerLayer" in _classes(module):
        module = inner
    return module


def plain_name(name: str) -> str:
    """A name without the parts that torch.compile, checkpointing and FSDP add; a `module` may be the model's own, and stays."""
    return ".".join(part for part in name.split(".") if part == "module" or part not in _INNER.values())


def _classes(module: nn.Module) -> list[str]:
    """Names of the module's classes, so that their libraries need no import."""
    return [base.__name__ for base in type(module).__mro__]


def _base_model(model: nn.Module) -> nn.Module:
    model = unwrapped(model, keep="")
    if hasattr(model, "peft_config") and "base_model" in model._modules:
        peft: Any = model
        model = peft.get_base_model() if hasattr(peft, "get_base_model") else peft.base_model.model  # PeftMixedModel
    return unwrapped(model, keep="")


def _walk(base: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """Names, modules, and whether PEFT trains the module itself instead of an adapter on it."""
    seen, pending = set(), [("", base, False)]
    while pending:
        name, module, saved = pending.pop()
        module = unwrapped(module, keep="")
        parts = module._modules
        if "original_module" in parts and ("modules_to_save" in parts or "token_adapter" in parts):
            pending.append((name, cast(Any, module).original_module, True))  # a property where tokens are trained
        elif module not in seen:
            seen.add(module)
            yield name, module, saved
            children = reversed(base_layer(module)._modules.items())
            pending += [(f"{name}.{key}".lstrip("."), child, saved) for key, child in children if child is not None]


def _candidates(base: nn.Module) -> tuple[dict[str, TargetModule], dict[str, str]]:
    """Modules that may carry an adapter by their type, and why some are left out by default, or cannot be targets at all."""
    walked = {name: (base_layer(module), saved) for name, module, saved in _walk(base)}
    found = {name: facts for name, (layer, _) in walked.items() if (facts := _kind_and_shape(layer))}
    weights = {name: walked[name][0]._parameters.get("weight") for name in found}
    owners = Counter(id(weight) for weight in weights.values() if weight is not None)
    output = cast(Any, base).get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    heads = {name for name in found if output is not None and walked[name][0] is base_layer(output)} | find_heads(found)
    why: dict[str, str] = {name: "tied" for name in found if owners[id(weights[name])] > 1}
    why |= dict.fromkeys(heads, "heads")
    why |= {name: "embeddings" for name, (kind, *_) in found.items() if kind == "embedding"}
    if hasattr(getattr(base, "config", None), "model_type"):
        from rankscope.lora import refused_by_peft

        why |= {name: f"PEFT refuses it ({reason})" for name, reason in refused_by_peft(base, found).items()}
    targets = {}
    for name, (tower, block, role) in describe_modules(list(found)).items():
        layer, saved = walked[name]
        kind, rows, columns = found[name]
        above, _, child = name.rpartition(".")
        if saved:
            why[name] = _SAVED
        elif not rows or not columns:
            why[name] = "the module has no weights (a width of 0)"
        elif NOT_LINEAR.fullmatch(type(layer).__name__):
            why[name] = f"{type(layer).__name__} computes more than a linear map"
        elif name and above in walked and _reads_weight(walked[above][0], child):
            why[name] = f"{type(walked[above][0]).__name__} reads its weight without calling it"
        sides = {"in_features": rows, "out_features": columns}
        targets[name] = TargetModule(name=name, **sides, tower=tower, block=block, role=role, kind=kind)
    return targets, why


def _kind_and_shape(layer: Any) -> tuple[Kind, int, int] | None:
    """The kind of adapter a layer takes, and its input and output features. Quantised linears subclass nn.Linear."""
    from torch import nn

    if isinstance(layer, nn.Linear):
        return "linear", layer.in_features, layer.out_features
    if hasattr(layer, "nf") and "Conv1D" in _classes(layer):
        return "conv1d", layer.nx, layer.nf
    if isinstance(layer, nn.Conv2d) and layer.groups == 1:  # with groups, PEFT takes only multiples of them as ranks
        return "conv2d", layer.in_channels * math.prod(layer.kernel_size), layer.out_channels
    if isinstance(layer, nn.Embedding):
        return "embedding", layer.num_embeddings, layer.embedding_dim
    return None


def _reads_weight(parent: Any, child: str) -> bool:
    if child in ("linear1", "linear2") and getattr(parent, "activation_relu_or_gelu", False):
        return bool(parent.self_attn.batch_first)  # nn.TransformerEncoderLayer, whose fast path serves every evaluation
    return any(READS_WEIGHT.fullmatch(f"{kind}.{child}") for kind in _classes(parent))


def _checked(selection: Any) -> Selection:
    listed = isinstance(selection, Iterable) and not isinstance(selection, str | bytes | Mapping)
    names = tuple(selection) if listed else (selection,)
    if not names or not all(isinstance(name, str) and name for name in names):
        what = f'"{ALL_LINEAR}", a regex, a list of names or a peft.LoraConfig'
        raise ModelError(f'`selection` must be {what}, but is {shown(selection)}; pass "{ALL_LINEAR}" for all.')
    return names if listed else names[0]


def _selected(
    selection: Selection, model: str, targets: Mapping[str, TargetModule], why: Mapping[str, str]
) -> set[str]:
    """What a regex or a list selects, without what is left out."""
    matched = _match(selection, targets)
    idle = {name: why[name] for name in targets if name in matched and why.get(name) not in (None, *_LEFT_OUT)}
    usable = matched - set(idle)
    in_full = set() if isinstance(selection, str) else set(selection)
    if kept := {name for name in usable if name in in_full or name not in why}:
        if idle and selection != ALL_LINEAR:
            name, reason = next(iter(idle.items()))
            logger.warning("`%s` is no target: %s (%d such modules)", name, reason, len(idle))
        return kept
    if selection == ALL_LINEAR and any(target.kind == "conv2d" for target in targets.values()):
        must = f"must name the convolutions of {model}, which has no linear modules outside its head"
        raise ModelError(f'`selection` {must}, but is "{ALL_LINEAR}"; pass a regex or a list.')
    if usable:
        reasons = sorted({why[name] for name in usable})
        what = f"only {' and '.join(reasons)} in {model}; name them in full to adapt them all the same."
    elif matched:
        what = f"only modules like `{min(matched)}`, where {idle[min(matched)]}; select others."
    else:
        what = f"none in {model}, which has no linear modules; name others."
    must = f"must match a module that may carry an adapter, but {shown(selection)} matches"
    raise ModelError(f"`selection` {must} {what}")


def _selected_by_peft(
    config: Any, model: nn.Module, targets: Mapping[str, TargetModule], why: Mapping[str, str]
) -> set[str]:
    """What PEFT adapts under a LoraConfig and an allocation can give ranks to."""
    from rankscope.lora import adapted_modules

    adapted = [plain_name(name) for name in adapted_modules(config, _base_model(model))]
    kept = {name for name in adapted if name in targets and why.get(name) != _SAVED}
    if not kept:
        what = f"PEFT adapts only {shown(adapted)}" if adapted else "PEFT adapts none"
        must = f"select linear modules, convolutions or embeddings of {type(model).__name__}, but {what}"
        remedy = "check `target_modules`, `exclude_modules`, `layers_to_transform` and `modules_to_save`"
        raise ModelError(f"`selection` must {must}; {remedy}.")
    for name in adapted:
        reason = why.get(name) if name in targets else "ranks cannot be given to it"
        if reason not in (None, _SAVED, *_LEFT_OUT) and not {"original_module", "modules_to_save"} & set(
            name.split(".")
        ):
            logger.warning("PEFT adapts `%s` under this config, but %s", name, reason)
    return kept


def _match(selection: Selection, targets: Mapping[str, TargetModule]) -> set[str]:
    """The names that a selection matches, by PEFT's rules: a regex for the whole name, or names or the ends of names."""
    if selection == ALL_LINEAR:
        return {name for name, target in targets.items() if target.kind in ("linear", "conv1d")}
    if isinstance(selection, str) and (matched := _match_regex(selection, targets)):
        return matched
    by_end: dict[str, set[str]] = defaultdict(set)
    for name in targets:
        parts = name.split(".")
        for start in range(len(parts)):
            by_end[".".join(parts[start:])].add(name)
    unknown = [selection] if isinstance(selection, str) else [entry for entry in selection if entry not in by_end]
    if not unknown:
        return set().union(*(by_end[entry] for entry in selection))
    if (missing := unknown[0]) in by_end:
        remedy = f"a string is a regex for the whole name, so pass [{missing!r}]"
    else:
        ends = list(dict.fromkeys(end for name in targets if not (end := name.rpartition(".")[2]).isdigit()))
        wanted = missing.rpartition(".")[2] if missing.replace(".", "").isidentifier() else missing
        close = difflib.get_close_matches(wanted, ends[:1000], n=3, cutoff=0.5) or ends[:6]
        remedy = f"did you mean {', '.join(map(repr, close))}" if close else "the model has no such modules"
    raise ModelError(f"`selection` must match modules of the model, but {missing!r} matches none; {remedy}.")


def _match_regex(pattern: str, names: Iterable[str]) -> set[str]:
    """The names that a regex matches as a whole. A pattern that backtracks without end is stopped."""
    import regex  # type: ignore[import-untyped]  # unlike `re`, it takes a time limit

    try:
        re.compile(pattern)  # PEFT's engine
        compiled = regex.compile(pattern)
        return {name for name in names if compiled.fullmatch(name, timeout=_REGEX_SECONDS)}
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        raise ModelError(f"`selection` must be a valid regex, but {pattern!r} is not: {error}.") from None
    except TimeoutError:
        found = f"{pattern!r} takes over {_REGEX_SECONDS} s for one name; avoid nested repeats such as `(a+)+`"
        raise ModelError(f"`selection` must be a regex that matches quickly, but {found}.") from None
