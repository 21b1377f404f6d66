"""Target modules: finding them in a model, and naming the tower, block and role of each.

Nothing here needs torch until `find_targets` is called.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from rankscope.exceptions import TargetError

if TYPE_CHECKING:
    from torch import nn

Kind = Literal["linear", "conv1d", "conv2d", "embedding"]
LeftOut = Literal["heads", "embeddings", "tied"]

ALL_LINEAR = "all-linear"
LEFT_OUT: tuple[LeftOut, ...] = ("heads", "embeddings", "tied")


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetModule:
    """A module that may carry an adapter.

    Attributes:
        name: Full dotted name inside the base model.
        in_features: Input features; for a convolution, input channels times the kernel's area; for an
            embedding, the number of rows.
        out_features: Output features (channels of a convolution, width of an embedding).
        tower: `vision`, `projector` or `language`; `encoder` or `decoder`; `model` where there is one tower only.
        block: Index of the transformer block inside its tower; None outside blocks.
        role: The projection, normalised over architectures: `q_proj`, `o_proj`, `fc1`, …
        kind: `linear`, `conv1d` (transformers' transposed linear), `conv2d` or `embedding`.

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
    full or asked for through `include`.

    Args:
        model: Any torch module; a model already wrapped by PEFT gives the modules of its base model.
        selection: `"all-linear"`; a regex that must match the full name; names, each matching a module by its full
            name or its last parts (PEFT's rule); or a `peft.LoraConfig`, whose `target_modules` and
            `exclude_modules` are followed to the letter, heads and embeddings included.
        include: Any of `"heads"`, `"embeddings"`, `"tied"`.

    Raises:
        TargetError: Nothing matches, or one of the names matches nothing; near misses are named.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 8), nn.Linear(8, 2))
    >>> [(target.name, target.rank_cost) for target in find_targets(model)]
    [('1', 12), ('2', 10)]
    """
    if unknown := set(include) - set(LEFT_OUT):
        raise TargetError(f"`include` must be among {LEFT_OUT}, but got {sorted(unknown)}.")
    if hasattr(selection, "target_modules"):
        config, selection, include = selection, selection.target_modules, LEFT_OUT
        excluded = getattr(config, "exclude_modules", None) or ()
    else:
        excluded = ()
    if not isinstance(selection, str):
        selection = tuple(selection or ())
        if not selection:
            raise TargetError(f'`selection` must name at least one module, but is empty; pass "{ALL_LINEAR}" for all.')

    base = ((name, getattr(module, "base_layer", module)) for name, module in base_modules(model))
    candidates = {name: (module, kind) for name, module in base if (kind := _kind(module))}
    matched = _match(selection, candidates) - _match_quietly(excluded, candidates)
    left_out = _left_out(model, candidates)
    named_in_full = set() if isinstance(selection, str) else set(selection)
    kept = [
        name
        for name in candidates
        if name in matched and (name in named_in_full or left_out.get(name) in {None, *include})
    ]
    if not kept:
        reasons = sorted({reason for name in matched if (reason := left_out.get(name))})
        raise TargetError(
            f"`selection` must match a module that may carry an adapter, but {selection!r} matches "
            f"{'only ' + ' and '.join(reasons) if reasons else 'none'} in {type(model).__name__}; "
            f"pass `include={reasons or ['…']}` to adapt them all the same."
        )
    towers = name_towers(list(candidates))
    return tuple(_describe(name, *candidates[name], tower=towers[name]) for name in kept)


def fingerprint_targets(targets: Sequence[TargetModule]) -> str:
    """A short hash of the names and shapes of target modules: equal for models an allocation can be moved between."""
    text = "\n".join(
        f"{t.name} {t.in_features} {t.out_features} {t.kind}" for t in sorted(targets, key=lambda t: t.name)
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --- which modules -----------------------------------------------------------------------------------------------


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module with its name in the base model; a PEFT layer is named as the layer it wraps, its `base_layer`."""
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        model = cast(Any, model).get_base_model()
    wrapped: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in wrapped):
            continue
        if hasattr(module, "base_layer"):
            wrapped.append(name + ".")
        yield name, module


