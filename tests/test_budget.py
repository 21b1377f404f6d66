"""Both projections onto a budget: feasible, tight, independent of order, and against independent references."""

import itertools
import logging
import re
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import rankscope as rs
from rankscope.budget import RankLimits, allocate_marginal, allocate_proportional
from rankscope.errors import SettingsError
from tests.inventories import check_feasible, inventories, vit_inventory


@st.composite
def problems(draw: st.DrawFn) -> tuple[tuple[rs.TargetModule, ...], rs.ParameterBudget, dict, dict]:
    """An inventory, a budget that covers the lower bounds and one rank more, and bounds by name."""
    targets = draw(inventories())
    low = {t.name: draw(st.integers(0, min(2, t.full_rank))) for t in targets}
    high = {t.name: draw(st.integers(low[t.name], t.full_rank + 2)) for t in targets}
    needed = sum(t.rank_cost * low[t.name] for t in targets) + min(t.rank_cost for t in targets)
    full = sum(t.rank_cost * t.full_rank for t in targets)
    limit = draw(st.integers(needed, max(needed, full) + 10))
    if not any(high.values()):
        high[targets[0].name] = 1
        limit = max(limit, targets[0].rank_cost)
    if not any(low.values()):
        limit = max(limit, min(t.rank_cost for t in targets if high[t.name]))
    return targets, rs.ParameterBudget(limit), low, high


def draw_gains(data: st.DataObject, targets: tuple[rs.TargetModule, ...]) -> dict[str, list[float]]:
    gains = {
        t.name: sorted(data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.7]), max_size=8)), reverse=True)
        for t in targets
    }
    gains[targets[0].name] = [9.0, *gains[targets[0].name]]
    return gains


@given(problems(), st.data())
def test_proportional_is_feasible_tight_and_independent_of_order(problem: tuple, data: st.DataObject) -> None:
    targets, budget, low, high = problem
    scores = {t.name: data.draw(st.sampled_from([0.0, 0.1, 1.0, 1.0, 3.0, 50.0])) for t in targets}
    scores[targets[0].name] = 1.0
    found = allocate_proportional(targets, scores, budget, RankLimits(low, high))
    check_feasible(found, budget, low, high)
    shuffled = tuple(data.draw(st.permutations(targets)))
    again = allocate_proportional(shuffled, scores, budget, RankLimits(low, high))
    assert dict(again.ranks) == dict(found.ranks)


@given(problems(), st.data())
def test_marginal_is_feasible_tight_and_independent_of_order(problem: tuple, data: st.DataObject) -> None:
    targets, budget, low, high = problem
    gains = draw_gains(data, targets)
    found = allocate_marginal(targets, gains, budget, RankLimits(low, high))
    check_feasible(found, budget, low, high)
    shuffled = tuple(data.draw(st.permutations(targets)))
    assert dict(allocate_marginal(shuffled, gains, budget, RankLimits(low, high)).ranks) == dict(found.ranks)


def value(gains: dict[str, list[float]], ranks: dict[str, int]) -> float:
    return sum(sum(gains[name][:rank]) for name, rank in ranks.items())


def best_value(targets: tuple[rs.TargetModule, ...], gains: dict[str, list[float]], limit: int) -> float:
    """The optimum by trying every allocation."""
    choices = itertools.product(*[range(t.full_rank + 1) for t in targets])
    return max(
        value(gains, dict(zip([t.name for t in targets], ranks, strict=True)))
        for ranks in choices
        if sum(t.rank_cost * r for t, r in zip(targets, ranks, strict=True)) <= limit
    )


@given(inventories(max_size=4, equal_costs=True), st.integers(1, 24), st.data())
def test_marginal_is_optimal_for_equal_costs(targets: tuple, units: int, data: st.DataObject) -> None:
    gains = draw_gains(data, targets)
    found = allocate_marginal(targets, gains, rs.ParameterBudget(12 * units))
    assert value(gains, dict(found.ranks)) == pytest.approx(best_value(targets, gains, 12 * units))


