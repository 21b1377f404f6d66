"""`ParameterBudget`, and the two ways of spending it: water-filling (`allocate_marginal`) and `allocate_proportional`."""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankscope.allocation import RankAllocation
from rankscope.errors import SettingsError, shown
from rankscope.targets import TargetModule

Bound = float | Mapping[str, float] | None  # whole numbers of any type, such as NumPy's or 64.0
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

logger = logging.getLogger(__name__)
_warn_once = lru_cache(maxsize=256)(logger.warning)  # a search projects thousands of times onto one budget
_LARGEST = np.iinfo(np.int64).max
_NO_TARGETS = "`targets` must hold at least one target module, but is empty."
_WRONG_GAINS = "`gains` of `{}` must be a list of finite numbers that are not negative."
_WRONG_SCORES = "`scores` must be finite, not negative and not all zero; take the profile again on data with a loss."


@dataclass(frozen=True, slots=True)
class ParameterBudget:
    """The most trainable adapter parameters that an allocation may use; a search may try smaller budgets as well (`search`).

    >>> ParameterBudget(2_000_000).limit
    2000000
    """

    limit: int
    search: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        limit = _whole(self.limit)
        if limit is None or limit <= 0:
            must = "must be a positive whole number of adapter parameters"
            raise SettingsError(f"`limit` {must}, but got {shown(self.limit)}.")
        object.__setattr__(self, "limit", limit)

    @classmethod
    def of(cls, budget: ParameterBudget | int) -> ParameterBudget:
        """The budget itself, or one of so many parameters."""
        return budget if isinstance(budget, cls) else cls(budget)  # type: ignore[arg-type]

    @classmethod
    def uniform(cls, targets: Sequence[TargetModule], rank: int, search: bool = False) -> ParameterBudget:
        """What plain LoRA of this rank uses on every target module. Above a module's full rank, its full rank counts.

        >>> ParameterBudget.uniform([TargetModule(name="fc1", in_features=64, out_features=256)], rank=8)
        ParameterBudget(limit=2560)
        """
        whole = _whole(rank)
        if whole is None or whole < 1:
            raise SettingsError(f"`rank` must be a whole number of at least 1, but got {shown(rank)}.")
        if not targets:
            raise SettingsError(_NO_TARGETS)
        limit = sum(target.rank_cost * min(whole, target.full_rank) for target in targets)
        if low := [target for target in targets if target.full_rank < whole]:
            _warn_once(
                f"rank {shown(whole)} is above the full rank of {len(low)} of {len(targets)} target modules, as of "
                f"`{low[0].name}` ({low[0].full_rank}); the budget counts their full rank: {limit:,} parameters."
            )
        return cls(limit, search)


@dataclass(frozen=True, slots=True)
class RankLimits:
    """The least and the greatest rank of each module: one number for all, or numbers by name.

    Modules that a mapping leaves out may have any rank from 0 to their full rank, which caps all.

    >>> RankLimits(max_rank={"fc1": 4}).arrays([TargetModule(name=n, in_features=8, out_features=8) for n in ("fc1", "fc2")])
    (array([0, 0]), array([4, 8]))
    """

    min_rank: Bound = 0
    max_rank: Bound = None

    def arrays(self, targets: Sequence[TargetModule]) -> tuple[Ints, Ints]:
        """The least and the greatest ranks, one entry a target."""
        full = np.array([target.full_rank for target in targets], dtype=np.int64)
        lowest, highest = np.zeros_like(full), full.copy()
        index = {target.name: i for i, target in enumerate(targets)}
        for label, bound, values in (("min_rank", self.min_rank, lowest), ("max_rank", self.max_rank, highest)):
            by_name, of = (bound, " of `{}`") if isinstance(bound, Mapping) else (dict.fromkeys(index, bound), "")
            for name, value in by_name.items() if bound is not None else ():
                whole = _whole(value)
                if name not in index:
                    raise SettingsError(f"`{label}` must name target modules only, but names {name!r}.")
                if whole is None:
                    raise SettingsError(f"`{label}`{of.format(name)} must be a whole number, but got {shown(value)}.")
                if whole < 0:
                    raise SettingsError(f"`{label}` must not be negative, but got {shown(whole)}.")
                values[index[name]] = min(whole, _LARGEST)
        highest = np.minimum(highest, full)
        worst = int(np.argmax(lowest - highest))
        if (low := lowest[worst]) > (high := highest[worst]):
            most = f"`max_rank` or the full rank of `{targets[worst].name}` ({high})"
            raise SettingsError(f"`min_rank` must not exceed {most}, but got {low}.")
        return lowest, highest


