"""Budgets of towers: every way of spending keeps them, water-filling is optimal under them, and contradictions are named."""

import itertools
import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

import rankscope as rs
from rankscope.budget import RankLimits, _cheapest_cover, _warn_once, allocate_marginal, allocate_proportional
from rankscope.errors import FileError, SettingsError
from rankscope.settings import read_study
from tests.cli.terminal import invoke_code
from tests.inventories import vit_inventory

SIDES = st.sampled_from([1, 2, 3, 4])
TOWERS = ("vision", "projector", "language")


def a_module(name: str, tower: str, sides: tuple[int, int]) -> rs.TargetModule:
    return rs.TargetModule(name=name, in_features=sides[0], out_features=sides[1], tower=tower)


@st.composite
def models(draw: st.DrawFn, *, costs_equal: bool, max_size: int = 4) -> tuple[rs.TargetModule, ...]:
    towers = draw(st.lists(st.sampled_from(TOWERS), min_size=1, max_size=max_size))
    return tuple(
        a_module(f"{tower}.{i}", tower, (3, 3) if costs_equal else (draw(SIDES), draw(SIDES)))
        for i, tower in enumerate(towers)
    )


@st.composite
def problems(draw: st.DrawFn, **options: Any) -> tuple[tuple[rs.TargetModule, ...], int, dict, dict, dict]:
    """Targets, a limit, bounds on towers and on ranks; not all of them are feasible."""
    targets = draw(models(**options))
    full = sum(t.rank_cost * t.full_rank for t in targets)
    limit = draw(st.integers(min(t.rank_cost for t in targets), full + 3))
    bounds = {}
    for tower in sorted({t.tower for t in targets}):
        if draw(st.booleans()):
            least = draw(st.integers(0, limit // 2))
            bounds[tower] = (least, draw(st.integers(least, limit)))
    low = {t.name: draw(st.sampled_from([0, 0, 0, 1])) for t in targets}
    high = {t.name: draw(st.integers(max(low[t.name], 1), max(t.full_rank, 1))) for t in targets}
    return targets, limit, bounds, low, high


def spent_by(targets: tuple[rs.TargetModule, ...], ranks: tuple[int, ...]) -> dict[str, int]:
    spent = dict.fromkeys((t.tower for t in targets), 0)
    for target, rank in zip(targets, ranks, strict=True):
        spent[target.tower] += (target.in_features + target.out_features) * rank
    return spent


def feasible(problem: tuple) -> Iterator[tuple[int, ...]]:
    """Every allocation within all bounds, by trying all."""
    targets, limit, bounds, low, high = problem
    for ranks in itertools.product(*[range(low[t.name], min(high[t.name], t.full_rank) + 1) for t in targets]):
        spent = spent_by(targets, ranks)
        if sum(spent.values()) <= limit and all(a <= spent[tower] <= b for tower, (a, b) in bounds.items()):
            yield ranks


def solve(problem: tuple, worth: Mapping[str, Any]) -> rs.RankAllocation | None:
    """What both ways of spending find; None where they say that nothing is feasible."""
    targets, limit, bounds, low, high = problem
    by_rank = isinstance(next(iter(worth.values())), list)
    try:
        budget = rs.ParameterBudget.bounded(limit, bounds)
        return (allocate_marginal if by_rank else allocate_proportional)(targets, worth, budget, RankLimits(low, high))
    except SettingsError:
        return None


def draw_gains(data: st.DataObject, targets: tuple[rs.TargetModule, ...]) -> dict[str, list[float]]:
    value = st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.7])
    found = {t.name: sorted(data.draw(st.lists(value, max_size=4)), reverse=True) for t in targets}
    found[targets[0].name] = [9.0, *found[targets[0].name]]
    return found


def value(gains: Mapping[str, list[float]], targets: tuple[rs.TargetModule, ...], ranks: tuple[int, ...]) -> float:
    return sum(sum(gains[t.name][:rank]) for t, rank in zip(targets, ranks, strict=True))