@given(inventories(max_size=3, equal_costs=True), st.data())
def test_marginal_is_optimal_within_bounds(targets: tuple, data: st.DataObject) -> None:
    gains = draw_gains(data, targets)
    low = {t.name: data.draw(st.integers(0, 2)) for t in targets}
    high = {t.name: data.draw(st.integers(max(low[t.name], 1), 6)) for t in targets}
    limit = 12 * data.draw(st.integers(max(sum(low.values()), 1), 18))
    found = allocate_marginal(targets, gains, rs.ParameterBudget(limit), RankLimits(low, high))
    best = max(
        value(gains, dict(zip([t.name for t in targets], ranks, strict=True)))
        for ranks in itertools.product(*[range(low[t.name], high[t.name] + 1) for t in targets])
        if 12 * sum(ranks) <= limit
    )
    assert value(gains, dict(found.ranks)) == pytest.approx(best)


@given(inventories(max_size=3), st.integers(30, 120), st.data())
def test_marginal_misses_at_most_one_rank_for_unequal_costs(
    targets: tuple[rs.TargetModule, ...], limit: int, data: st.DataObject
) -> None:
    """Greedy by density loses at most the first rank that did not fit (Dantzig 1957, the knapsack's bound)."""
    gains = draw_gains(data, targets)
    found = allocate_marginal(targets, gains, rs.ParameterBudget(limit))
    largest = max(max(values, default=0.0) for values in gains.values())
    assert value(gains, dict(found.ranks)) >= best_value(targets, gains, limit) - largest - 1e-9


def largest_remainder(scores: list[float], units: int) -> list[int]:
    """Hare's method, written on its own: quotas, floors, then the largest remainders; ties to the first."""
    quotas = [units * score / sum(scores) for score in scores]
    seats = [int(quota + 1e-9) for quota in quotas]
    order = sorted(range(len(scores)), key=lambda i: (-round(quotas[i] - seats[i], 9), i))
    for i in order[: units - sum(seats)]:
        seats[i] += 1
    return seats


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(1, 25))
def test_proportional_is_largest_remainder_for_equal_costs(scores: list[int], units: int) -> None:
    targets = tuple(rs.TargetModule(name=f"m{i}", in_features=40, out_features=40) for i in range(len(scores)))
    by_name = {f"m{i}": float(score) for i, score in enumerate(scores)}
    found = allocate_proportional(targets, by_name, rs.ParameterBudget(80 * units))
    assert list(found.vector) == largest_remainder(scores, units)


def exact_ideal(costs: list[int], scores: list[int], low: list[int], high: list[int], limit: int) -> list[Fraction]:
    """clip(c * score, low, high) at the c where it costs the limit, in fractions, from breakpoint to breakpoint."""

    def at(c: Fraction) -> list[Fraction]:
        return [min(max(c * s, Fraction(a)), Fraction(b)) for s, a, b in zip(scores, low, high, strict=True)]

    def cost(c: Fraction) -> Fraction:
        return sum((w * r for w, r in zip(costs, at(c), strict=True)), Fraction(0))

    ends = sorted({Fraction(0), *(Fraction(b, s) for s, *ab in zip(scores, low, high, strict=True) if s for b in ab)})
    if cost(ends[-1]) <= limit:
        return at(ends[-1])
    before = max(end for end in ends if cost(end) <= limit)
    after = min(end for end in ends if cost(end) > limit)
    return at(before + (after - before) * (limit - cost(before)) / (cost(after) - cost(before)))


@given(problems(), st.data())
def test_proportional_is_exact_with_costs_and_bounds(problem: tuple, data: st.DataObject) -> None:
    targets, budget, low, high = problem
    targets = tuple(sorted(targets, key=lambda t: t.name))
    scores = [data.draw(st.integers(0, 9)) for _ in targets]
    scores[0] = 5
    costs = [t.rank_cost for t in targets]
    highest = [min(high[t.name], t.full_rank) for t in targets]
    ideal = exact_ideal(costs, scores, [low[t.name] for t in targets], highest, budget.limit)
    ranks = [int(i) for i in ideal]
    left = budget.limit - sum(c * r for c, r in zip(costs, ranks, strict=True))
    while fitting := [i for i in range(len(ranks)) if ranks[i] < highest[i] and costs[i] <= left]:
        chosen = max(fitting, key=lambda i: (ideal[i] - ranks[i], -i))
        ranks[chosen] += 1
        left -= costs[chosen]
    named = {t.name: float(s) for t, s in zip(targets, scores, strict=True)}
    assert list(allocate_proportional(targets, named, budget, RankLimits(low, high)).vector) == ranks


