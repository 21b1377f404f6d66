"""`RankAllocation`: a value that is frozen, hashable, exact, and comes back from JSON."""

import json
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import rankscope as rs
from rankscope.errors import FileError, SettingsError
from tests.inventories import inventories, vit_inventory

VIT = vit_inventory()


@st.composite
def allocations(draw: st.DrawFn) -> rs.RankAllocation:
    targets = draw(inventories())
    vector = tuple(draw(st.integers(0, t.full_rank)) for t in targets)
    return rs.RankAllocation(
        targets, vector, strategy=draw(st.text(max_size=5)), budget=draw(st.none() | st.integers(1, 2**63 - 1))
    )


@given(allocations())
def test_dictionary_round_trip(allocation: rs.RankAllocation) -> None:
    again = rs.RankAllocation.from_dict(json.loads(json.dumps(allocation.to_dict())))
    assert again == allocation
    assert (again.strategy, again.budget) == (allocation.strategy, allocation.budget)
    assert again.fingerprint == allocation.fingerprint
    assert again.targets == allocation.targets


def test_equality_and_hash_are_of_modules_and_ranks_only() -> None:
    one = rs.RankAllocation(VIT, (1,) * 36, strategy="uniform", budget=6_912)
    two = rs.RankAllocation(VIT, [1] * 36, strategy="other")
    assert one == two
    assert len({one, two}) == 1
    assert one != rs.RankAllocation(VIT, (2,) + (1,) * 35)
    with pytest.raises(FrozenInstanceError):
        one.vector = (1,)
    with pytest.raises(TypeError):
        one.ranks["x"] = 1


def test_parameters_and_difference() -> None:
    uniform = rs.RankAllocation(VIT, (1,) * 36)
    assert uniform.parameters == 6 * (4 * 128 + 2 * 320) == 6_912
    moved = rs.RankAllocation.from_ranks(VIT, {**uniform.ranks, VIT[0].name: 3, VIT[5].name: 0})
    assert moved.difference(uniform) == {VIT[0].name: 2, VIT[5].name: -1}
    assert uniform.difference(uniform) == {}
    with pytest.raises(SettingsError, match=r"^`other` must be an allocation over the same target modules\.$"):
        uniform.difference(rs.RankAllocation(VIT[:1], (1,)))


def test_the_file_is_the_contracts(tmp_path: Path) -> None:
    allocation = rs.RankAllocation(VIT, (1,) * 36, strategy="uniform", budget=7_000)
    path = allocation.to_json(tmp_path / "new" / "allocation.json")
    stored = json.loads(path.read_text())
    stored.pop("checksum")
    assert {key: stored[key] for key in ("schema", "strategy", "budget", "parameters")} == {
        "schema": 1, "strategy": "uniform", "budget": 7_000, "parameters": 6_912,
    }  # fmt: skip
    assert stored["ranks"] == dict(allocation.ranks)
    assert rs.RankAllocation.from_json(path) == allocation


def test_bad_files_are_named(tmp_path: Path) -> None:
    allocation = rs.RankAllocation(VIT[:2], (1, 2))
    path = allocation.to_json(tmp_path / "a.json")
    stored = json.loads(path.read_text())
    stored.pop("checksum")
    cases = {
        "an allocation's `parameters` must equal what its ranks cost (384), but says 5; it was edited: write it again.": {**stored, "parameters": 5},
        "an allocation must have schema 1, but has 7; write it again.": {**stored, "schema": 7},
        "an allocation must hold ranks and targets, but is incomplete ('ranks'); write it again.": {k: v for k, v in stored.items() if k != "ranks"},
        f"`{path}` does not hold a valid allocation: the rank of `{VIT[0].name}` must lie between 0 and 64 (its smaller side), but got 65.": {**stored, "ranks": {VIT[0].name: 65}},
        f"`{path}` does not hold a valid allocation: `ranks` must name target modules only, but names 'gone'.": {**stored, "ranks": {"gone": 1}},
        f"`{path}` must hold an allocation as a JSON object, but holds a list.": [],
        "an allocation must have schema 1, but has None; write it again.": {},
        "an allocation's `parameters` must equal what its ranks cost (384), but says '384'; it was edited: write it again.": {**stored, "parameters": "384"},
        f"an allocation's `model` must be the fingerprint of its targets ({stored['model']}), but says 'other'; it was edited: write it again.": {**stored, "model": "other"},
        "an allocation must hold ranks and targets, but is incomplete ('list' object has no attribute 'get'); write it again.": {**stored, "ranks": [VIT[0].name]},
        f"`{path}` does not hold a valid allocation: the rank of `{VIT[0].name}` must be a whole number, but got 1.5.": {**stored, "ranks": {VIT[0].name: 1.5}},
        f"`{path}` does not hold a valid allocation: the rank of `{VIT[0].name}` must be a whole number, but got True.": {**stored, "ranks": {VIT[0].name: True}},
        f"an allocation must hold ranks and targets, but is incomplete (a target of name '{VIT[0].name}'); write it again.": {**stored, "targets": [stored["targets"][0] | {"role": []}]},
        "an allocation must hold ranks and targets, but is incomplete (a target of kind 'x'); write it again.": {**stored, "targets": [stored["targets"][0] | {"kind": "x"}]},
        "an allocation must hold ranks and targets, but is incomplete (strategy 3, budget None); write it again.": {**stored, "strategy": 3},
    }  # fmt: skip
    for message, value in cases.items():
        path.write_text(json.dumps(value))
        with pytest.raises(FileError, match=f"^{re.escape(message)}$"):
            rs.RankAllocation.from_json(path)


