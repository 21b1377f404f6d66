"""The policy against its promises: the budget, hysteresis, cool-down, and the best single transfer by brute force."""

import re
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rankscope as rs
from rankscope.budget import RankLimits
from rankscope.control import decisions
from rankscope.control.decisions import ModuleSignals
from rankscope.errors import SettingsError

POLICY = rs.ControllerSettings(hysteresis=0.0, min_gain_ratio=0.0)


def module(name: str, values: list[float], gains: list[float], *, size: int = 32, out: int = 32) -> ModuleSignals:
    target = rs.TargetModule(name=name, in_features=size, out_features=out)
    return ModuleSignals(target=target, rank=len(values), worth=(*values, *gains))


class Proposal(NamedTuple):
    ranks: dict[str, int]
    changes: dict[str, tuple[int, int]]  # ranks before and after
    parameters: int
    predicted: float


def propose(signals: Sequence[ModuleSignals], *arguments: Any, **options: Any) -> Proposal:
    """What the policy does, and that as changes."""
    found = decisions.propose(signals, *arguments, **options)
    changes = {n: (s.rank, found.ranks[n]) for s in signals if found.ranks[n := s.target.name] != s.rank}
    assert found.action == ("moved" if changes else "kept")
    parameters = sum(s.target.rank_cost * found.ranks[s.target.name] for s in signals)
    return Proposal(dict(found.ranks), changes, parameters, found.predicted)


def changes(proposal: Proposal) -> dict[str, tuple[int, int]]:
    return proposal.changes


def held(signals: list[ModuleSignals], name: str) -> RankLimits:
    """This module keeps its rank."""
    rank = {s.target.name: s.rank for s in signals if s.target.name == name}
    return RankLimits(rank, rank)


def spent(signals: list[ModuleSignals]) -> int:
    return sum(s.target.rank_cost * s.rank for s in signals)


@st.composite
def modules(draw: st.DrawFn) -> list[ModuleSignals]:
    found = []
    for index in range(draw(st.integers(2, 5))):
        spectrum = sorted(draw(st.lists(st.floats(0.0, 10.0), min_size=4, max_size=6)), reverse=True)
        rank = draw(st.integers(0, 3))
        sizes = draw(st.sampled_from([(32, 32), (32, 96), (8, 32)]))
        found.append(module(f"m{index}", spectrum[:rank], spectrum[rank:], size=sizes[0], out=sizes[1]))
    return found


@settings(max_examples=200, deadline=None)
@given(modules(), st.integers(0, 200), st.booleans(), st.sampled_from([0.0, 0.1, 1.0]))
def test_within_the_budget_and_never_for_less(
    signals: list[ModuleSignals], slack: int, coarse: bool, margin: float
) -> None:
    budget = rs.ParameterBudget(max(spent(signals), 40) + slack)
    proposal = propose(signals, budget, rs.ControllerSettings(hysteresis=margin, min_gain_ratio=0.0), coarse=coarse)
    assert proposal.parameters <= budget.limit
    assert proposal.predicted > 0 or not proposal.changes


@settings(max_examples=100, deadline=None)
@given(modules(), st.booleans())
def test_what_was_moved_is_not_moved_back(signals: list[ModuleSignals], coarse: bool) -> None:
    """With the same spectra, the second proposal never undoes the first."""
    budget = rs.ParameterBudget(max(spent(signals), 64))
    first = propose(signals, budget, POLICY, coarse=coarse)
    ranks = first.ranks
    moved = [ModuleSignals(target=s.target, rank=ranks[s.target.name], worth=(*s.worth, *[0.0] * 99)) for s in signals]
    second = propose(moved, budget, POLICY, coarse=coarse)
    assert second.ranks != first.ranks or not second.changes
    assert not second.changes or second.predicted > 0


@settings(max_examples=100, deadline=None)
@given(modules(), st.integers(0, 80))
def test_the_fine_transfer_is_the_best_of_all(signals: list[ModuleSignals], slack: int) -> None:
    """Of one rank more for one module and the greedy choice of donors, equal costs: by brute force over all allocations."""
    signals = [
        module(
            s.target.name, list(s.worth[: s.rank]), list(s.worth[s.rank :])
        )  # equal costs: greedy donors are optimal
        for s in signals
    ]
    budget = rs.ParameterBudget(max(spent(signals), 64) + slack)
    proposal = propose(signals, budget, POLICY, coarse=False)
    best = 0.0
    for deltas in product((-1, 0, 1), repeat=len(signals)):
        if deltas.count(1) != 1 or any(s.rank + d < 0 for s, d in zip(signals, deltas, strict=True)):
            continue
        if spent(signals) + sum(64 * d for d in deltas) > budget.limit:
            continue
        net = sum(
            s.worth[s.rank] if d == 1 else -s.worth[s.rank - 1] if d == -1 else 0.0
            for s, d in zip(signals, deltas, strict=True)
        )
        best = max(best, net)
    total = sum(sum(s.worth) for s in signals) or 1.0
    assert proposal.predicted == pytest.approx(best / total, abs=1e-12)


