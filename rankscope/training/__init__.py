"""Fine-tuning: one loop for search, train and compare, and the methods it can run."""

from rankscope.training.loop import TrainingResult, save_adapter, train
from rankscope.training.memory import describe_towers, estimate_memory
from rankscope.training.methods import AdaLora, Eva, FullFineTuning, HeadOnly, Lora, Method, PeftAdapter

__all__ = [
    "AdaLora",
    "Eva",
    "FullFineTuning",
    "HeadOnly",
    "Lora",
    "Method",
    "PeftAdapter",
    "TrainingResult",
    "describe_towers",
    "estimate_memory",
    "save_adapter",
    "train",
]