def test_a_file_cut_anywhere_or_missing_is_named(tmp_path: Path) -> None:
    path = rs.RankAllocation(VIT[:2], (1, 2)).to_json(tmp_path / "a.json")
    whole = path.read_text().rstrip()
    for end in range(0, len(whole), 37):
        path.write_text(whole[:end])
        start, stop = (
            f"`{path}` must hold an allocation as JSON, but it cannot be parsed (",
            "); it may be truncated: write it again.",
        )
        with pytest.raises(FileError, match=f"^{re.escape(start)}.*{re.escape(stop)}$"):
            rs.RankAllocation.from_json(path)
    none = tmp_path / "none.json"
    message = f"`{none}` must hold an allocation, but there is no such file; check the path."
    with pytest.raises(FileError, match=f"^{re.escape(message)}$"):
        rs.RankAllocation.from_json(none)


def test_an_edited_shape_is_seen_even_where_it_costs_nothing(tmp_path: Path) -> None:
    path = rs.RankAllocation(VIT[:2], (1, 0)).to_json(tmp_path / "a.json")
    stored = json.loads(path.read_text())
    stored.pop("checksum")
    stored["targets"][1]["in_features"] = 32
    path.write_text(json.dumps(stored))
    with pytest.raises(FileError, match=r"^an allocation's `model` must be the fingerprint of its targets \("):
        rs.RankAllocation.from_json(path)


def test_fingerprint_is_the_same_in_another_process() -> None:
    allocation = rs.RankAllocation(VIT, (1,) * 36)
    code = (
        "import rankscope as rs; from tests.inventories import vit_inventory; "
        "print(rs.RankAllocation(vit_inventory(), (1,) * 36).fingerprint)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": "."},
    )
    assert done.stdout.strip() == allocation.fingerprint


def test_ranks_must_fit() -> None:
    with pytest.raises(SettingsError, match=r"^`vector` must hold one rank for each of the 36 targets, but holds 1\.$"):
        rs.RankAllocation(VIT, (1,))
    with pytest.raises(SettingsError, match=r"^`targets` must not name a module twice\.$"):
        rs.RankAllocation((VIT[0], VIT[0]), (1, 1))
    for rank, message in [
        (-1, f"the rank of `{VIT[0].name}` must lie between 0 and 64 (its smaller side), but got -1."),
        (65, f"the rank of `{VIT[0].name}` must lie between 0 and 64 (its smaller side), but got 65."),
        (1.5, f"the rank of `{VIT[0].name}` must be a whole number, but got 1.5."),
        ("two", f"the rank of `{VIT[0].name}` must be a whole number, but got 'two'."),
    ]:
        with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
            rs.RankAllocation(VIT[:1], (rank,))
    with pytest.raises(SettingsError, match=r"^`ranks` must name target modules only, but names 'gone'\.$"):
        rs.RankAllocation.from_ranks(VIT, {"gone": 1})


def test_numpy_ranks_become_plain_integers() -> None:
    allocation = rs.RankAllocation(VIT[:2], np.array([1, 2]))
    assert repr(allocation.vector) == "(1, 2)"
