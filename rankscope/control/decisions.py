"""Decisions: proposals within the budget, what moves do to the loss, and the record. Pure functions, no state, no torch.

A module's r-th rank is worth sigma_r^2, the energy of the present gradient that it can follow (Eckart and Young 1936), as in
one-shot. The ranks in place are the first ones.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from rankscope.allocation import RankAllocation
from rankscope.budget import ParameterBudget, RankLimits, allocate_marginal
from rankscope.files import replacing
from rankscope.performance import HierarchicalRegressor, PerformanceModel, RankFeatures
from rankscope.settings import ControllerSettings
from rankscope.targets import TargetModule

Ranks = Sequence[int]

# "kept": nothing is worth moving; "refused" by a performance model; "skipped": no gradient to decide on.
Action = Literal["moved", "kept", "refused", "skipped"]


class Effect(NamedTuple):
    """A change for the better (above 0), and its standard error."""

    mean: float = math.nan
    error: float = math.nan


UNKNOWN = Effect()


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
    offline: Effect = UNKNOWN  # by the study's performance model, in its standard normal units
    online: Effect = UNKNOWN  # by earlier moves, in units of the training loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One decision: a row of `decisions.parquet`. NaN stands for what is not known."""

    step: int  # optimizer steps before it
    phase: str  # "coarse" (all modules together) or "fine" (one rank to one module)
    action: Action  # "moved", "kept", "refused" or "skipped"
    reason: str  # in words
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


def _n_moved(before: Ranks, after: Ranks) -> int:
    return sum(max(new - old, 0) for old, new in zip(before, after, strict=True))


def count_moved(decisions: pd.DataFrame) -> int:
    """Number of ranks that went elsewhere, over all decisions."""
    return sum(map(_n_moved, decisions["ranks_before"], decisions["ranks_after"]))


def write_decisions(decisions: pd.DataFrame, path: str | os.PathLike[str]) -> Path:
    """Write the table of decisions atomically; returns the path."""
    with replacing(path) as temporary:
        decisions.to_parquet(temporary, index=False)
    return Path(path)


# --- proposals ----------------------------------------------------------------------------------------------------


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
    targets, present = tuple(s.target for s in signals), tuple(s.rank for s in signals)
    low, high = (limits or RankLimits()).arrays(targets)
    low, high = np.minimum(low, present), np.maximum(np.minimum(high, settings.max_rank or high), present)
    move, margin = _refill if coarse else _best_transfer, settings.hysteresis / max(signal_share, 1e-3)
    ranks = move(signals, low.tolist(), high.tolist(), budget, margin)
    pairs = list(zip(signals, ranks, strict=True))
    total = (sum(sum(s.values) + sum(s.gains) for s in signals) if energy is None else energy) or 1.0
    predicted = sum(s.worth(rank) / total for s, rank in pairs)
    share_moved = sum(s.target.rank_cost * max(rank - s.rank, 0) for s, rank in pairs) / budget.limit
    if predicted <= 0 or predicted < settings.min_gain_ratio * share_moved:
        return Proposal(allocation=RankAllocation(targets, present), action="kept", reason="nothing is worth moving")
    return Proposal(
        allocation=RankAllocation(targets, tuple(ranks)),
        action="moved",
        reason=f"captures {predicted:.1%} of the gradient energy more",
        changes={s.target.name: (s.rank, rank) for s, rank in pairs if rank != s.rank},
        predicted=predicted,
    )


def _refill(
    signals: Sequence[ModuleSignals], low: Ranks, high: Ranks, budget: ParameterBudget, margin: float
) -> list[int]:
    """Water-filling on all ranks together; those in place count `1 + margin` times their worth."""
    targets = [s.target for s in signals]
    worth = [np.concatenate([np.asarray(s.values) * (1.0 + margin), np.asarray(s.gains)]) for s in signals]
    gains = {target.name: np.sort(each)[::-1] for target, each in zip(targets, worth, strict=True)}
    if budget.limit < min(target.rank_cost for target in targets) or not any(each.any() for each in worth):
        return [s.rank for s in signals]
    limits = RankLimits(dict(zip(gains, low, strict=True)), dict(zip(gains, high, strict=True)))
    return list(allocate_marginal(targets, gains, budget, limits).vector)


