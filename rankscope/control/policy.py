"""The policy: from what each module's ranks are worth to transfers within the budget. Pure functions, no state, no torch.

The worth of a module's r-th rank is the energy sigma_r^2 of the gradient that it can follow: one-shot's gain (Eckart and Young
1936), here of the gradient while the run goes on. The ranks in place are the first; what is worth having goes through the one
projection onto the budget (`rankscope.budget.allocate_marginal`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rankscope.allocation import RankAllocation
from rankscope.budget import ParameterBudget, RankLimits, allocate_marginal
from rankscope.errors import ModelError
from rankscope.targets import TargetModule


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How bold the moves are.

    Attributes:
        margin: Hysteresis: a transfer must gain by this share more than it gives up; where only a part of the gradient is
            signal, by this share over that part.
        min_gain: The least share of the gradient energy that a move must gain, over the share of the budget that it moves. What
            moves starts again from nothing, so that moving much to gain little loses.
        cooldown: Decisions for which a module that moved is left alone.
        coarse_fraction: Share of the time until the freeze in which a decision may move all modules together; afterwards each
            moves one rank to one module.
        max_rank: The largest rank of a module; None: its full rank.

    >>> Policy(margin=0.5).coarse_fraction
    0.5
    """

    margin: float = 0.3
    min_gain: float = 0.5
    cooldown: int = 0
    coarse_fraction: float = 0.5
    max_rank: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.margin < math.inf:
            raise ModelError(f"`margin` must be 0 or more, but got {self.margin}.")
        if not 0 <= self.min_gain < math.inf:
            raise ModelError(f"`min_gain` must be 0 or more, but got {self.min_gain}.")
        if self.cooldown < 0:
            raise ModelError(f"`cooldown` must be 0 or more decisions, but got {self.cooldown}.")
        if not 0 <= self.coarse_fraction <= 1:
            raise ModelError(f"`coarse_fraction` must lie between 0 and 1, but got {self.coarse_fraction}.")
        if self.max_rank is not None and self.max_rank < 1:
            raise ModelError(f"`max_rank` must be at least 1, but got {self.max_rank}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleSignals:
    """What one module's ranks are worth, in units of gradient energy that all modules share.

    Attributes:
        target: The module.
        values: Of each rank in place, descending; as many as its rank.
        gains: Of the first, second, … rank more, descending.
    """

    target: TargetModule
    values: tuple[float, ...]
    gains: tuple[float, ...]

    @property
    def rank(self) -> int:
        """The ranks in place."""
        return len(self.values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """One module's part in a move.

    Attributes:
        module: Its name.
        before: Its rank.
        after: Its rank afterwards.
        worth: What it gains (above 0) or gives up (below), as a share of the gradient energy.
    """

    module: str
    before: int
    after: int
    worth: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """Transfers that belong together.

    Attributes:
        allocation: The ranks afterwards.
        transfers: Of the modules that change, in the model's order; empty: nothing moves.
    """

    allocation: RankAllocation
    transfers: tuple[Transfer, ...]

    @property
    def predicted(self) -> float:
        """The gradient energy gained over what is given up, as a share of the whole."""
        return sum(transfer.worth for transfer in self.transfers)

    @property
    def moved(self) -> float:
        """The share of the budget that goes to further ranks."""
        costs = {target.name: target.rank_cost for target in self.allocation.targets}
        gained = sum(costs[t.module] * (t.after - t.before) for t in self.transfers if t.after > t.before)
        return gained / (self.allocation.budget or self.allocation.parameters)


def propose(
    signals: Sequence[ModuleSignals],
    budget: ParameterBudget,
    policy: Policy,
    *,
    coarse: bool,
    signal_share: float = 1.0,
    energy: float | None = None,
    cooling: Collection[str] = (),
    capacity: Mapping[str, int] | None = None,
    lowest: int = 0,
) -> Proposal:
    """What the policy would move now: all modules together (coarse), or one rank to one module (fine).

    Args:
        signals: Of all modules; their ranks are within the budget.
        budget: The limit in parameters, kept by the ranks afterwards.
        policy: How bold.
        coarse: Which of the two.
        signal_share: Of the gradient energy, what is signal: the noisier, the more a transfer must gain.
        energy: What worth is a share of; None: what all signals sum to.
        cooling: Modules that keep their rank this time.
        capacity: The largest rank of each module, where its adapter has one.
        lowest: The rank below which no module falls.

    >>> fc = [TargetModule(name=f"fc{i}", in_features=64, out_features=64) for i in (1, 2)]
    >>> signals = [ModuleSignals(target=fc[0], values=(9.0, 1.0), gains=(0.5,)),
    ...            ModuleSignals(target=fc[1], values=(8.0,), gains=(6.0, 1.0))]
    >>> [(t.module, t.before, t.after) for t in propose(signals, ParameterBudget(384), Policy(), coarse=True).transfers]
    [('fc1', 2, 1), ('fc2', 1, 2)]
    """
    highest = {s.target.name: _highest(s, policy, capacity) for s in signals}
    held = {s.target.name for s in signals if s.target.name in cooling}
    move = _refill if coarse else _best_transfer
    ranks = move(signals, budget, policy.margin / max(signal_share, 1e-3), highest, held, lowest)
    total = (sum(sum(s.values) + sum(s.gains) for s in signals) if energy is None else energy) or 1.0
    allocation = RankAllocation(
        tuple(s.target for s in signals), tuple(ranks), strategy="controller", budget=budget.limit
    )
    transfers = tuple(
        Transfer(module=s.target.name, before=s.rank, after=rank, worth=_worth(s, rank) / total)
        for s, rank in zip(signals, ranks, strict=True)
        if rank != s.rank
    )
    proposal = Proposal(allocation=allocation, transfers=transfers)
    if proposal.predicted <= 0 or proposal.predicted < policy.min_gain * proposal.moved:
        return Proposal(allocation=_present(signals, budget), transfers=())
    return proposal


def _refill(
    signals: Sequence[ModuleSignals],
    budget: ParameterBudget,
    margin: float,
    highest: Mapping[str, int],
    held: Collection[str],
    floor: int,
) -> list[int]:
    """Water-filling on ranks in place, worth `1 + margin` times what they are, and further ones together."""
    gains = {s.target.name: _merged(s, margin) for s in signals}
    nothing_fits = budget.limit < min(s.target.rank_cost for s in signals)
    if nothing_fits or not any(values.any() for values in gains.values()):
        return [s.rank for s in signals]
    present = {s.target.name: min(s.rank, s.target.full_rank) for s in signals}
    lowest = {name: rank if name in held else min(rank, floor) for name, rank in present.items()}
    most = {name: rank if name in held else highest[name] for name, rank in present.items()}
    targets = tuple(s.target for s in signals)
    return list(allocate_marginal(targets, gains, budget, RankLimits(lowest, most)).vector)


def _best_transfer(
    signals: Sequence[ModuleSignals],
    budget: ParameterBudget,
    margin: float,
    highest: Mapping[str, int],
    held: Collection[str],
    floor: int,
) -> list[int]:
    """One rank more for the module at which it brings most, net of the cheapest ranks elsewhere that make room for it."""
    ranks = [s.rank for s in signals]
    left = budget.limit - sum(s.target.rank_cost * s.rank for s in signals)
    movable = [i for i, s in enumerate(signals) if s.target.name not in held]
    donors = sorted(  # stable: in each module the last rank goes first
        (
            (value / signals[i].target.rank_cost, i, value)
            for i in movable
            for value in reversed(signals[i].values[floor:])
        ),
        key=lambda donor: donor[0],
    )
    best, best_net = ranks, 0.0
    for receiver in movable:
        s = signals[receiver]
        if not s.gains or s.rank >= highest[s.target.name]:
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


def _merged(signals: ModuleSignals, margin: float) -> NDArray[np.float64]:
    """The module's ranks in the order of their worth; equal worth leaves things as they are."""
    kept = np.asarray(signals.values) * (1.0 + margin)
    return np.sort(np.concatenate([kept, np.asarray(signals.gains)]))[::-1]


def _worth(signals: ModuleSignals, rank: int) -> float:
    if rank >= signals.rank:
        return sum(signals.gains[: rank - signals.rank])
    return -sum(signals.values[rank:])


def _highest(signals: ModuleSignals, policy: Policy, capacity: Mapping[str, int] | None) -> int:
    """A module that has more already may keep it."""
    most = signals.target.full_rank if policy.max_rank is None else min(policy.max_rank, signals.target.full_rank)
    if capacity is not None:
        most = min(most, capacity[signals.target.name])
    return max(most, signals.rank)


def _present(signals: Sequence[ModuleSignals], budget: ParameterBudget) -> RankAllocation:
    ranks = tuple(s.rank for s in signals)
    return RankAllocation(tuple(s.target for s in signals), ranks, strategy="controller", budget=budget.limit)
