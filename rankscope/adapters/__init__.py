"""Adapters: the only importer of peft. Allocations to and from LoRA configs and PEFT models."""

from rankscope.adapters.lora import (
    apply_allocation,
    count_adapter_parameters,
    from_lora_config,
    from_peft_model,
    save_lora_config,
    to_lora_config,
)

__all__ = [
    "apply_allocation",
    "count_adapter_parameters",
    "from_lora_config",
    "from_peft_model",
    "save_lora_config",
    "to_lora_config",
]