def test_hysteresis_grows_with_noise() -> None:
    signals = [module("a", [1.0], [0.1]), module("b", [1.4], [1.3])]
    budget = rs.ParameterBudget(spent(signals))
    for coarse in (True, False):
        assert changes(
            propose(signals, budget, rs.ControllerSettings(hysteresis=0.2, min_gain_ratio=0.0), coarse=coarse)
        ) == {
            "a": (1, 0),
            "b": (1, 2),
        }
        assert not propose(
            signals, budget, rs.ControllerSettings(hysteresis=0.4, min_gain_ratio=0.0), coarse=coarse
        ).changes
        assert not propose(
            signals, budget, rs.ControllerSettings(hysteresis=0.2, min_gain_ratio=0.0), coarse=coarse, signal_share=0.5
        ).changes


def test_little_is_not_worth_moving_much_for() -> None:
    """A quarter of the budget moves, for 2 of the 16 that all signals sum to: a gain of half of what is moved."""
    signals = [module("a", [3.0, 1.0], []), module("b", [4.0, 4.0], [3.0, 1.0])]
    budget = rs.ParameterBudget(spent(signals))
    for coarse in (True, False):
        found = propose(signals, budget, rs.ControllerSettings(hysteresis=0.0, min_gain_ratio=0.5), coarse=coarse)
        assert (changes(found), found.predicted) == ({"a": (2, 1), "b": (2, 3)}, 2 / 16)
        assert not propose(
            signals, budget, rs.ControllerSettings(hysteresis=0.0, min_gain_ratio=0.51), coarse=coarse
        ).changes


def test_modules_that_cool_down_stay() -> None:
    signals = [module("a", [0.0], [0.0]), module("b", [5.0], [4.0]), module("c", [1.0], [0.0])]
    budget = rs.ParameterBudget(spent(signals))
    for coarse in (True, False):
        assert changes(propose(signals, budget, POLICY, coarse=coarse)) == {"a": (1, 0), "b": (1, 2)}
        assert changes(propose(signals, budget, POLICY, coarse=coarse, limits=held(signals, "a"))) == {
            "b": (1, 2),
            "c": (1, 0),
        }
        assert not propose(signals, budget, POLICY, coarse=coarse, limits=held(signals, "b")).changes


def test_capacity_and_largest_rank_bind() -> None:
    signals = [module("a", [0.1, 0.1], [0.0]), module("b", [5.0], [4.0, 3.0])]
    budget = rs.ParameterBudget(spent(signals))
    assert changes(propose(signals, budget, POLICY, coarse=True)) == {"a": (2, 0), "b": (1, 3)}
    assert changes(
        propose(signals, budget, rs.ControllerSettings(hysteresis=0.0, min_gain_ratio=0.0, max_rank=2), coarse=True)
    ) == {
        "a": (2, 1),
        "b": (1, 2),
    }
    assert not propose(signals, budget, POLICY, coarse=False, limits=RankLimits(max_rank={"a": 2, "b": 1})).changes


def test_a_costly_module_takes_from_several() -> None:
    signals = [module("a", [0.2], []), module("b", [0.3], []), module("wide", [], [1.0], out=96)]
    proposal = propose(signals, rs.ParameterBudget(spent(signals)), POLICY, coarse=False)
    assert changes(proposal) == {"a": (1, 0), "b": (1, 0), "wide": (0, 1)}
    assert proposal.predicted == pytest.approx((1.0 - 0.5) / 1.5)


def test_no_gradient_moves_nothing() -> None:
    signals = [module("a", [0.0], [0.0]), module("b", [0.0], [0.0])]
    for coarse in (True, False):
        assert not propose(signals, rs.ParameterBudget(spent(signals)), POLICY, coarse=coarse).changes


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"hysteresis": -0.1}, "`hysteresis`: input should be greater than or equal to 0, but got -0.1."),
        ({"min_gain_ratio": -0.5}, "`min_gain_ratio`: input should be greater than or equal to 0, but got -0.5."),
        ({"cooldown": -1}, "`cooldown`: input should be greater than or equal to 0, but got -1."),
        ({"coarse_fraction": 1.5}, "`coarse_fraction`: input should be less than or equal to 1, but got 1.5."),
        ({"max_rank": 0}, "`max_rank`: input should be greater than 0, but got 0."),
    ],
)
def test_bad_settings_are_named(settings_: dict[str, float], message: str) -> None:
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
        rs.ControllerSettings(**settings_)


# --- towers ----------------------------------------------------------------------------------------------------------


