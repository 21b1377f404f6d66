"""Target modules: finding them in a model, and naming the tower, block and role of each.

Nothing here needs torch until `find_targets` is called.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import re
import reprlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

from rankscope.errors import ModelError
from rankscope.naming import describe_modules, find_heads
from rankscope.naming import name_block as name_block
from rankscope.naming import name_role as name_role
from rankscope.naming import name_towers as name_towers

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)


Kind = Literal["linear", "conv1d", "conv2d", "embedding"]
LeftOut = Literal["heads", "embeddings", "tied"]

ALL_LINEAR = "all-linear"
REGEX_SECONDS = 1.0  # for one name
LEFT_OUT: tuple[LeftOut, ...] = ("heads", "embeddings", "tied")


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetModule:
    """A module that may carry an adapter.

    Attributes:
        name: Full dotted name inside the base model.
        in_features: Input features; for a convolution, input channels times the kernel's area; for an
            embedding, the number of rows.
        out_features: Output features (channels of a convolution, width of an embedding).
        tower: `vision`, `audio`, `projector` or `language`; `encoder` or `decoder`; `model` where there is one tower only.
        block: Index of the transformer block, unique inside its tower; None outside blocks.
        role: The projection, normalised over architectures: `q_proj`, `o_proj`, `fc1`, …
        kind: `linear`, `conv1d` (transformers' transposed linear), `conv2d` or `embedding`.
        existing_rank: The rank of an adapter that the module carries already, where that is above the full rank; else None.

    >>> TargetModule(name="h.0.fc", in_features=64, out_features=256).rank_cost
    320
    """

    name: str
    in_features: int
    out_features: int
    tower: str = "model"
    block: int | None = None
    role: str = ""
    kind: Kind = "linear"
    existing_rank: int | None = field(default=None, compare=False, repr=False)

    @property
    def rank_cost(self) -> int:
        """Trainable parameters that one more rank adds: a row of A and a column of B."""
        return self.in_features + self.out_features

    @property
    def full_rank(self) -> int:
        """The largest rank a weight update of this module can have."""
        return min(self.in_features, self.out_features)


def find_targets(
    model: nn.Module,
    selection: str | Iterable[str] | Any = ALL_LINEAR,
    *,
    include: Collection[LeftOut] = (),
) -> tuple[TargetModule, ...]:
    """Finds the target modules of a model, in the model's order.

    Linear modules (quantised ones included), transformers' Conv1D, convolutions without groups and embeddings may carry an
    adapter. Output heads, embeddings and modules that share their weight with another are left out, unless they are named in
    full or asked for through `include`. Modules where an adapter can do nothing are always left out: those that PEFT refuses,
    those whose weight is read without calling them (the output projection of nn.MultiheadAttention, parts of Mamba), and those
    that a PEFT model trains in full through `modules_to_save`.

    Args:
        model: Any torch module, also inside PEFT, torch.compile (as a whole or block by block), DistributedDataParallel or
            FullyShardedDataParallel: names and shapes are those of the base model.
        selection: `"all-linear"`; a regex that must match the full name; names, each matching a module by its full
            name or its last parts (PEFT's rule); or a `peft.LoraConfig`, which selects what PEFT adapts under it.
        include: Any of `"heads"`, `"embeddings"`, `"tied"`.

    Raises:
        ModelError: Nothing matches, or one of the names matches nothing; near misses are named.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 8), nn.Linear(8, 2))
    >>> [(target.name, target.rank_cost) for target in find_targets(model)]
    [('1', 12), ('2', 10)]
    """
    _check(model, include)
    candidates = _candidates(model)
    idle = _idle(model, candidates)
    if hasattr(selection, "peft_type"):
        kept = _selected_by_peft(selection, model, candidates, idle)
    else:
        kept = _selected(_checked(selection), model, candidates, idle, include)
    described = describe_modules(list(candidates))
    return tuple(_target(name, candidates[name], *described[name]) for name in candidates if name in kept)


def fingerprint_targets(targets: Sequence[TargetModule]) -> str:
    """A short hash of the names and shapes of target modules: equal for models an allocation can be moved between."""
    text = "\n".join(
        f"{t.name} {t.in_features} {t.out_features} {t.kind}" for t in sorted(targets, key=lambda t: t.name)
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --- the base model inside its wrappers ---------------------------------------------------------------------------


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel and torch.compile, which runs as well without them."""
    while (inner := _inner_name(model)) and inner != _SHARDED:
        model = cast("nn.Module", model._modules[inner])
    return model


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module with its name in the base model, in the order of `named_modules`.

    Wrappers (torch.compile, DistributedDataParallel, FullyShardedDataParallel, activation checkpointing) leave no trace in
    the names. A PEFT layer stands for the layer that it wraps; what `modules_to_save` trains in full does not occur.
    """
    yield from ((name, module) for name, module, saved in _walk(_base_model(model)) if not saved)


def base_layer(module: nn.Module) -> nn.Module:
    """The layer that a PEFT layer wraps; any other module itself."""
    while (inner := module._modules.get("base_layer")) is not None and _is_of(module, "BaseTunerLayer"):
        module = inner
    return module


def _is_of(module: nn.Module, kind: str) -> bool:
    """Whether a class of that name is among the module's, without an import of the library that has it."""
    return any(base.__name__ == kind for base in type(module).__mro__)


