"""Tiny random models: eight that many tests build (`BUILDERS`), and the long table of transformers' architectures."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {"vocab_size": 50, "max_position_embeddings": 32}
IMAGE = {"image_size": 8, "patch_size": 4}
NO_IDS = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
LLAMA = {**SMALL, **TEXT, **NO_IDS, "num_key_value_heads": 2}

BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**SMALL, **TEXT)),
    "bert-mlm": lambda: BertForMaskedLM(BertConfig(**SMALL, **TEXT)),
    "vit": lambda: ViTForImageClassification(ViTConfig(**SMALL, **IMAGE)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, bos_token_id=1, eos_token_id=1)
    ),
    "clip": lambda: CLIPModel(
        CLIPConfig(text_config={**SMALL, **TEXT, **NO_IDS}, vision_config={**SMALL, **IMAGE}, projection_dim=16)
    ),
    "llava": lambda: LlavaForConditionalGeneration(
        LlavaConfig(
            text_config={"model_type": "llama", **LLAMA},
            vision_config={"model_type": "clip_vision_model", **SMALL, **IMAGE},
        )
    ),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=50, decoder_start_token_id=0)
    ),
}


def build(name: str) -> nn.Module:
    """The model of that name, with the same random weights every time."""
    torch.manual_seed(0)
    return BUILDERS[name]()


# --- the long table: one row an architecture -----------------------------------------------------------------------

# What every configuration is shrunk to where it has such a value; further values stand in the table.
SIZES: dict[str, int] = {
    key: size
    for size, keys in (
        (
            32,
            "hidden_size d_model n_embd dim embed_dim embedding_size model_dim encoder_hidden_size max_source_positions",
        ),
        (
            64,
            "intermediate_size d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner ffn_hidden_size hidden_dim mlp_dim",
        ),
        (64, "max_position_embeddings n_positions max_target_positions"),
        (2, "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers"),
        (2, "num_decoder_layers num_key_value_heads num_experts_per_tok type_vocab_size"),
        (4, "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads"),
        (4, "num_encoder_attention_heads num_decoder_attention_heads num_local_experts num_experts n_routed_experts"),
        (16, "moe_intermediate_size shared_expert_intermediate_size projection_dim image_size"),
        (8, "d_kv head_dim"),
        (60, "vocab_size"),
        (4, "patch_size"),
        (3, "num_channels mask_token_id unk_token_id"),
        (2, "eos_token_id sep_token_id"),
        (1, "bos_token_id cls_token_id decoder_start_token_id"),
        (0, "pad_token_id"),
    )
    for key in keys.split()
}
# Short for several roles of a tower.
WORDS = {
    "attention": ATTENTION,
    "cross": [f"cross_{role}" for role in ATTENTION],
    "gated": ["gate_proj", "up_proj", "down_proj"],
    "mlp": ["fc1", "fc2"],
}
SOFT = 55  # the token that an image's or a sound's features take the place of


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A class of transformers, its inputs, the roles of its targets by tower, and values of its configuration."""

    model: str
    inputs: str
    roles: dict[str, list[str]]
    selection: str = "all-linear"
    config: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """The same random weights every time, in evaluation mode."""
        torch.manual_seed(0)
        kind = getattr(transformers, self.model)
        model: nn.Module = kind(tiny_config(kind.config_class, self.config)).eval()
        return model

    def batch(self, seed: int) -> dict[str, Tensor]:
        return INPUTS[self.inputs](torch.Generator().manual_seed(seed))


def tiny_config(kind: type, values: dict[str, Any]) -> Any:
    """A configuration with sizes from `SIZES`, then `values`, whose dicts go to the parts of composite ones."""
    plain, values = kind(), dict(values)
    parts = getattr(kind, "sub_configs", {})
    shrunk = {
        key: SIZES[key]
        for key, value in plain.to_dict().items()
        if key in SIZES
        and key not in parts
        and (isinstance(value, int) or (value is None and key.endswith("token_id")))
    }
    for key in parts:
        part = values.pop(key, {})
        own = CONFIG_MAPPING[part["model_type"]] if "model_type" in part else type(getattr(plain, key))
        if own is not type(None):
            shrunk[key] = tiny_config(own, {k: v for k, v in part.items() if k != "model_type"})
    return kind(**shrunk | values)


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The model's own loss; where it has none, the mean squares of its outputs."""
    output = model(**batch)
    if getattr(output, "loss", None) is not None:
        return output.loss
    return sum(outputs.float().square().mean() for outputs in tensors_of(output))


