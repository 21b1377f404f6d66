"""A small vision-language model built as MobileVLM is: DINOv2-small, a light projector, SmolLM2-135M, as a LLaVA."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast

from rankscope.errors import TaskError
from rankscope.files import digest, read_tensors, replacing
from rankscope.tasks.data import cache_folder
from rankscope.tasks.pretrained import dinov2_small, load_model, load_pretrained, smollm2
from rankscope.tasks.scenes import IMAGE_TOKEN, N_IMAGE_TOKENS

Stage = Literal["pixel_values", "image_features", "image_embeds"]


class LightProjector(nn.Module):
    """LDP, MobileVLM's light projector (Chu et al., arXiv 2312.16886, figure 4), which leaves a quarter of the tokens.

    Two pointwise layers, a depthwise 3 x 3 convolution with a residual, a depthwise one of stride 2, and a layer norm whose
    scale gives the outputs the size of word embeddings.
    """

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width_in, width)
        self.linear_2 = nn.Linear(width, width)
        self.local = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.pool = nn.Conv2d(width, width, 3, stride=2, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)

    def forward(self, features: Tensor) -> Tensor:
        """Map patch features (batch, side * side, vision width) to tokens (batch, side * side / 4, language width)."""
        hidden = self.linear_2(nn.functional.gelu(self.linear_1(features)))
        grid = hidden.transpose(1, 2).unflatten(2, (round(hidden.shape[1] ** 0.5), -1))
        grid = self.pool(nn.functional.gelu(grid + self.local(grid)))
        return cast(Tensor, self.norm(grid.flatten(2).transpose(1, 2)))


class MobileLlava(LlavaForConditionalGeneration):  # type: ignore[misc]
    """transformers' LLaVA with a `LightProjector`. It saves and loads as any model of transformers.

    `without` leaves out frozen parts whose outputs are given instead. Several questions on one image are packed into one
    sequence, each of which sees the image and itself.
    """

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)
        widths = config.vision_config.hidden_size, config.text_config.hidden_size
        self.model.multi_modal_projector = LightProjector(*widths)

    def without(self, stage: Stage) -> MobileLlava:
        """Drop the parts before the stage that inputs begin with, in place: the vision tower, or the projector as well."""
        if stage != "pixel_values":
            self.model.vision_tower = None
        if stage == "image_embeds":
            self.model.multi_modal_projector = None
        return self

    def patch_features(self, pixel_values: Tensor) -> Tensor:
        """Return what the vision tower gives the projector, (batch, patches, width): its last layer before the final norm."""
        hidden = self.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
        return cast(Tensor, hidden[self.config.vision_feature_layer][:, 1:])

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        segments: Tensor | None = None,
        image_features: Tensor | None = None,
        image_embeds: Tensor | None = None,
        answers: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Run LLaVA. Arguments other than these are its own, `pixel_values` among them.

        `segments`, (batch, length), holds 0 for the image and 1, 2, … for the questions on it, which do not see each other.
        In place of `pixel_values` go `image_features`, (batch, patches, width) of the vision tower, or `image_embeds`,
        (batch, tokens, width) of the projector. `answers`, (batch, length), is the token to predict after each one, or -100;
        with it, logits are of these answers only, (n, vocabulary), and the loss is their mean cross-entropy.
        """
        if image_features is not None:
            image_embeds = self.model.multi_modal_projector(image_features)
        if image_embeds is not None:
            options["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=list(image_embeds))}
        if segments is not None:
            seen = packed_mask(segments, attention_mask)
            attention_mask = torch.zeros(seen.shape, device=seen.device, dtype=self.dtype)
            attention_mask = attention_mask.masked_fill_(~seen, torch.finfo(self.dtype).min)  # what every kernel takes
        if answers is None:
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, **options)
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **options)[0]
        kept = answers != -100
        logits = self.lm_head(hidden[kept])
        loss = nn.functional.cross_entropy(logits.float(), answers[kept])
        return LlavaCausalLMOutputWithPast(loss=loss, logits=logits)


def packed_mask(segments: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Return (batch, 1, length, length): whether a token sees another, which comes first and is of segment 0 or its own."""
    order = torch.arange(segments.shape[1], device=segments.device)
    seen = (segments[:, None] == 0) | (segments[:, None] == segments[:, :, None])
    seen = seen & (order[None, :] <= order[:, None])
    if attention_mask is not None:
        seen = seen & attention_mask.bool()[:, None]
    return seen.unsqueeze(1)


def build_mobile_vlm(projector: Path) -> Path:
    """Return the folder of the model with this projector, put together at the first call; `MobileLlava` loads it."""
    if not projector.is_file():
        must = f"the projector must be a safetensors file, but there is no `{projector}`"
        raise TaskError(f"{must}; data/scenes/train.py makes one.")
    weights = read_tensors(projector, what="a projector")
    folder = cache_folder() / f"mobile-vlm-{digest(weights)[:12]}"
    if not folder.is_dir():
        with replacing(folder, folder=True) as temporary:
            assembled(weights).save_pretrained(temporary)
            load_pretrained("AutoTokenizer", smollm2()).save_pretrained(temporary)
    return folder


def assembled(projector: Mapping[str, Tensor]) -> MobileLlava:
    """Return DINOv2-small, a projector of these weights, and SmolLM2-135M-Instruct as one model, in bfloat16."""
    vision = load_model("Dinov2Model", dinov2_small())
    language = load_model("AutoModelForCausalLM", smollm2())
    sizes = {"image_token_index": IMAGE_TOKEN, "image_seq_length": N_IMAGE_TOKENS, "vision_feature_layer": -1}
    with torch.device("meta"):
        model = MobileLlava(LlavaConfig(vision_config=vision.config, text_config=language.config, **sizes))
    model.model.vision_tower, model.model.language_model, model.lm_head = vision, language.model, language.lm_head
    model.model.multi_modal_projector.load_state_dict(projector, assign=True)
    return cast(MobileLlava, model.to(torch.bfloat16).eval())
