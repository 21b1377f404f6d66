"""Warnings, each given once, for a controller that is not asked to decide, or that never had a gradient to decide on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from rankscope.control.decisions import Decision

logger = logging.getLogger(__name__)


class StepReminder:
    """Warns where the optimizer steps and the controller is not told.

    Args:
        optimizer: Whose steps are counted, not wrapped.
        after: How many may pass.
    """

    def __init__(self, optimizer: Optimizer, *, after: int) -> None:
        self._left = after
        self._handle = optimizer.register_step_post_hook(self._count)

    def stop(self) -> None:
        """The controller was told, or is closed."""
        self._handle.remove()

    def _count(self, *_: Any) -> None:
        self._left -= 1
        if self._left < 0:
            self.stop()
            logger.warning(
                "the optimizer has stepped, but `RankController.step` was never called, so no rank can move; call it after each "
                "`optimizer.step()` and before `zero_grad()`"
            )


def warn_if_blind(decisions: Sequence[Decision]) -> None:
    """Says so where there were decisions and none had a gradient to rest on."""
    if not decisions or any(decision.action != "skipped" for decision in decisions):
        return
    broken = decisions[-1].broken
    cause = (
        f"the gradients of {broken} sampled steps were not finite; lower the learning rate or the loss scale"
        if broken
        else "no training forward pass of the PEFT model was seen, or none with gradients; train the model that was passed, and "
        "with reentrant checkpointing call its `enable_input_require_grads()`"
    )
    logger.warning(
        "no rank was moved, for none of the %d decisions had gradients to rest on: %s", len(decisions), cause
    )
