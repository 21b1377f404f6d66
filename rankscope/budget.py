"""`ParameterBudget`, and the two ways of spending it: water-filling (`allocate_marginal`) and `allocate_proportional`."""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankscope.allocation import RankAllocation
from rankscope.errors import SettingsError, did_you_mean, shown
from rankscope.settings import BudgetSettings, TowerSettings
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

    `towers` bound single towers by name. Numbers up to 1 are shares of the budget, above parameters; a number alone is the most.

    >>> ParameterBudget(2_000_000).limit
    2000000
    >>> ParameterBudget(2_000_000, towers={"vision": 0.2, "language": {"at_least": 10_000, "at_most": 0.5}}).bounds
    {'vision': (0, 400000), 'language': (10000, 1000000)}
    """

    limit: int
    search: bool = field(default=False, repr=False)
    towers: Mapping[str, TowerSettings | Mapping[str, float] | float] = field(
        default_factory=dict, repr=False, hash=False
    )

    def __post_init__(self) -> None:
        limit = _whole(self.limit)
        if limit is None or limit <= 0:
            must = "must be a positive whole number of adapter parameters"
            raise SettingsError(f"`limit` {must}, but got {shown(self.limit)}.")
        given: Any = dict(self.towers) if isinstance(self.towers, Mapping) else self.towers
        object.__setattr__(self, "limit", limit)
        object.__setattr__(self, "towers", BudgetSettings(parameters=1, towers=given).towers)
        bounds = self.bounds
        for tower, (least, most) in bounds.items():
            if least > most:
                raise SettingsError(
                    f"`towers` must let `{tower}` have as much as they ask for, but of a budget of {shown(limit)} parameters "
                    f"`at_least` is {shown(least)} and `at_most` {shown(most)}; lower the one, or raise the other."
                )
        if (asked := sum(least for least, _ in bounds.values())) > limit:
            each = ", ".join(f"{tower} {shown(least)}" for tower, (least, _) in bounds.items() if least)
            raise SettingsError(
                f"`towers` must ask for no more than the budget of {shown(limit)} parameters, but ask for at least "
                f"{shown(asked)} ({each}); lower `at_least` of a tower, or raise the budget."
            )

    @classmethod
    def of(cls, budget: ParameterBudget | RankAllocation | int) -> ParameterBudget:
        """The budget itself, that of an allocation (what it uses, if it has none), or one of so many parameters."""
        if isinstance(budget, RankAllocation):
            return cls.bounded(budget.budget or budget.parameters, budget.tower_bounds)
        return budget if isinstance(budget, cls) else cls(budget)  # type: ignore[arg-type]

    @classmethod
    def from_settings(cls, settings: BudgetSettings, targets: Sequence[TargetModule]) -> ParameterBudget:
        """The budget that a study asks for: so many parameters, or what uniform LoRA of a rank uses.

        >>> targets = [TargetModule(name="fc1", in_features=64, out_features=256)]
        >>> ParameterBudget.from_settings(BudgetSettings(uniform_rank=8), targets)
        ParameterBudget(limit=2560)
        """
        if settings.uniform_rank is not None:
            return cls.uniform(targets, settings.uniform_rank, settings.search, settings.towers)
        return cls(settings.parameters or 0, settings.search, settings.towers)

    @classmethod
    def uniform(
        cls, targets: Sequence[TargetModule], rank: int, search: bool = False, towers: Mapping[str, Any] | None = None
    ) -> ParameterBudget:
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
        return cls(limit, search, {} if towers is None else towers)

    @classmethod
    def bounded(cls, limit: int, bounds: Mapping[str, tuple[int, int]]) -> ParameterBudget:
        """A budget whose towers have so many parameters, at least and at most: the inverse of `bounds`."""
        # No rank costs a single parameter, and 1 would be read as a share.
        towers = {
            tower: {"at_least": least + (least == 1), "at_most": most - (most == 1)}
            for tower, (least, most) in bounds.items()
        }
        return cls(limit, towers=towers)

    @property
    def bounds(self) -> dict[str, tuple[int, int]]:
        """The least and the most parameters of each bounded tower."""
        towers: Mapping[str, Any] = self.towers
        return {tower: each.bounds(self.limit) for tower, each in towers.items()}

    def terms(self) -> dict[str, Any]:
        """The limit, and the bounds on towers if there are any, as plain values: what results depend on."""
        towers: Mapping[str, Any] = self.towers
        bounded = {"towers": {tower: each.terms() for tower, each in towers.items()}} if towers else {}
        return {"budget": self.limit, **bounded}

    def at(self, limit: int) -> ParameterBudget:
        """A budget of so many parameters with the same bounds on towers: shares are of the new limit."""
        return replace(self, limit=limit, search=False)

    def beside(self, spent: Mapping[str, int]) -> ParameterBudget:
        """What is left for the towers named in `spent`, each of which holds so many parameters that stay."""
        left = {
            tower: (max(least - spent[tower], 0), max(most - spent[tower], 0))
            for tower, (least, most) in self.bounds.items()
            if tower in spent
        }
        return ParameterBudget.bounded(max(self.limit - sum(spent.values()), 1), left)

    def require(self, allocation: RankAllocation, what: str, *, or_else: str = "lower ranks") -> None:
        """Raise a SettingsError unless an allocation keeps within the budget, `or_else` told, and the bounds on towers."""
        if (found := allocation.parameters) > self.limit:
            must = f"`budget` must cover {what} ({found:,} parameters)"
            raise SettingsError(f"{must}, but got {self.limit:,}; raise it, or {or_else}.")
        spent = allocation.parameters_by_tower
        for tower, (least, most) in self.bounds.items():
            if not least <= spent.get(tower, 0) <= most:
                raise SettingsError(
                    f"{what} must give tower `{tower}` {least:,} to {most:,} parameters, but give it {spent.get(tower, 0):,}; "
                    "change its ranks, or its bounds in the budget."
                )


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
    depth and roles. What is left over pays for no rank.

    A tower with a least first gets its own best ranks until it has it; a tower with a most takes no rank beyond it. Exact where
    all costs are equal: the best total of n ranks in a tower is concave in n, and a sum of concave functions under such bounds is
    maximised greedily (Federgruen and Groenevelt, Operations Research 34, 1986). Else short of the optimum by less than one rank,
    and by one more for each tower whose bound is met.
    """
    problem = _problem(targets, budget, limits)
    costs, lowest = problem.costs, problem.lowest
    curves = _arrays(targets, gains, "gains", _WRONG_GAINS, ndim=1)
    if not any(curve[0] > 0 for curve in curves if curve.size):
        remedy = "choose targets that the loss depends on, or profile on other data"
        raise SettingsError(f"`gains` must not all be zero; {remedy}.")
    left = problem.limit - int(costs @ lowest)
    highest = np.minimum(problem.highest, lowest + left // costs)
    # Curves may reach up to full rank. Look only as far as ranks may go: further where a module takes all it was shown.
    reach = np.full(len(targets), 2 * (left // int(costs.sum())) + 8)
    while True:
        horizon = np.minimum(highest, lowest + reach)
        module, rank, gain = _ladder(targets, curves, horizon)
        mantissa, exponent = np.frexp(gain / costs[module])
        density = np.ldexp(np.round(mantissa, 12), exponent)  # ties stay ties after a rounding error in the last bit
        order = np.lexsort((rank * len(targets) + problem.places[module], -density))
        order = order[rank[order] >= lowest[module[order]]]  # the ranks below are given
        ranks = problem.with_least(module[order])
        order = order[rank[order] >= ranks[module[order]]]
        problem.place(module[order], ranks)
        short = (ranks == horizon) & (horizon < highest)
        if not short.any():
            return problem.allocation(ranks)
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

    A tower whose most is met keeps the smaller c at which it is met. A tower with a least first gets the ranks that come first by
    (rank + 1/2) / score (Webster's method) until it has it; these then are its least ranks.
    """
    problem = _problem(targets, budget, limits)
    values = np.array(_arrays(targets, scores, "scores", _WRONG_SCORES, ndim=0))
    if not np.isfinite(values).all() or (values < 0).any() or not values.any():
        raise SettingsError(_WRONG_SCORES)
    values /= values.max()
    positive = np.maximum(values, 1e-300)  # scores may underflow; the ends must not overflow
    costs, highest, lowest = problem.costs, problem.highest, problem.lowest
    if problem.least.any():
        module, rank = _rungs(np.minimum(highest, lowest + problem.least[problem.tower] // costs + 1))
        order = np.lexsort((rank * len(targets) + problem.places[module], (rank + 0.5) / positive[module]))
        lowest = problem.with_least(module[order[rank[order] >= lowest[module[order]]]])

    # The cost is linear in c between those c at which a module meets one of its limits, or a tower its most.
    caps = np.full(len(targets), math.inf)
    ends = np.unique([0.0, *(lowest / positive), *(highest / positive)])

    def ideal(scale: float) -> Floats:
        ranks: Floats = np.clip(np.minimum(scale, caps) * values, lowest, highest).astype(np.float64)
        return ranks

    def cost(scale: float, among: Any = slice(None)) -> float:
        return float(costs[among] @ ideal(scale)[among])

    for group, most in enumerate(problem.most.tolist()[1:], start=1):
        mine = problem.tower == group
        caps[mine] = _scale_of(partial(cost, among=mine), ends, most)
    scale = _scale_of(cost, np.unique([*ends, *caps[np.isfinite(caps)]]), problem.limit)
    ranks = np.floor(ideal(scale) + min(1e-9, 0.5 / costs.sum())).astype(np.int64)  # forgives less than a parameter
    order = np.lexsort((problem.places, -np.round(ideal(scale) - ranks, 9)))
    while (open_ := order[(ranks[order] < highest[order]) & problem.fits(order, ranks)]).size:
        # Rounds that every open module can take part in go in at once.
        rounds = min(problem.rounds(open_, ranks), int((highest - ranks)[open_].min()))
        if rounds:
            ranks[open_] += rounds
        else:
            problem.place(open_, ranks)
    return problem.allocation(ranks)


def _scale_of(cost: Callable[[float], float], ends: Floats, limit: int) -> float:
    """The largest c of a cost within the limit; the cost does not fall, and is linear between the `ends`."""
    after = bisect_right(ends, float(limit), key=cost)
    low, high = (float(end) for end in ends[[after - 1, min(after, len(ends) - 1)]])
    return low if low == high else low + (high - low) * (limit - cost(low)) / (cost(high) - cost(low))


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Problem:
    """What both ways of spending have in common; arrays over modules, and over groups of modules: tower by tower."""

    targets: tuple[TargetModule, ...]
    budget: ParameterBudget
    costs: Ints
    lowest: Ints  # ranks
    highest: Ints
    places: Ints  # of the modules, where they tie
    limit: int  # the parameters that can be spent
    tower: Ints  # the group of each module; 0: of a tower without bounds
    least: Ints  # parameters of each group
    most: Ints

    def allocation(self, ranks: Ints) -> RankAllocation:
        """The ranks as an allocation of this budget."""
        vector, budget = tuple(ranks.tolist()), self.budget
        return RankAllocation(self.targets, vector, budget=budget.limit, tower_bounds=budget.bounds)

    def spent(self, ranks: Ints) -> Ints:
        """The parameters of each group."""
        return np.array([self.costs @ np.where(self.tower == group, ranks, 0) for group in range(len(self.most))])

    def fits(self, order: Ints, ranks: Ints) -> NDArray[np.bool_]:
        """Whether one more rank of each module in `order` fits the budget and its tower."""
        spent = self.spent(ranks)
        room = np.minimum(self.most - spent, self.limit - spent.sum())
        fitting: NDArray[np.bool_] = self.costs[order] <= room[self.tower[order]]
        return fitting

    def rounds(self, order: Ints, ranks: Ints) -> int:
        """How many more ranks all modules in `order` can get together."""
        spent = self.spent(ranks)
        wanted = self.spent(np.bincount(order, minlength=ranks.size))
        asking = wanted > 0
        return int(min((self.limit - spent.sum()) // wanted.sum(), *((self.most - spent)[asking] // wanted[asking])))

    def place(self, order: Ints, ranks: Ints) -> None:
        """Add a rank to the modules in `order`, each where it still fits the budget and its tower. Changes `ranks`."""
        while (order := order[self.fits(order, ranks)]).size:  # what did not fit never will: the room only falls
            spent, costs, groups = self.spent(ranks), self.costs[order], self.tower[order]
            n = np.searchsorted(np.cumsum(costs), self.limit - spent.sum(), side="right")
            for group in np.unique(groups) if len(self.most) > 1 else ():
                mine = np.cumsum(np.where(groups == group, costs, 0))
                n = min(n, np.searchsorted(mine, (self.most - spent)[group], side="right"))
            ranks += np.bincount(order[:n], minlength=ranks.size)
            order = order[n:]

    def with_least(self, order: Ints) -> Ints:
        """The lowest ranks, and from `order`, best first, as many for each tower as give it its least parameters.

        The last rank of a tower may take it above its least. Where that does not fit, each tower gets the cheapest ranks that do.
        """
        ranks, missing = self.lowest.copy(), self.least - self.spent(self.lowest)
        for group in np.flatnonzero(missing > 0):
            mine = order[self.tower[order] == group]
            n = int(np.searchsorted(np.cumsum(self.costs[mine]), missing[group])) + 1
            ranks += np.bincount(mine[:n], minlength=ranks.size)
        spent = self.spent(ranks)
        if (spent <= self.most).all() and spent.sum() <= self.limit:
            return ranks
        ranks = self.lowest.copy()
        for group in np.flatnonzero(missing > 0):
            inside = self.tower == group
            room = Counter[int]()
            for cost, more in zip(
                self.costs[inside].tolist(), (self.highest - self.lowest)[inside].tolist(), strict=True
            ):
                room[cost] += more
            for cost, n in _cheapest_cover(room, int(missing[group])).items():
                chosen = order[(self.tower[order] == group) & (self.costs[order] == cost)][:n]
                ranks += np.bincount(chosen, minlength=ranks.size)
        return ranks


def _cheapest_cover(room: Mapping[int, int], least: int) -> Counter[int]:
    """How many of each cost make the smallest sum from `least` on, with `room` for so many of each; a bounded subset sum.

    >>> dict(_cheapest_cover({3: 2, 5: 4}, 12))
    {5: 2, 3: 1}
    """
    unit = math.gcd(*room)
    least, kept = -(-least // unit), (1 << (-(-least // unit) + max(room) // unit)) - 1
    bundles = [(cost // unit, 1 << bit) for cost, n in room.items() for bit in range(n.bit_length() - 1)]
    bundles += [(cost // unit, n - (1 << n.bit_length() - 1) + 1) for cost, n in room.items() if n]
    sums = [1]  # bit s: whether the bundles so far can sum to s
    for cost, n in bundles:
        sums.append((sums[-1] | sums[-1] << cost * n) & kept)
    above, found = sums[-1] >> least, Counter[int]()
    total = least + (above & -above).bit_length() - 1
    for (cost, n), before in zip(reversed(bundles), reversed(sums[:-1]), strict=True):
        if not before >> total & 1:
            found[cost * unit] += n
            total -= cost * n
    return found


def _problem(targets: Sequence[TargetModule], budget: ParameterBudget, limits: RankLimits) -> _Problem:
    """The problem; a SettingsError where no ranks solve it."""
    if not targets:
        raise SettingsError(_NO_TARGETS)
    lowest, highest = limits.arrays(targets)
    costs = np.array([target.rank_cost for target in targets], dtype=np.int64)
    needed, holds = int(costs @ lowest), sum(target.rank_cost * target.full_rank for target in targets)
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
    if budget.limit > holds:
        _warn_once(
            f"`budget` is {shown(budget.limit)} parameters, but {len(targets)} target modules hold {holds:,} at full "
            "rank; the rest stays unused: lower it, or add targets."
        )
    limit, names, bounds = min(budget.limit, holds), ["", *budget.bounds], budget.bounds.values()
    problem = _Problem(
        targets=tuple(targets),
        budget=budget,
        costs=costs,
        lowest=lowest,
        highest=highest,
        places=_spread_places(tuple(targets)),
        limit=limit,
        tower=np.array([names.index(t.tower) if t.tower in names else 0 for t in targets], dtype=np.int64),
        least=np.array([0, *(min(low, _LARGEST) for low, _ in bounds)], dtype=np.int64),
        most=np.array([limit, *(min(high, limit) for _, high in bounds)], dtype=np.int64),
    )
    if bounds:
        _check_towers(problem, names)
    return problem


def _check_towers(problem: _Problem, names: Sequence[str]) -> None:
    """Raise a SettingsError where the model lacks a bounded tower, or no ranks meet all bounds."""
    present, budget = sorted({target.tower for target in problem.targets}), problem.budget
    if unknown := [name for name in names[1:] if name not in present]:
        hint = did_you_mean(unknown[0], present, "take one of these.")
        raise SettingsError(
            f"`towers` must be among the model's ({', '.join(present)}), but name {unknown[0]!r}; {hint}"
        )
    needed, holds = problem.spent(problem.lowest), problem.spent(problem.highest)
    for name, low, high, least, most in zip(names, needed, holds, problem.least, problem.most, strict=True):
        if low > most:
            raise SettingsError(
                f"`towers` must let `{name}` have its least ranks ({low:,} parameters), but `at_most` is {most:,} of a budget of "
                f"{budget.limit:,}; raise it, or lower `min_rank`."
            )
        if high < least:
            raise SettingsError(
                f"`towers` must ask of `{name}` no more than its modules hold at `max_rank` or full rank ({high:,} parameters), "
                f"but `at_least` is {least:,} of a budget of {budget.limit:,}; lower it, or raise `max_rank`."
            )
    open_ = np.flatnonzero(problem.highest > 0)
    if not (problem.costs[open_] <= problem.most[problem.tower[open_]]).any():
        raise SettingsError(
            "`towers` must leave a target module room for one rank, but leave none; raise an `at_most`."
        )
    module, _ = _rungs(np.minimum(problem.highest - problem.lowest, problem.least[problem.tower] // problem.costs + 1))
    spent = problem.spent(problem.with_least(module))
    for name, found, least, most in zip(names, spent, problem.least, problem.most, strict=True):
        if found > most:
            raise SettingsError(
                f"`towers` must leave `{name}` ranks to choose from, but none cost {least:,} to {most:,} parameters (from there "
                f"on {found:,} at least); raise `at_most`, or lower `at_least`."
            )
    if (total := int(spent.sum())) > budget.limit:
        raise SettingsError(
            f"`budget` must cover the least of all towers in whole ranks ({total:,} parameters), but got {budget.limit:,}; raise "
            "it, or lower an `at_least`."
        )
    usable = int(np.minimum(holds, problem.most).sum())
    if usable < problem.limit - int(problem.costs.max()):
        _warn_once(
            f"the towers' `at_most` let ranks use {usable / budget.limit:.0%} of the budget; the rest stays unused: raise one, "
            "or lower the budget."
        )


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
    module, rank = _rungs(horizon)
    gain = np.zeros(module.size)
    listed = np.array([curve.size for curve in curves])
    gain[rank < listed[module]] = np.concatenate([curve[:high] for curve, high in zip(curves, horizon, strict=True)])
    if (wrong := ~np.isfinite(gain) | (gain < 0)).any():
        raise SettingsError(_WRONG_GAINS.format(targets[module[np.argmax(wrong)]].name))
    first = gain[np.arange(gain.size) - rank]
    if (wrong := (np.diff(gain, prepend=0.0) > 1e-12 * first) & (rank > 0)).any():
        raise SettingsError(f"`gains` of `{targets[module[np.argmax(wrong)]].name}` must not increase with the rank.")
    return module, rank, gain


def _rungs(horizon: Ints) -> tuple[Ints, Ints]:
    """One row for each rank up to the horizon: its module, and its number there."""
    module = np.repeat(np.arange(horizon.size), horizon)
    return module, np.arange(module.size) - np.repeat(np.cumsum(horizon) - horizon, horizon)


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