@pytest.mark.parametrize("tiny", [1e-290, 1e-310, 5e-324, 0.0])
def test_scores_that_underflow_do_not_make_the_ranks_even(tiny: float) -> None:
    targets = tuple(rs.TargetModule(name=n, in_features=64, out_features=64) for n in "abc")
    found = allocate_proportional(targets, {"a": 1.0, "b": tiny, "c": 0.0}, rs.ParameterBudget(70 * 128))
    assert found.vector[0] == 64
    assert sum(found.vector) == 70


def test_rounding_costs_no_parameter_of_a_huge_model() -> None:
    targets = tuple(rs.TargetModule(name=n, in_features=10**9, out_features=10**9) for n in "ab")
    budget = rs.ParameterBudget(8 * 4 * 10**9 - 1)
    assert sorted(rs.allocate("uniform", targets=targets, budget=budget).vector) == [7, 8]


def test_ties_survive_rounding_errors() -> None:
    """0.1 * 3 is not 0.3 in floating point, but a tie all the same: it goes to the name, not to the last bit."""
    targets = tuple(rs.TargetModule(name=n, in_features=5, out_features=5) for n in "ab")
    assert 0.1 * 3 > 0.3
    assert allocate_marginal(targets, {"a": [0.3], "b": [0.1 * 3]}, rs.ParameterBudget(10)).vector == (1, 0)


def test_a_hand_worked_water_filling() -> None:
    """Costs 4 and 8: gains per parameter 2, 0.5 against 1.25, 1; 20 parameters buy the first three."""
    targets = (
        rs.TargetModule(name="small", in_features=2, out_features=2),
        rs.TargetModule(name="large", in_features=4, out_features=4),
    )
    gains = {"small": [8.0, 2.0], "large": [10.0, 8.0, 1.0]}
    assert allocate_marginal(targets, gains, rs.ParameterBudget(20)).vector == (1, 2)
    assert allocate_marginal(targets, gains, rs.ParameterBudget(12)).vector == (1, 1)
    assert allocate_marginal(targets, gains, rs.ParameterBudget(15)).vector == (1, 1)
    found = allocate_marginal(targets, gains, rs.ParameterBudget(16))
    assert found.vector == (2, 1)  # the second large one did not fit; a cheaper one did


def test_an_inventory_of_a_70b_model() -> None:
    shapes = [(8192, 8192), (8192, 1024), (8192, 1024), (8192, 8192), (8192, 28672), (8192, 28672), (28672, 8192)]
    targets = tuple(
        rs.TargetModule(name=f"layers.{b}.{i}", in_features=shape[0], out_features=shape[1])
        for b in range(80)
        for i, shape in enumerate(shapes)
    )
    rng = np.random.default_rng(0)
    gains = {t.name: np.sort(rng.exponential(rng.exponential(), size=256))[::-1] for t in targets}
    budget = rs.ParameterBudget.uniform(targets, 32)
    check_feasible(allocate_marginal(targets, gains, budget, RankLimits(max_rank=256)), budget, 0, 256)
    scores = {name: float(values[0]) for name, values in gains.items()}
    check_feasible(allocate_proportional(targets, scores, budget, RankLimits(max_rank=256)), budget, 0, 256)


