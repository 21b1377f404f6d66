"""The hierarchical space: its corners are one-shot and uniform, and every point of it is feasible."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import rankscope as rs
from rankscope.budget import allocate_marginal
from rankscope.errors import SettingsError
from rankscope.searching.space import HierarchicalSpace, group_by_depth, group_by_gradient, name_offsets
from tests.inventories import check_feasible, inventories, vit_inventory

VIT = vit_inventory()
RNG = np.random.default_rng(0)
GAINS = {t.name: np.sort(RNG.exponential(RNG.exponential() * 1e-9, size=64))[::-1] for t in VIT}


def space(limit: int) -> HierarchicalSpace:
    return HierarchicalSpace(targets=VIT, gains=GAINS, budget=rs.ParameterBudget(limit), groups=group_by_depth(VIT))


def test_tilts_are_few_and_named() -> None:
    names = [tilt.name for tilt in space(6_912).tilts]
    assert names == ["one-shot weight", "blocks 0-1", "blocks 2-3", "blocks 4-5", "role fc1", "role fc2", "role k_proj",
                     "role o_proj", "role q_proj", "role v_proj"]  # fmt: skip
    assert space(6_912).dimensions == ["tau", "group/model/0", "group/model/1", "group/model/2", "role/fc1", "role/fc2",
                                       "role/k_proj", "role/o_proj", "role/q_proj", "role/v_proj"]  # fmt: skip
    one = HierarchicalSpace(
        targets=VIT[:1], gains=GAINS, budget=rs.ParameterBudget(128), groups=group_by_depth(VIT[:1])
    )
    assert [tilt.name for tilt in one.tilts] == ["one-shot weight"]


def test_names_tell_groups_apart() -> None:
    """By gradient, groups are no runs of blocks; users' groups may lie in the same blocks; names of many blocks are short."""
    by_gradient = {t.name: f"model/{t.block % 2}" for t in VIT}
    assert name_offsets(VIT, by_gradient)["group/model/0"] == "blocks 0, 2, 4"
    own = {t.name: "attention" if t.role.endswith("_proj") else "mlp" for t in VIT}
    names = name_offsets(VIT, own)
    assert (names["group/attention"], names["group/mlp"]) == ("group/attention", "group/mlp")
    deep = vit_inventory(60)
    names = name_offsets(deep, {t.name: f"model/{t.block % 2}" for t in deep})
    assert (names["group/model/0"], names["group/model/1"]) == ("30 blocks, group 0", "30 blocks, group 1")
    outside = (*VIT, rs.TargetModule(name="stem", in_features=3, out_features=64, role="stem"))
    assert name_offsets(outside, group_by_depth(outside))["group/model/-"] == "outside blocks"


@pytest.mark.parametrize("limit", [6_912, 13_824, 20_736, 10_000, 7_111])
def test_corners_are_one_shot_and_uniform(limit: int) -> None:
    found = space(limit)
    assert found.allocation(found.point(tau=1.0)) == allocate_marginal(VIT, GAINS, rs.ParameterBudget(limit))
    assert found.allocation(found.point(tau=0.0)) == rs.allocate(
        "uniform", targets=VIT, budget=rs.ParameterBudget(limit)
    )


@given(st.integers(128, 60_000))
def test_corners_hold_at_every_budget(limit: int) -> None:
    found, budget = space(limit), rs.ParameterBudget(limit)
    assert found.allocation(found.point(tau=1.0)) == allocate_marginal(VIT, GAINS, budget)
    assert found.allocation(found.point(tau=0.0)) == rs.allocate("uniform", targets=VIT, budget=budget)


@given(inventories(), st.integers(26, 600), st.integers(0, 9))
def test_corners_hold_for_unequal_costs(targets: tuple[rs.TargetModule, ...], limit: int, seed: int) -> None:
    rng, budget = np.random.default_rng(seed), rs.ParameterBudget(limit)
    gains = {t.name: np.sort(rng.exponential(size=t.full_rank))[::-1] for t in targets}
    found = HierarchicalSpace(targets=targets, gains=gains, budget=budget, groups=group_by_depth(targets))
    assert found.allocation(found.point(tau=1.0)) == allocate_marginal(targets, gains, budget)
    assert found.allocation(found.point(tau=0.0)) == rs.allocate("uniform", targets=targets, budget=budget)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_tau_zero_is_plain_lora_at_its_budget(rank: int) -> None:
    found = space(6_912 * rank)
    assert found.allocation(found.point(tau=0.0)).vector == (rank,) * 36


