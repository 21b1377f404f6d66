"""The tower, block and role of modules, read from their names; and which of them are output heads.

All of it is tables of patterns over dotted names: to teach a new architecture, add its words.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence


def _part(words: str) -> re.Pattern[str]:
    """A pattern for one whole part of a dotted name."""
    return re.compile(rf"(^|\.)({words})(\.|$)")


def describe_modules(names: Sequence[str]) -> dict[str, tuple[str, int | None, str]]:
    """Tower, block and role of each module, judged over all names of the model.

    No two modules share all three, except the experts of one mixture.

    >>> describe_modules(["layers.0.conv.0.proj", "layers.0.conv.1.proj"])
    {'layers.0.conv.0.proj': ('model', 0, 'conv_0_proj'), 'layers.0.conv.1.proj': ('model', 0, 'conv_1_proj')}
    >>> describe_modules(["layers.0.experts.0.w1", "layers.0.experts.1.w1"])
    {'layers.0.experts.0.w1': ('model', 0, 'gate_proj'), 'layers.0.experts.1.w1': ('model', 0, 'gate_proj')}
    """
    towers = name_towers(names)
    roles = {name: name_role(name) for name in names}
    by_tower: dict[str, list[str]] = defaultdict(list)
    for name in names:
        by_tower[towers[name]].append(name)
    blocks: dict[str, int | None] = {}
    for members in by_tower.values():
        blocks |= _number_blocks(members, roles)
    alike: dict[tuple[str, bool, str], list[str]] = defaultdict(list)
    for name in names:
        alike[towers[name], blocks[name] is None, roles[name]].append(name)
    for members in alike.values():
        roles |= _qualified(members, blocks, roles)
    return {name: (towers[name], blocks[name], roles[name]) for name in names}


# --- heads --------------------------------------------------------------------------------------------------------

# At the top of the model.
_HEAD = re.compile(
    r"(\w*lm_head|embed_out|score|\w*classifier|qa_outputs|head|cls|\w*_head|\w*_predictor|\w*_predictions|"
    r"class_embed|bbox_embed|vocab_projector|vocab_transform|output_projection|logits_proj|logit_fc|proj_out|"
    r"sequence_summary|\w*_decoder_postnet|regressor|logits_dense|predict_(state|action|return))(\.|$)"
)
# Anywhere in it.
_INNER_HEAD = _part(r"lm_heads?|cls\.predictions|(speech_)?decoder_postnet|decoder\.output_projection")
# Beside a `classifier` at the top, as in wav2vec2.
_BEFORE_CLASSIFIER = {"projector", "dense", "feature_extractor"}
_OUTPUT_EMBEDDING = re.compile(
    r"(.*\.)?(lm_head|lm_head\.decoder|embed_out|output_projection|proj_out|vocab_projector|predictions\.decoder|generator_lm_head)"
)


def find_heads(names: Collection[str]) -> set[str]:
    """The modules that are part of an output head.

    >>> sorted(find_heads(["encoder.layers.0.fc1", "projector", "classifier"]))
    ['classifier', 'projector']
    >>> find_heads(["vision.layers.0.fc1", "projector", "language.layers.0.fc1"])
    set()
    """
    before = _BEFORE_CLASSIFIER if "classifier" in names else set()
    return {name for name in names if _HEAD.match(name) or _INNER_HEAD.search(name) or name in before}


def is_output_embedding(name: str) -> bool:
    """Whether a module maps hidden states to the vocabulary, as `lm_head` does."""
    return _OUTPUT_EMBEDDING.fullmatch(name) is not None


# --- towers -------------------------------------------------------------------------------------------------------

# The first that is found in a name gives its tower, in a model of several modalities.
_TOWERS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (tower, _part(words))
    for tower, words in (
        (
            "projector",
            r"\w*projector|mm_projection|modality_projection|\w*connector|\w*merger\w*|\w*aligner|\w*resampler|\w*abstractor|"
            r"(visual|vision|image|text|audio|speech|language|video|image_to_text|image_to_mm|text_to_mm)_proj(ection)?|"
            r"\w*q_?former|multimodal\w*|cross_modal\w*|(vision|audio|speech)_adapter|embed_(vision|audio)|vision_embed_tokens|"
            r"(audio_)?enc_to_dec_proj|img_projection\w*|(up|down)_proj_for_\w+",
        ),
        ("audio", r"audio\w*|speech(_\w+)?|sound\w*"),
        (
            "vision",
            r"vision\w*|visual(_(?!bert)\w+)?|image_(encoder|model|tower|embed)|img_(encoder|processor)|video(_\w+)?|vqmodel|"
            r"backbone",
        ),
        ("language", r"language\w*|text\w*|llm"),
        ("encoder", r"\w+_encoder"),
        ("decoder", r"\w+_decoder"),
    )
)
_STACK = re.compile(r"(^|\.)(?:\w+_)?(encoder|decoder)\.")
# A block's parts are of its tower, whatever they are called (Zamba's `layers.2.mamba_decoder`).
_ABOVE_BLOCKS = re.compile(r"(?:\d+\.)*[^\d](?:(?!\.\d+\.).)*\.?")


def _above_blocks(name: str) -> str:
    match = _ABOVE_BLOCKS.match(name)
    return match.group() if match else name


def name_towers(names: Collection[str]) -> dict[str, str]:
    """The tower of each module, judged over all of them: a name has a tower only beside another.

    >>> name_towers(["vision_tower.layers.0.fc1", "model.layers.0.mlp.fc1"])
    {'vision_tower.layers.0.fc1': 'vision', 'model.layers.0.mlp.fc1': 'language'}
    >>> name_towers(["vit.layers.0.fc1"])
    {'vit.layers.0.fc1': 'model'}
    """
    heads = find_heads(names)
    above = {n: _above_blocks(n) for n in names}
    found = {n: next((tower for tower, pattern in _TOWERS if pattern.search(above[n])), None) for n in names}
    stacks = {n: match.group(2) if (match := _STACK.search(above[n])) else "model" for n in names}
    body = [n for n in names if n not in heads]
    present, halves = {found[n] for n in body}, {stacks[n] for n in body}
    if len(present) > 1 and present & {"vision", "audio", "projector"}:
        rest = {stacks[n] for n in body if found[n] is None}
        # A language model beside an encoder; a detector; a segmenter with its mask_decoder.
        if "language" in present or {"encoder", "decoder"} <= rest or "decoder" in present:
            other = "language" if "language" in present else "model"
            return {n: found[n] or stacks[n].replace("model", other) for n in names}
        return {n: found[n] or "language" for n in names}
    if halves == {"model", "decoder"}:
        return {n: "decoder" if stack == "decoder" else "encoder" for n, stack in stacks.items()}
    return stacks if {"encoder", "decoder"} <= halves else dict.fromkeys(names, "model")


# --- blocks -------------------------------------------------------------------------------------------------------

# Numbers below these count parts of a block, not blocks.
_INSIDE_BLOCK = re.compile(r"\w*(mlp|ffn|feed_forward|attn|attention|experts?|head|adapter|conv)\w*")
_BASE = 1000  # a stage's blocks in `name_block`


def name_block(name: str) -> int | None:
    """The number of the transformer block that a module sits in, by its name alone; None outside blocks.

    It is the first number in the name that has parts below it. Where blocks are counted within stages, as in Swin, the
    stage counts 1000. Numbers of experts, or of the parts of one block, do not count.

    >>> name_block("bert.encoder.layer.11.output.dense"), name_block("mm_projector.0")
    (11, None)
    >>> name_block("swin.encoder.layers.2.blocks.5.attention.q_proj"), name_block("encoder.block.3.layer.1.DenseReluDense.wi")
    (2005, 3)
    """
    _, key = _locate(name)
    if key is None:
        return None
    number = 0
    for index in key:
        number = number * _BASE + index
    return number


def _locate(name: str) -> tuple[str, tuple[int, ...] | None]:
    """The stack of blocks that a module is in, and the numbers of its stage and block there."""
    parts = name.split(".")
    counted = _block_parts(parts)
    if not counted:
        return "", None
    return ".".join(parts[: counted[0]]), tuple(int(parts[index]) for index in counted)


def _block_parts(parts: Sequence[str]) -> list[int]:
    """Where in a name the numbers of its stage and block stand; a model inside nn.Sequential has one more in front."""
    counted: list[int] = []
    for index, part in enumerate(parts[:-1]):
        if part.isdecimal() and (not counted or _nests(parts, counted[-1], index)):
            counted.append(index)
    return counted[: 3 if parts[0].isdecimal() else 2]


def _nests(parts: Sequence[str], outer: int, inner: int) -> bool:
    """Whether the inner number counts blocks within the stage that the outer one counts."""
    between = parts[outer + 1 : inner]
    if not between:
        return True
    if any(_INSIDE_BLOCK.fullmatch(part) for part in (parts[outer - 1] if outer else "", *between)):
        return False
    word, above = between[-1], parts[outer - 1] if outer else ""
    return (
        word == "h"
        or word.endswith(("blocks", "layers", "stages"))
        or (word in ("block", "layer") and above != "block" and above != "layers")
    )


def _number_blocks(names: Iterable[str], roles: Mapping[str, str]) -> dict[str, int | None]:
    """Block numbers that are unique within a tower: stages follow each other, and so do stacks that would collide."""
    stacks: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    blocks: dict[str, int | None] = dict.fromkeys(names)
    for name in blocks:
        stack, key = _locate(name)
        if key is not None:
            stacks[stack][name] = key
    taken: set[tuple[int, str]] = set()
    for keys in stacks.values():
        numbers = _flat(keys)
        here = {(number, roles[name]) for name, number in numbers.items()}
        offset = max(number for number, _ in taken) + 1 if here & taken else 0
        taken |= {(number + offset, role) for number, role in here}
        blocks |= {name: number + offset for name, number in numbers.items()}
    return blocks


def _flat(keys: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """One number for each (stage, block): a plain stack keeps its own, stages are counted through."""
    depth = max(len(key) for key in keys.values())
    if depth == 1:
        return {name: key[0] for name, key in keys.items()}
    padded = {name: key + (0,) * (depth - len(key)) for name, key in keys.items()}
    order = {key: number for number, key in enumerate(sorted(set(padded.values())))}
    return {name: order[key] for name, key in padded.items()}


# --- roles --------------------------------------------------------------------------------------------------------

_ATTENTION = r"(\w*attn|\w*attention|attn_\w+|EncDecAttention|self)"
_MLP = r"(\w*mlp|ffn\d?|ff|feed_forward\d?|DenseReluDense)"
# The first pattern found in the name gives its role; a name that fits none keeps its last part.
_ROLES: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (role, re.compile(rf"(^|\.)({pattern})(\.linear)?$"))
    for role, pattern in (
        ("fc1", rf"{_MLP}\.(in_proj|key|Wi|intermediate|linear_1|linear_in|layer_1)"),
        ("fc2", rf"{_MLP}\.(out_proj|value|Wo|output|linear_2|linear_out|layer_2)"),
        ("out_proj", r"(mixer|mamba|ssm|conv)\.out_proj"),
        (
            "qkv_proj",
            rf"qkv|qkv_proj|[wW]qkv|c_attn|att_proj|query_key_value|queries_keys_values|{_ATTENTION}\.in_proj",
        ),
        ("kv_proj", r"kv|kv_proj|to_kv|keys_values|key_value"),
        (
            "q_proj",
            r"q_proj|query|q_lin|q|wq|Wq|q_attn|query_proj|q_head|queries|linear_q|to_q|to_query|project_q|projection_query",
        ),
        ("k_proj", r"k_proj|key|k_lin|k|wk|Wk|key_proj|k_head|keys|linear_k|to_k|to_key|project_k|projection_key"),
        (
            "v_proj",
            r"v_proj|value|v_lin|v|wv|Wv|value_proj|v_head|values|linear_v|to_v|to_value|project_v|projection_value",
        ),
        (
            "o_proj",
            rf"o_proj|out_proj|out_lin|to_out|attention_out|o|{_ATTENTION}\.(c_proj|output\.dense|dense|proj|wo|Wo|output|projection|"
            r"projection_layer|post_proj|output_proj|linear_out)",
        ),
        ("gate_up_proj", r"gate_up_proj"),
        ("gate_proj", r"gate_proj|wi_0|w1|w_gate|proj_up_gate"),
        ("up_proj", r"up_proj|wi_1|w3|proj_up"),
        ("down_proj", r"down_proj|w2|proj_down"),
        (
            "fc1",
            r"fc1|c_fc|wi|Wi|lin1|fc_in|intermediate\.dense|intermediate_dense|dense_h_to_4h|ffn\.0|linear1|dense1|linear_fc1|"
            r"pwconv1|linear_up|intermediate_query\.dense|ffn",
        ),
        (
            "fc2",
            r"fc2|mlp\.c_proj|wo|Wo|lin2|fc_out|output\.dense|output_dense|dense_4h_to_h|ffn\.2|linear2|dense2|linear_fc2|"
            r"pwconv2|linear_down|output_query\.dense|ffn_output",
        ),
        ("pooler", r"pooler\.dense"),
    )
)
_CROSS = re.compile(
    r"(^|\.)(\w*cross_?att\w*|cross\w*|encoder_attn|EncDecAttention|encoder_decoder_attention|x_attn)\."
)
_EXPERT = re.compile(r"(experts?)\.\d+\.")


def name_role(name: str) -> str:
    """The projection a module is, in one vocabulary for all architectures; `cross_` before those of cross-attention.

    >>> [name_role(n) for n in ("h.0.attn.c_proj", "h.0.mlp.c_proj", "encoder.layer.0.attention.self.query")]
    ['o_proj', 'fc2', 'q_proj']
    """
    role = next((role for role, pattern in _ROLES if pattern.search(name)), None) or _last_words(name)
    return f"cross_{role}" if _CROSS.search(name) else role


def _last_words(name: str) -> str:
    """The last part of a name; of a numbered one (`mlp.layers.0`), the words before its number, too."""
    parts = _path_in_block(name)
    start = len(parts) - 1
    while start and (parts[start].isdecimal() or parts[start] == "layers"):
        start -= 1
    return "_".join(parts[start:])


def _qualified(names: Sequence[str], blocks: Mapping[str, int | None], roles: Mapping[str, str]) -> dict[str, str]:
    """Longer roles where two modules of a block would share one, by the parts of their names that differ.

    The experts of a mixture go on sharing theirs. All blocks of a tower are treated alike.
    """
    paths = {name: _path_in_block(name) for name in names}
    in_block: dict[int | None, set[tuple[str, ...]]] = defaultdict(set)
    for name, path in paths.items():
        in_block[blocks[name]].add(path)
    if max(len(found) for found in in_block.values()) == 1:
        return {}
    distinct = set(paths.values())
    start = min(_shared(distinct), *(len(path) - 1 for path in distinct))
    while start and any(path[start].isdecimal() for path in distinct):  # a number needs the word before it
        start -= 1
    ends = _shared([path[start:-1][::-1] for path in distinct])
    longer = {path: "_".join(path[start : len(path) - 1 - ends]) for path in distinct}
    if len({(longer[path], roles[name]) for name, path in paths.items()}) < len(distinct):
        return {name: "_".join(path[start:]) for name, path in paths.items()}
    return {name: f"{longer[path]}_{roles[name]}".lstrip("_") for name, path in paths.items()}


def _path_in_block(name: str) -> tuple[str, ...]:
    """The parts of a name below its block's number, without the numbers of experts."""
    parts = name.split(".")
    counted = _block_parts(parts)
    return tuple(_EXPERT.sub(r"\1.", ".".join(parts[counted[-1] + 1 if counted else 0 :])).split("."))


def _shared(paths: Iterable[Sequence[str]]) -> int:
    """How many first parts all paths share."""
    shared = 0
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared += 1
    return shared