VIT = vit_inventory()
ONES = {t.name: 1.0 for t in VIT}
FIRST = VIT[0].name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 5_000, "min_rank": 1}, "`budget` must cover rank 1 on all 36 target modules (6,912 parameters), but got 5,000; drop targets, allow rank 0, or raise it."),
        ({"budget": 1_000, "min_rank": {FIRST: 9}}, "`budget` must cover `min_rank` on all 36 target modules (1,152 parameters), but got 1,000; drop targets, allow rank 0, or raise it."),
        ({"budget": 100}, "`budget` must cover one rank of the cheapest target module (128 parameters), but got 100; raise it."),
        ({"min_rank": 5, "max_rank": 4, "budget": 10**6}, f"`min_rank` must not exceed `max_rank` or the full rank of `{FIRST}` (4), but got 5."),
        ({"min_rank": -1}, "`min_rank` must not be negative, but got -1."),
        ({"max_rank": {"nowhere": 1}}, "`max_rank` must name target modules only, but names 'nowhere'."),
        ({"min_rank": 1.5}, "`min_rank` must be a whole number, but got 1.5."),
        ({"max_rank": True}, "`max_rank` must be a whole number, but got True."),
        ({"max_rank": float("nan")}, "`max_rank` must be a whole number, but got nan."),
        ({"max_rank": {FIRST: "x"}}, f"`max_rank` of `{FIRST}` must be a whole number, but got 'x'."),
        ({"min_rank": {FIRST: [1]}}, f"`min_rank` of `{FIRST}` must be a whole number, but got [1]."),
        ({"min_rank": {3: 1}}, "`min_rank` must name target modules only, but names 3."),
        ({"min_rank": -(10**400)}, "`min_rank` must not be negative, but got an integer of about 400 digits."),
        ({"scores": {**ONES, FIRST: "x"}}, "`scores` must be finite, not negative and not all zero; take the profile again on data with a loss."),
        ({"gains": {**dict.fromkeys(ONES, [1.0]), FIRST: [[1.0]]}}, f"`gains` of `{FIRST}` must be a list of finite numbers that are not negative."),
        ({"gains": {**dict.fromkeys(ONES, [1.0]), FIRST: ["x"]}}, f"`gains` of `{FIRST}` must be a list of finite numbers that are not negative."),
        ({"targets": ()}, "`targets` must hold at least one target module, but is empty."),
        ({"scores": {}}, f"`scores` must cover every target module, but `{FIRST}` is missing."),
        ({"scores": dict.fromkeys(ONES, 0.0)}, "`scores` must be finite, not negative and not all zero; take the profile again on data with a loss."),
        ({"scores": {**ONES, FIRST: float("nan")}}, "`scores` must be finite, not negative and not all zero; take the profile again on data with a loss."),
        ({"gains": {}}, f"`gains` must cover every target module, but `{FIRST}` is missing."),
        ({"gains": dict.fromkeys(ONES, [0.0])}, "`gains` must not all be zero; choose targets that the loss depends on, or profile on other data."),
        ({"gains": {**dict.fromkeys(ONES, [1.0]), FIRST: [1.0, 2.0]}}, f"`gains` of `{FIRST}` must not increase with the rank."),
        ({"gains": {**dict.fromkeys(ONES, [1.0]), FIRST: [float("nan")]}}, f"`gains` of `{FIRST}` must be a list of finite numbers that are not negative."),
    ],
)  # fmt: skip
def test_mistakes_are_named(arguments: dict, message: str) -> None:
    options = {"targets": VIT, "budget": 6_912, **arguments}
    targets, budget = options.pop("targets"), rs.ParameterBudget(options.pop("budget"))
    limits = RankLimits(options.pop("min_rank", 0), options.pop("max_rank", None))
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
        if "gains" in options:
            allocate_marginal(targets, options["gains"], budget, limits)
        else:
            allocate_proportional(targets, options.get("scores", ONES), budget, limits)


@pytest.mark.parametrize("limit", [0, -3, 1.5, True, float("nan"), float("inf"), "many", None])
def test_a_budget_is_a_positive_whole_number(limit: object) -> None:
    message = f"`limit` must be a positive whole number of adapter parameters, but got {limit!r}."
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
        rs.ParameterBudget(limit)


@pytest.mark.parametrize("limit", [5, 5.0, np.int64(5)])
def test_a_whole_budget_becomes_an_int(limit: float) -> None:
    assert repr(rs.ParameterBudget(limit)) == "ParameterBudget(limit=5)"


@pytest.mark.parametrize("bound", [64, 64.0, np.int64(64), 10**30, 10**400])
def test_bounds_may_be_any_whole_number(bound: float) -> None:
    full = rs.ParameterBudget.uniform(VIT, 64)
    assert set(rs.allocate("uniform", targets=VIT, budget=full, max_rank=bound).vector) == {64}


