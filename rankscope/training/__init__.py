"""Fine-tuning runs: one loop for search, train and compare alike, and the methods that it can run."""

from rankscope.training.loop import save_adapter, train
from rankscope.training.methods import (
    AdaLora,
    Eva,
    FullFineTuning,
    HeadOnly,
    Lora,
    Method,
    Running,
    TrainingConfig,
    TrainingResult,
)

__all__ = [
    "AdaLora",
    "Eva",
    "FullFineTuning",
    "HeadOnly",
    "Lora",
    "Method",
    "Running",
    "TrainingConfig",
    "TrainingResult",
    "save_adapter",
    "train",
]
