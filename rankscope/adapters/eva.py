"""PEFT's EVA (Paischer et al., arXiv 2410.07170), to compare with: LoRA along the inputs' principal directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peft import EvaConfig, LoraConfig, PeftModel, initialize_lora_eva_weights
from torch import nn

from rankscope.adapters.live import config_of, lora_layers
from rankscope.adapters.lora import wrap
from rankscope.adapters.patterns import alpha_for, name_fields
from rankscope.targets import TargetModule


def wrap_with_eva(
    model: nn.Module,
    targets: Sequence[TargetModule],
    batches: Sequence[Mapping[str, Any]],
    *,
    rank: int,
    scaling: float,
    rho: float = 2.0,
    dropout: float = 0.0,
    modules_to_save: Sequence[str] = (),
) -> PeftModel:
    """Wraps `model` (in place) with LoRA whose ranks and rows of A come from the inputs of these batches.

    Args:
        model: The base model.
        targets: What to adapt.
        batches: Go through the model again and again until directions have settled.
        rank: The mean over modules; where EVA puts them, a module may end with none.
        scaling: The factor on the update at this rank.
        rho: The largest rank is `rho * rank`; 1: no redistribution.
        dropout: Before A.
        modules_to_save: Trained whole.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha_for(rank, scaling, rslora=False),
        lora_dropout=dropout,
        **name_fields([target.name for target in targets]),
        modules_to_save=list(modules_to_save) or None,
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=rho),
    )
    wrapped = wrap(model, config, {target.name: rank for target in targets}, low_cpu_mem_usage=True)
    options: dict[str, Any] = {}
    if "input_ids" not in batches[0]:  # PEFT's default takes the attention mask, which only language models have
        options = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None}
    inputs = [_without_class_labels(batch) for batch in batches]
    initialize_lora_eva_weights(wrapped, inputs, show_progress_bar=False, **options)
    kept = {name: layer.r["default"] for name, layer in lora_layers(wrapped, "default").items()}
    wrapped.peft_config["default"] = config_of(wrapped, "default", kept)  # EVA's has a pattern for each module
    return wrapped


def _without_class_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    """EVA takes labels for a mask over tokens."""
    tokens = batch.get("input_ids")
    return {
        key: value
        for key, value in batch.items()
        if key != "labels" or (tokens is not None and value.shape == tokens.shape)
    }
