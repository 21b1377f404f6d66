"""The online controller: ranks that move between modules while a LoRA model trains."""

from rankscope.control.controller import ControllerConfig, RankController
from rankscope.control.decisions import Decision, count_moved, write_decisions
from rankscope.control.policy import Policy
from rankscope.control.trainer import RankControllerCallback

__all__ = [
    "ControllerConfig",
    "Decision",
    "Policy",
    "RankController",
    "RankControllerCallback",
    "count_moved",
    "write_decisions",
]
