"""Fine-tuning runs: one loop for search, train and compare alike, and the methods that it can run."""

from rankscope.training.config import TrainingConfig, TrainingResult
from rankscope.training.loop import train
from rankscope.training.method import Lora, Method, Running
from rankscope.training.peers import AdaLora, Eva, FullFineTuning, HeadOnly
from rankscope.training.saving import save_adapter

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