def plain_name(name: str) -> str:
    """A module's or parameter's name without the parts that `torch.compile`, checkpointing and FSDP add to it.

    DistributedDataParallel's `module` stays, which a module of the model itself may be called.
    """
    return ".".join(part for part in name.split(".") if part == "module" or part not in _INNER.values())


# The attribute by which each wrapper holds the module inside it.
_SHARDED = "_fsdp_wrapped_module"
_INNER = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "DeepSpeedEngine": "module",
    "FullyShardedDataParallel": _SHARDED,
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}


def _inner_name(module: nn.Module) -> str | None:
    return next((_INNER[base.__name__] for base in type(module).__mro__ if base.__name__ in _INNER), None)


def _within(module: nn.Module) -> nn.Module:
    while inner := _inner_name(module):
        module = cast("nn.Module", module._modules[inner])
    return module


def _base_model(model: nn.Module) -> nn.Module:
    model = _within(model)
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        return _within(cast(Any, model).get_base_model())
    if hasattr(model, "peft_config") and "base_model" in model._modules:  # PeftMixedModel
        return _within(cast(Any, model).base_model.model)
    return model


def _walk(
    module: nn.Module, name: str = "", saved: bool = False, seen: set[nn.Module] | None = None
) -> Iterator[tuple[str, nn.Module, bool]]:
    """Names, modules, and whether PEFT trains the module itself instead of an adapter on it."""
    seen = set() if seen is None else seen
    module = _within(module)
    parts = module._modules
    if "original_module" in parts and ("modules_to_save" in parts or "token_adapter" in parts):
        yield from _walk(cast(Any, module).original_module, name, True, seen)  # a property where tokens are trained
        return
    if module in seen:
        return
    seen.add(module)
    yield name, module, saved
    for key, child in base_layer(module)._modules.items():
        if child is not None:
            yield from _walk(child, f"{name}.{key}" if name else key, saved, seen)


# --- which modules ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    module: nn.Module
    kind: Kind
    parent: nn.Module | None
    saved: bool


def fused_experts(model: nn.Module) -> list[str]:
    """Names of parameters that hold the weights of several experts in one 3-D tensor: no adapter here takes them.

    So transformers 5 keeps Mixtral's, Qwen's and DeepSeek's experts; earlier versions had a linear module for each.
    """
    found = []
    for name, module in base_modules(model):
        layer = base_layer(module)
        for weight, parameter in layer.named_parameters(recurse=False):
            if parameter.ndim == 3 and _EXPERTS.search(f"{type(layer).__name__} {name.rpartition('.')[2]} {weight}"):
                found.append(f"{name}.{weight}".removeprefix("."))
    return found


_EXPERTS = re.compile(r"expert|moe", re.IGNORECASE)


def _candidates(model: nn.Module) -> dict[str, _Candidate]:
    """What may carry an adapter by its type, by name."""
    found: dict[str, nn.Module] = {}
    candidates: dict[str, _Candidate] = {}
    for name, module, saved in _walk(_base_model(model)):
        found[name] = layer = base_layer(module)
        if kind := _kind(layer):
            parent = found.get(name.rpartition(".")[0]) if name else None
            candidates[name] = _Candidate(module=layer, kind=kind, parent=parent, saved=saved)
    return candidates


