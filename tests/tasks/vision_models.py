"""Tiny random models of the image-text-to-text families with their processors, and rows of images, questions and answers."""

import json
import math
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

# One token a byte, so that any text has tokens and offsets.
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = [
    "<pad>", "<s>", "</s>", "<unk>", "<image>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|image_pad|>", "<|video_pad|>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", "<row_1_col_1>",
    "<row_1_col_2>", "<row_2_col_1>", "<row_2_col_2>",
]  # fmt: skip
ID = {token: index for index, token in enumerate(SPECIAL)}
VOCABULARY = len(SPECIAL) + len(BYTES)

# Shortened from the templates of the released models.
_TURN = (
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ IMAGE }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
)
TEMPLATES = {
    "llava": "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    "idefics3": "<|im_start|>{% for message in messages %}{{ message['role'].capitalize() }}"
    "{{ ':' if message['content'][0]['type'] == 'image' else ': ' }}"
    + _TURN.replace("IMAGE", "'<image>'")
    + "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
    "qwen": "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    + _TURN.replace("IMAGE", "'<|vision_start|><|image_pad|><|vision_end|>'")
    + "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
}

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TEXT = {**SMALL, **IDS, "vocab_size": VOCABULARY, "num_key_value_heads": 2, "max_position_embeddings": 512}
ROTARY = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
QWEN = {
    "image_token_id": ID["<|image_pad|>"],
    "video_token_id": ID["<|video_pad|>"],
    "vision_start_token_id": ID["<|vision_start|>"],
    "vision_end_token_id": ID["<|vision_end|>"],
    "text_config": {**TEXT, **ROTARY},
    "tie_word_embeddings": False,
}
IMAGE = ID["<image>"]


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *BYTES])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _llava(**config: Any) -> tuple[Any, Any]:
    vision = {"model_type": "clip_vision_model", **SMALL, "image_size": 8, "patch_size": 4}
    config = transformers.LlavaConfig(
        **{"text_config": {"model_type": "llama", **TEXT}, "vision_config": vision, "image_token_id": IMAGE, **config}
    )
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    processor = transformers.LlavaProcessor(
        images, tokenizer(), patch_size=4, num_additional_image_tokens=1, vision_feature_select_strategy="default",
        chat_template=TEMPLATES["llava"],
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config), processor


def _idefics_parts(family: str) -> tuple[Any, Any]:
    """The configuration and the image processor of Idefics3, or of SmolVLM, which goes on from it."""
    vision = {**SMALL, "image_size": 8, "patch_size": 4}
    config = getattr(transformers, f"{family}Config")(
        text_config={"model_type": "llama", **TEXT}, vision_config=vision, image_token_id=IMAGE, scale_factor=2
    )
    images = getattr(transformers, f"{family}ImageProcessorPil")
    return config, images(size={"longest_edge": 16}, max_image_size={"longest_edge": 8})


def _idefics3() -> tuple[Any, Any]:
    config, images = _idefics_parts("Idefics3")
    processor = transformers.Idefics3Processor(
        images, tokenizer(), image_seq_len=1, chat_template=TEMPLATES["idefics3"]
    )
    return transformers.Idefics3ForConditionalGeneration(config), processor


def _smolvlm() -> tuple[Any, Any]:
    config, images = _idefics_parts("SmolVLM")
    parts = (images, tokenizer(), TEMPLATES["idefics3"], {"processor_class": "SmolVLMProcessor", "image_seq_len": 1})
    return transformers.SmolVLMForConditionalGeneration(config), parts


def _paligemma() -> tuple[Any, Any]:
    vision = {**SMALL, "image_size": 8, "patch_size": 4, "projection_dim": 32, "vision_use_head": False}
    backend = tokenizer()
    images = transformers.SiglipImageProcessorPil(size={"height": 8, "width": 8})
    images.image_seq_length = 4
    processor = transformers.PaliGemmaProcessor(images, backend)
    config = transformers.PaliGemmaConfig(
        text_config={"model_type": "gemma", **TEXT, "head_dim": 8, "vocab_size": len(backend)}, vision_config=vision,
        image_token_id=IMAGE, projection_dim=32,
    )  # fmt: skip
    return transformers.PaliGemmaForConditionalGeneration(config), processor


class MobileConfig(transformers.LlavaConfig):
    model_type = "tiny_mobile_vlm"


