"""Fine-tuning: one loop for search, train and compare, and the methods it can run."""

from rankscope.training.loop import TrainingResult, save_adapter, train
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
    "save_adapter",
    "train",
]
