"""One conformance suite for all strategies, and each rule worked by hand."""

import math
import re
from collections.abc import Sequence
from importlib.metadata import EntryPoint
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import rankscope as rs
from rankscope.errors import ModelError, SettingsError
from rankscope.strategies import NEEDS_PROFILE, STRATEGIES, Request, Strategy
from rankscope.targets import fingerprint_targets
from tests.inventories import check_feasible, vit_inventory

VIT = vit_inventory()


def make_profile(targets: tuple[rs.TargetModule, ...], spectra: dict[str, list[float]]) -> rs.Profile:
    rows = [
        {
            "module": t.name, "tower": t.tower, "block": t.block, "role": t.role, "kind": t.kind,
            "in_features": t.in_features, "out_features": t.out_features, "rank_cost": t.rank_cost,
            "gradient_norm": float(np.linalg.norm(spectra[t.name])), "signal_energy": 0.0, "noise_energy": 0.0,
            "singular_values": spectra[t.name], "exact": True,
            "signal_share": 0.25, "fisher_trace": spectra[t.name][0] ** 2, "sensitivity": spectra[t.name][-1],
            "activation_variance": float(np.sum(spectra[t.name])), "activation_values": spectra[t.name], "weight_norm": 1.0,
        }
        for t in targets
    ]  # fmt: skip
    return rs.Profile(pd.DataFrame(rows), {"model": fingerprint_targets(targets)})


def random_profile(seed: int) -> rs.Profile:
    rng = np.random.default_rng(seed)
    spectra = {t.name: np.sort(rng.exponential(rng.exponential(), size=32))[::-1].tolist() for t in VIT}
    return make_profile(VIT, spectra)


CASES = [
    ("uniform", {}),
    *[("random", {"concentration": c}) for c in (0.1, 1.0, 10.0)],
    ("gradient-norm", {}),
    ("sensitivity", {}),
    ("activation", {}),
    *[("one-shot", {"power": p, "signal": s}) for p in (1.0, 2.0) for s in (True, False)],
    ("one-shot", {"power": 1.0, "block_concavity": 0.75}),
]


@pytest.mark.parametrize(("strategy", "options"), CASES, ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2])
class TestConformance:
    """What holds for every strategy."""

    def allocate(self, strategy: str, options: dict, seed: int, **more: object) -> rs.RankAllocation:
        arguments = {
            "targets": VIT,
            "budget": rs.ParameterBudget.uniform(VIT, 2),
            "profile": random_profile(seed),
            **more,
        }
        return rs.allocate(strategy, seed=seed, **arguments, **options)

    @pytest.mark.parametrize("limit", [128, 130, 6_911, 6_912, 100_000])
    def test_feasible_and_tight(self, strategy: str, options: dict, seed: int, limit: int) -> None:
        budget = rs.ParameterBudget(limit)
        check_feasible(self.allocate(strategy, options, seed, budget=budget), budget)

    def test_bounds(self, strategy: str, options: dict, seed: int) -> None:
        budget = rs.ParameterBudget.uniform(VIT, 2)
        check_feasible(self.allocate(strategy, options, seed, min_rank=1, max_rank=3), budget, 1, 3)
        by_name = {VIT[0].name: 7}
        check_feasible(self.allocate(strategy, options, seed, min_rank=by_name), budget, by_name)

    def test_repeats_and_does_not_depend_on_order(self, strategy: str, options: dict, seed: int) -> None:
        first = self.allocate(strategy, options, seed)
        assert self.allocate(strategy, options, seed) == first
        backwards = self.allocate(strategy, options, seed, targets=VIT[::-1])
        assert dict(backwards.ranks) == dict(first.ranks)
        assert (first.strategy, first.budget) == (strategy, 13_824)

    def test_infeasible(self, strategy: str, options: dict, seed: int) -> None:
        message = (
            "`budget` must cover rank 1 on all 36 target modules (6,912 parameters), but got 6,000; "
            "drop targets, allow rank 0, or raise it."
        )
        with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
            self.allocate(strategy, options, seed, budget=rs.ParameterBudget(6_000), min_rank=1)


TWO = (
    rs.TargetModule(name="narrow", in_features=10, out_features=10),
    rs.TargetModule(name="wide", in_features=10, out_features=30),
)
SPECTRA = {"narrow": [4.0, 2.0, 1.0], "wide": [6.0, 2.0, 0.5]}