def test_uniform_budget() -> None:
    assert rs.ParameterBudget.uniform(VIT, 2) == rs.ParameterBudget(2 * 6_912)
    assert rs.ParameterBudget.uniform(VIT, np.int64(2)) == rs.ParameterBudget.uniform(VIT, 2.0)
    with pytest.raises(SettingsError, match=r"^`targets` must hold at least one target module, but is empty\.$"):
        rs.ParameterBudget.uniform((), 2)


@pytest.mark.parametrize("rank", [0, -1, 1.5, True, float("nan"), "8", None])
def test_a_uniform_rank_is_a_positive_whole_number(rank: object) -> None:
    message = f"`rank` must be a whole number of at least 1, but got {rank!r}."
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
        rs.ParameterBudget.uniform(VIT, rank)


def test_ranks_above_full_rank_count_as_full_rank_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    targets = (
        rs.TargetModule(name="q", in_features=64, out_features=64),
        rs.TargetModule(name="router", in_features=64, out_features=3),
    )
    with caplog.at_level(logging.WARNING):
        budget = rs.ParameterBudget.uniform(targets, 32)
    assert budget.limit == 32 * 128 + 3 * 67
    assert caplog.messages == [
        "rank 32 is above the full rank of 1 of 2 target modules, as of `router` (3); "
        "the budget counts their full rank: 4,297 parameters."
    ]
    assert rs.allocate("uniform", targets=targets, budget=budget).vector == (32, 3)


