"""Fine-tuning: one loop for search, train and compare, and the methods it can run."""

from rankscope.training.loop import TrainingResult, train
from rankscope.training.memory import describe_towers, estimate_memory
from rankscope.training.methods import AdaLora, Eva, FullFineTuning, HeadOnly, Lora, Method, PeftAdapter
from rankscope.training.saving import add_to_card, save_adapter
from rankscope.training.watching import watching

__all__ = [
    "AdaLora",
    "Eva",
    "FullFineTuning",
    "HeadOnly",
    "Lora",
    "Method",
    "PeftAdapter",
    "TrainingResult",
    "add_to_card",
    "describe_towers",
    "estimate_memory",
    "save_adapter",
    "train",
    "watching",
]
