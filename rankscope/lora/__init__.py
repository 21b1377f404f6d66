"""Adapters: the only importer of peft. Allocations to and from LoRA configs and PEFT models, and ranks that change live."""

from rankscope.lora.checkpoint import load_adapter, loaded_from, restore_ranks, restore_ranks_on_load, save_ranks
from rankscope.lora.config import (
    adapted_modules,
    count_adapter_parameters,
    from_lora_config,
    refused_by_peft,
    save_lora_config,
    to_lora_config,
)
from rankscope.lora.export import adapted_regex, export
from rankscope.lora.factors import check_known, unwrap_optimizer
from rankscope.lora.masks import RankMasks, masks_on
from rankscope.lora.resize import LiveAdapter, Resize, from_peft_model, is_ddp, resize_adapters
from rankscope.lora.saved import CARD, RANKS_TITLE, PaddedAdapter, SavedAdapter, pad_adapter, read_adapter
from rankscope.lora.shrink import Moments, ShrunkAdapter, measure_moments, shrink
from rankscope.lora.wrapping import (
    apply_allocation,
    ia3_config,
    ranks_of_adalora,
    vera_config,
    with_heads,
    wrap_with_adalora,
    wrap_with_config,
    wrap_with_eva,
)

__all__ = [
    "CARD",
    "RANKS_TITLE",
    "LiveAdapter",
    "Moments",
    "PaddedAdapter",
    "RankMasks",
    "Resize",
    "SavedAdapter",
    "ShrunkAdapter",
    "adapted_modules",
    "adapted_regex",
    "apply_allocation",
    "check_known",
    "count_adapter_parameters",
    "export",
    "from_lora_config",
    "from_peft_model",
    "ia3_config",
    "is_ddp",
    "load_adapter",
    "loaded_from",
    "masks_on",
    "measure_moments",
    "pad_adapter",
    "ranks_of_adalora",
    "read_adapter",
    "refused_by_peft",
    "resize_adapters",
    "restore_ranks",
    "restore_ranks_on_load",
    "save_lora_config",
    "save_ranks",
    "shrink",
    "to_lora_config",
    "unwrap_optimizer",
    "vera_config",
    "with_heads",
    "wrap_with_adalora",
    "wrap_with_config",
    "wrap_with_eva",
]