def tensors_of(output: Any) -> list[Tensor]:
    """The floating-point tensors that a model returns."""
    return [value for value in output.values() if isinstance(value, Tensor) and value.is_floating_point()]


def _tokens(g: torch.Generator, n: int = 8) -> Tensor:
    return torch.randint(4, 50, (2, n), generator=g)


def _floats(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(2, *shape, generator=g)


def _class(g: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (2,), generator=g)


def _text(g: torch.Generator, soft: int = 0, **more: Tensor) -> dict[str, Tensor]:
    """Text to predict, after `soft` places for features."""
    tokens = torch.cat([torch.full((2, soft), SOFT), _tokens(g)], 1)
    return {"input_ids": tokens, "labels": tokens, **more}


def _image(g: torch.Generator) -> Tensor:
    return _floats(g, 3, 16, 16)


def _places(soft: int) -> Tensor:
    return torch.cat([torch.ones(2, soft), torch.zeros(2, 8)], 1).long()


INPUTS: dict[str, Callable[[torch.Generator], dict[str, Tensor]]] = {
    "text": _text,
    "classes": lambda g: {"input_ids": _tokens(g), "labels": _class(g)},
    "sequences": lambda g: {"input_ids": _tokens(g), "labels": _tokens(g, 5)},
    "bytes": lambda g: {"inputs": (tokens := _tokens(g, 64)), "labels": tokens},
    "image": lambda g: {"pixel_values": _image(g), "labels": _class(g)},
    "pixels": lambda g: {"pixel_values": _image(g)},
    "speech": lambda g: {"input_values": _floats(g, 800), "labels": _class(g)},
    "letters": lambda g: {"input_values": _floats(g, 800), "labels": torch.randint(4, 30, (2, 3), generator=g)},
    "wave": lambda g: {"input_values": _floats(g, 2000), "labels": _tokens(g, 5)},
    "spectrogram": lambda g: {"input_values": _floats(g, 16, 16), "labels": _class(g)},
    "spectrum": lambda g: {"input_features": _floats(g, 8, 64), "labels": _tokens(g, 5)},
    "frames": lambda g: {"input_features": _floats(g, 64, 8), "labels": _tokens(g, 5)},
    "sound": lambda g: {"input_features": _floats(g, 8, 64), "labels": _class(g)},
    "sound pair": lambda g: {"input_features": _floats(g, 1, 32, 8), "input_ids": _tokens(g)},
    "pair": lambda g: {"pixel_values": _image(g), "input_ids": _tokens(g)},
    "question": lambda g: {"pixel_values": _image(g), "input_ids": _tokens(g)},
    "caption": lambda g: _text(g, pixel_values=_image(g)),
    "masked caption": lambda g: {
        **_text(g, pixel_values=_image(g)),
        "image_embeds_position_mask": (torch.arange(8) < 4).expand(2, 8),
    },
    "4 patches": lambda g: _text(g, 4, pixel_values=_image(g)),
    "16 patches": lambda g: _text(g, 16, pixel_values=_image(g)),
    "typed patches": lambda g: _text(g, 4, pixel_values=_image(g), token_type_ids=_places(4)),
    "prefix": lambda g: _text(g, 16, pixel_values=_image(g), token_type_ids=0 * _places(16)),
    "instruction": lambda g: _text(g, 4, pixel_values=_image(g), qformer_input_ids=_tokens(g)),
    "images": lambda g: _text(g, 4, pixel_values=_floats(g, 1, 3, 16, 16)),
    "tiles": lambda g: _text(g, 36, pixel_values=_floats(g, 2, 3, 16, 16), image_sizes=torch.tensor([[16, 16]] * 2)),
    "tile": lambda g: _text(
        g,
        pixel_values=_floats(g, 1, 1, 3, 16, 16),
        aspect_ratio_ids=torch.ones(2, 1).long(),
        aspect_ratio_mask=torch.ones(2, 1, 1).long(),
        cross_attention_mask=torch.ones(2, 8, 1, 1).long(),
    ),
    "patch grid": lambda g: _text(
        g,
        4,
        pixel_values=_floats(g, 16, 48).flatten(0, 1),
        image_grid_thw=torch.tensor([[1, 4, 4]] * 2),
        mm_token_type_ids=_places(4),
    ),
    "prompt": lambda g: {
        "pixel_values": _image(g),
        "input_ids": torch.cat([torch.full((2, 17), SOFT), _tokens(g)], 1),
        "labels": _tokens(g, 5),
    },
    "audio": lambda g: _text(g, 16, input_features=_floats(g, 8, 64)),
    "masked audio": lambda g: _text(
        g, 16, input_features=_floats(g, 8, 64), feature_attention_mask=torch.ones(2, 64).long()
    ),
}


def _row(model: str, inputs: str, roles: dict[str, str], selection: str = "all-linear", **config: Any) -> Architecture:
    written_out = {
        tower: [r for word in text.split() for r in WORDS.get(word, [word])] for tower, text in roles.items()
    }
    return Architecture(model=model, inputs=inputs, roles=written_out, selection=selection, config=config)


WAVES: dict[str, Any] = {
    "conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (8, 8), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 16,
    "mask_time_prob": 0.0, "ctc_zero_infinity": True,
}  # fmt: skip

# fmt: off
ARCHITECTURES: dict[str, Architecture] = {
    # text encoders
    "bert": _row("BertForSequenceClassification", "classes", {"model": "attention mlp pooler"}),
    "roberta": _row("RobertaForMaskedLM", "text", {"model": "attention mlp"}),
    "distilbert": _row("DistilBertForSequenceClassification", "classes", {"model": "attention mlp"}),
    "albert": _row("AlbertForSequenceClassification", "classes", {"model": "attention mlp "
        "embedding_hidden_mapping_in pooler"}),
    "electra": _row("ElectraForSequenceClassification", "classes", {"model": "attention mlp"}),
    "deberta": _row("DebertaForSequenceClassification", "classes", {"model": "mlp qkv_proj o_proj pooler"}),
    "deberta-v2": _row("DebertaV2ForSequenceClassification", "classes", {"model": "attention mlp pooler"}),
    "mpnet": _row("MPNetForSequenceClassification", "classes", {"model": "attention mlp"}),
    "modernbert": _row("ModernBertForSequenceClassification", "classes", {"model": "mlp qkv_proj o_proj"}),
    "mobilebert": _row("MobileBertForSequenceClassification", "classes", {"model": "mlp embedding_transformation "
        "q_proj k_proj v_proj attention_output_o_proj output_bottleneck_dense bottleneck_input_dense "
        "bottleneck_attention_o_proj ffn_0_fc1 ffn_0_fc2 ffn_1_fc1 ffn_1_fc2 ffn_2_fc1 ffn_2_fc2 pooler"},
        true_hidden_size=32, intra_bottleneck_size=32),
    "funnel": _row("FunnelForSequenceClassification", "classes", {"model": "attention mlp"}, block_sizes=[1, 1],
        d_inner=64),
    "xlm": _row("XLMForSequenceClassification", "classes", {"model": "attention mlp"}, emb_dim=32),
    "xlnet": _row("XLNetForSequenceClassification", "classes", {"model": "mlp"}, d_inner=64),
    "convbert": _row("ConvBertForSequenceClassification", "classes", {"model": "attention mlp conv_kernel_layer "
        "conv_out_layer"}),
    "roformer": _row("RoFormerForSequenceClassification", "classes", {"model": "attention mlp"}),
    "canine": _row("CanineForSequenceClassification", "classes", {"model": "attention mlp pooler"},
        downsampling_rate=2, num_hash_functions=4, num_hash_buckets=16, local_transformer_stride=8),
    "longformer": _row("LongformerForSequenceClassification", "classes", {"model": "attention mlp query_global key_global "
        "value_global"}, attention_window=4),
    "layoutlm": _row("LayoutLMForSequenceClassification", "classes", {"model": "attention mlp pooler"}),
    "fnet": _row("FNetForSequenceClassification", "classes", {"model": "mlp projection pooler"}),
    "eurobert": _row("EuroBertForSequenceClassification", "classes", {"model": "attention gated"}),
    "perceiver": _row("PerceiverForMaskedLM", "bytes", {"encoder": "attention cross mlp cross_fc1 cross_fc2",
        "decoder": "cross cross_fc1 cross_fc2"}, num_latents=4, d_latents=32, num_self_attends_per_block=2,
        num_self_attention_heads=4, num_cross_attention_heads=4),
    # decoders
    "gpt2": _row("GPT2LMHeadModel", "text", {"model": "mlp qkv_proj o_proj"}),
    "gptj": _row("GPTJForCausalLM", "text", {"model": "attention mlp"}, rotary_dim=4),
    "gpt-neo": _row("GPTNeoForCausalLM", "text", {"model": "attention mlp"}, attention_types=[[['global', 'local'],
        1]], window_size=8),
    "gpt-neox": _row("GPTNeoXForCausalLM", "text", {"model": "mlp qkv_proj o_proj"}),
    "codegen": _row("CodeGenForCausalLM", "text", {"model": "mlp qkv_proj o_proj"}, rotary_dim=4),
    "llama": _row("LlamaForCausalLM", "text", {"model": "attention gated"}),
    "mistral": _row("MistralForCausalLM", "text", {"model": "attention gated"}),
    "qwen2": _row("Qwen2ForCausalLM", "text", {"model": "attention gated"}),
    "qwen3": _row("Qwen3ForCausalLM", "text", {"model": "attention gated"}),
    "gemma2": _row("Gemma2ForCausalLM", "text", {"model": "attention gated"}),
    "phi": _row("PhiForCausalLM", "text", {"model": "attention mlp"}),
    "phi3": _row("Phi3ForCausalLM", "text", {"model": "o_proj qkv_proj gate_up_proj down_proj"}),
    "falcon": _row("FalconForCausalLM", "text", {"model": "mlp qkv_proj o_proj"}),
    "bloom": _row("BloomForCausalLM", "text", {"model": "mlp qkv_proj o_proj"}),
    "opt": _row("OPTForCausalLM", "text", {"model": "attention mlp"}, word_embed_proj_dim=32),
    "mpt": _row("MptForCausalLM", "text", {"model": "qkv_proj o_proj up_proj down_proj"}),
    "starcoder2": _row("Starcoder2ForCausalLM", "text", {"model": "attention mlp"}),
    "biogpt": _row("BioGptForCausalLM", "text", {"model": "attention mlp"}),
    "ctrl": _row("CTRLLMHeadModel", "text", {"model": "attention mlp"}, dff=64),
    # mixtures of experts
    "deepseek-v3": _row("DeepseekV3ForCausalLM", "text", {"model": "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj "
        "o_proj"}, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, n_group=2,
        topk_group=1, first_k_dense_replace=1, num_key_value_heads=4, head_dim=4),
    "mixtral": _row("MixtralForCausalLM", "text", {"model": "attention"}),
    "qwen2-moe": _row("Qwen2MoeForCausalLM", "text", {"model": "attention gated shared_expert_gate"}),
    "qwen3-moe": _row("Qwen3MoeForCausalLM", "text", {"model": "attention"}),
    "gpt-oss": _row("GptOssForCausalLM", "text", {"model": "attention"}),
    "jetmoe": _row("JetMoeForCausalLM", "text", {"model": "mlp_layer self_attention_experts_layer kv_proj"},
        kv_channels=8),
    "llama4": _row("Llama4ForCausalLM", "text", {"model": "attention gated"}, intermediate_size_mlp=64),
    "olmoe": _row("OlmoeForCausalLM", "text", {"model": "attention"}),
    # state spaces and hybrids
    "mamba": _row("MambaForCausalLM", "text", {"model": "in_proj"}, state_size=4),
    "mamba2": _row("Mamba2ForCausalLM", "text", {"model": "in_proj"}, num_heads=8, head_dim=8, state_size=4,
        n_groups=1, chunk_size=4),
    "falcon-mamba": _row("FalconMambaForCausalLM", "text", {"model": "in_proj"}, state_size=4),
    "falcon-h1": _row("FalconH1ForCausalLM", "text", {"model": "attention gated in_proj"}, mamba_d_ssm=64,
        mamba_n_heads=8, mamba_d_head=8, mamba_d_state=4, mamba_chunk_size=4),
    "jamba": _row("JambaForCausalLM", "text", {"model": "attention gated in_proj x_proj out_proj"},
        attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, mamba_d_state=4,
        use_mamba_kernels=False),
    "bamba": _row("BambaForCausalLM", "text", {"model": "attention gated in_proj"}, attn_layer_indices=[1],
        mamba_n_heads=8, mamba_d_head=8, mamba_d_state=4, mamba_chunk_size=4),
    "zamba2": _row("Zamba2ForCausalLM", "text", {"model": "attention in_proj linear gate_up_proj down_proj "
        "gate_up_proj_adapter_list_0_0 gate_up_proj_adapter_list_0_1"}, layer_types=['mamba', 'hybrid'], mamba_d_state=4, n_mamba_heads=8, mamba_headdim=8,
        chunk_size=4, adapter_rank=2, hybrid_layer_ids=[1], attention_head_dim=16),
    "nemotron-h": _row("NemotronHForCausalLM", "text", {"model": "attention in_proj up_proj down_proj"},
        layer_types=['mamba', 'moe', 'attention', 'mlp'], num_hidden_layers=4, mamba_num_heads=8, mamba_head_dim=8,
        ssm_state_size=4, n_groups=1, chunk_size=4),
    "recurrent-gemma": _row("RecurrentGemmaForCausalLM", "text", {"model": "attention gated linear_y linear_x "
        "linear_out"}, num_hidden_layers=3, lru_width=32),
    "qwen3-next": _row("Qwen3NextForCausalLM", "text", {"model": "attention in_proj_qkvz in_proj_ba "
        "shared_expert_gate"}, layer_types=['linear_attention', 'full_attention'], linear_num_value_heads=4,
        linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8),
    "lfm2": _row("Lfm2ForCausalLM", "text", {"model": "attention gated in_proj out_proj"}, layer_types=['conv',
        'full_attention']),
    "granite-hybrid": _row("GraniteMoeHybridForCausalLM", "text", {"model": "attention input_linear output_linear "
        "in_proj"}, layer_types=['mamba', 'attention'], mamba_n_heads=8, mamba_d_head=8, mamba_d_state=4,
        mamba_chunk_size=4, shared_intermediate_size=32),
    # encoder-decoders
    "t5": _row("T5ForConditionalGeneration", "sequences", {"encoder": "attention mlp", "decoder": "attention cross "
        "mlp"}, decoder_start_token_id=0),
    "umt5": _row("UMT5ForConditionalGeneration", "sequences", {"encoder": "attention gate_proj up_proj fc2",
        "decoder": "attention cross gate_proj up_proj fc2"}, decoder_start_token_id=0),
    "bart": _row("BartForConditionalGeneration", "sequences", {"encoder": "attention mlp", "decoder": "attention "
        "cross mlp"}),
    "pegasus": _row("PegasusForConditionalGeneration", "sequences", {"encoder": "attention mlp", "decoder":
        "attention cross mlp"}),
    "marian": _row("MarianMTModel", "sequences", {"encoder": "attention mlp", "decoder": "attention cross mlp"}),
    "m2m100": _row("M2M100ForConditionalGeneration", "sequences", {"encoder": "attention mlp", "decoder": "attention "
        "cross mlp"}),
    "led": _row("LEDForConditionalGeneration", "sequences", {"encoder": "attention mlp query_global key_global "
        "value_global", "decoder": "attention cross mlp"}, max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64, attention_window=4),
    "prophetnet": _row("ProphetNetForConditionalGeneration", "sequences", {"encoder": "attention mlp", "decoder":
        "attention cross mlp relative_pos_embeddings"}),
    "switch": _row("SwitchTransformersForConditionalGeneration", "sequences", {"encoder": "attention mlp",
        "decoder": "attention cross mlp"}, decoder_start_token_id=0),
    "longt5": _row("LongT5ForConditionalGeneration", "sequences", {"encoder": "attention mlp", "decoder": "attention "
        "cross mlp"}, local_radius=3, decoder_start_token_id=0),
    # vision
    "vit": _row("ViTForImageClassification", "image", {"model": "attention mlp"}),
    "deit": _row("DeiTForImageClassification", "image", {"model": "attention mlp"}),
    "beit": _row("BeitForImageClassification", "image", {"model": "attention mlp"}),
    "dinov2": _row("Dinov2ForImageClassification", "image", {"model": "attention mlp"}),
    "swin": _row("SwinForImageClassification", "image", {"model": "attention mlp reduction"}, embed_dim=8,
        depths=[2, 2], num_heads=[2, 2], window_size=2, patch_size=2),
    "swinv2": _row("Swinv2ForImageClassification", "image", {"model": "attention mlp reduction "
        "continuous_position_bias_mlp_0 continuous_position_bias_mlp_2"}, embed_dim=8,
        depths=[1, 1], num_heads=[2, 2], window_size=2, patch_size=2, pretrained_window_sizes=[0, 0]),
    "convnext": _row("ConvNextForImageClassification", "image", {"model": "mlp"}, hidden_sizes=[8, 16], depths=[2,
        1], num_stages=2, patch_size=2),
    "resnet": _row("ResNetForImageClassification", "image", {"model": "convolution shortcut_convolution "
        "layer_0_convolution layer_1_convolution layer_2_convolution"}, selection=r"resnet.*convolution",
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2]),
    "segformer": _row("SegformerForImageClassification", "image", {"model": "attention mlp"}, num_encoder_blocks=2,
        depths=[1, 1], hidden_sizes=[16, 32], num_attention_heads=[2, 2], sr_ratios=[2, 1], patch_sizes=[3, 3],
        strides=[2, 2], mlp_ratios=[2, 2], decoder_hidden_size=16),
    "pvt": _row("PvtForImageClassification", "image", {"model": "attention mlp"}, num_encoder_blocks=2, depths=[1,
        2], hidden_sizes=[16, 32], num_attention_heads=[2, 2], sequence_reduction_ratios=[2, 1], patch_sizes=[4, 2],
        strides=[4, 2], mlp_ratios=[2, 2]),
    "hiera": _row("HieraForImageClassification", "image", {"model": "mlp qkv_proj o_proj proj"}, embed_dim=8,
        depths=[1, 1], num_heads=[1, 2], image_size=[16, 16], query_stride=[2, 2], masked_unit_size=[2, 2],
        masked_unit_attention=[True, False], num_query_pool=1, patch_stride=[2, 2], patch_size=[3, 3],
        patch_padding=[1, 1]),
    "vit-mae": _row("ViTMAEForPreTraining", "pixels", {"encoder": "attention mlp", "decoder": "attention mlp "
        "decoder_embed decoder_pred"}, decoder_num_hidden_layers=2, decoder_hidden_size=16,
        decoder_intermediate_size=32),
    "yolos": _row("YolosForObjectDetection", "pixels", {"model": "attention mlp"}, image_size=[16, 16],
        num_detection_tokens=3),
    "detr": _row("DetrForObjectDetection", "pixels", {"encoder": "attention mlp", "decoder": "attention cross mlp"},
        use_timm_backbone=False, use_pretrained_backbone=False, backbone_config={"model_type": "resnet",
        "embedding_size": 8, "hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1], "out_features": ['stage4']},
        num_queries=3),
    "dpt": _row("DPTForDepthEstimation", "pixels", {"model": "attention mlp 0"}, num_hidden_layers=4,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[4, 8, 8, 8], fusion_hidden_size=8),
    "sam": _row("SamModel", "pixels", {"vision": "mlp qkv_proj o_proj", "decoder": "attention mlp "
        "cross_attn_token_to_image_cross_q_proj cross_attn_token_to_image_cross_k_proj "
        "cross_attn_token_to_image_cross_v_proj cross_attn_token_to_image_cross_o_proj "
        "cross_attn_image_to_token_cross_q_proj cross_attn_image_to_token_cross_k_proj "
        "cross_attn_image_to_token_cross_v_proj cross_attn_image_to_token_cross_o_proj proj_in proj_out layers_0 "
        "iou_prediction_head_layers_0"},
        vision_config={"output_channels": 16, "global_attn_indexes": [1], "window_size": 2, "num_pos_feats": 8,
        "mlp_dim": 64}, prompt_encoder_config={"hidden_size": 16, "image_embedding_size": 4, "mask_input_channels":
        4}, mask_decoder_config={"hidden_size": 16, "num_hidden_layers": 1, "iou_head_hidden_dim": 16,
        "num_attention_heads": 2}),
    "siglip-vision": _row("SiglipForImageClassification", "image", {"model": "attention mlp"}),
    # audio
    "wav2vec2": _row("Wav2Vec2ForSequenceClassification", "speech", {"model": "attention mlp projection"}, **WAVES),
    "wav2vec2-ctc": _row("Wav2Vec2ForCTC", "letters", {"model": "attention mlp projection"}, **WAVES),
    "wav2vec2-xvector": _row("Wav2Vec2ForXVector", "speech", {"model": "attention mlp projection"}, **WAVES,
        tdnn_dim=(16, 16), tdnn_kernel=(3, 2), tdnn_dilation=(1, 1), xvector_output_dim=16),
    "wav2vec2-conformer": _row("Wav2Vec2ConformerForCTC", "letters", {"model": "attention projection ffn1_fc1 "
        "ffn1_fc2 linear_pos ffn2_fc1 ffn2_fc2"}, **WAVES, vocab_size=60, conv_depthwise_kernel_size=3),
    "hubert": _row("HubertForCTC", "letters", {"model": "attention mlp projection"}, **WAVES),
    "wavlm": _row("WavLMForCTC", "letters", {"model": "mlp projection gru_rel_pos_linear"}, **WAVES),
    "sew": _row("SEWForCTC", "letters", {"model": "attention mlp feature_projection projection"}, **WAVES,
        squeeze_factor=2),
    "sew-d": _row("SEWDForCTC", "letters", {"model": "attention mlp feature_projection projection"}, **WAVES,
        squeeze_factor=2),
    "data2vec-audio": _row("Data2VecAudioForCTC", "letters", {"model": "attention mlp projection"}, **WAVES |
        {"num_conv_pos_embeddings": 2}),
    "whisper": _row("WhisperForConditionalGeneration", "spectrum", {"encoder": "attention mlp", "decoder":
        "attention cross mlp"}, num_mel_bins=8),
    "whisper-classes": _row("WhisperForAudioClassification", "sound", {"model": "attention mlp"}, num_mel_bins=8,
        classifier_proj_size=16),
    "ast": _row("ASTForAudioClassification", "spectrogram", {"model": "attention mlp"}, max_length=16,
        num_mel_bins=16, frequency_stride=4, time_stride=4),
    "speecht5": _row("SpeechT5ForSpeechToText", "letters", {"encoder": "attention mlp projection", "decoder":
        "attention cross mlp"}, **WAVES, positional_dropout=0.0),
    "speech2text": _row("Speech2TextForConditionalGeneration", "frames", {"encoder": "attention mlp", "decoder":
        "attention cross mlp"}, input_feat_per_channel=8, conv_channels=16, num_conv_layers=2, conv_kernel_sizes=[3,
        3]),
    "clap": _row("ClapModel", "sound pair", {"language": "attention mlp pooler", "projector": "text_projection_fc1 "
        "text_projection_fc2 audio_projection_fc1 audio_projection_fc2", "audio": "attention mlp reduction"},
        audio_config={"spec_size": 16, "num_mel_bins": 8, "patch_size": 2, "patch_stride": [2, 2], "window_size": 2,
        "depths": [1, 1], "num_attention_heads": [2, 2], "patch_embeds_hidden_size": 8, "hidden_size": 16,
        "aff_block_r": 1, "enable_fusion": False}),
    "moonshine": _row("MoonshineForConditionalGeneration", "wave", {"encoder": "attention mlp", "decoder":
        "attention cross mlp"}, encoder_num_hidden_layers=2, decoder_num_hidden_layers=2,
        encoder_num_attention_heads=4, decoder_num_attention_heads=4, encoder_num_key_value_heads=4,
        decoder_num_key_value_heads=4),
    # vision and language
    "clip": _row("CLIPModel", "pair", {"language": "attention mlp", "vision": "attention mlp", "projector":
        "visual_projection text_projection"}),
    "siglip": _row("SiglipModel", "pair", {"language": "attention mlp head", "vision": "attention mlp"}),
    "blip": _row("BlipForConditionalGeneration", "caption", {"vision": "mlp qkv_proj o_proj", "language": "attention "
        "cross mlp"}, text_config={"encoder_hidden_size": 32}),
    "blip-2": _row("Blip2ForConditionalGeneration", "4 patches", {"vision": "mlp qkv_proj o_proj", "projector":
        "attention cross mlp language_projection", "language": "attention mlp"}, num_query_tokens=4,
        image_token_index=55, image_token_id=55, text_config={"model_type": "opt", "word_embed_proj_dim": 32}),
    "instructblip": _row("InstructBlipForConditionalGeneration", "instruction", {"vision": "mlp qkv_proj o_proj",
        "projector": "attention cross intermediate_fc1 output_fc2 intermediate_query_fc1 output_query_fc2 "
        "language_projection", "language": "attention mlp"}, num_query_tokens=4, image_token_index=55,
        image_token_id=55, text_config={"model_type": "opt", "word_embed_proj_dim": 32}),
    "llava": _row("LlavaForConditionalGeneration", "16 patches", {"vision": "attention mlp", "projector": "linear_1 "
        "linear_2", "language": "attention gated"}, image_token_index=55, image_token_id=55),
    "llava-next": _row("LlavaNextForConditionalGeneration", "tiles", {"vision": "attention mlp", "projector":
        "linear_1 linear_2", "language": "attention gated"}, image_token_index=55, image_token_id=55,
        image_grid_pinpoints=[[16, 16]]),
    "qwen2-vl": _row("Qwen2VLForConditionalGeneration", "patch grid", {"vision": "mlp qkv_proj o_proj", "projector":
        "mlp_0 mlp_2", "language": "attention gated"}, image_token_id=55, vision_start_token_id=54, vision_end_token_id=53,
        video_token_id=56, vision_config={"depth": 2, "hidden_size": 32, "embed_dim": 32, "mlp_ratio": 2,
        "spatial_merge_size": 2, "temporal_patch_size": 1}, text_config={"rope_parameters": {"rope_type": "default",
        "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}),
    "qwen3-vl": _row("Qwen3VLForConditionalGeneration", "patch grid", {"vision": "mlp qkv_proj o_proj", "projector":
        "mlp", "language": "attention gated"}, image_token_id=55, vision_start_token_id=54, vision_end_token_id=53,
        video_token_id=56, vision_config={"depth": 2, "out_hidden_size": 32, "spatial_merge_size": 2,
        "temporal_patch_size": 1, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        text_config={"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta":
        10000.0}}),
    "paligemma": _row("PaliGemmaForConditionalGeneration", "prefix", {"vision": "attention mlp", "projector":
        "linear", "language": "attention gated"}, image_token_index=55, image_token_id=55, projection_dim=32,
        vision_config={"projection_dim": 32}),
    "idefics3": _row("Idefics3ForConditionalGeneration", "images", {"vision": "attention mlp", "projector": "proj",
        "language": "attention gated"}, image_token_id=55, scale_factor=2),
    "idefics2": _row("Idefics2ForConditionalGeneration", "images", {"vision": "attention mlp", "projector":
        "attention gated", "language": "attention gated"}, image_token_id=55,
        perceiver_config={"resampler_n_latents": 4, "resampler_depth": 2, "resampler_n_heads": 4,
        "resampler_head_dim": 8, "num_key_value_heads": 2}),
    "git": _row("GitForCausalLM", "caption", {"vision": "attention mlp", "language": "attention mlp", "projector":
        "visual_projection_0"}),
    "vilt": _row("ViltForQuestionAnswering", "question", {"model": "attention mlp pooler"}),
    "mllama": _row("MllamaForConditionalGeneration", "tile", {"vision": "attention mlp", "language": "attention "
        "cross gated", "projector": "multi_modal_projector"}, image_token_index=55,
        vision_config={"num_global_layers": 1, "intermediate_layers_indices": [0], "vision_output_dim": 64,
        "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]]}, text_config={"cross_attention_layers": [1]}),
    "internvl": _row("InternVLForConditionalGeneration", "4 patches", {"vision": "attention mlp", "projector":
        "linear_1 linear_2", "language": "attention gated"}, image_token_id=55, vision_config={"image_size": [16,
        16], "patch_size": [4, 4]}),
    "kosmos2": _row("Kosmos2ForConditionalGeneration", "masked caption", {"language": "attention mlp", "vision":
        "attention mlp", "projector": "cross dense"}, latent_query_num=4, text_config={"layers": 2, "embed_dim": 32,
        "attention_heads": 4, "ffn_dim": 64}),
    "gemma3": _row("Gemma3ForConditionalGeneration", "typed patches", {"vision": "attention mlp", "language":
        "attention gated"}, image_token_index=55, image_token_id=55, mm_tokens_per_image=4),
    "owlvit": _row("OwlViTModel", "pair", {"language": "attention mlp", "vision": "attention mlp", "projector":
        "visual_projection text_projection"}),
    "layoutlmv3": _row("LayoutLMv3ForSequenceClassification", "classes", {"model": "attention mlp"}, input_size=16,
        coordinate_size=4, shape_size=8, max_2d_position_embeddings=64),
    "flava": _row("FlavaModel", "pair", {"language": "attention mlp pooler", "vision": "attention mlp pooler",
        "projector": "attention mlp pooler image_projection text_projection image_to_mm_projection "
        "text_to_mm_projection"}),
    "florence2": _row("Florence2ForConditionalGeneration", "prompt", {"vision": "spatial_block_window_attn_qkv_proj "
        "spatial_block_window_attn_o_proj spatial_block_fc1 spatial_block_fc2 channel_block_channel_attn_qkv_proj "
        "channel_block_channel_attn_o_proj channel_block_fc1 channel_block_fc2", "projector": "image_projection",
        "language": "attention cross mlp"}, image_token_id=55, vision_config={"depths": [1, 1], "patch_size": [3,
        3], "patch_stride": [2, 2], "patch_padding": [1, 1], "patch_prenorm": [False, True], "embed_dim": [8, 16],
        "num_heads": [2, 2], "num_groups": [2, 2], "window_size": 4, "projection_dim": 32,
        "max_position_embeddings": 8}, text_config={"model_type": "bart"}),
    "aria": _row("AriaForConditionalGeneration", "4 patches", {"vision": "attention mlp", "projector": "mlp "
        "cross_q_proj cross_k_proj cross_v_proj cross_linear", "language": "attention gated"}, image_token_index=55,
        image_token_id=55, projector_patch_to_query_dict={"16": 4}, text_config={"moe_num_experts": 4, "moe_topk":
        2, "moe_num_shared_experts": 1}),
    # audio and language
    "qwen2-audio": _row("Qwen2AudioForConditionalGeneration", "masked audio", {"audio": "attention mlp",
        "projector": "linear", "language": "attention gated"}, audio_token_index=55, audio_token_id=55,
        audio_config={"num_mel_bins": 8}),
    "voxtral": _row("VoxtralForConditionalGeneration", "audio", {"audio": "attention mlp", "language": "attention "
        "gated", "projector": "linear_1 linear_2"}, audio_token_id=55, audio_config={"num_mel_bins": 8}),
}
# fmt: on
