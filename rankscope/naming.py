"""The tower, block and role of a module, read from its dotted name.

The tables below are data: to support another architecture, add its words. A cell is a regex for part of a name.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

MAX_LABEL = 48  # characters of a group's blocks, one by one


def _rows(table: str, start: str = "", end: str = "") -> tuple[tuple[str, re.Pattern[str]], ...]:
    """Each line of a table as its first word and a pattern for any of the others. The first match decides."""
    lines = [line.split() for line in table.strip().splitlines()]
    return tuple((label, re.compile(f"{start}({'|'.join(words)}){end}")) for label, *words in lines)


# --- tables -------------------------------------------------------------------------------------------------------

# Whole parts of a name above its block, in models of several modalities.
_TOWERS = _rows(
    r"""
    projector  \w*projector mm_projection modality_projection \w*connector \w*merger\w* \w*aligner \w*resampler \w*abstractor
    projector  (visual|vision|image|text|audio|speech|language|video|image_to_text|image_to_mm|text_to_mm)_proj(ection)?
    projector  \w*q_?former multimodal\w* cross_modal\w* (vision|audio|speech)_adapter embed_(vision|audio) vision_embed_tokens
    projector  (audio_)?enc_to_dec_proj img_projection\w* (up|down)_proj_for_\w+
    audio      audio\w* speech(_\w+)? sound\w*
    vision     vision\w* visual(_(?!bert)\w+)? image_(encoder|model|tower|embed) img_(encoder|processor) video(_\w+)? vqmodel
    vision     backbone
    language   language\w* text\w* llm
    encoder    \w+_encoder
    decoder    \w+_decoder
    """,
    start=r"(^|\.)",
    end=r"(\.|$)",
)

_STACK = re.compile(r"(^|\.)(?:\w+_)?(encoder|decoder)\.")
_ABOVE_BLOCKS = re.compile(r"(?:\d+\.)*[^\d](?:(?!\.\d+\.).)*\.?")

# The last parts of a name. A name that matches nothing keeps its last part as its role.
_ATTENTION = r"(\w*attn|\w*attention|attn_\w+|EncDecAttention|self)"
_MLP = r"(\w*mlp|ffn\d?|ff|feed_forward\d?|DenseReluDense)"
_ROLES = _rows(
    rf"""
    fc1           {_MLP}\.(in_proj|key|Wi|intermediate|linear_1|linear_in|layer_1)
    fc2           {_MLP}\.(out_proj|value|Wo|output|linear_2|linear_out|layer_2)
    out_proj      (mixer|mamba|ssm|conv)\.out_proj
    qkv_proj      qkv qkv_proj [wW]qkv c_attn att_proj query_key_value queries_keys_values {_ATTENTION}\.in_proj
    kv_proj       kv kv_proj to_kv keys_values key_value
    q_proj        q_proj query q_lin q wq Wq q_attn query_proj q_head queries linear_q to_q to_query project_q projection_query
    k_proj        k_proj key k_lin k wk Wk key_proj k_head keys linear_k to_k to_key project_k projection_key
    v_proj        v_proj value v_lin v wv Wv value_proj v_head values linear_v to_v to_value project_v projection_value
    o_proj        o_proj out_proj out_lin to_out attention_out o {_ATTENTION}\.(c_proj|output\.dense|dense|proj|wo|Wo|output)
    o_proj        {_ATTENTION}\.(projection|projection_layer|post_proj|output_proj|linear_out)
    gate_up_proj  gate_up_proj
    gate_proj     gate_proj wi_0 w1 w_gate proj_up_gate
    up_proj       up_proj wi_1 w3 proj_up
    down_proj     down_proj w2 proj_down
    fc1           fc1 c_fc wi Wi lin1 fc_in intermediate\.dense intermediate_dense dense_h_to_4h ffn\.0 linear1 dense1 linear_fc1
    fc1           pwconv1 linear_up intermediate_query\.dense ffn
    fc2           fc2 mlp\.c_proj wo Wo lin2 fc_out output\.dense output_dense dense_4h_to_h ffn\.2 linear2 dense2 linear_fc2
    fc2           pwconv2 linear_down output_query\.dense ffn_output
    pooler        pooler\.dense
    """,
    start=r"(^|\.)",
    end=r"(\.linear)?$",
)
_CROSS_ATTENTION = re.compile(
    r"(^|\.)(\w*cross_?att\w*|cross\w*|encoder_attn|EncDecAttention|encoder_decoder_attention|x_attn)\."
)
_EXPERT = re.compile(r"(experts?)\.\d+\.")
# Numbers below the first count parts of a block; below the second, the blocks of a stage.
_INSIDE_BLOCK = re.compile(r"\w*(mlp|ffn|feed_forward|attn|attention|experts?|head|adapter|conv)\w*")
_BLOCKS = re.compile(r"h|.*(blocks|layers|stages)")

# Output heads: at the top of the model, or anywhere in it.
_HEAD = re.compile(
    r"""^(\w*lm_head|embed_out|score|\w*classifier|qa_outputs|head|cls|\w*_head|\w*_predictor|\w*_predictions
        |class_embed|bbox_embed|vocab_projector|vocab_transform|output_projection|logits_proj|logit_fc|proj_out
        |sequence_summary|\w*_decoder_postnet|regressor|logits_dense|predict_(state|action|return))(\.|$)
    |(^|\.)(lm_heads?|cls\.predictions|(speech_)?decoder_postnet|decoder\.output_projection)(\.|$)""",
    re.VERBOSE,
)
_BEFORE_CLASSIFIER = {"projector", "dense", "feature_extractor"}  # beside a `classifier` at the top, as in wav2vec2
# Maps hidden states to the vocabulary.
OUTPUT_EMBEDDING = re.compile(
    r"(.*\.)?(lm_head|lm_head\.decoder|embed_out|output_projection|proj_out|vocab_projector|predictions\.decoder|generator_lm_head)"
)

# Classes, and children whose weight they read without a call, so that an adapter there does nothing. Fused kernels count,
# though they run only on a GPU or outside training.
READS_WEIGHT = re.compile(
    r"""MultiheadAttention\..*|WavLMAttention\.([qkv]|out)_proj|\w*MHAttentionMap\.k_(proj|linear)
    |(Falcon)?MambaMixer\.(x|dt|out)_proj|JambaMambaMixer\.dt_proj|GraniteMoeHybridMambaLayer\.out_proj
    |(Mamba2|Bamba|FalconH1|NemotronHMamba2|Zamba2Mamba)Mixer\.out_proj
    |\w*TDNNLayer\.kernel|MobileBertLMPredictionHead\.dense|\w+Encoder\.rel_pos(_[xy])?_bias""",
    re.VERBOSE,
)
# Subclasses of nn.Linear that return more than the product with their weight.
NOT_LINEAR = re.compile(r"\w*Router|\w*GroupedLinear|IdeficsDecoupledLinear")


class _Place(NamedTuple):
    """Where a module sits: its stack of blocks, the numbers of its stage and block there, and its path in the block."""

    stack: str
    numbers: tuple[int, ...]
    path: tuple[str, ...]


def describe_modules(names: Sequence[str]) -> dict[str, tuple[str, int | None, str]]:
    """Tower, block and role of each module, judged over all names of the model.

    No two modules share all three, except the experts of one mixture.

    >>> describe_modules(["layers.0.experts.0.w1", "layers.0.experts.1.w1"])
    {'layers.0.experts.0.w1': ('model', 0, 'gate_proj'), 'layers.0.experts.1.w1': ('model', 0, 'gate_proj')}
    """
    towers, places, roles = name_towers(names), {n: locate(n) for n in names}, {n: name_role(n) for n in names}
    blocks = _number_blocks(towers, places, roles)
    alike: dict[tuple[str, bool, str], dict[str, tuple[str, ...]]] = defaultdict(dict)
    for name in names:
        alike[towers[name], blocks[name] is None, roles[name]][name] = places[name].path
    for (*_, role), paths in alike.items():
        roles |= _longer_roles(paths, blocks, role)
    return {name: (towers[name], blocks[name], roles[name]) for name in names}


def find_heads(names: Collection[str]) -> set[str]:
    """The modules that are part of an output head."""
    classified = "classifier" in names  # names may be a list
    return {n for n in names if _HEAD.search(n) or (classified and n in _BEFORE_CLASSIFIER)}


def name_towers(names: Collection[str]) -> dict[str, str]:
    """The tower of each module. A name has a tower only beside another: that of `vit.layers.0.fc1` alone is `model`."""
    # A block's parts belong to its tower, whatever they are called (Zamba's `layers.2.mamba_decoder`).
    above = {n: match.group() if (match := _ABOVE_BLOCKS.match(n)) else n for n in names}
    found = {n: _first(_TOWERS, above[n]) for n in names}
    stacks = {n: match.group(2) if (match := _STACK.search(above[n])) else "model" for n in names}
    body = set(names) - find_heads(names)
    present, halves = {found[n] for n in body}, {stacks[n] for n in body}
    if len(present) > 1 and present & {"vision", "audio", "projector"}:
        rest = {stacks[n] for n in body if found[n] is None}
        # A language model beside an encoder; a detector; a segmenter with its mask_decoder.
        if not ("language" in present or {"encoder", "decoder"} <= rest or "decoder" in present):
            return {n: found[n] or "language" for n in names}
        other = "language" if "language" in present else "model"
        return {n: found[n] or stacks[n].replace("model", other) for n in names}
    if halves == {"model", "decoder"}:
        return {n: "decoder" if stack == "decoder" else "encoder" for n, stack in stacks.items()}
    return stacks if {"encoder", "decoder"} <= halves else dict.fromkeys(names, "model")


def _first(rows: Iterable[tuple[str, re.Pattern[str]]], name: str) -> str | None:
    return next((label for label, pattern in rows if pattern.search(name)), None)


def locate(name: str) -> _Place:
    """Splits a name at its block's number: the first that has parts below it, or the second where stages hold blocks.

    Experts, and the parts of one block, are no blocks.

    >>> locate("swin.encoder.layers.2.blocks.5.attention.q_proj")
    _Place(stack='swin.encoder.layers', numbers=(2, 5), path=('attention', 'q_proj'))
    """
    parts = name.split(".")
    counted: list[int] = []
    for index, part in enumerate(parts[:-1]):
        if part.isdecimal() and (not counted or _nests(parts[: counted[-1]], parts[counted[-1] + 1 : index])):
            counted.append(index)
    counted = counted[: 3 if parts[0].isdecimal() else 2]  # a model inside nn.Sequential has one more in front
    stack, below = (parts[: counted[0]], parts[counted[-1] + 1 :]) if counted else ([], parts)
    path = _EXPERT.sub(r"\1.", ".".join(below)).split(".")
    return _Place(".".join(stack), tuple(int(parts[index]) for index in counted), tuple(path))


def _nests(above: Sequence[str], between: Sequence[str]) -> bool:
    """Whether a number with these parts above and between counts blocks within the stage that an earlier number counts."""
    if not between or any(_INSIDE_BLOCK.fullmatch(part) for part in (*above[-1:], *between)):
        return not between
    plain = between[-1] in ("block", "layer") and above[-1:] not in (["block"], ["layers"])
    return plain or _BLOCKS.fullmatch(between[-1]) is not None


def _number_blocks(
    towers: Mapping[str, str], places: Mapping[str, _Place], roles: Mapping[str, str]
) -> dict[str, int | None]:
    """Block numbers, unique in a tower. A plain stack keeps its own; stages, and stacks that would collide, count on."""
    blocks: dict[str, int | None] = dict.fromkeys(towers)
    stacks: dict[tuple[str, str], dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name, place in places.items():
        if place.numbers:
            stacks[towers[name], place.stack][name] = place.numbers
    taken: set[tuple[str, int, str]] = set()
    n_blocks: dict[str, int] = defaultdict(int)
    for (tower, _), keys in stacks.items():
        depth = max(len(key) for key in keys.values())
        padded = {name: key + (0,) * (depth - len(key)) for name, key in keys.items()}
        order = {key: key[0] if depth == 1 else n for n, key in enumerate(sorted(set(padded.values())))}
        collides = any((tower, order[key], roles[name]) in taken for name, key in padded.items())
        numbers = {name: order[key] + (n_blocks[tower] if collides else 0) for name, key in padded.items()}
        blocks |= numbers
        taken |= {(tower, number, roles[name]) for name, number in numbers.items()}
        n_blocks[tower] = max(n_blocks[tower], max(numbers.values()) + 1)
    return blocks


def name_role(name: str) -> str:
    """The projection a module is, in one vocabulary for all architectures; `cross_` before those of cross-attention.

    >>> [name_role(n) for n in ("h.0.attn.c_proj", "h.0.mlp.c_proj", "encoder.layer.0.attention.self.query")]
    ['o_proj', 'fc2', 'q_proj']
    """
    role = _first(_ROLES, name)
    if role is None:
        path = locate(name).path  # its end, from a word on that is more than the place in a list
        start = max((i for i, part in enumerate(path) if not part.isdecimal() and part != "layers"), default=0)
        role = "_".join(path[start:])
    return f"cross_{role}" if _CROSS_ATTENTION.search(name) else role


def _longer_roles(paths: Mapping[str, tuple[str, ...]], blocks: Mapping[str, int | None], role: str) -> dict[str, str]:
    """Longer roles, by the parts of their paths that differ, where two modules of a block would share this one."""
    distinct = set(paths.values())
    placed = Counter(block for block, _ in {(blocks[name], path) for name, path in paths.items()})
    if max(placed.values()) == 1:
        return {}
    start = min(_shared(distinct), *(len(path) - 1 for path in distinct))
    while start and any(path[start].isdecimal() for path in distinct):
        start -= 1
    ends = _shared([path[start:-1][::-1] for path in distinct])
    longer = {path: "_".join(path[start : len(path) - 1 - ends]) for path in distinct}
    if len(set(longer.values())) < len(distinct):
        return {name: "_".join(path[start:]) for name, path in paths.items()}
    return {name: f"{longer[path]}_{role}".lstrip("_") for name, path in paths.items()}


def _shared(paths: Iterable[Sequence[str]]) -> int:
    """How many first parts all paths share."""
    return sum(1 for _ in itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False)))


def label_blocks(group: str, blocks: Collection[int], *, several: bool = False) -> str:
    """Return the readable name of a group `tower/number` of blocks; with `several` towers, the tower's name comes first.

    >>> label_blocks("model/0", [0, 1, 2, 5]), label_blocks("vision/3", [3], several=True), label_blocks("model/-", [])
    ('blocks 0-2, 5', 'vision block 3', 'outside blocks')
    """
    tower, _, number = group.rpartition("/")
    runs = [[block] for block in sorted(blocks) if block - 1 not in blocks]
    for run in runs:
        run.append(next(last for last in itertools.count(run[0]) if last + 1 not in blocks))
    listed = ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)
    name = f"block{'s' * (len(blocks) > 1)} {listed}" if blocks else "outside blocks"
    name = name if len(name) <= MAX_LABEL else f"{len(blocks)} blocks, group {number}"
    return f"{tower} {name}" if several else name
