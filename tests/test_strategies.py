"""One conformance suite for all strategies, and each rule worked by hand."""

import math
import re
from importlib.metadata import EntryPoint

import numpy as np
import pandas as pd
import pytest
import torch

import rankscope as rs
from rankscope.errors import ModelError, SettingsError
from rankscope.strategies import NEEDS_PROFILE, STRATEGIES, Request, Strategy, one_shot
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
    ("one-shot", {"power": 2.0, "depth": 0.0}),
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
    """Values per parameter: narrow 4/20, 2/20, 1/20; wide 6/40, 2/40, …; squares: narrow 16/20, 4/20, …; wide 36/40, 4/40."""
    profile = make_profile(TWO, SPECTRA)
    first = [(40, (2, 0)), (60, (1, 1)), (80, (2, 1)), (140, (3, 2))]
    squares = [(40, (0, 1)), (60, (1, 1)), (80, (2, 1)), (120, (2, 2)), (140, (3, 2))]
    for power, cases in ((1, first), (2, squares)):
        for limit, ranks in cases:
            budget = rs.ParameterBudget(limit)
            found = rs.allocate("one-shot", targets=TWO, budget=budget, profile=profile, power=power)
            assert found.vector == ranks
            if power == 1:
                assert rs.allocate("one-shot", targets=TWO, budget=budget, profile=profile) == found


def test_one_shot_options_by_hand() -> None:
    """Raw values: energies 16/20 against 9/40 and 9/40, then values 4/20 against 3/40; agreed values: the wide one's."""
    profile = make_profile(TWO, {"narrow": [4.0, 1.0], "wide": [3.0, 3.0]})
    profile.table["signal_share"] = [1 / 16, 1.0]  # agreed values 1 and 1/4, 3 and 3

    def found(limit: int, **options: object) -> tuple[int, ...]:
        budget = rs.ParameterBudget(limit)
        return rs.allocate("one-shot", targets=TWO, budget=budget, profile=profile, **options).vector

    assert found(40, power=2) == found(40, signal=True, power=2) == (0, 1)
    assert found(40, signal=False, power=2) == (2, 0)  # the wide module's first rank no longer fits
    assert found(60, signal=False, power=2) == (1, 1)
    assert found(80, signal=True, power=2) == (0, 2)
    assert found(80, signal=False, power=2) == (2, 1)  # 9/40 comes twice before 1/20, but only once fits
    assert found(100, signal=False, power=2) == (1, 2)
    assert found(100, signal=True, power=1) == (1, 2)
    assert found(80, signal=True, power=0.1) == (2, 1)  # 1/20, then 0.25 ** 0.1 / 20, then 3 ** 0.1 / 40


def test_one_shot_counts_the_blocks_that_a_change_passes_through() -> None:
    """Equal gradients: in blocks 0, 1 and 2 of three they count 3/3, 2/3 and 1/3, in the other tower 2/2 and 1/2, outside 1."""
    towers = [("vision", 0), ("vision", 1), ("vision", 2), ("language", 0), ("language", 1), ("model", None)]
    targets = tuple(
        rs.TargetModule(name=f"{tower}.{block}", tower=tower, block=block, in_features=4, out_features=4)
        for tower, block in towers
    )
    spectra = {target.name: [2.0, 1.0] for target in targets}
    request = Request(targets=targets, budget=rs.ParameterBudget(80), profile=make_profile(targets, spectra), seed=0)
    shares = [1, 2 / 3, 1 / 3, 1, 1 / 2, 1]
    for depth in (0.0, 1.0, 2.0):
        gains = one_shot(request, depth=depth)
        for target, share in zip(targets, shares, strict=True):
            assert gains[target.name][:2] == pytest.approx(np.array([1.0, 0.5]) * share**depth)
    assert rs.allocate("one-shot", targets=targets, budget=32, profile=request.profile).vector == (1, 1, 0, 1, 0, 1)


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
        (SettingsError, "one-shot", {"exponent": 2}, "`one-shot` takes power, depth, signal, but got 'exponent'."),
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
        (SettingsError, "one-shot", {"depth": -1, "profile": make_profile(TWO, SPECTRA)}, "`depth` must be a finite number of 0 or more, but got -1."),
        (SettingsError, "one-shot", {"depth": True, "profile": make_profile(TWO, SPECTRA)}, "`depth` must be a finite number of 0 or more, but got True."),
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
