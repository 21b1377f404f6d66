"""Tasks: where a search gets its model, data, loss and metric from."""

from rankscope.tasks.answers import Chat
from rankscope.tasks.conversations import IGNORED
from rankscope.tasks.data import data_folder
from rankscope.tasks.image_text import ImageTextToText
from rankscope.tasks.images import ImageClassification
from rankscope.tasks.pretrained import evaluating
from rankscope.tasks.protocol import Batch, Split, Task, check_task, evaluate, fingerprint_task, profile_task
from rankscope.tasks.ready import DigitsShift, Outline, load_task, outline_task
from rankscope.tasks.sequences import SequenceToSequence, TokenClassification
from rankscope.tasks.text import CausalLM, TextClassification
from rankscope.tasks.trainers import TrainerTask, undisturbed

__all__ = [
    "IGNORED", "Batch", "CausalLM", "Chat", "DigitsShift", "ImageClassification", "ImageTextToText", "Outline",
    "SequenceToSequence", "Split", "Task", "TextClassification", "TokenClassification", "TrainerTask", "check_task",
    "data_folder", "evaluate", "evaluating", "fingerprint_task", "load_task", "outline_task", "profile_task", "undisturbed",
]  # fmt: skip