@settings(max_examples=400, deadline=None)
@given(problems(costs_equal=False), st.data())
def test_all_bounds_hold_wherever_they_can(problem: tuple, data: st.DataObject) -> None:
    """Against every allocation: what is found is feasible and tight, and an error means that nothing but 0 is."""
    targets = problem[0]
    allowed = set(feasible(problem)) - {(0,) * len(targets)}
    gains = draw_gains(data, targets)
    scores = {t.name: data.draw(st.sampled_from([0.0, 0.1, 1.0, 1.0, 50.0])) for t in targets} | {targets[0].name: 1.0}
    for worth in (gains, scores):
        found = solve(problem, worth)
        assert (found is not None) == bool(allowed)
        if found is None:
            continue
        assert found.vector in allowed
        for i, rank in enumerate(found.vector):
            assert (*found.vector[:i], rank + 1, *found.vector[i + 1 :]) not in allowed
        assert found.parameters_by_tower == spent_by(targets, found.vector)
        shuffled = data.draw(st.permutations(targets))
        again = solve((tuple(shuffled), *problem[1:]), worth)
        assert again is not None
        assert dict(again.ranks) == dict(found.ranks)


@settings(max_examples=300, deadline=None)
@given(problems(costs_equal=True), st.data())
def test_water_filling_is_optimal_for_equal_costs(problem: tuple, data: st.DataObject) -> None:
    targets, gains = problem[0], draw_gains(data, problem[0])
    found = solve(problem, gains)
    if found is not None:
        best = max(value(gains, targets, ranks) for ranks in feasible(problem))
        assert value(gains, targets, found.vector) == pytest.approx(best)


def best_by_milp(problem: tuple, gains: Mapping[str, Any], *, whole: bool = True) -> float | None:
    """The optimum by HiGHS: one variable for each rank of each module; relaxed to fractions of ranks unless `whole`."""
    targets, limit, bounds, low, high = problem
    rungs = [(t, r) for t in targets for r in range(min(high[t.name], t.full_rank))]
    gain = np.array([gains[t.name][r] if r < len(gains[t.name]) else 0.0 for t, r in rungs])
    cost = np.array([t.rank_cost for t, _ in rungs], dtype=float)
    rows, least, most = [cost], [0.0], [float(limit)]
    for tower, (a, b) in bounds.items():
        rows.append(cost * [t.tower == tower for t, _ in rungs])
        least.append(a)
        most.append(b)
    given_ = np.array([float(r < low[t.name]) for t, r in rungs])
    found = milp(
        -gain,
        constraints=LinearConstraint(np.array(rows), least, most),
        bounds=Bounds(given_, 1.0),
        integrality=np.full(len(rungs), int(whole)),
        options={"mip_rel_gap": 0.0},
    )
    return -float(found.fun) if found.success else None


def a_vision_language_model(seed: int, *, costs_equal: bool) -> tuple[tuple, dict[str, list[float]]]:
    """32 modules in three towers, spectra over three decades, and random bounds, all in thirds of the budget or so."""
    rng = np.random.default_rng(seed)
    shapes = {"vision": [(24, 24), (24, 96)], "projector": [(24, 36)], "language": [(36, 36), (36, 12), (36, 96)]}
    counts = {"vision": 6, "projector": 2, "language": 6}
    targets = tuple(
        a_module(f"{tower}.{i}.{j}", tower, (24, 24) if costs_equal else sides)
        for tower, sides_of in shapes.items()
        for i in range(counts[tower])
        for j, sides in enumerate(sides_of)
    )
    gains = {t.name: np.sort(rng.exponential(10 ** rng.uniform(-3, 0), size=12))[::-1].tolist() for t in targets}
    limit = int(rng.uniform(1.0, 4.0) * sum(t.rank_cost for t in targets))
    bounds = {
        "vision": (int(rng.uniform(0.3, 0.4) * limit), int(rng.uniform(0.45, 0.6) * limit)),
        "language": (0, int(rng.uniform(0.2, 0.9) * limit)),
        "projector": (int(rng.uniform(0.0, 0.05) * limit), limit),
    }
    low = {t.name: int(rng.random() < 0.1) for t in targets}
    return (targets, limit, bounds, low, {t.name: int(rng.integers(4, 12)) for t in targets}), gains