def _kind(module: nn.Module) -> Kind | None:
    """The kind of adapter a module takes, or None. Quantised linears subclass nn.Linear."""
    from torch import nn

    if isinstance(module, nn.Linear):
        return "linear"
    if hasattr(module, "nf") and _is_of(module, "Conv1D"):
        return "conv1d"
    if isinstance(module, nn.Conv2d) and module.groups == 1:  # with groups, PEFT takes only multiples of them as ranks
        return "conv2d"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return None


def _check(model: Any, include: Any) -> None:
    if not hasattr(model, "named_modules"):
        raise ModelError(f"`model` must be a torch module, but is {_brief(model)}; load it first.")
    if isinstance(include, str) or not isinstance(include, Collection):
        raise ModelError(f"`include` must be a list of {LEFT_OUT}, but is {_brief(include)}.")
    if unknown := [entry for entry in include if entry not in LEFT_OUT]:
        raise ModelError(f"`include` must be among {LEFT_OUT}, but got {_brief(unknown)}.")


def _checked(selection: Any) -> str | tuple[str, ...]:
    """A selection by regex or by names.

    Raises:
        ModelError: It is neither, or is empty.
    """
    if isinstance(selection, str) and selection:
        return selection
    if isinstance(selection, str) or (isinstance(selection, Collection) and not selection):
        raise ModelError(f'`selection` must name at least one module, but is empty; pass "{ALL_LINEAR}" for all.')
    if isinstance(selection, bytes | Mapping) or not isinstance(selection, Iterable):
        raise ModelError(
            f'`selection` must be "{ALL_LINEAR}", a regex, a list of names or a peft.LoraConfig, but is {_brief(selection)}; '
            f'pass "{ALL_LINEAR}" for all.'
        )
    names = tuple(selection)
    if wrong := [name for name in names if not isinstance(name, str) or not name]:
        raise ModelError(f"`selection` must hold names of modules, but holds {_brief(wrong[0])}; take it out.")
    return names or _checked("")


def _selected(
    selection: str | tuple[str, ...],
    model: nn.Module,
    candidates: Mapping[str, _Candidate],
    idle: Mapping[str, str],
    include: Collection[LeftOut],
) -> set[str]:
    """The names that a regex or a list selects, without what is left out."""
    matched = _match(selection, candidates)
    left_out = _left_out(model, candidates)
    in_full = set() if isinstance(selection, str) else set(selection)
    kept = {
        name for name in matched if name not in idle and (name in in_full or left_out.get(name) in {None, *include})
    }
    if not kept:
        raise ModelError(_nothing_left(selection, model, candidates, matched, idle, left_out))
    if selection != ALL_LINEAR and (ignored := [name for name in candidates if name in matched and name in idle]):
        logger.warning("`%s` is no target: %s (%d such modules)", ignored[0], idle[ignored[0]], len(ignored))
    return kept


def _nothing_left(
    selection: str | tuple[str, ...],
    model: nn.Module,
    candidates: Mapping[str, _Candidate],
    matched: Collection[str],
    idle: Mapping[str, str],
    left_out: Mapping[str, LeftOut],
) -> str:
    if selection == ALL_LINEAR and any(candidate.kind == "conv2d" for candidate in candidates.values()):
        return (
            f"`selection` must name the convolutions of {type(model).__name__}, which has no linear modules outside its head, "
            f'but is "{ALL_LINEAR}"; pass a regex or a list.'
        )
    start = f"`selection` must match a module that may carry an adapter, but {_brief(selection)} matches"
    reasons = sorted({left_out[name] for name in matched if name in left_out and name not in idle})
    if reasons:
        remedy = f"pass `include={reasons}` to adapt them all the same"
        return f"{start} only {' and '.join(reasons)} in {type(model).__name__}; {remedy}."
    if matched:
        name = min(matched)
        return f"{start} only modules like `{name}`, where {idle[name]}; select others."
    return f"{start} none in {type(model).__name__}, which has no linear modules; name others."