def allocate_marginal(
    targets: Sequence[TargetModule],
    gains: Mapping[str, Sequence[float] | NDArray[Any]],
    budget: ParameterBudget,
    limits: RankLimits = RankLimits(),
) -> RankAllocation:
    """Water-filling: the ranks with the highest gain per parameter first, until the budget is full.

    `gains` are, by module name, those of its first, second, … rank: not negative, not increasing. Ranks beyond the end of the
    list gain nothing, and are placed last, as evenly as they fit. Ties go to the lower rank, then are spread evenly over towers,
    depth and roles. Exact where all costs are equal, else within one rank of the optimum; what is left over pays for no rank.
    """
    costs, lowest, highest, places, limit = _problem(targets, budget, limits)
    curves = _arrays(targets, gains, "gains", _WRONG_GAINS, ndim=1)
    if not any(curve[0] > 0 for curve in curves if curve.size):
        remedy = "choose targets that the loss depends on, or profile on other data"
        raise SettingsError(f"`gains` must not all be zero; {remedy}.")
    left = limit - int(costs @ lowest)
    highest = np.minimum(highest, lowest + left // costs)
    # Curves may reach up to full rank. Look only as far as ranks may go: further where a module takes all it was shown.
    reach = np.full(len(targets), 2 * (left // int(costs.sum())) + 8)
    while True:
        horizon = np.minimum(highest, lowest + reach)
        module, rank, gain = _ladder(targets, curves, horizon)
        mantissa, exponent = np.frexp(gain / costs[module])
        density = np.ldexp(np.round(mantissa, 12), exponent)  # ties stay ties after a rounding error in the last bit
        order = np.lexsort((rank * len(targets) + places[module], -density))
        order = order[rank[order] >= lowest[module[order]]]  # the ranks below are given
        ranks = lowest.copy()
        _place(module[order], ranks, left, costs)
        short = (ranks == horizon) & (horizon < highest)
        if not short.any():
            return RankAllocation(tuple(targets), tuple(ranks.tolist()), budget=budget.limit)
        reach[short] *= 4


def allocate_proportional(
    targets: Sequence[TargetModule],
    scores: Mapping[str, float],
    budget: ParameterBudget,
    limits: RankLimits = RankLimits(),
) -> RankAllocation:
    """Ranks in proportion to scores on any scale, by largest remainder (Hare's method, with costs and limits).

    The ideal ranks are clip(c * score, min, max), with the c at which they cost the whole budget. They are rounded down, then
    single ranks go to the modules furthest below their ideal. Ties are spread evenly over towers, depth and roles.
    """
    costs, lowest, highest, places, limit = _problem(targets, budget, limits)
    values = np.array(_arrays(targets, scores, "scores", _WRONG_SCORES, ndim=0))
    if not np.isfinite(values).all() or (values < 0).any() or not values.any():
        raise SettingsError(_WRONG_SCORES)
    values /= values.max()

    def ideal(scale: float) -> Floats:
        return np.clip(scale * values, lowest, highest).astype(np.float64)

    def cost(scale: float) -> float:
        return float(costs @ ideal(scale))

    # The cost is linear in c between those c at which a module meets one of its limits.
    positive = np.maximum(values, 1e-300)  # scores may underflow; the ends must not overflow
    ends = np.unique([0.0, *(lowest / positive), *(highest / positive)])
    after = bisect_right(ends, float(limit), key=cost)
    low, high = ends[[after - 1, min(after, len(ends) - 1)]]
    scale = low if low == high else low + (high - low) * (limit - cost(low)) / (cost(high) - cost(low))

    ranks = np.floor(ideal(scale) + min(1e-9, 0.5 / costs.sum())).astype(np.int64)  # forgives less than a parameter
    left = limit - int(costs @ ranks)
    order = np.lexsort((places, -np.round(ideal(scale) - ranks, 9)))
    while (open_ := order[(ranks[order] < highest[order]) & (costs[order] <= left)]).size:
        # Rounds that every open module can take part in go in at once.
        spent = int(costs[open_].sum())
        if rounds := min(left // spent, int((highest - ranks)[open_].min())):
            ranks[open_] += rounds
            left -= rounds * spent
        else:
            left = _place(open_, ranks, left, costs)
    return RankAllocation(tuple(targets), tuple(ranks.tolist()), budget=budget.limit)


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


def _problem(
    targets: Sequence[TargetModule], budget: ParameterBudget, limits: RankLimits
) -> tuple[Ints, Ints, Ints, Ints, int]:
    """Costs, least and greatest ranks, places of the modules when they tie, and the parameters that can be spent."""
    if not targets:
        raise SettingsError(_NO_TARGETS)
    lowest, highest = limits.arrays(targets)
    costs = np.array([target.rank_cost for target in targets], dtype=np.int64)
    needed, most = int(costs @ lowest), sum(target.rank_cost * target.full_rank for target in targets)
    bound = "`min_rank`" if isinstance(limits.min_rank, Mapping) else f"rank {limits.min_rank}"
    least, what, remedy = (
        needed,
        f"{bound} on all {len(targets)} target modules",
        "drop targets, allow rank 0, or raise it",
    )
    if not needed:
        cheapest = int(costs[highest > 0].min(initial=_LARGEST))
        least, what, remedy = cheapest, "one rank of the cheapest target module", "raise it"
    if budget.limit < least:
        raise SettingsError(f"`budget` must cover {what} ({least:,} parameters), but got {budget.limit:,}; {remedy}.")
    if budget.limit > most:
        _warn_once(
            f"`budget` is {shown(budget.limit)} parameters, but {len(targets)} target modules hold {most:,} at full "
            "rank; the rest stays unused: lower it, or add targets."
        )
    return costs, lowest, highest, _spread_places(tuple(targets)), min(budget.limit, most)


def _whole(value: Any) -> int | None:
    """A whole number as an int; None for anything else, truth values and strings included."""
    if isinstance(value, float | np.floating):
        return int(value) if float(value).is_integer() else None
    return int(value) if not isinstance(value, bool) and isinstance(value, Integral) else None


def _arrays(
    targets: Sequence[TargetModule], values: Mapping[str, Any], label: str, wrong: str, ndim: int
) -> list[Floats]:
    """The score, or the gains, of each target; `wrong` is the message where they are no numbers."""
    arrays: list[Floats] = []
    for name in (target.name for target in targets):
        if name not in values:
            raise SettingsError(f"`{label}` must cover every target module, but `{name}` is missing.")
        try:
            arrays.append(np.asarray(values[name], dtype=np.float64))
        except (TypeError, ValueError, OverflowError):
            raise SettingsError(wrong.format(name)) from None
        if arrays[-1].ndim != ndim:
            raise SettingsError(wrong.format(name))
    return arrays


def _ladder(targets: Sequence[TargetModule], curves: list[Floats], horizon: Ints) -> tuple[Ints, Ints, Floats]:
    """One row for each rank up to the horizon: its module, its number there, its gain. All are checked in one pass."""
    module = np.repeat(np.arange(len(targets)), horizon)
    rank = np.arange(module.size) - np.repeat(np.cumsum(horizon) - horizon, horizon)
    gain = np.zeros(module.size)
    listed = np.array([curve.size for curve in curves])
    gain[rank < listed[module]] = np.concatenate([curve[:high] for curve, high in zip(curves, horizon, strict=True)])
    if (wrong := ~np.isfinite(gain) | (gain < 0)).any():
        raise SettingsError(_WRONG_GAINS.format(targets[module[np.argmax(wrong)]].name))
    first = gain[np.arange(gain.size) - rank]
    if (wrong := (np.diff(gain, prepend=0.0) > 1e-12 * first) & (rank > 0)).any():
        raise SettingsError(f"`gains` of `{targets[module[np.argmax(wrong)]].name}` must not increase with the rank.")
    return module, rank, gain


# --- ties ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def _spread_places(targets: tuple[TargetModule, ...]) -> Ints:
    """The place of each module in an order whose every beginning is spread over towers, depth and roles.

    Among the first k modules each tower has its share of k; within a tower, blocks of one size differ by at most one module,
    and so do roles where every block has one module of each. Names decide only within one tower, block and role.
    """
    stacks: dict[tuple[str, bool], list[TargetModule]] = defaultdict(list)
    for target in targets:
        stacks[target.tower, target.block is None].append(target)
    keys = {}
    for stack, members in stacks.items():
        for target, place in zip(members, _places_in_stack(members).tolist(), strict=True):
            keys[target.name] = ((place + 0.5) / len(members), stack)
    return np.argsort(sorted(range(len(targets)), key=lambda index: keys[targets[index].name]))


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
    """The number of each entry in its group, along an order that is sorted by group; and the size of its group."""
    sizes = np.bincount(groups)
    numbers = np.empty(groups.size, dtype=np.int64)
    numbers[order] = np.arange(groups.size) - (np.cumsum(sizes) - sizes)[groups[order]]
    return numbers, sizes[groups]
