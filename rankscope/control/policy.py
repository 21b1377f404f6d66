"""The move policy: from what ranks are worth to a proposal within the budget. Pure functions, no state, no torch.

A module's r-th rank is worth sigma_r^2, the energy of the present gradient that it can follow (Eckart and Young 1936), as in
one-shot. The ranks in place are the first ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from rankscope.allocation import RankAllocation
from rankscope.budget import ParameterBudget, RankLimits, allocate_marginal
from rankscope.settings import ControllerSettings
from rankscope.targets import TargetModule

# "kept": nothing is worth moving; "refused" by a performance model; "skipped": no gradient to decide on.
Action = Literal["moved", "kept", "refused", "skipped"]


class Effect(NamedTuple):
    """A change for the better (above 0), and its standard error."""

    mean: float
    error: float


UNKNOWN = Effect(math.nan, math.nan)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleSignals:
    """What one module's ranks are worth, in units of gradient energy that all modules share."""

    target: TargetModule
    values: tuple[float, ...]  # of each rank in place, descending
    gains: tuple[float, ...]  # of the first, second, … further rank, descending

    @property
    def rank(self) -> int:
        """The number of ranks in place."""
        return len(self.values)

    def worth(self, rank: int) -> float:
        """What a change to this rank gains (above 0) or gives up (below 0)."""
        return sum(self.gains[: rank - self.rank]) if rank >= self.rank else -sum(self.values[rank:])


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """What the policy would do, and what performance models expect of it."""

    allocation: RankAllocation  # afterwards
    action: Action
    reason: str  # in words
    changes: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # ranks before and after, by module
    predicted: float = 0.0  # increase in captured gradient energy, as a fraction of the total
    moved: float = 0.0  # share of the budget that goes to further ranks
    offline: Effect = UNKNOWN  # by the study's performance model, in its standard normal units
    online: Effect = UNKNOWN  # by earlier moves, in units of the training loss


def propose(
    signals: Sequence[ModuleSignals],
    budget: ParameterBudget,
    settings: ControllerSettings,
    *,
    coarse: bool,
    signal_share: float = 1.0,
    energy: float | None = None,
    limits: RankLimits | None = None,
) -> Proposal:
    """What the policy would move within the budget: ranks of all modules together (coarse), or one rank to one module.

    The less of the gradient energy is signal (`signal_share`), the more a move must gain. Worth is a fraction of `energy`; None:
    of the sum of all signals. A module outside the `limits` may keep its rank.

    >>> fc = [TargetModule(name=f"fc{i}", in_features=64, out_features=64) for i in (1, 2)]
    >>> signals = [ModuleSignals(target=fc[0], values=(9.0, 1.0), gains=(0.5,)),
    ...            ModuleSignals(target=fc[1], values=(8.0,), gains=(6.0, 1.0))]
    >>> dict(propose(signals, ParameterBudget(384), ControllerSettings(), coarse=True).changes)
    {'fc1': (2, 1), 'fc2': (1, 2)}
    """
    targets, present = tuple(s.target for s in signals), [s.rank for s in signals]
    low, high = (limits or RankLimits()).arrays(targets)
    low, high = np.minimum(low, present), np.maximum(np.minimum(high, settings.max_rank or high), present)
    move = _refill if coarse else _best_transfer
    ranks = move(signals, low.tolist(), high.tolist(), budget, settings.hysteresis / max(signal_share, 1e-3))
    pairs = list(zip(signals, ranks, strict=True))
    total = (sum(sum(s.values) + sum(s.gains) for s in signals) if energy is None else energy) or 1.0
    predicted = sum(s.worth(rank) / total for s, rank in pairs)
    moved = sum(s.target.rank_cost * max(rank - s.rank, 0) for s, rank in pairs) / budget.limit
    if predicted <= 0 or predicted < settings.min_gain_ratio * moved:
        return Proposal(
            allocation=RankAllocation(targets, tuple(present)), action="kept", reason="nothing is worth moving"
        )
    return Proposal(
        allocation=RankAllocation(targets, tuple(ranks)),
        action="moved",
        reason=f"captures {predicted:.1%} of the gradient energy more",
        changes={s.target.name: (s.rank, rank) for s, rank in pairs if rank != s.rank},
        predicted=predicted,
        moved=moved,
    )


def _refill(
    signals: Sequence[ModuleSignals], low: list[int], high: list[int], budget: ParameterBudget, margin: float
) -> list[int]:
    """Water-filling on all ranks together; those in place count `1 + margin` times their worth."""
    worth = (np.concatenate([np.asarray(s.values) * (1.0 + margin), np.asarray(s.gains)]) for s in signals)
    gains = {s.target.name: np.sort(each)[::-1] for s, each in zip(signals, worth, strict=True)}
    nothing_fits = budget.limit < min(s.target.rank_cost for s in signals)
    if nothing_fits or not any(values.any() for values in gains.values()):
        return [s.rank for s in signals]
    lowest = {s.target.name: min(rank, s.target.full_rank) for s, rank in zip(signals, low, strict=True)}
    limits = RankLimits(lowest, dict(zip(gains, high, strict=True)))
    return list(allocate_marginal([s.target for s in signals], gains, budget, limits).vector)


def _best_transfer(
    signals: Sequence[ModuleSignals], low: list[int], high: list[int], budget: ParameterBudget, margin: float
) -> list[int]:
    """One rank more where it brings most, net of the cheapest ranks elsewhere that make room for it."""
    ranks = [s.rank for s in signals]
    left = budget.limit - sum(s.target.rank_cost * s.rank for s in signals)
    donors = sorted(  # stable: in each module the last rank goes first
        (
            (value / s.target.rank_cost, index, value)
            for index, (s, lowest) in enumerate(zip(signals, low, strict=True))
            for value in reversed(s.values[lowest:])
        ),
        key=lambda donor: donor[0],
    )
    best, best_net = ranks, 0.0
    for receiver, (s, highest) in enumerate(zip(signals, high, strict=True)):
        if not s.gains or s.rank >= highest:
            continue
        found, lost, room = ranks.copy(), 0.0, left
        for _, donor, value in donors:
            if room >= s.target.rank_cost:
                break
            if donor != receiver:
                found[donor] -= 1
                room += signals[donor].target.rank_cost
                lost += value
        found[receiver] += 1
        net = s.gains[0] - (1.0 + margin) * lost
        if room >= s.target.rank_cost and net > best_net:
            best, best_net = found, net
    return best
