"""Towers, blocks, roles and heads from names alone."""

from collections.abc import Collection

import pytest

from rankscope.naming import describe_modules, find_heads, locate, name_role, name_towers


@pytest.mark.parametrize(
    ("name", "block", "role"),
    [
        ("transformer.blocks.7.attn.Wqkv", 7, "qkv_proj"),
        ("gpt_neox.layers.3.attention.dense", 3, "o_proj"),
        ("gpt_neox.layers.3.mlp.dense_4h_to_h", 3, "fc2"),
        ("distilbert.transformer.layer.2.ffn.lin1", 2, "fc1"),
        ("model.layers.4.block_sparse_moe.experts.1.w2", 4, "down_proj"),
        ("model.mm_projector.2", None, "mm_projector_2"),
        ("decoder.layers.3.mlp.layers.1", 3, "mlp_layers_1"),
        ("layers.3.1", 3, "1"),
        ("encoder.layer.0.attention.attention.query", 0, "q_proj"),
        ("encoder.layer.0.attention.output.dense", 0, "o_proj"),
        ("decoder.layers.5.encoder_attn.v_proj", 5, "cross_v_proj"),
        ("model.layers.0.attn.Wo", 0, "o_proj"),
        ("model.layers.0.mlp.Wo", 0, "fc2"),
        ("model.layers.0.attention.wo", 0, "o_proj"),
        ("model.layers.0.attention.wqkv", 0, "qkv_proj"),
        ("encoder.block.0.layer.1.DenseReluDense.wo", 0, "fc2"),
        ("bert.encoder.layer.0.crossattention.output.dense", 0, "cross_o_proj"),
        ("transformer.h.3.crossattention.c_proj", 3, "cross_o_proj"),
        ("model.layers.0.self_attn.dense", 0, "o_proj"),
        ("deberta.encoder.layer.0.attention.self.query_proj", 0, "q_proj"),
        ("deberta.encoder.layer.0.attention.self.in_proj", 0, "qkv_proj"),
        ("wav2vec2.encoder.layers.0.feed_forward.output_dense", 0, "fc2"),
        ("backbone.layers.0.mixer.in_proj", 0, "in_proj"),
        ("backbone.layers.0.mixer.out_proj", 0, "out_proj"),
        ("vision_tower.layers.1.q_proj.linear", 1, "q_proj"),
        ("swin.encoder.layers.1.blocks.0.attention.q_proj", (1, 0), "q_proj"),
        ("funnel.encoder.blocks.1.2.ffn.linear_1", (1, 2), "fc1"),
        ("0.model.layers.3.self_attn.q_proj", (0, 3), "q_proj"),
    ],
)
def test_blocks_and_roles(name: str, block: int | tuple[int, int] | None, role: str) -> None:
    """Where a tuple is given, it is the numbers of the stage and of the block in it."""
    numbers = () if block is None else block if isinstance(block, tuple) else (block,)
    assert (locate(name).numbers, name_role(name)) == (numbers, role)