@st.composite
def bounded(draw: st.DrawFn) -> tuple[list[ModuleSignals], rs.ParameterBudget]:
    """Modules of equal costs in two towers, with a budget and bounds on towers that the present ranks keep."""
    signals = []
    for index, s in enumerate(draw(modules())):
        target = rs.TargetModule(
            name=s.target.name, in_features=32, out_features=32, tower=draw(st.sampled_from(["vision", "language"]))
        )
        signals.append(ModuleSignals(target=target, rank=s.rank, worth=s.worth))
        assert index < 5
    limit = max(spent(signals), 64) + draw(st.integers(0, 150))
    bounds = {}
    for tower in {s.target.tower for s in signals}:
        mine = spent([s for s in signals if s.target.tower == tower])
        bounds[tower] = (draw(st.integers(0, mine)), min(mine + draw(st.integers(0, 100)), limit))
    return signals, rs.ParameterBudget.bounded(limit, bounds)


def within(signals: list[ModuleSignals], ranks: Sequence[int], budget: rs.ParameterBudget) -> bool:
    by_tower = dict.fromkeys(budget.bounds, 0)
    for s, rank in zip(signals, ranks, strict=True):
        by_tower[s.target.tower] += 64 * rank
    inside = all(low <= by_tower[tower] <= high for tower, (low, high) in budget.bounds.items())
    return inside and sum(by_tower.values()) <= budget.limit


@settings(max_examples=100, deadline=None)
@given(bounded(), st.booleans())
def test_moves_keep_the_bounds_of_towers(problem: tuple, coarse: bool) -> None:
    signals, budget = problem
    found = decisions.propose(signals, budget, POLICY, coarse=coarse)
    assert within(signals, list(found.ranks.values()), budget)


@settings(max_examples=100, deadline=None)
@given(bounded())
def test_the_fine_transfer_is_the_best_that_towers_allow(problem: tuple) -> None:
    """At equal costs, by brute force over one rank more for one module and up to two less elsewhere."""
    signals, budget = problem
    best = 0.0
    for deltas in product((-2, -1, 0, 1), repeat=len(signals)):
        ranks = [s.rank + d for s, d in zip(signals, deltas, strict=True)]
        fewer = sum(-d for d in deltas if d < 0)
        if deltas.count(1) != 1 or fewer > 2 or min(ranks) < 0 or not within(signals, ranks, budget):
            continue
        if all(rank <= len(s.worth) for rank, s in zip(ranks, signals, strict=True)):
            best = max(best, sum(s.gain(rank) for s, rank in zip(signals, ranks, strict=True)))
    total = sum(sum(s.worth) for s in signals) or 1.0
    assert decisions.propose(signals, budget, POLICY, coarse=False).predicted == pytest.approx(best / total, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(bounded())
def test_a_coarse_move_is_the_best_that_towers_allow(problem: tuple) -> None:
    signals, budget = problem
    signals = signals[:3]
    budget = budget.beside(dict.fromkeys({s.target.tower for s in signals}, 0))
    choices = product(*[range(len(s.worth) + 1) for s in signals])
    if not within(signals, [s.rank for s in signals], budget) or not any(any(s.worth) for s in signals):
        return
    best = max(
        sum(s.gain(rank) for s, rank in zip(signals, ranks, strict=True))
        for ranks in choices
        if within(signals, ranks, budget)
    )
    total = sum(sum(s.worth) for s in signals)
    assert decisions.propose(signals, budget, POLICY, coarse=True).predicted == pytest.approx(best / total, abs=1e-12)


def test_room_is_made_where_it_lacks() -> None:
    """The receiver's tower is full, so its own tower gives, though a rank of the other one is worth less."""

    def signal(name: str, tower: str, rank: int, worth: tuple[float, ...]) -> ModuleSignals:
        target = rs.TargetModule(name=name, in_features=32, out_features=32, tower=tower)
        return ModuleSignals(target=target, rank=rank, worth=worth)

    signals = [
        signal("v", "vision", 1, (1.0, 0.9)),
        signal("l0", "language", 1, (2.0, 1.9)),
        signal("l1", "language", 2, (9.0, 8.0, 7.0)),
    ]
    budget = rs.ParameterBudget(4 * 64, towers={"language": 0.75})
    assert propose(signals, budget, POLICY, coarse=False).changes == {"l0": (1, 0), "l1": (2, 3)}
    freer = rs.ParameterBudget(4 * 64)
    assert propose(signals, freer, POLICY, coarse=False).changes == {"v": (1, 0), "l1": (2, 3)}
    kept = rs.ParameterBudget(4 * 64, towers={"vision": {"at_least": 0.25}, "language": {"at_least": 0.5}})
    assert propose(signals, kept, POLICY, coarse=False).changes == {"l0": (1, 0), "l1": (2, 3)}
