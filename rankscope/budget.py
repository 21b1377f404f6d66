"""`ParameterBudget`, and the two exact projections of scores or marginal gains onto it.

Both keep sum(rank_cost_i * r_i) <= limit and leave less over than the cheapest rank that could still be placed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from rankscope.allocation import RankAllocation
from rankscope.exceptions import BudgetError
from rankscope.targets import TargetModule

Bound = int | Mapping[str, int] | None
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ParameterBudget:
    """The most trainable adapter parameters that an allocation may use.

    >>> ParameterBudget(2_000_000).limit
    2000000
    """

    limit: int

    def __post_init__(self) -> None:
        limit: Any = self.limit
        whole = isinstance(limit, Real) and float(limit).is_integer()
        if isinstance(limit, bool) or not whole or limit <= 0:
            raise BudgetError(f"`limit` must be a positive whole number of adapter parameters, but got {self.limit!r}.")
        object.__setattr__(self, "limit", int(self.limit))

    @classmethod
    def uniform(cls, targets: Sequence[TargetModule], rank: int) -> ParameterBudget:
        """What plain LoRA of this rank on every target module uses.

        >>> ParameterBudget.uniform([TargetModule(name="fc1", in_features=64, out_features=256)], rank=8)
        ParameterBudget(limit=2560)
        """
        if rank < 1:
            raise BudgetError(f"`rank` must be at least 1, but got {rank}.")
        return cls(rank * sum(target.rank_cost for target in targets))


@dataclass(frozen=True, slots=True)
class _Problem:
    """Checked inputs of a projection: costs, bounds and the order in which ties break, one entry a module."""

    costs: Ints
    lowest: Ints
    highest: Ints
    name_order: Ints
    limit: int


def allocate_proportional(
    targets: Sequence[TargetModule],
    scores: Mapping[str, float],
    budget: ParameterBudget,
    *,
    min_rank: Bound = 0,
    max_rank: Bound = None,
) -> RankAllocation:
    """Ranks in proportion to scores, by largest remainder (Hare's method, with costs and bounds).

    The ideal ranks are clip(c * score_i, min, max), with the one c at which they cost the whole budget; they are
    rounded down, then single ranks go to the modules that stay furthest below their ideal.

    Args:
        targets: The target modules.
        scores: A non-negative score for each target module, by name, on any scale.
        budget: The limit in parameters.
        min_rank: The least rank: for all modules, or by name (others: 0).
        max_rank: The greatest rank: for all modules, or by name (others, and None: full rank).

    Raises:
        BudgetError: No feasible allocation, or scores that are missing, negative, not finite, or all zero.
    """
    problem = _check(targets, budget, min_rank, max_rank)
    values = np.array([_lookup(scores, target.name, "scores") for target in targets], dtype=np.float64)
    if not np.isfinite(values).all() or (values < 0).any() or not values.any():
        raise BudgetError(
            "`scores` must be finite, not negative and not all zero; take the profile again on data with a loss."
        )
    ideal = _ideal_ranks(values / values.max(), problem)
    ranks = np.floor(ideal + 1e-9).astype(np.int64)
    left = problem.limit - int(problem.costs @ ranks)
    while True:
        open_ = np.flatnonzero((ranks < problem.highest) & (problem.costs <= left))
        if not open_.size:
            return RankAllocation(tuple(targets), tuple(ranks.tolist()), budget=budget.limit)
        shortfall = np.round(ideal[open_] - ranks[open_], 9)
        chosen = open_[np.lexsort((problem.name_order[open_], -shortfall))[0]]
        ranks[chosen] += 1
        left -= int(problem.costs[chosen])


def allocate_marginal(
    targets: Sequence[TargetModule],
    gains: Mapping[str, Sequence[float] | NDArray[Any]],
    budget: ParameterBudget,
    *,
    min_rank: Bound = 0,
    max_rank: Bound = None,
) -> RankAllocation:
    """Water-filling: the ranks with the highest gain per parameter first, until the budget is full.

    Greedy is exact for diminishing gains when all costs are equal, and within one unit otherwise. Ties go to the
    lower rank, then to the module name.

    Args:
        targets: The target modules.
        gains: For each target module, by name, the gain of its first, second, … rank: not negative, not increasing.
            Ranks beyond the list's end gain nothing, and are placed last, as evenly as they fit.
        budget: The limit in parameters.
        min_rank: The least rank: for all modules, or by name (others: 0).
        max_rank: The greatest rank: for all modules, or by name (others, and None: full rank).

    Raises:
        BudgetError: No feasible allocation, or gains that are missing, negative, increasing, not finite, or all zero.
    """
    problem = _check(targets, budget, min_rank, max_rank)
    ranks = problem.lowest.copy()
    left = problem.limit - int(problem.costs @ ranks)

    # One row for each rank that might be placed: its module, which rank it is, its gain per parameter.
    affordable = ranks + left // problem.costs
    highest = np.minimum(problem.highest, affordable)
    module = np.repeat(np.arange(len(targets)), highest - ranks)
    rank = np.concatenate([np.arange(low, high) for low, high in zip(ranks, highest, strict=True)])
    density = np.concatenate(
        [_padded(gains, t, low, high) for t, low, high in zip(targets, ranks, highest, strict=True)]
    )
    if not any(np.any(np.asarray(gains[target.name]) > 0) for target in targets):
        raise BudgetError("`gains` must not all be zero; take the profile again on data with a loss.")
    order = np.lexsort((problem.name_order[module], rank, -_rounded(density / problem.costs[module])))
    module = module[order]

    # The longest prefix that fits goes in at once; what is left is tried rank by rank.
    spent = np.cumsum(problem.costs[module])
    fits = int(np.searchsorted(spent, left, side="right"))
    ranks += np.bincount(module[:fits], minlength=len(targets))
    left -= int(spent[fits - 1]) if fits else 0
    cheapest = int(problem.costs.min())
    for index in module[fits:]:
        if left < cheapest:
            break
        if problem.costs[index] <= left:  # one that did not fit never will: `left` only falls
            ranks[index] += 1
            left -= int(problem.costs[index])
    return RankAllocation(tuple(targets), tuple(ranks.tolist()), budget=budget.limit)


def _check(targets: Sequence[TargetModule], budget: ParameterBudget, min_rank: Bound, max_rank: Bound) -> _Problem:
    if not targets:
        raise BudgetError("`targets` must hold at least one target module, but is empty.")
    names = [target.name for target in targets]
    costs = np.array([target.rank_cost for target in targets], dtype=np.int64)
    full = np.array([target.full_rank for target in targets], dtype=np.int64)
    lowest = _bound(min_rank, names, default=np.zeros_like(full), label="min_rank")
    highest = np.minimum(_bound(max_rank, names, default=full, label="max_rank"), full)
    if (lowest > highest).any():
        worst = int(np.argmax(lowest > highest))
        raise BudgetError(
            f"`min_rank` must not exceed `max_rank` or the full rank of `{names[worst]}` ({highest[worst]}), "
            f"but got {lowest[worst]}."
        )
    needed = int(costs @ lowest)
    if needed > budget.limit:
        what = f"rank {min_rank}" if isinstance(min_rank, int) else "`min_rank`"
        raise BudgetError(
            f"`budget` must cover {what} on all {len(targets)} target modules ({needed:,} parameters), "
            f"but got {budget.limit:,}; drop targets, allow rank 0, or raise it."
        )
    if not needed and budget.limit < (smallest := int(costs[highest > 0].min(initial=np.iinfo(np.int64).max))):
        raise BudgetError(
            f"`budget` must cover one rank of the cheapest target module ({smallest:,} parameters), "
            f"but got {budget.limit:,}; raise it."
        )
    name_order = np.empty(len(names), dtype=np.int64)
    name_order[np.argsort(np.array(names), kind="stable")] = np.arange(len(names))
    return _Problem(costs=costs, lowest=lowest, highest=highest, name_order=name_order, limit=budget.limit)


def _bound(bound: Bound, names: Sequence[str], *, default: Ints, label: str) -> Ints:
    if bound is None:
        return default
    if isinstance(bound, Mapping):
        if unknown := set(bound) - set(names):
            raise BudgetError(f"`{label}` must name target modules only, but names {sorted(unknown)[0]!r}.")
        values = np.array([bound.get(name, int(d)) for name, d in zip(names, default, strict=True)], dtype=np.int64)
    else:
        values = np.full(len(names), bound, dtype=np.int64)
    if (values < 0).any():
        raise BudgetError(f"`{label}` must not be negative, but got {int(values.min())}.")
    return values


def _lookup(values: Mapping[str, T], name: str, label: str) -> T:
    try:
        return values[name]
    except KeyError:
        raise BudgetError(f"`{label}` must cover every target module, but `{name}` is missing.") from None


def _ideal_ranks(scores: Floats, problem: _Problem) -> Floats:
    """clip(c * scores, lowest, highest), costing the budget: c by bisection, since the cost never falls with c."""

    def at(scale: float) -> Floats:
        return np.clip(scale * scores, problem.lowest, problem.highest).astype(np.float64)

    low, high = 0.0, 1.0
    least = max(float(scores[scores > 0].min()), 1e-300)  # scores may underflow; the ceiling must not overflow
    ceiling = float(problem.highest.max()) / least  # here every scored module is at its maximum
    while high < ceiling and float(problem.costs @ at(high)) < problem.limit:
        high *= 2.0
    for _ in range(100):
        middle = (low + high) / 2.0
        if float(problem.costs @ at(middle)) <= problem.limit:
            low = middle
        else:
            high = middle
    return at(low)


def _rounded(values: Floats) -> Floats:
    """Values to 12 digits of their mantissa: equal ones must stay ties after a rounding error in the last bit."""
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.round(mantissa, 12), exponent)


def _padded(gains: Mapping[str, Any], target: TargetModule, low: int, high: int) -> Floats:
    """The gains of ranks low+1 … high, checked, with zeros beyond the list's end."""
    values = np.asarray(_lookup(gains, target.name, "gains"), dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all() or (values < 0).any():
        raise BudgetError(f"`gains` of `{target.name}` must be a list of finite numbers that are not negative.")
    if (np.diff(values) > 1e-12 * values.max(initial=0.0)).any():
        raise BudgetError(f"`gains` of `{target.name}` must not increase with the rank.")
    padded = np.zeros(high)
    padded[: min(high, values.size)] = values[:high]
    return padded[low:]
