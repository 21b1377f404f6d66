"""Tiny random models of every architecture that discovery must know."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import (
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
