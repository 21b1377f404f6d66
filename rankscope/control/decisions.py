"""Decisions: proposals within the budget, and their record. Pure functions, no state, no torch.

A module's r-th rank is worth sigma_r^2, the energy of the present gradient that it can follow (Eckart and Young 1936), as in
one-shot. The ranks in place are the first ones.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from rankscope.budget import ParameterBudget, RankLimits, allocate_marginal
from rankscope.files import SEALED, replacing
from rankscope.settings import ControllerSettings
from rankscope.targets import TargetModule

Ranks = Sequence[int]
Action = Literal["moved", "kept", "skipped"]  # kept: nothing is worth moving; skipped: no gradient to decide on


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleSignals:
    """What one module's ranks are worth, in units of gradient energy that all modules share."""

    target: TargetModule
    rank: int  # the number of ranks in place
    worth: tuple[float, ...]  # of each rank, descending, as far as those in place and beyond
    reach: int | None = None  # the leading ones that count as what there is to capture; None: all

    def gain(self, rank: int) -> float:
        """What a change to this rank gains (above 0) or gives up (below 0)."""
        return sum(self.worth[self.rank : rank]) - sum(self.worth[rank : self.rank])


class Proposal(NamedTuple):
    """What the policy would do."""

    ranks: Mapping[str, int]  # afterwards, by module
    action: Action
    reason: str  # in words
    predicted: float = math.nan  # increase in captured gradient energy, as a fraction of the total


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One decision: a row of `decisions.parquet`. NaN stands for what is not known."""

    step: int  # optimizer steps before it
    phase: str  # "coarse" (all modules together) or "fine" (one rank to one module)
    action: Action  # "moved", "kept" or "skipped"
    reason: str  # in words
    parameters: int  # of the adapter afterwards
    batches: int  # whose gradients it rests on
    broken: int  # sampled steps so far whose gradients were not finite
    signal_share: float  # of the gradient energy, what the batches agree on
    loss: float  # mean of those that `step` was given since the previous decision
    predicted: float  # increase in captured gradient energy, as a fraction of the total
    modules: tuple[str, ...]  # the target modules, in the model's order
    ranks_before: tuple[int, ...]  # of each module
    ranks_after: tuple[int, ...]
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
        decisions.to_parquet(temporary, index=False, **SEALED)
    return Path(path)


# --- proposals ----------------------------------------------------------------------------------------------------


def propose(
    signals: Sequence[ModuleSignals],
    budget: ParameterBudget,
    settings: ControllerSettings,
    *,
    coarse: bool,
    signal_share: float = 1.0,
    limits: RankLimits | None = None,
) -> Proposal:
    """What the policy would move within the budget and its towers: all ranks together (coarse), or one rank to one module.

    The less of the gradient energy is signal (`signal_share`), the more a move must gain. A module outside the `limits` may keep
    its rank.

    >>> fc = [TargetModule(name=f"fc{i}", in_features=64, out_features=64) for i in (1, 2)]
    >>> signals = [ModuleSignals(target=fc[0], rank=2, worth=(9.0, 1.0, 0.5)),
    ...            ModuleSignals(target=fc[1], rank=1, worth=(8.0, 6.0, 1.0))]
    >>> propose(signals, ParameterBudget(384), ControllerSettings(), coarse=True).ranks
    {'fc1': 1, 'fc2': 2}
    """
    targets, present = [s.target for s in signals], [s.rank for s in signals]
    low, high = (limits or RankLimits()).arrays(targets)
    low, high = np.minimum(low, present), np.maximum(np.minimum(high, settings.max_rank or high), present)
    move, margin = _refill if coarse else _best_transfer, settings.hysteresis / max(signal_share, 1e-3)
    ranks = move(signals, low.tolist(), high.tolist(), budget, margin)
    total = sum(sum(s.worth[: s.reach]) for s in signals) or 1.0
    predicted = sum(s.gain(rank) / total for s, rank in zip(signals, ranks, strict=True))
    more = np.maximum(np.subtract(ranks, present), 0)
    share_moved = float(more @ [target.rank_cost for target in targets]) / budget.limit
    names = [target.name for target in targets]
    if predicted <= 0 or predicted < settings.min_gain_ratio * share_moved:
        return Proposal(dict(zip(names, present, strict=True)), "kept", "nothing is worth moving", predicted=0.0)
    reason = f"captures {predicted:.1%} of the gradient energy more"
    return Proposal(dict(zip(names, ranks, strict=True)), "moved", reason, predicted)


def _refill(signals: Sequence[ModuleSignals], low: Ranks, high: Ranks, budget: ParameterBudget, margin: float) -> Ranks:
    """Water-filling on all ranks together; those in place count `1 + margin` times their worth."""
    targets = [s.target for s in signals]
    most = {tower: high for tower, (_, high) in budget.bounds.items()}
    room = any(t.rank_cost <= min(budget.limit, most.get(t.tower, budget.limit)) for t in targets)
    if not room or not any(any(s.worth) for s in signals):
        return [s.rank for s in signals]
    gains = {s.target.name: np.array(s.worth) for s in signals}
    for s in signals:
        gains[s.target.name][: s.rank] *= 1.0 + margin
    limits = RankLimits(dict(zip(gains, low, strict=True)), dict(zip(gains, high, strict=True)))
    return allocate_marginal(targets, gains, budget, limits).vector


def _best_transfer(
    signals: Sequence[ModuleSignals], low: Ranks, high: Ranks, budget: ParameterBudget, margin: float
) -> Ranks:
    """One rank more where it brings most, net of the cheapest ranks elsewhere that make room for it.

    First its own tower makes the room that it lacks there; ranks of towers at their least stay.
    """
    ranks, costs = [s.rank for s in signals], [s.target.rank_cost for s in signals]
    towers, bounds = [s.target.tower for s in signals], budget.bounds
    spent = Counter[str]()
    for tower, cost, rank in zip(towers, costs, ranks, strict=True):
        spent[tower] += cost * rank
    donors = [(index, value) for index, s in enumerate(signals) for value in reversed(s.worth[low[index] : s.rank])]
    donors.sort(key=lambda donor: donor[1] / costs[donor[0]])  # stable: in each module the last rank goes first
    best, best_net = ranks, 0.0
    for receiver, s in enumerate(signals):
        if s.rank >= min(high[receiver], len(s.worth)):
            continue
        own, found, lost, after = towers[receiver], ranks.copy(), 0.0, spent.copy()
        found[receiver] += 1
        after[own] += costs[receiver]
        total, most, waiting = after.total(), bounds.get(own, (0, math.inf))[1], donors
        for inside in (True, False):
            passed = []
            for donor, value in waiting:
                giver, cost = towers[donor], costs[donor]
                enough = after[own] <= most if inside else total <= budget.limit
                stays = donor == receiver or after[giver] - cost < bounds.get(giver, (0, 0))[0]
                if enough or stays or (inside and giver != own):
                    passed.append((donor, value))
                    continue
                found[donor] -= 1
                after[giver] -= cost
                total -= cost
                lost += value
            waiting = passed
        net = s.worth[s.rank] - (1.0 + margin) * lost
        if after[own] <= most and total <= budget.limit and net > best_net:
            best, best_net = found, net
    return best
