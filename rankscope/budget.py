"""`ParameterBudget`, and the two exact ways of spending it: water-filling on gains, and in proportion to scores."""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
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

Bound = int | Mapping[str, int] | None
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
T = TypeVar("T")

logger = logging.getLogger(__name__)
_warn_once = lru_cache(maxsize=256)(logger.warning)  # a search projects thousands of times onto one budget
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
        """What plain LoRA of this rank uses on every target module; above a module's full rank, its full rank counts.

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
class RankLimits:
    """The least and the greatest rank of each module: one number for all, or numbers by name.

    Modules that a mapping leaves out may have any rank from 0 to their full rank, which also caps `max_rank`.

    >>> RankLimits(max_rank={"fc1": 4}).arrays([TargetModule(name=n, in_features=8, out_features=8) for n in ("fc1", "fc2")])
    (array([0, 0]), array([4, 8]))
    """

    min_rank: Bound = 0
    max_rank: Bound = None

    def arrays(self, targets: Sequence[TargetModule]) -> tuple[Ints, Ints]:
        """Least and greatest ranks, one entry a target.

        Raises:
            SettingsError: A limit is no whole number from 0 on, is for no target, or leaves a module without a rank.
        """
        full = np.array([target.full_rank for target in targets], dtype=np.int64)
        lowest = self._array("min_rank", self.min_rank, targets, np.zeros_like(full))
        highest = np.minimum(self._array("max_rank", self.max_rank, targets, full.copy()), full)
        if (lowest > highest).any():
            worst = int(np.argmax(lowest > highest))
            raise SettingsError(
                f"`min_rank` must not exceed `max_rank` or the full rank of `{targets[worst].name}` ({highest[worst]}), "
                f"but got {lowest[worst]}."
            )
        return lowest, highest

    @staticmethod
    def _array(label: str, limit: Any, targets: Sequence[TargetModule], values: Ints) -> Ints:
        if limit is None:
            return values
        by_name = limit if isinstance(limit, Mapping) else dict.fromkeys((target.name for target in targets), limit)
        indices = {target.name: index for index, target in enumerate(targets)}
        if unknown := set(by_name) - set(indices):
            raise SettingsError(f"`{label}` must name target modules only, but names {min(map(repr, unknown))}.")
        for name, value in by_name.items():
            whole = _whole(value)
            if whole is None:
                of = f" of `{name}`" if isinstance(limit, Mapping) else ""
                raise SettingsError(f"`{label}`{of} must be a whole number, but got {shown(value)}.")
            if whole < 0:
                raise SettingsError(f"`{label}` must not be negative, but got {shown(whole)}.")
            values[indices[name]] = min(whole, _LARGEST)
        return values


@dataclass(frozen=True, slots=True)
class _Problem:
    """Checked inputs of both projections, one entry a module; `places` orders modules that tie."""

    costs: Ints
    lowest: Ints
    highest: Ints
    places: Ints
    limit: int


def allocate_marginal(
    targets: Sequence[TargetModule],
    gains: Mapping[str, Sequence[float] | NDArray[Any]],
    budget: ParameterBudget,
    limits: RankLimits = RankLimits(),
) -> RankAllocation:
    """Water-filling: the ranks with the highest gain per parameter first, until the budget is full.

    Exact for diminishing gains when all costs are equal, else within one rank of the optimum. Ties go to the lower rank, then
    are spread evenly over towers, depth and roles. What is left over is less than any rank that could still be placed.

    Args:
        targets: The target modules.
        gains: By module name, the gain of its first, second, … rank: not negative, not increasing. Ranks beyond the end of the
            list gain nothing, and are placed last, as evenly as they fit.
        budget: The limit in parameters.
        limits: Least and greatest ranks.

    Raises:
        SettingsError: No allocation is feasible, or gains are missing, negative, increasing, not finite, or all zero.
    """
    problem = _check(targets, budget, limits)
    names = [target.name for target in targets]
    curves = [_curve(_lookup(gains, name, "gains"), name) for name in names]
    if not any(curve[0] > 0 for curve in curves if curve.size):
        raise SettingsError(
            "`gains` must not all be zero; choose targets that the loss depends on, or profile on other data."
        )
    left = problem.limit - int(problem.costs @ problem.lowest)
    highest = np.minimum(problem.highest, problem.lowest + left // problem.costs)
    # Curves may reach up to full rank. Look only as far as ranks may go: further where a module takes all it was shown.
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
    # One row for each rank that might be placed: its module, which rank it is, its gain.
    module = np.repeat(np.arange(len(names)), horizon)
    rank = np.arange(module.size) - np.repeat(np.cumsum(horizon) - horizon, horizon)
    gain = np.zeros(module.size)
    listed = np.array([curve.size for curve in curves])
    gain[rank < listed[module]] = np.concatenate([curve[:high] for curve, high in zip(curves, horizon, strict=True)])
    if (wrong := ~np.isfinite(gain) | (gain < 0)).any():
        name = names[module[np.argmax(wrong)]]
        raise SettingsError(f"`gains` of `{name}` must be a list of finite numbers that are not negative.")
    first = np.array([curve[0] if curve.size else 0.0 for curve in curves])[module]
    if (wrong := (np.diff(gain) > 1e-12 * first[1:]) & (rank[1:] > 0)).any():
        raise SettingsError(f"`gains` of `{names[module[1:][np.argmax(wrong)]]}` must not increase with the rank.")
    density = _rounded(gain / problem.costs[module])
    order = np.lexsort((rank * len(names) + problem.places[module], -density))
    ranks = problem.lowest.copy()
    _place(module[order[rank[order] >= ranks[module[order]]]], ranks, left, problem.costs)
    return ranks


def allocate_proportional(
    targets: Sequence[TargetModule],
    scores: Mapping[str, float],
    budget: ParameterBudget,
    limits: RankLimits = RankLimits(),
) -> RankAllocation:
    """Ranks in proportion to scores, by largest remainder (Hare's method, with costs and limits).

    The ideal ranks are clip(c * score, min, max), with the c at which they cost the whole budget. They are rounded down, then
    single ranks go to the modules furthest below their ideal. Ties are spread evenly over towers, depth and roles.

    Args:
        targets: The target modules.
        scores: By module name, a score on any scale that is not negative.
        budget: The limit in parameters.
        limits: Least and greatest ranks.

    Raises:
        SettingsError: No allocation is feasible, or scores are missing, negative, not finite, or all zero.
    """
    problem = _check(targets, budget, limits)
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


def _ideal_ranks(scores: Floats, problem: _Problem) -> Floats:
    """clip(c * scores, lowest, highest) at the c where it costs the budget.

    The cost is linear in c between those c at which a module meets a bound, so c is interpolated between two of them.
    """

    def at(scale: float) -> Floats:
        return np.clip(scale * scores, problem.lowest, problem.highest).astype(np.float64)

    def cost(scale: float) -> float:
        return float(problem.costs @ at(scale))

    positive = np.maximum(scores, 1e-300)  # scores may underflow; their bounds must not overflow
    ends = np.unique([0.0, *(problem.lowest / positive), *(problem.highest / positive)])
    after = bisect_right(ends, float(problem.limit), key=cost)
    if after == len(ends):
        return at(ends[-1])
    low, high = ends[after - 1 : after + 1]
    return at(low + (high - low) * (problem.limit - cost(low)) / (cost(high) - cost(low)))


def _place(order: Ints, ranks: Ints, left: int, costs: Ints) -> int:
    """Adds a rank to the modules in `order`, each where it still fits. Changes `ranks`; returns what is left over."""
    while order.size:
        spent = np.cumsum(costs[order])
        fits = int(np.searchsorted(spent, left, side="right"))
        ranks += np.bincount(order[:fits], minlength=ranks.size)
        left -= int(spent[fits - 1]) if fits else 0
        order = order[fits:]
        order = order[costs[order] <= left]  # what did not fit never will: `left` only falls
    return left


# --- checks -------------------------------------------------------------------------------------------------------


def _check(targets: Sequence[TargetModule], budget: ParameterBudget, limits: RankLimits) -> _Problem:
    _require(targets)
    costs = np.array([target.rank_cost for target in targets], dtype=np.int64)
    lowest, highest = limits.arrays(targets)
    needed, most = int(costs @ lowest), sum(target.rank_cost * target.full_rank for target in targets)
    if needed > budget.limit:
        what = "`min_rank`" if isinstance(limits.min_rank, Mapping) else f"rank {limits.min_rank}"
        raise SettingsError(
            f"`budget` must cover {what} on all {len(targets)} target modules ({needed:,} parameters), "
            f"but got {budget.limit:,}; drop targets, allow rank 0, or raise it."
        )
    if not needed and budget.limit < (smallest := int(costs[highest > 0].min(initial=_LARGEST))):
        raise SettingsError(
            f"`budget` must cover one rank of the cheapest target module ({smallest:,} parameters), "
            f"but got {budget.limit:,}; raise it."
        )
    if budget.limit > most:
        _warn_once(
            f"`budget` is {shown(budget.limit)} parameters, but {len(targets)} target modules hold {most:,} at full "
            "rank; the rest stays unused: lower it, or add targets."
        )
    return _Problem(costs, lowest, highest, _spread_places(tuple(targets)), min(budget.limit, most))


def _require(targets: Sequence[TargetModule]) -> None:
    if not targets:
        raise SettingsError("`targets` must hold at least one target module, but is empty.")


def _whole(value: Any) -> int | None:
    """A whole number as an int; None for anything else, truth values and strings included."""
    if isinstance(value, bool):
        return None
    if isinstance(value, Integral):
        return int(value)
    return int(value) if isinstance(value, float | np.floating) and float(value).is_integer() else None


def _lookup(values: Mapping[str, T], name: str, label: str) -> T:
    try:
        return values[name]
    except KeyError:
        raise SettingsError(f"`{label}` must cover every target module, but `{name}` is missing.") from None


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


def _rounded(values: Floats) -> Floats:
    """Values to 12 digits of their mantissa: equal ones must stay ties after a rounding error in the last bit."""
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.round(mantissa, 12), exponent)


# --- ties ---------------------------------------------------------------------------------------------------------


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
    names, depths, roles = (
        np.unique(values, return_inverse=True)[1]
        for values in zip(*((t.name, t.block or 0, t.role) for t in targets), strict=True)
    )
    n_blocks, n_roles = int(depths.max()) + 1, int(roles.max()) + 1
    visits = depths * pow(_stride(n_blocks, n_roles), -1, n_blocks) % n_blocks  # the block's place within a round
    # The round in which each role comes to its block: the j with role = (k + k // lcm) mod n_roles at step
    # k = visit + j n_blocks. Every run of n_blocks steps from a multiple of it on then takes each block once, and every such
    # run of n_roles steps each role once: a Latin rectangle, closed by one more shift at each common multiple.
    common = math.gcd(n_blocks, n_roles)
    period = n_roles // common
    shifts = (roles - visits) % common
    turns = shifts * period + (roles - visits - shifts) // common * pow(n_blocks // common, -1, period) % period

    # Several modules of a role in one block (experts) take turns at even distances, from another one in each block on.
    cells = depths * n_roles + roles
    number, size = _numbered(cells, np.lexsort((names, cells)))
    within = ((number - visits) % size + (turns + 0.5) / n_roles) / size
    position, size = _numbered(depths, np.lexsort((names, within, depths)))
    return np.argsort(np.lexsort((names, visits, (position + (visits + 0.5) / n_blocks) / size)))


def _stride(n_blocks: int, n_roles: int) -> int:
    """The stride through the blocks that spreads over depth both the blocks that come first and those where one role does."""

    def evenness(step: int) -> float:
        """The least gap among the first m multiples on a circle of blocks, relative to the even one, at the worst m."""
        period = n_blocks // math.gcd(step, n_blocks)
        multiples = np.arange(1, period) * (step % n_blocks) % n_blocks
        gaps = np.minimum(multiples, n_blocks - multiples)
        return float(np.min(gaps * np.arange(2, period + 1), initial=n_blocks)) / n_blocks

    golden = round(n_blocks * (math.sqrt(5) - 1) / 2)
    near = sorted(range(1, n_blocks), key=lambda stride: abs(stride - golden))[:100]
    strides = [stride for stride in near if math.gcd(stride, n_blocks) == 1]
    return max(strides, key=lambda stride: min(evenness(stride), evenness(stride * n_roles)), default=1)


def _numbered(groups: Ints, order: Ints) -> tuple[Ints, Ints]:
    """The number of each entry within its group, from 0 on in the given order, which is sorted by group; and the group's size."""
    sizes = np.bincount(groups)
    numbers = np.empty(groups.size, dtype=np.int64)
    numbers[order] = np.arange(groups.size) - (np.cumsum(sizes) - sizes)[groups[order]]
    return numbers, sizes[groups]
