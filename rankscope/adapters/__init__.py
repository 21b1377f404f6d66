"""Adapters: the only importer of peft. Allocations to and from LoRA configs and PEFT models."""

from rankscope.adapters.lora import (
    apply_allocation,
    count_adapter_parameters,
    from_lora_config,
    from_peft_model,
    load_adapter,
    save_lora_config,
    to_lora_config,
)
from rankscope.adapters.prefix import RankPrefix

__all__ = [
    "RankPrefix",
    "apply_allocation",
    "count_adapter_parameters",
    "from_lora_config",
    "from_peft_model",
    "load_adapter",
    "save_lora_config",
    "to_lora_config",
]
