"""The record of a decision: its inputs, what was predicted, what was done and why, and what came of it."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pandas as pd

from rankscope.allocation import RankAllocation
from rankscope.control.policy import Proposal
from rankscope.control.screen import Action, Verdict
from rankscope.control.signals import Measured
from rankscope.files import replacing


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