def test_one_shot_by_hand() -> None:
    """Energy per parameter: narrow 16/20, 4/20, 1/20; wide 36/40, 4/40, … in the order wide, narrow, narrow, wide."""
    profile = make_profile(TWO, SPECTRA)
    for limit, ranks in [(40, (0, 1)), (60, (1, 1)), (80, (2, 1)), (120, (2, 2)), (140, (3, 2))]:
        assert rs.allocate("one-shot", targets=TWO, budget=rs.ParameterBudget(limit), profile=profile).vector == ranks


def test_one_shot_options_by_hand() -> None:
    """Raw values: energies 16/20 against 9/40 and 9/40, then values 4/20 against 3/40; agreed values: the wide one's."""
    profile = make_profile(TWO, {"narrow": [4.0, 1.0], "wide": [3.0, 3.0]})
    profile.table["signal_share"] = [1 / 16, 1.0]  # agreed values 1 and 1/4, 3 and 3

    def found(limit: int, **options: object) -> tuple[int, ...]:
        budget = rs.ParameterBudget(limit)
        return rs.allocate("one-shot", targets=TWO, budget=budget, profile=profile, **options).vector

    assert found(40) == found(40, signal=True, power=2) == (0, 1)
    assert found(40, signal=False) == (2, 0)  # the wide module's first rank no longer fits
    assert found(60, signal=False) == (1, 1)
    assert found(80, signal=True, power=2) == (0, 2)
    assert found(80, signal=False, power=2) == (2, 1)  # 9/40 comes twice before 1/20, but only once fits
    assert found(100, signal=False, power=2) == (1, 2)
    assert found(100, signal=True, power=1) == (1, 2)
    assert found(80, signal=True, power=0.1) == (2, 1)  # 1/20, then 0.25 ** 0.1 / 20, then 3 ** 0.1 / 40


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("concavity", [0.3, 0.75, 1.0])
def test_blocks_that_share_are_worth_most(concavity: float, seed: int) -> None:
    """No other ranks of the budget have a larger sum over blocks of (sum over a block's modules) ** concavity."""
    rng, names = np.random.default_rng(seed), ["h.0.q_proj", "h.0.v_proj", "h.1.q_proj", "h.1.v_proj", "head"]
    blocks = [0, 0, 1, 1, None]
    targets = tuple(
        rs.TargetModule(name=name, block=block, in_features=4, out_features=4)
        for name, block in zip(names, blocks, strict=True)
    )
    spectra = {name: np.sort(rng.exponential(rng.exponential(3), size=4))[::-1].tolist() for name in names}
    profile = make_profile(targets, spectra)

    def worth(ranks: Sequence[int]) -> float:
        each = [sum(spectra[name][:rank]) for name, rank in zip(names, ranks, strict=True)]
        return (each[0] + each[1]) ** concavity + (each[2] + each[3]) ** concavity + each[4] ** concavity

    options: Any = {"power": 1.0, "block_concavity": concavity, "profile": profile}
    for n in (1, 3, 6, 10):
        found = rs.allocate("one-shot", targets=targets, budget=8 * n, **options).vector
        best = max(worth(ranks) for ranks in product(range(5), repeat=5) if sum(ranks) == n)
        assert (sum(found), worth(found)) == (n, pytest.approx(best))


@pytest.mark.parametrize("scale", [1e-150, 1e-20, 1.0, 1e20, 1e150])
def test_one_shot_looks_at_ratios_only(scale: float) -> None:
    """Squares and higher powers of very large or very small gradients stay numbers."""
    profile = make_profile(TWO, {name: [scale * value for value in values] for name, values in SPECTRA.items()})
    for power in (2, 1e4):
        for limit, ranks in ((40, (0, 1)), (80, (2, 1))):
            budget = rs.ParameterBudget(limit)
            assert rs.allocate("one-shot", targets=TWO, budget=budget, profile=profile, power=power).vector == ranks


def test_gradient_norm_by_hand() -> None:
    """Norms 3 and 4 a parameter share: of 280 parameters 120 go to the narrow module and 160 to the wide one."""
    profile = make_profile(TWO, {"narrow": [3.0], "wide": [4.0]})
    found = rs.allocate("gradient-norm", targets=TWO, budget=rs.ParameterBudget(280), profile=profile)
    assert found.vector == (6, 4)


def test_rules_on_single_features_by_hand() -> None:
    """Of 280 parameters: sensitivities 1 : 6 in parameters; input variance shares 3/4, 1/4 and 4/10, 6/10."""
    profile = make_profile(TWO, {"narrow": [3.0, 1.0], "wide": [4.0, 6.0]})
    profile.table["activation_values"] = [[3.0, 1.0], [6.0, 4.0]]

    def found(strategy: str, limit: int = 280, **options: object) -> tuple[int, ...]:
        budget = rs.ParameterBudget(limit)
        return rs.allocate(strategy, targets=TWO, budget=budget, profile=profile, **options).vector

    assert found("sensitivity") == (2, 6)
    assert found("activation", 60) == (1, 1)  # per parameter: 75/20, 25/20; 60/40, 40/40
    assert found("activation", 80) == (2, 1)


