"""Adapters: the only importer of peft. Allocations to and from LoRA configs and PEFT models, and ranks that change live."""

from rankscope.adapters.adalora import check_adalora_steps, ranks_of_adalora, step_adalora, wrap_with_adalora
from rankscope.adapters.eva import wrap_with_eva
from rankscope.adapters.lora import (
    apply_allocation,
    count_adapter_parameters,
    from_lora_config,
    from_peft_model,
    load_adapter,
    save_lora_config,
    to_lora_config,
)
from rankscope.adapters.masks import RankMasks, masks_on
from rankscope.adapters.requests import Resize
from rankscope.adapters.resize import resize_adapters
from rankscope.adapters.selection import adapted_modules, refused_by_peft
from rankscope.adapters.sidecar import restore_ranks, restore_ranks_on_load, save_ranks

__all__ = [
    "RankMasks",
    "Resize",
    "adapted_modules",
    "apply_allocation",
    "check_adalora_steps",
    "count_adapter_parameters",
    "from_lora_config",
    "from_peft_model",
    "load_adapter",
    "masks_on",
    "ranks_of_adalora",
    "refused_by_peft",
    "resize_adapters",
    "restore_ranks",
    "restore_ranks_on_load",
    "save_lora_config",
    "save_ranks",
    "step_adalora",
    "to_lora_config",
    "wrap_with_adalora",
    "wrap_with_eva",
]
