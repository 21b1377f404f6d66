"""What moves did to the training loss, and an online model of it that is fitted as the run goes on."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rankscope.allocation import RankAllocation
from rankscope.performance.features import RankFeatures
from rankscope.performance.regression import HierarchicalRegressor
from rankscope.profiling.observer import LocalHook
from rankscope.profiling.processes import gathered

logger = logging.getLogger(__name__)


class Effect(NamedTuple):
    """A change of the loss for the better (above 0), and its standard error."""

    mean: float
    error: float


class LossHistory:
    """The training loss of each step: the one that is passed, or else what the model returns as `loss`.

    Nothing is copied from the device until `values` asks for it. What the model returns is not always what is minimised, so the
    model is not watched once a loss was passed, and which of the two is used is logged once.
    """

    def __init__(self, model: nn.Module) -> None:
        self._handle = model.register_forward_hook(LocalHook(self._see))
        self._open, self._said = True, False
        self._present: list[Tensor] = []
        self._unread: list[Tensor | None] = []
        self._read: list[float] = []

    def end_step(self, loss: Tensor | float | None) -> None:
        """Take the loss of an optimizer step."""
        seen, self._present = self._present, []
        if loss is not None:
            self.close()
            seen = [torch.as_tensor(loss).detach().float()]
        self._unread.append(torch.stack(seen).mean() if seen else None)

    def say_which(self) -> None:
        """Log, once, which loss is used where none was passed. Every process must call it."""
        if self._said or not self._open:
            return
        self._said = True
        if not np.isnan(self.values()).all():
            logger.info("no loss was passed to `step`; moves are judged by what the model returns as `loss`")
        else:
            logger.warning(
                "no loss was passed to `step` and the model returned none, so the effect of moves is not measured; pass the loss "
                "that is minimised"
            )

    def values(self) -> list[float]:
        """One loss a step since the beginning, the mean over processes; NaN where there was none."""
        known = [loss for loss in self._unread if loss is not None]
        numbers = iter(torch.stack([loss.to(known[0].device) for loss in known]).tolist() if known else ())
        fresh = [math.nan if loss is None else next(numbers) for loss in self._unread]
        self._read += np.mean(gathered(fresh), axis=0).tolist() if fresh else []
        self._unread.clear()
        return self._read

    def restore(self, values: Sequence[float]) -> None:
        """Starts from losses of an earlier run."""
        self._read, self._unread, self._present = list(values), [], []

    def close(self) -> None:
        """Takes the hook off; what `torch.compile` made of it sees nothing from now on."""
        self._handle.remove()
        self._open = False

    def _see(self, model: nn.Module, _: Any, output: Any) -> None:
        if not self._open:
            return
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if model.training and torch.is_grad_enabled() and isinstance(loss, Tensor) and loss.numel() == 1:
            self._present.append(loss.detach().float().reshape(()))


def effect_of_move(losses: Sequence[float]) -> Effect | None:
    """How much more the loss fell at a move than before and after it.

    The losses are cut into four blocks, two before and two after the move, with means m_0 … m_3. What falls from m_1 to m_2 is
    compared with the mean of the falls from m_0 to m_1 and from m_2 to m_3, where nothing was moved: a steady or slowing
    decline cancels. The error is that of the four means, by the scatter inside the blocks.

    Args:
        losses: As many before the move as after it; None comes back for fewer than 8, or where one is not finite.

    >>> effect_of_move([4.0, 4.0, 3.0, 3.0, 1.0, 1.0, 0.0, 0.0])
    Effect(mean=1.0, error=0.0)
    """
    if len(losses) < 8 or not np.isfinite(losses).all():
        return None
    blocks = np.array_split(np.asarray(losses, dtype=np.float64), 4)
    m = [float(block.mean()) for block in blocks]
    mean = (m[1] - m[2]) - 0.5 * ((m[0] - m[1]) + (m[2] - m[3]))
    variance = sum(
        c**2 * float(block.var(ddof=1)) / len(block) for c, block in zip((0.5, 1.5, 1.5, 0.5), blocks, strict=True)
    )
    return Effect(mean, math.sqrt(variance))


class EffectModel:
    """Bayesian linear regression from a move's change of features to its effect; nothing is known before the first.

    The loss is taken to be linear in the concave rank features of the performance model, so that a move's effect is linear in
    their differences. All coefficients have one prior variance, at which the first move's effect is as uncertain before it is
    measured as its measurement is.

    Args:
        features: Of the target modules and the budget.
    """

    def __init__(self, features: RankFeatures) -> None:
        self._features = features
        self._rows: list[list[float]] = []
        self._effects: list[Effect] = []

    def add(self, before: RankAllocation, after: RankAllocation, effect: Effect) -> None:
        """Takes the measured effect of a move."""
        self._rows.append(self._row(before, after).tolist())
        self._effects.append(effect)

    def predict(self, before: RankAllocation, after: RankAllocation) -> Effect | None:
        """The effect to expect of a move, with its uncertainty; None before anything was measured."""
        if not self._effects:
            return None
        rows = np.array(self._rows)
        errors = np.maximum([effect.error for effect in self._effects], 1e-12)
        variance = errors[0] ** 2 / max(float(rows[0] @ rows[0]), 1e-12)
        model = HierarchicalRegressor(variances={"all": variance, "noise": 1.0})
        model.fit(rows, [effect.mean for effect in self._effects], sample_weight=1.0 / errors**2)
        mean, deviation = model.predict(self._row(before, after)[None, :], return_std=True)
        return Effect(float(mean[0]), float(deviation[0]))

    def state_dict(self) -> dict[str, Any]:
        """What was measured, as plain values."""
        return {"rows": self._rows, "effects": [list(effect) for effect in self._effects]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._rows = [list(row) for row in state["rows"]]
        self._effects = [Effect(*effect) for effect in state["effects"]]

    def _row(self, before: RankAllocation, after: RankAllocation) -> NDArray[np.float64]:
        rows = self._features.transform([after.vector, before.vector])
        difference: NDArray[np.float64] = rows[0] - rows[1]
        return difference
