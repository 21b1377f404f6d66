"""Tiny models with a tokenizer, saved as a user's model folder would be, and tables of texts."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["[PAD]", "[UNK]", "red", "green", "blue", "cat", "dog", "bird", "runs", "sleeps", "sings"]
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def save_tokenizer(folder: Path, words: Sequence[str] = WORDS) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder)


def save_bert(folder: Path, **config: float) -> Path:
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, **TINY, **config)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_llama(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(WORDS), bos_token_id=1, eos_token_id=1, pad_token_id=0, **TINY)
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def sentences() -> pd.DataFrame:
    """27 different sentences; the label is the animal."""
    rows = [
        (f"{colour} {animal} {verb}", animal)
        for colour in ("red", "green", "blue")
        for animal in ("cat", "dog", "bird")
        for verb in ("runs", "sleeps", "sings")
    ]
    return pd.DataFrame(rows, columns=["text", "label"])