def test_tau_goes_from_even_to_uneven() -> None:
    found = space(20_736)
    spread = [np.std(found.allocation(found.point(tau=tau)).vector) for tau in (0.0, 0.3, 0.6, 1.0)]
    assert spread == sorted(spread)
    assert spread[0] == 0


def test_offsets_move_ranks_where_they_say() -> None:
    found = space(20_736)
    base = found.allocation(found.point(tau=0.5))
    for name, chosen in (
        ("blocks 4-5", [t.block in (4, 5) for t in VIT]),
        ("role fc1", [t.role == "fc1" for t in VIT]),
    ):
        moved = found.allocation({**found.point(tau=0.5), name: 1.5})
        gained = sum(m - b for m, b, c in zip(moved.vector, base.vector, chosen, strict=True) if c)
        lost = sum(m - b for m, b, c in zip(moved.vector, base.vector, chosen, strict=True) if not c)
        assert gained > 0 > lost


@given(st.data(), st.integers(128, 60_000))
def test_every_point_is_feasible_and_tight(data: st.DataObject, limit: int) -> None:
    found = space(limit)
    point = {t.name: data.draw(st.floats(t.low, t.high)) for t in found.tilts}
    check_feasible(found.allocation(point), rs.ParameterBudget(limit))


def test_mistakes_are_named() -> None:
    found = space(6_912)
    with pytest.raises(
        SettingsError, match=r"^`point` must hold a finite number for each tilt, but 'one-shot weight' is None\.$"
    ):
        found.allocation({})
    partly = {name: value for name, value in found.point(tau=1.0).items() if name != "role fc2"}
    with pytest.raises(
        SettingsError, match=r"^`point` must hold a finite number for each tilt, but 'role fc2' is None\.$"
    ):
        found.allocation(partly)
    zero = HierarchicalSpace(
        targets=VIT, gains={t.name: np.zeros(3) for t in VIT}, budget=found.budget, groups=found.groups
    )
    with pytest.raises(
        SettingsError,
        match=r"^`gains` must not all be zero; choose targets that the loss depends on, or profile on other data\.$",
    ):
        zero.allocation(zero.point(tau=1.0))


def test_groups_by_gradient_find_the_levels() -> None:
    """Blocks 0 and 3 have a hundred times the energy of 1 and 4, and these of 2 and 5, in every role."""
    levels = {0: 1e4, 3: 1e4, 1: 1e2, 4: 1e2, 2: 1.0, 5: 1.0}
    energies = {t.name: levels[t.block] * (2 if t.role == "fc1" else 1) for t in VIT}
    groups = group_by_gradient(VIT, energies, 3)
    by_block = {t.block: groups[t.name] for t in VIT}
    assert by_block == {0: "model/2", 3: "model/2", 1: "model/1", 4: "model/1", 2: "model/0", 5: "model/0"}


def test_groups_by_depth_within_towers_and_outside_blocks() -> None:
    targets = [
        *[rs.TargetModule(name=f"v.{b}", in_features=4, out_features=4, tower="vision", block=b) for b in range(2)],
        rs.TargetModule(name="p", in_features=4, out_features=4, tower="projector"),
        *[rs.TargetModule(name=f"l.{b}", in_features=4, out_features=4, tower="language", block=b) for b in range(4)],
    ]
    assert list(group_by_depth(targets, 2).values()) == [
        "vision/0", "vision/1", "projector/-", "language/0", "language/0", "language/1", "language/1",
    ]  # fmt: skip


GOOD = {t.name: 1.0 / np.arange(1, 9) for t in VIT}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": ()}, "`targets` must hold at least one target module, but is empty; find others."),
        ({"groups": {}}, f"`groups` must hold every target module, but lacks `{VIT[0].name}`."),
        ({"gains": {}}, f"`gains` must hold every target module, but lacks `{VIT[0].name}`."),
        *(
            ({"gains": GOOD | {VIT[1].name: np.array([1.0, wrong])}},
             f"`gains` of `{VIT[1].name}` must be finite and not negative; take the profile again.")
            for wrong in (np.nan, np.inf, -1.0)
        ),
    ],
)  # fmt: skip
def test_a_space_that_cannot_be_searched_is_named(change: dict, message: str) -> None:
    arguments = {"targets": VIT, "gains": GOOD, "budget": rs.ParameterBudget.uniform(VIT, 2),
                 "groups": group_by_depth(VIT), **change}  # fmt: skip
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
        rs.HierarchicalSpace(**arguments)