def _selected_by_peft(
    config: Any, model: nn.Module, candidates: Mapping[str, _Candidate], idle: Mapping[str, str]
) -> set[str]:
    """What PEFT adapts under a LoraConfig and an allocation can give ranks to."""
    from rankscope.lora import adapted_modules

    adapted = [plain_name(name) for name in adapted_modules(config, _base_model(model))]
    kept = {name for name in adapted if name in candidates and not candidates[name].saved}
    if not kept:
        what = f"PEFT adapts only {_brief(adapted)}" if adapted else "PEFT adapts none"
        raise ModelError(
            f"`selection` must select linear modules, convolutions or embeddings of {type(model).__name__}, but {what}; "
            "check `target_modules`, `exclude_modules`, `layers_to_transform` and `modules_to_save`."
        )
    for name in adapted:
        if name not in candidates and not {"original_module", "modules_to_save"} & set(name.split(".")):
            logger.warning("PEFT adapts `%s` under this config, but ranks cannot be given to it", name)
        elif name in kept and name in idle:
            logger.warning("PEFT adapts `%s` under this config, but %s", name, idle[name])
    return kept


def _match(selection: str | tuple[str, ...], candidates: Mapping[str, _Candidate]) -> set[str]:
    if selection == ALL_LINEAR:
        return {name for name, candidate in candidates.items() if candidate.kind in ("linear", "conv1d")}
    if isinstance(selection, str):
        matched = _match_regex(selection, candidates)
        missing = [] if matched else [selection]
    else:
        by_entry = _match_names(selection, candidates)
        matched = set().union(*by_entry.values())
        missing = [entry for entry in selection if entry not in by_entry]
    if missing:
        if isinstance(selection, str) and _match_names((selection,), candidates):
            remedy = f"a string is a regex for the whole name, so pass [{selection!r}]"
        else:
            remedy = _near_misses(missing[0], candidates)
        raise ModelError(f"`selection` must match modules of the model, but {missing[0]!r} matches none; {remedy}.")
    return matched


def _match_names(entries: Iterable[str], names: Iterable[str]) -> dict[str, set[str]]:
    """PEFT's rule for lists: an entry matches a name as a whole or by its last parts. Entries without a match are absent."""
    wanted = set(entries)
    matched: dict[str, set[str]] = {}
    for name in names:
        tail = name
        while True:
            if tail in wanted:
                matched.setdefault(tail, set()).add(name)
            _, dot, tail = tail.partition(".")
            if not dot:
                break
    return matched


def _match_regex(pattern: str, names: Iterable[str]) -> set[str]:
    """PEFT's rule for strings: a regex for the whole name. A pattern that backtracks without end is stopped."""
    import regex  # type: ignore[import-untyped]  # unlike `re`, it can be given a time limit

    try:
        re.compile(pattern)  # PEFT's engine
        compiled = regex.compile(pattern)
        return {name for name in names if compiled.fullmatch(name, timeout=REGEX_SECONDS)}
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        raise ModelError(f"`selection` must be a valid regex, but {pattern!r} is not: {error}.") from None
    except TimeoutError:
        raise ModelError(
            f"`selection` must be a regex that matches quickly, but {pattern!r} takes over {REGEX_SECONDS} s for one name; "
            "avoid nested repeats such as `(a+)+`."
        ) from None


def _near_misses(entry: str, candidates: Iterable[str]) -> str:
    names = list(candidates)
    tails = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names if not name.rsplit(".", 1)[-1].isdigit()))
    wanted = entry.rsplit(".", 1)[-1] if "." in entry and entry.replace(".", "").isidentifier() else entry
    close = difflib.get_close_matches(wanted, tails[:1000], n=3, cutoff=0.5) or tails[:6]
    return f"did you mean {', '.join(repr(name) for name in close)}" if close else "the model has no such modules"


def _brief(value: Any) -> str:
    """A repr of one short line."""
    return " ".join(reprlib.repr(value).split())


# --- what is left out ---------------------------------------------------------------------------------------------