def test_uniform_is_uniform_and_random_is_not() -> None:
    budget = rs.ParameterBudget.uniform(VIT, 3)
    assert set(rs.allocate("uniform", targets=VIT, budget=budget).vector) == {3}
    spread = [
        np.std(rs.allocate("random", targets=VIT, budget=budget, seed=1, concentration=c).vector)
        for c in (0.1, 1.0, 10.0)
    ]
    assert spread[0] > spread[1] > spread[2] > 0


def test_mistakes_are_named() -> None:
    budget = rs.ParameterBudget(1_000)
    cases = [
        (SettingsError, "one-shoot", {}, "`strategy` must be one of uniform, random, gradient-norm, sensitivity, activation, one-shot, but got 'one-shoot'; did you mean 'one-shot'?"),
        (SettingsError, "one-shot", {"exponent": 2}, "`one-shot` takes power, signal, block_concavity, but got 'exponent'."),
        (SettingsError, "uniform", {"power": 2}, "`uniform` takes no options, but got 'power'."),
        (SettingsError, "random", {"concentration": 0}, "`concentration` must be a number above 0 and finite, but got 0."),
        (SettingsError, "random", {"concentration": [1]}, "`concentration` must be a number above 0 and finite, but got [1]."),
        (SettingsError, "random", {"seed": -1}, "`seed` must be a whole number of 0 or more, but got -1."),
        (SettingsError, "random", {"seed": True}, "`seed` must be int, but got True; see `help(rankscope.allocate)`."),
        (SettingsError, [], {}, "`strategy` must be str | Strategy, but got []; see `help(rankscope.allocate)`."),
        (SettingsError, "one-shot", {"power": "abc", "profile": make_profile(TWO, SPECTRA)}, "`power` must be a number above 0 and finite, but got 'abc'."),
        (SettingsError, "one-shot", {"power": None, "profile": make_profile(TWO, SPECTRA)}, "`power` must be a number above 0 and finite, but got None."),
        (SettingsError, "one-shot", {"signal": "no", "profile": make_profile(TWO, SPECTRA)}, "`signal` must be true or false, but got 'no'."),
        (SettingsError, "random", {"concentration": float("inf")}, "`concentration` must be a number above 0 and finite, but got inf."),
        (SettingsError, "one-shot", {"power": -1, "profile": make_profile(TWO, SPECTRA)}, "`power` must be a number above 0 and finite, but got -1."),
        (SettingsError, "one-shot", {"block_concavity": 0, "profile": make_profile(TWO, SPECTRA)}, "`block_concavity` must be a number above 0 and finite, but got 0."),
        (SettingsError, "one-shot", {"block_concavity": 1.5, "profile": make_profile(TWO, SPECTRA)}, "`block_concavity` must be at most 1, but got 1.5."),
        (SettingsError, "bayes", {}, "`strategy` must be one of uniform, random, gradient-norm, sensitivity, activation, one-shot, but got 'bayes'."),
        (ModelError, "one-shot", {}, "this strategy needs a profile, but got none; take one with `rs.profile(model, batches)`."),
        (ModelError, "one-shot", {"profile": make_profile(TWO[:1], SPECTRA)}, "`profile` must cover every target module, but 1 of 2 are missing, as `wide`; take it again on this model and these targets."),
    ]  # fmt: skip
    with pytest.raises(SettingsError, match=r"^`targets` must hold at least one target module, but is empty\.$"):
        rs.allocate("uniform", targets=(), budget=budget)
    for error, strategy, options, message in cases:
        with pytest.raises(error, match=f"^{re.escape(message)}$"):
            rs.allocate(strategy, targets=TWO, budget=budget, **options)
    assert set(STRATEGIES) >= NEEDS_PROFILE
    for strategy in set(STRATEGIES) - NEEDS_PROFILE:
        assert rs.allocate(strategy, targets=TWO, budget=budget).parameters <= 1_000


def without_signal() -> rs.Profile:
    profile = random_profile(2)
    profile.table["signal_share"] = 0.0
    return rs.Profile(profile.table, {**profile.metadata, "batches": 2})