def fused_experts(model: nn.Module) -> list[str]:
    """Names of parameters that hold the weights of several experts in one 3-D tensor: no adapter here takes them.

    So transformers 5 keeps Mixtral's, Qwen's and DeepSeek's experts; earlier versions had a linear module for each.
    """
    from torch import nn

    return [
        f"{name}.{weight}".removeprefix(".")
        for name, module in base_modules(model)
        if not isinstance(module, nn.modules.conv._ConvNd)
        for weight, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and min(parameter.shape) > 1
    ]


def _kind(module: nn.Module) -> Kind | None:
    """The kind of adapter a module takes, or None. Quantised linears subclass nn.Linear."""
    from torch import nn

    if isinstance(module, nn.Linear):
        return "linear"
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return "conv1d"
    if isinstance(module, nn.Conv2d) and module.groups == 1:  # with groups, PEFT takes only multiples of them as ranks
        return "conv2d"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return None


def _match(selection: str | tuple[str, ...], candidates: Mapping[str, tuple[nn.Module, Kind]]) -> set[str]:
    if selection == ALL_LINEAR:
        return {name for name, (_, kind) in candidates.items() if kind in ("linear", "conv1d")}
    matched = _match_quietly(selection, candidates)
    missing = (
        [selection]
        if isinstance(selection, str) and not matched
        else [entry for entry in selection if not _match_quietly((entry,), candidates)]
        if not isinstance(selection, str)
        else []
    )
    if missing:
        if isinstance(selection, str) and _match_quietly((selection,), candidates):
            remedy = f"a string is a regex for the whole name, so pass [{selection!r}]"
        else:
            remedy = _near_misses(missing[0], candidates)
        raise TargetError(f"`selection` must match modules of the model, but {missing[0]!r} matches none; {remedy}.")
    return matched


def _match_quietly(selection: str | Collection[str], candidates: Iterable[str]) -> set[str]:
    """PEFT's matching rule: a string is a regex for the whole name; names match whole or by their last parts."""
    if isinstance(selection, str):
        try:
            pattern = re.compile(selection)
        except re.error as error:
            raise TargetError(f"`selection` must be a valid regex, but {selection!r} is not: {error}.") from None
        return {name for name in candidates if pattern.fullmatch(name)}
    return {name for name in candidates if any(name == s or name.endswith(f".{s}") for s in selection)}


def _near_misses(entry: str, candidates: Iterable[str]) -> str:
    names = list(candidates)
    tails = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names if not name.rsplit(".", 1)[-1].isdigit()))
    wanted = entry.rsplit(".", 1)[-1] if "." in entry and entry.replace(".", "").isidentifier() else entry
    close = difflib.get_close_matches(wanted, tails, n=3, cutoff=0.5) or tails[:6]
    return f"did you mean {', '.join(repr(name) for name in close)}" if close else "the model has no such modules"


def _left_out(model: nn.Module, candidates: Mapping[str, tuple[nn.Module, Kind]]) -> dict[str, LeftOut]:
    """Which modules are left out by default, and why."""
    owners = Counter(
        id(module.weight) for module, _ in candidates.values() if getattr(module, "weight", None) is not None
    )
    base = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    get_output = getattr(base, "get_output_embeddings", None)
    output = get_output() if get_output else None
    reasons: dict[str, LeftOut] = {}
    for name, (module, kind) in candidates.items():
        if kind == "embedding":
            reasons[name] = "embeddings"
        elif module is output or _HEAD.match(name):
            reasons[name] = "heads"
        elif owners[id(getattr(module, "weight", None))] > 1:
            reasons[name] = "tied"
    return reasons


# Output heads stand at the top of transformers' models, under one of few names.
_HEAD = re.compile(
    r"(lm_head|embed_out|score|classifier|cls_classifier|distillation_classifier|pre_classifier|qa_outputs|head|"
    r"class_labels_classifier|bbox_predictor|cls|vocab_projector|vocab_transform|generator_lm_head)(\.|$)"
)


# --- what they are called ----------------------------------------------------------------------------------------


def _describe(name: str, module: nn.Module, kind: Kind, *, tower: str) -> TargetModule:
    in_features, out_features = _shape(module, kind)
    return TargetModule(
        name=name,
        in_features=in_features,
        out_features=out_features,
        tower=tower,
        block=name_block(name),
        role=name_role(name),
        kind=kind,
    )