@pytest.mark.parametrize("value", [np.nan, np.inf, "1"])
def test_a_point_holds_finite_numbers(value: object) -> None:
    space = rs.HierarchicalSpace(
        targets=VIT, gains=GOOD, budget=rs.ParameterBudget.uniform(VIT, 2), groups=group_by_depth(VIT)
    )
    message = f"`point` must hold a finite number for each tilt, but 'one-shot weight' is {value!r}."
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
        space.allocation(space.point(tau=1.0) | {"one-shot weight": value})


def test_a_group_without_modules_is_no_dimension() -> None:
    groups = {**group_by_depth(VIT), "elsewhere": "model/9"}
    space = rs.HierarchicalSpace(targets=VIT, gains=GOOD, budget=rs.ParameterBudget.uniform(VIT, 2), groups=groups)
    assert "group/model/9" not in space.dimensions


# --- towers ----------------------------------------------------------------------------------------------------------

VLM = (
    *(replace(t, name=f"v.{t.name}", tower="vision") for t in vit_inventory(2)),
    *(replace(t, name=f"l.{t.name}", tower="language") for t in vit_inventory(4)),
)
VLM_GAINS = {t.name: np.sort(RNG.exponential(RNG.exponential(), size=64))[::-1] for t in VLM}


def tower_space(budget: rs.ParameterBudget, **options: object) -> HierarchicalSpace:
    return HierarchicalSpace(
        targets=VLM, gains=VLM_GAINS, budget=budget, groups=group_by_depth(VLM, n_groups=2), **options
    )


def test_towers_are_the_top_level() -> None:
    found = tower_space(rs.ParameterBudget.uniform(VLM, 2))
    names = [tilt.name for tilt in found.tilts]
    assert names[:7] == ["one-shot weight", "tower language", "tower vision", "language blocks 0-1", "language blocks 2-3",
                         "vision block 0", "vision block 1"]  # fmt: skip
    flat = found.allocation(found.point(tau=1.0)).parameters_by_tower
    more = found.allocation(found.point(tau=1.0) | {"tower vision": 1.0}).parameters_by_tower
    assert more["vision"] > flat["vision"]
    groups = dict.fromkeys(("vision block 0", "vision block 1"), 1.0)
    assert found.allocation(found.point(tau=1.0) | groups).parameters_by_tower == more


@given(st.data())
def test_every_point_keeps_the_bounds_of_towers(data: st.DataObject) -> None:
    towers = {"vision": {"at_least": 0.1, "at_most": 0.25}, "language": {"at_least": 3_000}}
    budget = rs.ParameterBudget.uniform(VLM, 2, towers=towers)
    found = tower_space(budget)
    point = {t.name: data.draw(st.floats(t.low, t.high)) for t in found.tilts}
    budget.require(found.allocation(point), "a point")
    assert found.features.reference.tolist() == list(rs.allocate("uniform", targets=VLM, budget=budget).vector)


@given(st.data())
def test_smaller_budgets_keep_the_bounds_of_towers(data: st.DataObject) -> None:
    """A search over budgets goes as low as whole ranks meet all bounds, and shares are of the smaller budget."""
    towers = {"vision": {"at_least": 0.2, "at_most": 0.5}, "language": {"at_least": 3_000}}
    budget = rs.ParameterBudget.uniform(VLM, 2, search=True, towers=towers)
    found = tower_space(budget)
    assert 2 ** found.tilts[1].low * budget.limit >= 3_000 + 0.2 * 3_000
    point = {t.name: data.draw(st.floats(t.low, t.high)) for t in found.tilts}
    allocation = found.allocation(point)
    assert allocation.budget is not None
    budget.at(allocation.budget).require(allocation, "a point")
    tight = rs.ParameterBudget.uniform(VLM, 2, search=True, towers={"vision": {"at_least": 0.9, "at_most": 0.92}})
    assert tower_space(tight).tilts[1].low == 0.0  # whole ranks meet it at the full budget, not at all others
