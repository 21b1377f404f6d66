"""The tower, block and role of a module, read from its name; and which names are output heads."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Output heads stand at the top of transformers' models, under one of few names.
_HEAD = re.compile(
    r"(lm_head|embed_out|score|classifier|cls_classifier|distillation_classifier|pre_classifier|qa_outputs|head|"
    r"class_labels_classifier|bbox_predictor|cls|vocab_projector|vocab_transform|generator_lm_head)(\.|$)"
)
_OUTPUT_EMBEDDING = re.compile(
    r"(.*\.)?(lm_head|embed_out|output_projection|proj_out|vocab_projector|predictions\.decoder|generator_lm_head)"
)


def is_head(name: str) -> bool:
    """Whether a module is part of an output head.

    >>> is_head("score"), is_head("model.layers.0.mlp.score")
    (True, False)
    """
    return _HEAD.match(name) is not None


def is_output_embedding(name: str) -> bool:
    """Whether a module maps hidden states to the vocabulary, as `lm_head` does."""
    return _OUTPUT_EMBEDDING.fullmatch(name) is not None


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