def _left_out(model: nn.Module, candidates: Mapping[str, _Candidate]) -> dict[str, LeftOut]:
    """Which modules are left out by default, and why."""
    weights = {name: candidate.module._parameters.get("weight") for name, candidate in candidates.items()}
    owners = Counter(id(weight) for weight in weights.values() if weight is not None)
    get_output = getattr(_base_model(model), "get_output_embeddings", None)
    output = get_output() if get_output else None
    if output is not None:
        output = base_layer(output)
    heads = find_heads(candidates)
    reasons: dict[str, LeftOut] = {}
    for name, candidate in candidates.items():
        if candidate.kind == "embedding":
            reasons[name] = "embeddings"
        elif candidate.module is output or name in heads:
            reasons[name] = "heads"
        elif owners[id(weights[name])] > 1:
            reasons[name] = "tied"
    return reasons


# Modules whose weight another module reads without calling them, so that an adapter on them does nothing: the class of the
# parent, and the names of its children. Fused kernels count, though they run only on a GPU or outside training.
_READ_BY_WEIGHT: tuple[tuple[re.Pattern[str], re.Pattern[str]], ...] = tuple(
    (re.compile(parent), re.compile(children))
    for parent, children in (
        (r"MultiheadAttention", r".*"),
        (r"(Falcon)?MambaMixer", r"x_proj|dt_proj|out_proj"),
        (r"JambaMambaMixer", r"dt_proj"),
        (r"(Mamba2|Bamba|FalconH1|NemotronHMamba2|Zamba2Mamba)Mixer|GraniteMoeHybridMambaLayer", r"out_proj"),
        (r"WavLMAttention", r"[qkv]_proj|out_proj"),
        (r"\w*TDNNLayer", r"kernel"),
        (r"\w*MHAttentionMap", r"k_proj|k_linear"),
        (r"MobileBertLMPredictionHead", r"dense"),
        (r"\w+Encoder", r"rel_pos(_[xy])?_bias"),
    )
)

# Subclasses of nn.Linear that return something else than the product with their weight.
_NOT_LINEAR = re.compile(r"\w*Router|\w*GroupedLinear|IdeficsDecoupledLinear")


def _idle(model: nn.Module, candidates: Mapping[str, _Candidate]) -> dict[str, str]:
    """Where an adapter does nothing or cannot be, and why."""
    reasons: dict[str, str] = {}
    base = _base_model(model)
    if hasattr(getattr(base, "config", None), "model_type"):
        from rankscope.lora import refused_by_peft

        reasons |= {name: f"PEFT refuses it ({message})" for name, message in refused_by_peft(base, candidates).items()}
    for name, candidate in candidates.items():
        if candidate.saved:
            reasons[name] = "PEFT trains the module itself (`modules_to_save`)"
        elif not all(_shape(candidate.module, candidate.kind)):
            reasons[name] = "the module has no weights (a width of 0)"
        elif _NOT_LINEAR.fullmatch(type(candidate.module).__name__):
            reasons[name] = f"{type(candidate.module).__name__} computes more than a linear map"
        elif candidate.parent is not None and _reads_weight(candidate.parent, name.rsplit(".", 1)[-1]):
            reasons[name] = f"{type(candidate.parent).__name__} reads its weight without calling it"
    return reasons


def _reads_weight(parent: nn.Module, child: str) -> bool:
    if child in ("linear1", "linear2") and "activation_relu_or_gelu" in vars(parent):
        layer = cast(Any, parent)  # nn.TransformerEncoderLayer, whose fast path serves every evaluation
        return bool(layer.activation_relu_or_gelu and layer.self_attn.batch_first)
    kinds = [base.__name__ for base in type(parent).__mro__]
    return any(
        children.fullmatch(child) and any(readers.fullmatch(kind) for kind in kinds)
        for readers, children in _READ_BY_WEIGHT
    )


# --- what they are -----------------------------------------------------------------------------------------------


def _target(name: str, candidate: _Candidate, tower: str, block: int | None, role: str) -> TargetModule:
    in_features, out_features = _shape(candidate.module, candidate.kind)
    return TargetModule(
        name=name,
        in_features=in_features,
        out_features=out_features,
        tower=tower,
        block=block,
        role=role,
        kind=candidate.kind,
    )


def _shape(module: Any, kind: Kind) -> tuple[int, int]:
    if kind == "linear":
        return module.in_features, module.out_features
    if kind == "conv1d":
        return module.nx, module.nf
    if kind == "embedding":
        return module.num_embeddings, module.embedding_dim
    height, width = module.kernel_size
    return module.in_channels * height * width, module.out_channels