@pytest.mark.parametrize("limit", [10**7, 1e30, 10**400])
def test_a_budget_above_full_rank_is_said(limit: float, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = rs.allocate("uniform", targets=VIT, budget=rs.ParameterBudget(limit))
    assert set(found.vector) == {64}
    [message] = caplog.messages
    assert re.fullmatch(
        r"`budget` is .{1,30} parameters, but 36 target modules hold 442,368 at full rank; the rest stays unused: "
        r"lower it, or add targets\.",
        message,
    )


# --- ties --------------------------------------------------------------------------------------------------------


def grid(n_blocks: int, n_roles: int, *, experts: int = 1, cost: int = 12) -> tuple[rs.TargetModule, ...]:
    return tuple(
        rs.TargetModule(
            name=f"layers.{b}.{r}.{e}", in_features=cost // 2, out_features=cost // 2, block=b, role=f"role{r}"
        )
        for b in range(n_blocks)
        for r in range(n_roles)
        for e in range(experts)
    )


def differ_by_at_most_one(counts: list[int]) -> bool:
    return max(counts) - min(counts) <= 1


@given(st.integers(1, 40), st.integers(1, 12), st.data())
def test_what_uniform_leaves_over_is_spread_over_blocks_and_roles(
    n_blocks: int, n_roles: int, data: st.DataObject
) -> None:
    targets = grid(n_blocks, n_roles)
    units = data.draw(st.integers(1, 3 * len(targets)))
    ranks = rs.allocate("uniform", targets=targets, budget=rs.ParameterBudget(12 * units)).vector
    assert sum(ranks) == units
    assert differ_by_at_most_one(ranks)
    for key in ("block", "role"):
        counts = Counter({getattr(t, key): 0 for t in targets})
        for target, rank in zip(targets, ranks, strict=True):
            counts[getattr(target, key)] += rank
        assert differ_by_at_most_one(list(counts.values()))


@given(st.integers(2, 12), st.integers(1, 6), st.integers(1, 9), st.randoms(use_true_random=False), st.data())
def test_names_do_not_decide(n_blocks: int, n_roles: int, units: int, random: object, data: st.DataObject) -> None:
    """Modules under other names, in another order: the same blocks and roles get the ranks, with gains as with scores."""
    targets = grid(n_blocks, n_roles)
    budget = rs.ParameterBudget(12 * units)
    names = [f"m{i}" for i in range(len(targets))]
    random.shuffle(names)
    renamed = [replace(t, name=name) for t, name in zip(targets, names, strict=True)]
    random.shuffle(renamed)
    for project, flat in ((allocate_proportional, 1.0), (allocate_marginal, [3.0, 2.0, 1.0])):
        found = project(targets, {t.name: flat for t in targets}, budget)
        again = project(renamed, {t.name: flat for t in renamed}, budget)
        place = {(t.block, t.role): rank for t, rank in zip(again.targets, again.vector, strict=True)}
        assert [place[t.block, t.role] for t in found.targets] == list(found.vector)


def test_a_quarter_of_a_rank_reaches_all_depths_roles_and_towers() -> None:
    vision = [replace(t, name=f"v.{t.name}", tower="vision") for t in grid(8, 4)]
    language = [replace(t, name=f"l.{t.name}", tower="language") for t in grid(24, 7)]
    projector = [rs.TargetModule(name=f"p.{i}", in_features=6, out_features=6, tower="projector") for i in range(4)]
    targets = (*vision, *language, *projector)
    found = rs.allocate("uniform", targets=targets, budget=rs.ParameterBudget(12 * len(targets) // 4))
    taken = [t for t, rank in zip(targets, found.vector, strict=True) if rank]
    assert Counter(t.tower for t in taken) == {"vision": 8, "language": 42, "projector": 1}
    for tower, n_blocks in (("vision", 8), ("language", 24)):
        assert {t.block for t in taken if t.tower == tower} == set(range(n_blocks))
    for role in {t.role for t in language}:  # six of 24 blocks each, and no gap of half the depth
        blocks = sorted(t.block for t in taken if t.tower == "language" and t.role == role)
        assert len(blocks) == 6
        assert max(np.diff([-1, *blocks, 24])) <= 9


@pytest.mark.parametrize("n_blocks", [12, 16, 24, 28, 30, 32, 36, 40, 48, 80])
def test_the_first_few_ranks_are_spread_over_depth(n_blocks: int) -> None:
    """The first n ranks of a column of blocks leave no gap wider than three times the even one."""
    for n_roles in (1, 4, 6, 7):
        targets = grid(n_blocks, n_roles)
        for units in range(2, n_blocks + 1):
            found = rs.allocate("uniform", targets=targets, budget=rs.ParameterBudget(12 * units))
            blocks = sorted(t.block for t, rank in zip(targets, found.vector, strict=True) if rank)
            assert max(np.diff([*blocks, blocks[0] + n_blocks])) <= max(3 * n_blocks / units, 2)


def test_experts_share_what_is_left() -> None:
    """Of 4 attention roles and 3 x 8 experts a block, a quarter: one attention role and 6 experts, not the same ones everywhere."""
    targets = (*grid(6, 4), *(replace(t, name=f"e.{t.name}", role=f"expert{t.role}") for t in grid(6, 3, experts=8)))
    found = rs.allocate("uniform", targets=targets, budget=rs.ParameterBudget(12 * len(targets) // 4))
    taken = [t for t, rank in zip(targets, found.vector, strict=True) if rank]
    assert Counter(t.block for t in taken) == dict.fromkeys(range(6), 7)
    assert {t.role for t in taken} == {t.role for t in targets}
    experts = Counter(t.name.rsplit(".", 1)[-1] for t in taken if t.role.startswith("expert"))
    assert max(experts.values()) < 2 * 36 / 8


@given(inventories(), st.data())
def test_integer_uniform_ranks_are_whole(targets: tuple, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 20))
    found = rs.allocate("uniform", targets=targets, budget=rs.ParameterBudget.uniform(targets, rank))
    assert found.vector == tuple(min(rank, t.full_rank) for t in targets)


def test_gains_up_to_full_rank_are_read_as_far_as_they_matter() -> None:
    """The one module that takes 900 ranks gets them, whatever the mean; what no rank reaches is not looked at."""
    targets = grid(40, 5, cost=2048)
    steep = {t.name: 1e-3 / np.arange(1.0, 1025.0) for t in targets}
    steep[targets[7].name] = 2.0 - np.arange(1024) / 1024
    found = allocate_marginal(targets, steep, rs.ParameterBudget(2048 * 1000))
    assert found.vector[7] == 1000
    assert sum(found.vector) == 1000