def _best_transfer(
    signals: Sequence[ModuleSignals], low: Ranks, high: Ranks, budget: ParameterBudget, margin: float
) -> list[int]:
    """One rank more where it brings most, net of the cheapest ranks elsewhere that make room for it."""
    ranks, costs = [s.rank for s in signals], [s.target.rank_cost for s in signals]
    left = budget.limit - sum(cost * rank for cost, rank in zip(costs, ranks, strict=True))
    donors = [(index, value) for index, s in enumerate(signals) for value in reversed(s.values[low[index] :])]
    donors.sort(key=lambda donor: donor[1] / costs[donor[0]])  # stable: in each module the last rank goes first
    best, best_net = ranks, 0.0
    for receiver, s in enumerate(signals):
        if not s.gains or s.rank >= high[receiver]:
            continue
        found, lost, room = ranks.copy(), 0.0, left
        for donor, value in donors:
            if room >= costs[receiver]:
                break
            if donor != receiver:
                found[donor] -= 1
                room += costs[donor]
                lost += value
        found[receiver] += 1
        net = s.gains[0] - (1.0 + margin) * lost
        if room >= costs[receiver] and net > best_net:
            best, best_net = found, net
    return best


# --- effects of moves on the loss ---------------------------------------------------------------------------------


def effect_of_move(losses: Sequence[float]) -> Effect:
    """How much more the loss fell at a move than before and after it.

    The losses, as many before the move as after it, are cut into four blocks with means m_0 … m_3. The fall from m_1 to m_2 is
    compared with the mean of the falls from m_0 to m_1 and from m_2 to m_3, where nothing was moved: a steady or slowing
    decline cancels. The error is that of the four means, by the scatter inside the blocks. Unknown for fewer than 8 losses, or
    if one is not finite.

    >>> effect_of_move([4.0, 4.0, 3.0, 3.0, 1.0, 1.0, 0.0, 0.0])
    Effect(mean=1.0, error=0.0)
    """
    if len(losses) < 8 or not np.isfinite(losses).all():
        return UNKNOWN
    blocks = np.array_split(np.asarray(losses, dtype=np.float64), 4)
    m = [float(block.mean()) for block in blocks]
    mean = (m[1] - m[2]) - 0.5 * ((m[0] - m[1]) + (m[2] - m[3]))
    weighted = zip((0.5, 1.5, 1.5, 0.5), blocks, strict=True)
    return Effect(mean, math.sqrt(sum(c**2 * float(block.var(ddof=1)) / len(block) for c, block in weighted)))


def predict_effect(features: RankFeatures, decisions: Sequence[Decision], before: Ranks, after: Ranks) -> Effect:
    """The effect to expect of a move: Bayesian linear regression on the measured effects of earlier ones; NaN without any.

    The loss is taken to be linear in the concave rank features of the performance model. All coefficients have one prior
    variance, at which the first move's effect is as uncertain before it is measured as its measurement is.
    """
    moves = [each for each in decisions if each.action == "moved" and not math.isnan(each.realised)]
    if not moves:
        return UNKNOWN
    pairs = [*((move.ranks_after, move.ranks_before) for move in moves), (after, before)]
    *rows, row = (new - old for new, old in map(features.transform, pairs))
    errors = np.maximum([move.realised_error for move in moves], 1e-12)
    variance = errors[0] ** 2 / max(float(rows[0] @ rows[0]), 1e-12)
    model = HierarchicalRegressor(variances={"all": variance, "noise": 1.0})
    model.fit(rows, [move.realised for move in moves], sample_weight=1.0 / errors**2)
    return Effect(*(float(value) for (value,) in model.predict([row], return_std=True)))


def screen(proposal: Proposal, before: RankAllocation, offline: PerformanceModel | None, online: Effect) -> Proposal:
    """The proposal, refused if a model (the study's, or earlier moves) expects harm of more than its standard deviation."""
    expected = UNKNOWN
    if offline is not None:
        order = [target.name for target in offline.features.targets]
        new, old = ([ranks[name] for name in order] for ranks in (proposal.allocation.ranks, before.ranks))
        expected = Effect(*(float(value) for (value,) in offline.difference([new], [old])))
    proposal = replace(proposal, offline=expected, online=online)
    for name, effect in (("the study's model", expected), ("the model of earlier moves", online)):
        if effect.mean + effect.error < 0:
            reason = f"{name} expects {effect.mean:.3g} with uncertainty {effect.error:.3g}"
            return replace(proposal, action="refused", reason=reason)
    return proposal