@pytest.mark.parametrize("seed", range(12))
def test_water_filling_against_an_integer_program(seed: int) -> None:
    """Equal costs: the optimum. Others: between the whole optimum and one rank for the budget and each tower less."""
    for costs_equal in (True, False):
        problem, gains = a_vision_language_model(seed, costs_equal=costs_equal)
        best, found = best_by_milp(problem, gains), solve(problem, gains)
        assert found is not None
        assert best is not None
        got = value(gains, problem[0], found.vector)
        slack = 0.0 if costs_equal else sum(sorted((each[0] for each in gains.values()), reverse=True)[:4])
        assert best - slack - 1e-9 <= got <= best + 1e-9
        assert got > 0.97 * best


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.integers(1, 30), st.integers(0, 9), min_size=1, max_size=4), st.integers(1, 120))
def test_the_cheapest_cover_is_the_cheapest(room: dict[int, int], least: int) -> None:
    sums = {
        sum(cost * n for cost, n in zip(room, counts, strict=True)): counts
        for counts in itertools.product(*[range(n + 1) for n in room.values()])
    }
    if max(sums) >= least:
        found = _cheapest_cover(room, least)
        assert sum(cost * n for cost, n in found.items()) == min(total for total in sums if total >= least)
        assert all(0 < n <= room[cost] for cost, n in found.items())


# --- what a user asks for ----------------------------------------------------------------------------------------

VLM = (
    *(a_module(f"v.{i}", "vision", (64, 64)) for i in range(6)),
    *(a_module(f"p.{i}", "projector", (64, 96)) for i in range(2)),
    *(a_module(f"l.{i}", "language", (96, 96)) for i in range(8)),
)


@pytest.mark.parametrize("strategy", ["uniform", "random"])
@pytest.mark.parametrize("rank", [1, 4])
def test_every_strategy_keeps_shares(strategy: str, rank: int) -> None:
    towers = {"vision": 0.1, "language": {"at_least": 0.5}, "projector": {"at_least": 700}}
    budget = rs.ParameterBudget.uniform(VLM, rank, towers=towers)
    found = rs.allocate(strategy, targets=VLM, budget=budget)
    spent = found.parameters_by_tower
    assert spent["vision"] <= 0.1 * budget.limit
    assert spent["language"] >= 0.5 * budget.limit
    assert spent["projector"] >= 700
    assert budget.limit - 192 < found.parameters <= budget.limit
    budget.require(found, "the ranks")
    assert found.tower_bounds == budget.bounds
    again = rs.RankAllocation.from_dict(found.to_dict())
    assert again.tower_bounds == budget.bounds


@pytest.mark.parametrize("bounds", [None, 3, {"vision": ["few", 2]}, {"vision": [1, 2, 3]}], ids=str)
def test_bounds_of_an_edited_file_are_one_line(bounds: Any, tmp_path: Path) -> None:
    found = rs.allocate("uniform", targets=VLM, budget=rs.ParameterBudget.uniform(VLM, 1))
    (tmp_path / "allocation.json").write_text(json.dumps({**found.to_dict(), "tower_bounds": bounds}))
    with pytest.raises(FileError, match="`tower_bounds` must be the least and the most parameters by tower, but got "):
        rs.RankAllocation.from_json(tmp_path / "allocation.json")


def test_a_tower_may_be_left_without_adapters() -> None:
    budget = rs.ParameterBudget.uniform(VLM, 2, towers={"vision": 0})
    found = rs.allocate("uniform", targets=VLM, budget=budget)
    assert found.parameters_by_tower["vision"] == 0
    assert set(found.vector[6:]) <= {2, 3}


def test_shares_are_read_as_decimals_and_follow_the_budget() -> None:
    budget = rs.ParameterBudget(100, towers={"vision": 0.29, "language": {"at_least": 0.07, "at_most": 50}})
    assert budget.bounds == {
        "vision": (0, 29),
        "language": (7, 50),
    }  # 0.29 * 100 and 0.07 * 100 are off in the last bit
    assert budget.at(500).bounds == {"vision": (0, 145), "language": (35, 50)}
    assert rs.ParameterBudget(100) == rs.ParameterBudget(100, towers={})
    assert budget != rs.ParameterBudget(100)
    assert len({budget, rs.ParameterBudget(100)}) == 2
    assert rs.ParameterBudget.bounded(100, {"vision": (1, 29), "language": (0, 1)}).bounds == {
        "vision": (2, 29),
        "language": (0, 0),
    }


def test_without_towers_nothing_changes() -> None:
    """One tower bounded by the whole budget is the budget."""
    targets = vit_inventory()
    gains = {t.name: np.sort(np.random.default_rng(3).exponential(size=64))[::-1] for t in targets}
    for limit in (6_912, 10_000, 50_000):
        plain, bounded = rs.ParameterBudget(limit), rs.ParameterBudget(limit, towers={"model": 1.0})
        assert allocate_marginal(targets, gains, plain) == allocate_marginal(targets, gains, bounded)
        scores = {name: float(each[0]) for name, each in gains.items()}
        assert allocate_proportional(targets, scores, plain) == allocate_proportional(targets, scores, bounded)