def _shape(module: Any, kind: Kind) -> tuple[int, int]:
    if kind == "linear":
        return module.in_features, module.out_features
    if kind == "conv1d":
        return module.weight.shape[0], module.nf
    if kind == "embedding":
        return module.num_embeddings, module.embedding_dim
    height, width = module.kernel_size
    return module.in_channels * height * width, module.out_channels


_TOWERS: tuple[tuple[str, re.Pattern[str]], ...] = (
    (
        "projector",
        re.compile(r"(^|\.)(\w*projector|mm_projection|connector|merger|\w*aligner|(visual|text)_projection)(\.|$)"),
    ),
    ("vision", re.compile(r"(^|\.)(vision\w*|visual\w*|image_encoder|img_encoder)(\.|$)")),
)
_STACK = re.compile(r"(^|\.)(encoder|decoder)\.")


def name_towers(names: Sequence[str]) -> dict[str, str]:
    """The tower of each module, judged over all of them: a name has a tower only beside another.

    >>> name_towers(["vision_tower.layers.0.fc1", "model.layers.0.mlp.fc1"])
    {'vision_tower.layers.0.fc1': 'vision', 'model.layers.0.mlp.fc1': 'language'}
    >>> name_towers(["vit.layers.0.fc1"])
    {'vit.layers.0.fc1': 'model'}
    """
    towers = {n: next((tower for tower, pattern in _TOWERS if pattern.search(n)), "language") for n in names}
    if set(towers.values()) != {"language"} and len(set(towers.values())) > 1:
        return towers
    stacks = {n: found.group(2) if (found := _STACK.search(n)) else "model" for n in names}
    if {"encoder", "decoder"} <= set(stacks.values()):
        return stacks
    return dict.fromkeys(names, "model")


def name_block(name: str) -> int | None:
    """The index of the transformer block a module sits in: the first number in its name that has parts below it.

    >>> name_block("bert.encoder.layer.11.output.dense"), name_block("mm_projector.0")
    (11, None)
    """
    parts = name.split(".")[:-1]
    return next((int(part) for part in parts if part.isdigit()), None)


# The first pattern found in the name gives its role; a name that fits none keeps its last part.
_ROLES: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (role, re.compile(rf"(^|\.)({pattern})$"))
    for role, pattern in (
        ("qkv_proj", r"qkv|qkv_proj|Wqkv|c_attn|query_key_value|in_proj"),
        ("q_proj", r"q_proj|query|q_lin|q|wq|q_attn"),
        ("k_proj", r"k_proj|key|k_lin|k|wk"),
        ("v_proj", r"v_proj|value|v_lin|v|wv"),
        (
            "o_proj",
            r"o_proj|out_proj|out_lin|o|attn\.c_proj|attention\.output\.dense|(self_attention|attn|attention)\.(dense|proj)",
        ),
        ("gate_up_proj", r"gate_up_proj"),
        ("gate_proj", r"gate_proj|wi_0|w1|w_gate"),
        ("up_proj", r"up_proj|wi_1|w3"),
        ("down_proj", r"down_proj|w2"),
        ("fc1", r"fc1|c_fc|wi|lin1|fc_in|intermediate\.dense|dense_h_to_4h|ffn\.0"),
        ("fc2", r"fc2|mlp\.c_proj|wo|lin2|fc_out|output\.dense|dense_4h_to_h|ffn\.2"),
        ("pooler", r"pooler\.dense"),
    )
)
_CROSS = re.compile(r"(^|\.)(cross\w*|encoder_attn|EncDecAttention)\.")


def name_role(name: str) -> str:
    """The projection a module is, in one vocabulary for all architectures; `cross_` before those of cross-attention.

    >>> [name_role(n) for n in ("h.0.attn.c_proj", "h.0.mlp.c_proj", "encoder.layer.0.attention.self.query")]
    ['o_proj', 'fc2', 'q_proj']
    """
    role = next((role for role, pattern in _ROLES if pattern.search(name)), name.rsplit(".", 1)[-1])
    return f"cross_{role}" if _CROSS.search(name) else role