class Mobile(transformers.LlavaForConditionalGeneration):
    """LLaVA with a projector that quarters the tokens, as MobileVLM's does. Users register such a class with transformers."""

    config_class = MobileConfig

    def __init__(self, config: MobileConfig) -> None:
        super().__init__(config)
        self.model.multi_modal_projector = Downsampling(config)
        self.post_init()


class Downsampling(nn.Module):
    """Two pointwise layers, and a depthwise convolution of stride 2."""

    def __init__(self, config: MobileConfig) -> None:
        super().__init__()
        width = config.text_config.hidden_size
        self.point_1 = nn.Linear(config.vision_config.hidden_size, width)
        self.point_2 = nn.Linear(width, width)
        self.depth = nn.Conv2d(width, width, 3, stride=2, padding=1, groups=width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        features = self.point_2(nn.functional.gelu(self.point_1(features)))
        side = math.isqrt(features.shape[1])
        return self.depth(features.transpose(1, 2).unflatten(2, (side, side))).flatten(2).transpose(1, 2)


transformers.AutoConfig.register("tiny_mobile_vlm", MobileConfig)
transformers.AutoModelForImageTextToText.register(MobileConfig, Mobile)


def _mobile() -> tuple[Any, Any]:
    plain, processor = _llava()
    processor.patch_size, processor.num_additional_image_tokens = 8, 1  # one token of four patches
    return Mobile(MobileConfig(**plain.config.to_dict())), processor


def _qwen(version: str) -> tuple[Any, Any]:
    sizes = {"depth": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    if version == "Qwen2VL":
        vision = {**sizes, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2}
    else:
        vision = {**sizes, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 4, "intermediate_size": 64,
                  "window_size": 16, "fullatt_block_indexes": [1]}  # fmt: skip
    config = getattr(transformers, f"{version}Config")(**QWEN, vision_config=vision)
    images = transformers.Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 256}
    )
    return getattr(transformers, f"{version}ForConditionalGeneration")(config), (images, tokenizer(), TEMPLATES["qwen"])


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava": _llava,
    "mobile-vlm": _mobile,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "paligemma": _paligemma,
    "qwen2-vl": lambda: _qwen("Qwen2VL"),
    "qwen2.5-vl": lambda: _qwen("Qwen2_5_VL"),
}


def save_family(name: str, folder: Path) -> Path:
    """The model and its processor, as a downloaded model folder would be."""
    torch.manual_seed(0)
    model, processor = FAMILIES[name]()
    model.save_pretrained(folder)
    if isinstance(processor, tuple):
        images, tokens, template, *values = processor  # its half for videos needs torchvision
        images.save_pretrained(folder)
        if values:
            (folder / "processor_config.json").write_text(json.dumps(values[0]))
        tokens.save_pretrained(folder)
        (folder / "chat_template.jinja").write_text(template)
    else:
        processor.save_pretrained(folder)
    return folder


COLOURS = {"red": (230, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 230)}


def png(colour: str, size: tuple[int, int] = (12, 10), mode: str = "RGB") -> bytes:
    noise = np.random.default_rng(sum(size)).integers(0, 20, (size[1], size[0], 3))
    image = Image.fromarray((np.array(COLOURS[colour]) + noise - 10).clip(0, 255).astype(np.uint8)).convert(mode)
    stream = BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def questions(n: int = 6) -> pd.DataFrame:
    """`n` images a split, of different sizes, each with one question."""
    rows = []
    for index in range(3 * n):
        colour = list(COLOURS)[index % 3]
        image = {"bytes": png(colour, (9 + index, 12)), "path": None}
        split = ("train", "validation", "test")[index // n]
        rows.append({"image": image, "question": "which colour?", "answer": colour, "split": split})
    return pd.DataFrame(rows)


def save_rows(rows: pd.DataFrame, path: Path) -> Path:
    """As JSONL with the images in files, or as Parquet with the images inside."""
    if path.suffix == ".parquet":
        rows.to_parquet(path)
        return path
    lines = []
    for index, row in enumerate(rows.to_dict("records")):
        name = f"{index:03}.png"
        (path.parent / name).write_bytes(row["image"]["bytes"])
        lines.append(json.dumps({**row, "image": name}))
    path.write_text("\n".join(lines))
    return path