@pytest.mark.parametrize(
    ("limit", "towers", "options", "message"),
    [
        (5_000, {"visoin": 0.2}, {}, "`towers` must be among the model's (language, projector, vision), but name 'visoin'; did you mean 'vision'?"),
        (5_000, {"audio": 0.2}, {}, "`towers` must be among the model's (language, projector, vision), but name 'audio'; take one of these."),
        (5_000, {"vision": {"at_least": 0.6}, "language": {"at_least": 3_000}}, {}, "`towers` must ask for no more than the budget of 5,000 parameters, but ask for at least 6,000 (vision 3,000, language 3,000); lower `at_least` of a tower, or raise the budget."),
        (5_000, {"vision": {"at_least": 3_000, "at_most": 0.2}}, {}, "`towers` must let `vision` have as much as they ask for, but of a budget of 5,000 parameters `at_least` is 3,000 and `at_most` 1,000; lower the one, or raise the other."),
        (5_000, {"vision": 0.1}, {"min_rank": 1}, "`towers` must let `vision` have its least ranks (768 parameters), but `at_most` is 500 of a budget of 5,000; raise it, or lower `min_rank`."),
        (5_000, {"vision": {"at_least": 0.5}}, {"max_rank": 2}, "`towers` must ask of `vision` no more than its modules hold at `max_rank` or full rank (1,536 parameters), but `at_least` is 2,500 of a budget of 5,000; lower it, or raise `max_rank`."),
        (5_000, {"vision": {"at_least": 300, "at_most": 310}}, {}, "`towers` must leave `vision` ranks to choose from, but none cost 300 to 310 parameters (from there on 384 at least); raise `at_most`, or lower `at_least`."),
        (1_000, {"vision": {"at_least": 0.5}, "language": {"at_least": 0.5}}, {}, "`budget` must cover the least of all towers in whole ranks (1,088 parameters), but got 1,000; raise it, or lower an `at_least`."),
        (5_000, dict.fromkeys(("vision", "projector", "language"), 0), {}, "`towers` must leave a target module room for one rank, but leave none; raise an `at_most`."),
    ],
)  # fmt: skip
def test_contradictions_are_named(limit: int, towers: dict, options: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
        rs.allocate("uniform", targets=VLM, budget=rs.ParameterBudget(limit, towers=towers), **options)


def test_what_the_towers_leave_unused_is_said(caplog: pytest.LogCaptureFixture) -> None:
    towers = {"vision": 0.2, "projector": 0.1, "language": 0.3}
    _warn_once.cache_clear()  # other tests may have been told the same
    with caplog.at_level(logging.WARNING):
        found = rs.allocate("uniform", targets=VLM, budget=rs.ParameterBudget(20_000, towers=towers))
    assert 11_000 < found.parameters <= 12_000
    assert caplog.messages == [
        "the towers' `at_most` let ranks use 60% of the budget; the rest stays unused: raise one, or lower the budget."
    ]


# --- from the command line ---------------------------------------------------------------------------------------

TASK = """
import torch
from torch import nn


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.vision_tower = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"fc1": nn.Linear(8, 8)}) for _ in range(2))})
        self.multi_modal_projector = nn.Linear(8, 12)
        self.language_model = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"fc1": nn.Linear(12, 12)}) for _ in range(4))})

    def forward(self, x):
        for layer in self.vision_tower["layers"]:
            x = x + layer["fc1"](x).tanh()
        x = self.multi_modal_projector(x)
        for layer in self.language_model["layers"]:
            x = x + layer["fc1"](x).tanh()
        return x


class Task:
    name, metric = "both", "score"

    def build_model(self):
        torch.manual_seed(0)
        return Both()

    def train_batches(self, seed):
        g = torch.Generator().manual_seed(seed)
        for _ in range(6):
            x = torch.randn(16, 8, generator=g)
            yield x, x.repeat(1, 2)[:, :12].sin()

    def loss(self, model, batch):
        return (model(batch[0]) - batch[1]).square().mean()

    def evaluate(self, model, split):
        with torch.no_grad():
            loss = float(sum(self.loss(model, batch) for batch in self.train_batches(99)))
        return {"score": -loss, "loss": loss}
"""
STUDY = """
task: task.py:Task
budget: {uniform_rank: 2, towers: {vision: 0.2, language: {at_least: 0.5}, projector: {at_least: 20}}}
training: {steps: 10, learning_rate: 0.01}
search: {n_trials: 11, confirm_fraction: 0}
controller: {mode: on, hysteresis: 0.0, min_gain_ratio: 0.0, every: 2, freeze_fraction: 0.9}
compare: {methods: [searched, controller, last-blocks], n_seeds: 2, budgets: [1, 2]}
plan: {n_seeds: 3, max_seeds: 3, lowest: 1, highest: 2, ceiling: false, n_tuning_seeds: 1}
"""


def run(*arguments: object, expect: int = 0) -> str:
    status, output, errors = invoke_code(*arguments)
    assert status == expect, output + errors
    return errors if expect else output


def test_a_study_keeps_them_from_allocate_to_compare(tmp_path: Path) -> None:
    study, out = tmp_path / "study.yaml", tmp_path / "out"
    study.write_text(STUDY)
    (tmp_path / "task.py").write_text(TASK)
    text = run("allocate", study, "--out", out)
    assert "by tower: parameters (share), mean rank" in text
    allocation = rs.RankAllocation.from_json(out / "allocation.json")
    budget = rs.ParameterBudget.uniform(allocation.targets, 2, towers=read_study(study).budget.towers)
    assert budget.limit == 2 * (2 * 16 + 20 + 4 * 24) == 296
    assert budget.bounds == {"vision": (0, 59), "language": (148, 296), "projector": (20, 296)}
    assert re.search(r"vision +│ +2 │ +0 to 59 │ +48 \(\d+%\), 1\.50 │", text)
    budget.require(allocation, "allocate's")
    found = json.loads(run("allocate", study, "--out", out, "--json"))
    assert found["towers"] == allocation.parameters_by_tower

    run("train", study, "--out", out)
    decisions = pd.read_parquet(out / "decisions.parquet")
    assert "moved" in set(decisions["action"])
    for ranks in decisions["ranks_after"]:
        budget.require(rs.RankAllocation(allocation.targets, tuple(ranks)), "the controller's")

    run("search", study, "--out", out)
    for ranks in pd.read_parquet(out / "trials.parquet")["ranks"]:
        budget.require(rs.RankAllocation(allocation.targets, tuple(ranks)), "a trial's")
    assert rs.RankAllocation.from_json(out / "allocation.json").tower_bounds == budget.bounds
    run(
        "compare",
        study,
        "--out",
        out,
        "--set",
        "compare.methods=[searched, controller]",
        "--set",
        "compare.budgets=[1]",
    )
    for ranks in pd.read_parquet(out / "comparison.parquet")["ranks"]:
        budget.require(rs.RankAllocation.from_ranks(allocation.targets, json.loads(ranks)), "a run's")
    short = out.parent / "short"
    run("compare", study, "--out", short, "--set", "compare.methods=[controller-one-shot]")
    runs = pd.read_parquet(short / "comparison.parquet")
    assert set(runs["factor"]) == {1.0, 2.0}
    for factor, ranks in zip(runs["factor"], runs["ranks"], strict=True):
        larger = budget.at(round(factor * 296))  # its shares follow
        larger.require(rs.RankAllocation.from_ranks(allocation.targets, json.loads(ranks)), "a run's")
    message = (
        "`towers` must ask of `projector` no more than its modules hold at `max_rank` or full rank (0 parameters), but"
    )
    assert message in run("compare", study, "--out", short, "--set", "compare.methods=[last-blocks]", expect=2)

    run("budget", study, "--out", out, "--set", "plan.margin=1000")
    for row in pd.read_parquet(out / "plan.parquet").query("budget > 0").to_dict("records"):
        ranks = rs.RankAllocation.from_ranks(allocation.targets, json.loads(row["ranks"]))
        budget.at(row["budget"]).require(ranks, "a planned run's")
    recommended = read_study(out / "recommended.yaml").budget
    assert recommended.towers == read_study(study).budget.towers

    changed = STUDY.replace("vision: 0.2", "vision: 0.3")
    study.write_text(changed)
    assert "must be about" in run("train", study, "--out", out, expect=2)
    study.write_text(STUDY.replace("vision: 0.2", "visoin: 0.2"))
    assert "name 'visoin'; did you mean 'vision'?" in run("allocate", study, "--out", tmp_path / "new", expect=2)
