"""The online controller: ranks that move between modules while a LoRA model trains."""

from rankscope.control.controller import RankController, schedule_of
from rankscope.control.decisions import Decision, count_moved, write_decisions
from rankscope.control.trainer import RankControllerCallback

__all__ = ["Decision", "RankController", "RankControllerCallback", "count_moved", "schedule_of", "write_decisions"]
