"""The online controller: ranks that move between modules while a LoRA model trains."""

from rankscope.control.callback import RankControllerCallback
from rankscope.control.config import ControllerConfig
from rankscope.control.controller import RankController
from rankscope.control.decisions import Decision
from rankscope.control.policy import Policy

__all__ = ["ControllerConfig", "Decision", "Policy", "RankController", "RankControllerCallback"]
