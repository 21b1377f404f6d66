"""The record of a decision, what moves did to the training loss, and the models that may refuse a move."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rankscope.allocation import RankAllocation
from rankscope.control.policy import UNKNOWN, Action, Effect, Proposal
from rankscope.distributed import gathered
from rankscope.files import replacing
from rankscope.performance import HierarchicalRegressor, PerformanceModel, RankFeatures
from rankscope.profiling import LocalHook


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One decision: a row of `decisions.parquet`. NaN stands for what is not known."""

    step: int  # optimizer steps before it
    phase: str  # "coarse" (all modules together) or "fine" (one rank to one module)
    action: Action  # "moved", "kept", "refused" or "skipped"; see `Proposal`
    reason: str  # why, in words
    parameters: int  # of the adapter afterwards
    batches: int  # whose gradients it rests on
    broken: int  # sampled steps so far whose gradients were not finite
    signal_share: float  # of the gradient energy, what the batches agree on
    loss: float  # mean training loss since the previous decision
    predicted: float  # increase in captured gradient energy, as a fraction of the total
    offline: float  # change of the metric that the study's performance model predicts, in its standard normal units
    offline_error: float  # its standard deviation
    online: float  # fall of the training loss that earlier moves predict
    online_error: float  # its standard deviation
    realised: float = math.nan  # measured fall of the training loss at the move, beyond its trend
    realised_error: float = math.nan  # its standard error
    modules: tuple[str, ...]  # the target modules, in the model's order
    ranks_before: tuple[int, ...]  # of each module
    ranks_after: tuple[int, ...]
    ranks_proposed: tuple[int, ...]  # the present ranks if nothing was proposed
    values: tuple[float, ...]  # what the last rank of each module captures; 0 at rank 0
    gains: tuple[float, ...]  # what one more rank would capture

    @property
    def n_moved(self) -> int:
        """Number of ranks that went elsewhere."""
        return _n_moved(self.ranks_before, self.ranks_after)

    def to_row(self) -> dict[str, Any]:
        """The row of `decisions.parquet`; `Decision(**row)` is its inverse."""
        return asdict(self)

    def scalars(self) -> dict[str, float]:
        """The known scalars, under names that loggers group."""
        found = {
            "ranks/moved": float(self.n_moved),
            "ranks/parameters": float(self.parameters),
            "ranks/largest": float(max(self.ranks_after)),
            "ranks/asleep": float(self.ranks_after.count(0)),
            "ranks/signal_share": self.signal_share,
            "ranks/predicted": self.predicted,
        }
        return {name: value for name, value in found.items() if not math.isnan(value)}


def _n_moved(before: Iterable[int], after: Iterable[int]) -> int:
    return sum(max(new - old, 0) for old, new in zip(before, after, strict=True))


def count_moved(decisions: pd.DataFrame) -> int:
    """Number of ranks that went elsewhere, over all decisions."""
    return sum(map(_n_moved, decisions["ranks_before"], decisions["ranks_after"]))


def write_decisions(decisions: pd.DataFrame, path: str | os.PathLike[str]) -> Path:
    """Write the table of decisions atomically; returns the path."""
    with replacing(path) as temporary:
        decisions.to_parquet(temporary, index=False)
    return Path(path)


class LossHistory:
    """The training loss of each step: the one that is passed, or, as long as none was, what the model returns as `loss`.

    Nothing is copied from the device before `values`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._handle = model.register_forward_hook(LocalHook(self._see))
        self.watching = True
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

    def values(self) -> list[float]:
        """One loss a step since the beginning, the mean over processes; NaN where there was none."""
        known = [loss for loss in self._unread if loss is not None]
        numbers = iter(torch.stack([loss.to(known[0].device) for loss in known]).tolist() if known else ())
        fresh = [math.nan if loss is None else next(numbers) for loss in self._unread]
        self._read += np.mean(gathered(fresh), axis=0).tolist() if fresh else []
        self._unread.clear()
        return self._read

    def restore(self, values: Sequence[float]) -> None:
        """Go on from the losses of an earlier run."""
        self._read, self._unread, self._present = list(values), [], []

    def close(self) -> None:
        """Remove the hook, and stop what `torch.compile` made of it."""
        self._handle.remove()
        self.watching = False

    def _see(self, model: nn.Module, _: Any, output: Any) -> None:
        if not self.watching:
            return
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if model.training and torch.is_grad_enabled() and isinstance(loss, Tensor) and loss.numel() == 1:
            self._present.append(loss.detach().float().reshape(()))


def effect_of_move(losses: Sequence[float]) -> Effect | None:
    """How much more the loss fell at a move than before and after it.

    The losses, as many before the move as after it, are cut into four blocks with means m_0 … m_3. The fall from m_1 to m_2 is
    compared with the mean of the falls from m_0 to m_1 and from m_2 to m_3, where nothing was moved: a steady or slowing
    decline cancels. The error is that of the four means, by the scatter inside the blocks. None for fewer than 8 losses, or if
    one is not finite.

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


def predict_effect(
    features: RankFeatures, decisions: Sequence[Decision], before: Sequence[int], after: Sequence[int]
) -> Effect:
    """The effect to expect of a move: Bayesian linear regression on the measured effects of earlier ones; NaN without any.

    The loss is taken to be linear in the concave rank features of the performance model. All coefficients have one prior
    variance, at which the first move's effect is as uncertain before it is measured as its measurement is.
    """

    def change(before: Sequence[int], after: Sequence[int]) -> NDArray[np.float64]:
        rows = features.transform([after, before])
        difference: NDArray[np.float64] = rows[0] - rows[1]
        return difference

    moves = [each for each in decisions if each.action == "moved" and not math.isnan(each.realised)]
    if not moves:
        return UNKNOWN
    rows = np.array([change(move.ranks_before, move.ranks_after) for move in moves])
    errors = np.maximum([move.realised_error for move in moves], 1e-12)
    variance = errors[0] ** 2 / max(float(rows[0] @ rows[0]), 1e-12)
    model = HierarchicalRegressor(variances={"all": variance, "noise": 1.0})
    model.fit(rows, [move.realised for move in moves], sample_weight=1.0 / errors**2)
    mean, deviation = model.predict(change(before, after)[None, :], return_std=True)
    return Effect(float(mean[0]), float(deviation[0]))


def screen(proposal: Proposal, before: RankAllocation, offline: PerformanceModel | None, online: Effect) -> Proposal:
    """The proposal, refused if a model (the study's, or earlier moves) expects harm of more than its standard deviation."""
    expected = UNKNOWN
    if offline is not None:
        order = [target.name for target in offline.features.targets]
        rows = [[allocation.ranks[name] for name in order] for allocation in (proposal.allocation, before)]
        mean, deviation = offline.difference([rows[0]], [rows[1]])
        expected = Effect(float(mean[0]), float(deviation[0]))
    proposal = replace(proposal, offline=expected, online=online)
    for name, effect in (("the study's model", expected), ("the model of earlier moves", online)):
        if effect.mean + effect.error < 0:
            reason = f"{name} expects {effect.mean:.3g} with uncertainty {effect.error:.3g}"
            return replace(proposal, action="refused", reason=reason)
    return proposal