def test_without_signal_the_raw_gradient_stands_in_and_is_said(caplog: pytest.LogCaptureFixture) -> None:
    arguments = {"targets": VIT, "budget": rs.ParameterBudget.uniform(VIT, 2), "profile": without_signal()}
    raw = rs.allocate("one-shot", signal=False, **arguments)
    assert not caplog.text
    assert rs.allocate("one-shot", signal=True, **arguments) == raw
    assert "the 2 batches of the profile agree on nothing: the estimated signal is 0 in every module" in caplog.text


def test_a_sketch_too_narrow_for_the_budget_is_said(caplog: pytest.LogCaptureFixture) -> None:
    exact = random_profile(3)
    sketched = rs.Profile(exact.table.assign(exact=False), {**exact.metadata, "sketch_size": 4})
    for profile, rank in ((exact, 8), (sketched, 4)):
        rs.allocate("one-shot", targets=VIT, budget=rs.ParameterBudget.uniform(VIT, rank), profile=profile)
    assert not caplog.text
    rs.allocate("one-shot", targets=VIT, budget=rs.ParameterBudget.uniform(VIT, 8), profile=sketched)
    assert "the profile's sketches have 4 columns, but the budget's mean rank is 8: gains beyond 4 are" in caplog.text


def test_targets_without_any_score_are_named() -> None:
    spectra = {t.name: [0.0, 0.0] for t in VIT[:2]} | {t.name: [1.0, 0.5] for t in VIT[2:]}
    message = (
        "`targets` must hold a module that the profile gives a score above 0, but all 2 have 0, as "
        f"`{VIT[0].name}`; choose other targets, or another strategy."
    )
    for strategy in sorted(NEEDS_PROFILE):
        with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
            rs.allocate(
                strategy, targets=VIT[:2], budget=rs.ParameterBudget(10_000), profile=make_profile(VIT, spectra)
            )


def test_a_strategy_may_be_a_function_of_scores_or_gains() -> None:
    """Scores share parameters out, gains are filled up: as `gradient-norm` and `one-shot` do by hand above."""
    profile = make_profile(TWO, {"narrow": [3.0, 1.0], "wide": [4.0, 6.0]})

    def squares(request: Request, power: float = 1.0) -> dict[str, float]:
        return {t.name: request.profiled.column("fisher_trace")[t.name] ** (power / 2) for t in request.targets}

    def fixed(request: Request) -> dict[str, np.ndarray]:
        return {"narrow": np.array([16.0, 4.0]), "wide": np.array([36.0, 4.0]), "absent": np.array([99.0])}

    found = rs.allocate(squares, targets=TWO, budget=rs.ParameterBudget(280), profile=profile)
    assert (found.vector, found.strategy) == ((6, 4), "squares")
    found = rs.allocate(squares, targets=TWO, budget=rs.ParameterBudget(280), profile=profile, power=4.0)
    assert found.vector == (4, 5)  # 3.4 and 5.3 by 81 : 256; only the narrow module's next rank fits
    assert rs.allocate(fixed, targets=TWO, budget=rs.ParameterBudget(60)).vector == (1, 1)


@pytest.mark.parametrize(
    ("strategy", "options", "message"),
    [
        (lambda request: None, {}, "`<lambda>` must return a score, or the gains of ranks, by module name, but returned a NoneType."),
        (lambda request: dict.fromkeys(("narrow", "wide"), math.nan), {}, "`<lambda>` must return finite numbers that are not negative, but for `narrow` returned nan; mend the function."),
        (lambda request: {"narrow": "1", "wide": "a"}, {}, "`<lambda>` must return finite numbers that are not negative, but for `wide` returned 'a'; mend the function."),
        (lambda request: {"narrow": torch.ones(1, requires_grad=True), "wide": torch.ones(1)}, {},
         "`<lambda>` must return finite numbers that are not negative, but for `narrow` returned tensor([1.], requires_grad=True); mend the function."),
        (lambda request: {"narrow": 1.0}, {}, "`scores` must cover every target module, but `wide` is missing."),
        (lambda request: {"narrow": [1.0]}, {}, "`gains` must cover every target module, but `wide` is missing."),
        (lambda request, tau=1: {}, {"power": 1}, "`<lambda>` takes tau, but got 'power'."),
    ],
)  # fmt: skip
def test_mistakes_of_a_users_function_are_named(strategy: Strategy, options: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
        rs.allocate(strategy, targets=TWO, budget=rs.ParameterBudget(100), **options)


def test_an_installed_package_may_bring_a_strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("even", "rankscope.strategies:uniform", "rankscope.strategies")
    monkeypatch.setattr("rankscope.strategies.entry_points", lambda kind: {"even": point})
    found = rs.allocate("even", targets=TWO, budget=rs.ParameterBudget(120))
    assert (found.vector, found.strategy) == ((2, 2), "even")