BLIP_2 = {
    "vision_model.encoder.layers.0.mlp.fc1": "vision",
    "qformer.encoder.layer.0.attention.attention.query": "projector",
    "language_projection": "projector",
    "language_model.model.decoder.layers.0.fc1": "language",
    "language_model.lm_head": "language",
}
AUDIO = {
    "model.audio_tower.layers.0.self_attn.q_proj": "audio",
    "model.multi_modal_projector.linear": "projector",
    "model.language_model.layers.0.self_attn.q_proj": "language",
}
RESAMPLER = {
    "model.vision_model.encoder.layers.0.mlp.fc1": "vision",
    "model.connector.perceiver_resampler.layers.0.self_attn.q_proj": "projector",
    "model.layers.0.mlp.up_proj": "language",
}
SAM = {"vision_encoder.layers.0.mlp.lin1": "vision", "mask_decoder.transformer.layers.0.mlp.lin1": "decoder"}
DETR = {
    "model.backbone.conv_encoder.stages.0.layers.0.conv": "vision",
    "model.encoder.layers.0.fc1": "encoder",
    "model.decoder.layers.0.fc1": "decoder",
}
SPEECH = {"encoder.layers.0.fc1": "encoder", "projector.linear": "projector", "language_model.layers.0.fc1": "language"}
MAE = {"vit.layers.0.mlp.fc1": "encoder", "decoder.decoder_layers.0.mlp.fc1": "decoder"}
OPT = {"model.decoder.layers.0.fc1": "model", "lm_head": "model"}
SAM_2 = SAM | {"memory_encoder.fuser.layers.0.fc": "encoder", "memory_attention.layers.0.linear1": "model"}
VIDEO_MAE = {"videomae.encoder.layer.0.output.dense": "encoder", "decoder.decoder_layers.0.output.dense": "decoder"}
ZAMBA = {"model.layers.0.mamba.in_proj": "model", "model.layers.2.mamba_decoder.mamba.in_proj": "model"}
WAV2VEC2 = {"wav2vec2.encoder.layers.0.fc1": "model", "projector": "model", "classifier": "model"}


@pytest.mark.parametrize(
    "towers", [BLIP_2, AUDIO, RESAMPLER, SAM, SAM_2, VIDEO_MAE, DETR, SPEECH, MAE, OPT, ZAMBA, WAV2VEC2]
)
def test_towers(towers: dict[str, str]) -> None:
    assert name_towers(towers.keys()) == towers


@pytest.mark.parametrize(
    ("names", "heads"),
    [
        (["model.decoder.layers.0.fc1", "model.decoder.output_projection"], {"model.decoder.output_projection"}),
        (["encoder.layers.0.fc1", "projector", "classifier"], {"projector", "classifier"}),
        (["vision_tower.fc1", "projector", "lm_head"], {"lm_head"}),
        (["a.layers.0.fc1", "proj_out"], {"proj_out"}),
        (["text_decoder.cls.predictions.decoder", "text_decoder.pooler.dense"], {"text_decoder.cls.predictions.decoder"}),
        (["decoder.lm_heads.0", "score", "vision_model.head.mlp.fc1"], {"decoder.lm_heads.0", "score"}),
        (["classifier.out_proj", "bert.classifier_free.dense", "sequence_summary.summary"], {"classifier.out_proj", "sequence_summary.summary"}),
    ],
)  # fmt: skip
def test_heads(names: Collection[str], heads: set[str]) -> None:
    assert find_heads(names) == heads


def blocks(*names: str) -> list[int | None]:
    return [block for _, block, _ in describe_modules(names).values()]


def test_blocks_are_unique_in_a_tower() -> None:
    stages = [f"layers.{stage}.blocks.{block}.fc1" for stage, depth in enumerate([2, 1, 3]) for block in range(depth)]
    assert blocks(*stages, "layers.1.downsample.reduction") == [0, 1, 2, 3, 4, 5, 2]
    assert blocks("local.layers.0.fc1", "local.layers.1.fc1", "global.layers.0.fc1") == [0, 1, 2]  # two stacks
    assert blocks("attentions.0.q_lin", "attentions.1.q_lin", "ffns.0.lin1", "ffns.1.lin1") == [0, 1, 0, 1]  # one
    assert blocks("model.layers.3.fc1", "model.layers.9.fc1") == [3, 9]


def test_what_differs_in_a_block_differs_in_role() -> None:
    found = describe_modules([f"h.{i}.{part}.up_proj" for i in range(2) for part in ("ff1", "ff2")])
    assert [role for _, _, role in found.values()] == ["ff1_up_proj", "ff2_up_proj"] * 2
    experts = describe_modules([f"h.0.{part}.up_proj" for part in ("experts.0", "experts.1", "shared")])
    assert [role for _, _, role in experts.values()] == ["experts_up_proj", "experts_up_proj", "shared_up_proj"]
