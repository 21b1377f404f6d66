"""Tasks: where a search gets its model, data, loss and metric from."""

from rankscope.tasks.protocol import Batch, Split, Task, check_task, evaluate, fingerprint_task, profile_task
from rankscope.tasks.ready import load_task

__all__ = [
    "Batch",
    "Split",
    "Task",
    "check_task",
    "evaluate",
    "fingerprint_task",
    "load_task",
    "profile_task",
]
