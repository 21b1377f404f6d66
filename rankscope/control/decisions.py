"""The record of a decision: its inputs, what was predicted, what was done and why, and what came of it."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rankscope.allocation import RankAllocation
from rankscope.control.policy import Proposal
from rankscope.control.signals import Measured
from rankscope.distributed import gathered
from rankscope.files import replacing
from rankscope.performance import HierarchicalRegressor, PerformanceModel, RankFeatures
from rankscope.profiling import LocalHook

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


Action = Literal["moved", "kept", "refused", "skipped"]
UNKNOWN = Effect(math.nan, math.nan)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What becomes of a proposal.

    Attributes:
        action: `"moved"`, `"kept"`, `"refused"` or `"skipped"`.
        reason: In words.
        offline: What the study's model expects.
        online: What the model of earlier moves expects.
    """

    action: Action
    reason: str
    offline: Effect = UNKNOWN
    online: Effect = UNKNOWN


def screen(
    proposal: Proposal | None, before: RankAllocation, offline: PerformanceModel | None, online: EffectModel
) -> Verdict:
    """Refuses moves that a model expects to do harm, by more than one standard deviation of its own uncertainty."""
    if proposal is None:
        return Verdict(action="skipped", reason="no finite gradient to decide on")
    if not proposal.transfers:
        return Verdict(action="kept", reason="nothing is worth moving")
    after = proposal.allocation
    expected = UNKNOWN
    if offline is not None:
        order = [target.name for target in offline.features.targets]
        rows = [[allocation.ranks[name] for name in order] for allocation in (after, before)]
        mean, deviation = offline.difference([rows[0]], [rows[1]])
        expected = Effect(float(mean[0]), float(deviation[0]))
    measured = online.predict(before, after) or UNKNOWN
    for name, effect in (("the study's model", expected), ("the model of earlier moves", measured)):
        if effect.mean + effect.error < 0:
            reason = f"{name} expects {effect.mean:.3g} with uncertainty {effect.error:.3g}"
            return Verdict(action="refused", reason=reason, offline=expected, online=measured)
    reason = f"captures {proposal.predicted:.1%} of the gradient energy more"
    return Verdict(action="moved", reason=reason, offline=expected, online=measured)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One decision; NaN and None stand for what was not known.

    Attributes:
        step: After how many optimizer steps.
        phase: `"coarse"` (all modules together) or `"fine"` (one module).
        action: `"moved"`; `"kept"` where nothing was worth moving; `"refused"` by a performance model; `"skipped"` for want of
            gradients to decide on.
        reason: Why, in words.
        parameters: Of the adapter afterwards.
        batches: Whose gradients it rests on.
        broken: Sampled steps so far whose gradients were not finite.
        signal_share: Of the gradient energy, what the batches agree on.
        loss: Mean training loss since the decision before.
        predicted: What was proposed would capture this share of the gradient energy more.
        offline: The change of the metric that the study's performance model predicts, in its standard normal units.
        offline_error: Standard deviation of that.
        online: The fall of the training loss that the model of earlier moves predicts.
        online_error: Standard deviation of that.
        realised: By how much the training loss fell at the move beyond its trend.
        realised_error: Standard error of that.
        modules: The target modules, in the model's order.
        ranks_before: Of each.
        ranks_after: Of each.
        ranks_proposed: Of each, where something was.
        values: What the last rank of each captures; 0 at rank 0.
        gains: What one rank more would capture.
    """

    step: int
    phase: str
    action: Action
    reason: str
    parameters: int
    batches: int
    broken: int
    signal_share: float
    loss: float
    predicted: float
    offline: float
    offline_error: float
    online: float
    online_error: float
    realised: float
    realised_error: float
    modules: tuple[str, ...]
    ranks_before: tuple[int, ...]
    ranks_after: tuple[int, ...]
    ranks_proposed: tuple[int, ...]
    values: tuple[float, ...]
    gains: tuple[float, ...]

    @property
    def n_moved(self) -> int:
        """Ranks that went elsewhere."""
        return sum(max(after - before, 0) for before, after in zip(self.ranks_before, self.ranks_after, strict=True))


def describe(
    *,
    step: int,
    phase: str,
    verdict: Verdict,
    before: RankAllocation,
    after: RankAllocation,
    proposal: Proposal | None,
    measured: Measured | None,
    broken: int,
    loss: float,
) -> Decision:
    """The record of a decision whose effect is not known yet."""
    signals = {s.target.name: s for s in measured.signals} if measured else {}
    return Decision(
        step=step,
        phase=phase,
        action=verdict.action,
        reason=verdict.reason,
        parameters=after.parameters,
        batches=measured.batches if measured else 0,
        broken=broken,
        signal_share=measured.signal_share if measured else math.nan,
        loss=loss,
        predicted=proposal.predicted if proposal else math.nan,
        offline=verdict.offline.mean,
        offline_error=verdict.offline.error,
        online=verdict.online.mean,
        online_error=verdict.online.error,
        realised=math.nan,
        realised_error=math.nan,
        modules=tuple(before.ranks),
        ranks_before=before.vector,
        ranks_after=after.vector,
        ranks_proposed=proposal.allocation.vector if proposal else before.vector,
        values=tuple((signals[n].values or (0.0,))[-1] if n in signals else math.nan for n in before.ranks),
        gains=tuple((signals[n].gains or (0.0,))[0] if n in signals else math.nan for n in before.ranks),
    )


def summary(decision: Decision) -> dict[str, float]:
    """A decision's scalars under names that loggers group, without those that are not known."""
    found = {
        "ranks/moved": float(decision.n_moved),
        "ranks/parameters": float(decision.parameters),
        "ranks/largest": float(max(decision.ranks_after)),
        "ranks/asleep": float(decision.ranks_after.count(0)),
        "ranks/signal_share": decision.signal_share,
        "ranks/predicted": decision.predicted,
    }
    return {name: value for name, value in found.items() if not math.isnan(value)}


def tabulate_decisions(decisions: Sequence[Decision]) -> pd.DataFrame:
    """One row a decision; what is per module is in lists."""
    columns = [field.name for field in fields(Decision)]
    return pd.DataFrame([asdict(decision) for decision in decisions], columns=columns)


def count_moved(decisions: pd.DataFrame) -> int:
    """Ranks that went elsewhere, over all decisions."""
    changes = zip(decisions["ranks_before"], decisions["ranks_after"], strict=True)
    return sum(max(after - before, 0) for ranks in changes for before, after in zip(*ranks, strict=True))


def write_decisions(decisions: pd.DataFrame, path: str | os.PathLike[str]) -> Path:
    """Writes the table of decisions, atomically; returns the path."""
    with replacing(path) as temporary:
        decisions.to_parquet(temporary, index=False)
    return Path(path)
