"""`ParameterBudget`, and the two exact projections of scores or marginal gains onto it.

Both keep sum(rank_cost_i * r_i) <= limit and leave less over than the cheapest rank that could still be placed.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from rankscope.allocation import RankAllocation
from rankscope.errors import SettingsError, shown
from rankscope.targets import TargetModule

logger = logging.getLogger(__name__)


Bound = int | Mapping[str, int] | None
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
T = TypeVar("T")

_LARGEST = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class ParameterBudget:
    """The most trainable adapter parameters that an allocation may use.

    >>> ParameterBudget(2_000_000).limit
    2000000
    """

    limit: int

    def __post_init__(self) -> None:
        limit = _whole(self.limit)
        if limit is None or limit <= 0:
            raise SettingsError(
                f"`limit` must be a positive whole number of adapter parameters, but got {shown(self.limit)}."
            )
        object.__setattr__(self, "limit", limit)

    @classmethod
    def uniform(cls, targets: Sequence[TargetModule], rank: int) -> ParameterBudget:
        """What plain LoRA of this rank on every target module uses, without ranks above a module's full rank.

        PEFT builds those too, but they add parameters and no freedom; a warning names the modules.

        Raises:
            SettingsError: `rank` is no whole number from 1 on, or there are no targets.

        >>> ParameterBudget.uniform([TargetModule(name="fc1", in_features=64, out_features=256)], rank=8)
        ParameterBudget(limit=2560)
        """
        whole = _whole(rank)
        if whole is None or whole < 1:
            raise SettingsError(f"`rank` must be a whole number of at least 1, but got {shown(rank)}.")
        _require(targets)
        limit = sum(target.rank_cost * min(whole, target.full_rank) for target in targets)
        if low := [target for target in targets if target.full_rank < whole]:
            _warn_once(
                f"rank {shown(whole)} is above the full rank of {len(low)} of {len(targets)} target modules, as of "
                f"`{low[0].name}` ({low[0].full_rank}); the budget counts their full rank: {limit:,} parameters."
            )
        return cls(limit)


@dataclass(frozen=True, slots=True)
class _Problem:
    """Checked inputs of a projection: costs, bounds and the places of the modules when they tie, one entry a module."""

    costs: Ints
    lowest: Ints
    highest: Ints
    places: Ints
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
    rounded down, then single ranks go to the modules that stay furthest below their ideal. Ties are spread evenly over
    towers, depth and roles.

    Args:
        targets: The target modules.
        scores: A non-negative score for each target module, by name, on any scale.
        budget: The limit in parameters.
        min_rank: The least rank: for all modules, or by name (others: 0).
        max_rank: The greatest rank: for all modules, or by name (others, and None: full rank).

    Raises:
        SettingsError: No feasible allocation, or scores that are missing, negative, not finite, or all zero.
    """
    problem = _check(targets, budget, min_rank, max_rank)
    wrong = "`scores` must be finite, not negative and not all zero; take the profile again on data with a loss."
    values = _numbers([_lookup(scores, target.name, "scores") for target in targets], wrong)
    if not np.isfinite(values).all() or (values < 0).any() or not values.any():
        raise SettingsError(wrong)
    ideal = _ideal_ranks(values / values.max(), problem)
    ranks = np.floor(ideal + 1e-9).astype(np.int64)
    left = problem.limit - int(problem.costs @ ranks)
    order = np.lexsort((problem.places, -np.round(ideal - ranks, 9)))
    while (open_ := order[(ranks[order] < problem.highest[order]) & (problem.costs[order] <= left)]).size:
        # Rounds that every open module can take part in go in at once.
        spent = int(problem.costs[open_].sum())
        if rounds := min(left // spent, int((problem.highest - ranks)[open_].min())):
            ranks[open_] += rounds
            left -= rounds * spent
        else:
            left = _place(open_, ranks, left, problem.costs)
    return RankAllocation(tuple(targets), tuple(ranks.tolist()), budget=budget.limit)


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
    lower rank, then are spread evenly over towers, depth and roles.

    Args:
        targets: The target modules.
        gains: For each target module, by name, the gain of its first, second, … rank: not negative, not increasing.
            Ranks beyond the list's end gain nothing, and are placed last, as evenly as they fit.
        budget: The limit in parameters.
        min_rank: The least rank: for all modules, or by name (others: 0).
        max_rank: The greatest rank: for all modules, or by name (others, and None: full rank).

    Raises:
        SettingsError: No feasible allocation, or gains that are missing, negative, increasing, not finite, or all zero.
    """
    problem = _check(targets, budget, min_rank, max_rank)
    names = [target.name for target in targets]
    curves = [_curve(_lookup(gains, name, "gains"), name) for name in names]
    if not any(curve[0] > 0 for curve in curves if curve.size):
        raise SettingsError(
            "`gains` must not all be zero; choose targets that the loss depends on, or profile on other data."
        )
    left = problem.limit - int(problem.costs @ problem.lowest)
    highest = np.minimum(problem.highest, problem.lowest + left // problem.costs)
    # Gains may reach up to full rank. Look only as far as ranks may go: further where a module takes all it was shown.
    reach = np.full(len(targets), 2 * (left // int(problem.costs.sum())) + 8)
    while True:
        horizon = np.minimum(highest, problem.lowest + reach)
        ranks = _water_fill(curves, names, problem, horizon, left)
        short = (ranks == horizon) & (horizon < highest)
        if not short.any():
            return RankAllocation(tuple(targets), tuple(ranks.tolist()), budget=budget.limit)
        reach[short] *= 4


def _water_fill(curves: list[Floats], names: list[str], problem: _Problem, horizon: Ints, left: int) -> Ints:
    """Ranks up to `horizon`, those of the highest gain per parameter first, at `left` parameters above the least ranks."""
    _check_curves(curves, names, horizon)
    # One row for each rank that might be placed: its module, which rank it is, its gain per parameter.
    count = horizon - problem.lowest
    module = np.repeat(np.arange(len(names)), count)
    rank = np.arange(module.size) - np.repeat(np.cumsum(count) - count, count) + problem.lowest[module]
    density = np.zeros(module.size)
    listed = np.array([curve.size for curve in curves])
    shown = [curve[low:high] for curve, low, high in zip(curves, problem.lowest, horizon, strict=True)]
    density[rank < listed[module]] = np.concatenate(shown)
    ties = rank * len(names) + problem.places[module]
    order = np.lexsort((ties, -_rounded(density / problem.costs[module])))
    ranks = problem.lowest.copy()
    _place(module[order], ranks, left, problem.costs)
    return ranks


def _place(order: Ints, ranks: Ints, left: int, costs: Ints) -> int:
    """Adds a rank to the modules in `order`, each where it still fits; changes `ranks`, and returns what is left over."""
    while order.size:
        spent = np.cumsum(costs[order])
        fits = int(np.searchsorted(spent, left, side="right"))
        ranks += np.bincount(order[:fits], minlength=ranks.size)
        left -= int(spent[fits - 1]) if fits else 0
        order = order[fits:]
        order = order[costs[order] <= left]  # what did not fit never will: `left` only falls
    return left


def _check(targets: Sequence[TargetModule], budget: ParameterBudget, min_rank: Bound, max_rank: Bound) -> _Problem:
    _require(targets)
    names = [target.name for target in targets]
    costs = np.array([target.rank_cost for target in targets], dtype=np.int64)
    full = np.array([target.full_rank for target in targets], dtype=np.int64)
    lowest = _bound(min_rank, names, default=np.zeros_like(full), label="min_rank")
    highest = np.minimum(_bound(max_rank, names, default=full, label="max_rank"), full)
    if (lowest > highest).any():
        worst = int(np.argmax(lowest > highest))
        raise SettingsError(
            f"`min_rank` must not exceed `max_rank` or the full rank of `{names[worst]}` ({highest[worst]}), "
            f"but got {lowest[worst]}."
        )
    needed = int(costs @ lowest)
    if needed > budget.limit:
        what = "`min_rank`" if isinstance(min_rank, Mapping) else f"rank {min_rank}"
        raise SettingsError(
            f"`budget` must cover {what} on all {len(targets)} target modules ({needed:,} parameters), "
            f"but got {budget.limit:,}; drop targets, allow rank 0, or raise it."
        )
    if not needed and budget.limit < (smallest := int(costs[highest > 0].min(initial=_LARGEST))):
        raise SettingsError(
            f"`budget` must cover one rank of the cheapest target module ({smallest:,} parameters), "
            f"but got {budget.limit:,}; raise it."
        )
    if budget.limit > (most := int(costs @ full)):
        _warn_once(
            f"`budget` is {shown(budget.limit)} parameters, but {len(targets)} target modules hold {most:,} at full "
            "rank; the rest stays unused: lower it, or add targets."
        )
    limit = min(budget.limit, most)
    return _Problem(costs=costs, lowest=lowest, highest=highest, places=_spread_places(tuple(targets)), limit=limit)


def _require(targets: Sequence[TargetModule]) -> None:
    if not targets:
        raise SettingsError("`targets` must hold at least one target module, but is empty.")


def _bound(bound: Bound, names: Sequence[str], *, default: Ints, label: str) -> Ints:
    if bound is None:
        return default
    by_name = bound if isinstance(bound, Mapping) else dict.fromkeys(names, bound)
    if unknown := set(by_name) - set(names):
        raise SettingsError(f"`{label}` must name target modules only, but names {min(map(repr, unknown))}.")
    values = default.copy()
    for index, name in enumerate(names):
        if name not in by_name:
            continue
        whole = _whole(by_name[name])
        if whole is None:
            of = f" of `{name}`" if isinstance(bound, Mapping) else ""
            raise SettingsError(f"`{label}`{of} must be a whole number, but got {shown(by_name[name])}.")
        if whole < 0:
            raise SettingsError(f"`{label}` must not be negative, but got {shown(whole)}.")
        values[index] = min(whole, _LARGEST)
    return values


def _whole(value: Any) -> int | None:
    """A whole number as an int; None for anything else, truth values and strings included."""
    if isinstance(value, bool):
        return None
    if isinstance(value, Integral):
        return int(value)
    return int(value) if isinstance(value, float | np.floating) and float(value).is_integer() else None


@lru_cache(maxsize=256)
def _warn_once(message: str) -> None:
    """Each message once: a search projects thousands of times onto one budget."""
    logger.warning(message)


def _lookup(values: Mapping[str, T], name: str, label: str) -> T:
    try:
        return values[name]
    except KeyError:
        raise SettingsError(f"`{label}` must cover every target module, but `{name}` is missing.") from None


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


def _numbers(values: Any, wrong: str) -> Floats:
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise SettingsError(wrong) from None


def _curve(values: Any, name: str) -> Floats:
    wrong = f"`gains` of `{name}` must be a list of finite numbers that are not negative."
    curve = _numbers(values, wrong)
    if curve.ndim != 1:
        raise SettingsError(wrong)
    return curve


def _check_curves(curves: list[Floats], names: list[str], horizon: Ints) -> None:
    """Checks all curves up to the horizon in one pass: there may be thousands, of thousands of ranks each."""
    shown = [curve[:high] for curve, high in zip(curves, horizon, strict=True)]
    values = np.concatenate(shown)
    module = np.repeat(np.arange(len(shown)), [curve.size for curve in shown])
    if (wrong := ~np.isfinite(values) | (values < 0)).any():
        name = names[module[np.argmax(wrong)]]
        raise SettingsError(f"`gains` of `{name}` must be a list of finite numbers that are not negative.")
    first = np.array([curve[0] if curve.size else 0.0 for curve in shown])[module]
    wrong = (np.diff(values) > 1e-12 * first[1:]) & (module[1:] == module[:-1])
    if wrong.any():
        raise SettingsError(f"`gains` of `{names[module[np.argmax(wrong)]]}` must not increase with the rank.")


# --- ties ----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def _spread_places(targets: tuple[TargetModule, ...]) -> Ints:
    """The place of each module in an order whose every beginning is spread over towers, depth and roles.

    Among the first k modules each tower has its share of k; within a tower, blocks of one size differ by at most one module,
    and so do roles where every block has one module of each. Names decide only within one tower, block and role.
    """
    stacks: dict[tuple[str, bool], list[int]] = defaultdict(list)
    for index, target in enumerate(targets):
        stacks[target.tower, target.block is None].append(index)
    shares, stack_of = np.empty(len(targets)), np.empty(len(targets), dtype=np.int64)
    for number, stack in enumerate(sorted(stacks)):
        members = stacks[stack]
        shares[members] = (_places_in_stack([targets[index] for index in members]) + 0.5) / len(members)
        stack_of[members] = number
    return np.argsort(np.lexsort((stack_of, shares)))


def _places_in_stack(targets: Sequence[TargetModule]) -> Ints:
    """The same among blocks by roles: round by round through the blocks, each time with the block's next role."""
    names = np.unique([target.name for target in targets], return_inverse=True)[1]
    depths = np.unique([target.block or 0 for target in targets], return_inverse=True)[1]
    roles = np.unique([target.role for target in targets], return_inverse=True)[1]
    n_blocks, n_roles = int(depths.max()) + 1, int(roles.max()) + 1
    stride = _stride(n_blocks, n_roles)
    visits = depths * pow(stride, -1, n_blocks) % n_blocks  # the place of the module's block within a round
    turns = _turns(visits, roles, n_blocks, n_roles)

    # Several modules of a role in one block (experts) take turns at even distances, from another one in each block on.
    cells = depths * n_roles + roles
    number, size = _numbered(cells, np.lexsort((names, cells)))
    within = ((number - visits) % size + (turns + 0.5) / n_roles) / size
    position, size = _numbered(depths, np.lexsort((names, within, depths)))
    return np.argsort(np.lexsort((names, visits, (position + (visits + 0.5) / n_blocks) / size)))


def _turns(visits: Ints, roles: Ints, n_blocks: int, n_roles: int) -> Ints:
    """In which round each role comes to its block: the j with role = (k + k // lcm) mod n_roles at step k = visit + j n_blocks.

    Every run of n_blocks steps from a multiple of it on then takes each block once, and every such run of n_roles steps each
    role once: a Latin rectangle, closed by one more shift at each common multiple.
    """
    common = math.gcd(n_blocks, n_roles)
    period = n_roles // common
    shifts = (roles - visits) % common
    inverse = pow(n_blocks // common, -1, period)
    turns: Ints = shifts * period + (roles - visits - shifts) // common * inverse % period
    return turns


def _stride(n_blocks: int, n_roles: int) -> int:
    """The stride through the blocks that spreads over depth both the blocks that come first and those where one role does."""
    golden = round(n_blocks * (math.sqrt(5) - 1) / 2)
    near = sorted(range(1, n_blocks), key=lambda stride: abs(stride - golden))[:100]
    strides = [stride for stride in near if math.gcd(stride, n_blocks) == 1]
    return max(strides, key=lambda s: min(_evenness(s, n_blocks), _evenness(s * n_roles, n_blocks)), default=1)


def _evenness(step: int, n: int) -> float:
    """The least gap among the first m multiples of `step` on a circle of n places, relative to n / m, at the worst m."""
    period = n // math.gcd(step, n)
    multiples = np.arange(1, period) * (step % n) % n
    gaps = np.minimum(multiples, n - multiples)
    return float(np.min(gaps * np.arange(2, period + 1), initial=n)) / n


def _numbered(groups: Ints, order: Ints) -> tuple[Ints, Ints]:
    """The number of each entry within its group, from 0 on in the given order, which is sorted by group; and the group's size."""
    sizes = np.bincount(groups)
    numbers = np.empty(groups.size, dtype=np.int64)
    numbers[order] = np.arange(groups.size) - (np.cumsum(sizes) - sizes)[groups[order]]
    return numbers, sizes[groups]
