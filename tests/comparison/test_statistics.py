"""Statistics against brute force, published tables, and how often they cover the truth."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankscope.comparison import paired_difference, rank_methods
from rankscope.comparison.statistics import equivalent_factor, holm, paired_p_value, seed_noise


def test_paired_difference_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        noise = rng.normal(size=10)  # shared by the pair: it must cancel
        found = paired_difference((0.5 + noise + 0.1 * rng.normal(size=10)).tolist(), noise.tolist())
        assert found.low < found.mean < found.high
        hits += found.low <= 0.5 <= found.high
    assert 170 <= hits <= 199  # nominally 190; a bootstrap of ten is a little short


def test_paired_difference_of_equal_runs() -> None:
    assert paired_difference([0.5, 0.6, 0.7], [0.4, 0.5, 0.6]) == pytest.approx((0.1, 0.1, 0.1))


@pytest.mark.parametrize("n", [3, 5, 8])
def test_the_p_value_counts_sign_flips(n: int) -> None:
    rng = np.random.default_rng(n)
    ours, theirs = rng.normal(0.3, 1.0, n), rng.normal(0.0, 1.0, n)
    difference = ours - theirs
    means = [abs(np.mean(difference * signs)) for signs in product((-1, 1), repeat=n)]
    expected = np.mean([mean >= abs(difference.mean()) - 1e-12 for mean in means])
    assert paired_p_value(ours.tolist(), theirs.tolist()) == pytest.approx(expected)
    assert paired_p_value(ours.tolist(), ours.tolist()) == 1.0


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=8))
def test_holm_steps_down(p_values: list[float]) -> None:
    """Against the definition: sorted p times what is left to test, never falling, never above 1."""
    adjusted = holm(p_values)
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    worst = 0.0
    for n, i in enumerate(order):
        worst = max(worst, (len(p_values) - n) * p_values[i])
        assert adjusted[i] == pytest.approx(min(worst, 1.0))


@pytest.mark.parametrize(("k", "quantile"), [(2, 1.960), (3, 2.343), (4, 2.569), (5, 2.728), (10, 3.164)])
def test_the_critical_difference_is_nemenyis(k: int, quantile: float) -> None:
    """Quantiles of Demsar (2006), table 5a."""
    scores = {str(i): [float(i), float(-i)] for i in range(k)}
    found = rank_methods(scores)
    assert found.critical_difference == pytest.approx(quantile * math.sqrt(k * (k + 1) / 12), rel=1e-3)
    assert set(found.mean_ranks.values()) == {(k + 1) / 2}


def test_seed_noise_is_what_two_groups_differ_by() -> None:
    rng = np.random.default_rng(0)
    found = np.mean([seed_noise(rng.normal(0.9, 0.02, 8).tolist()) for _ in range(400)])
    differences = rng.normal(0.9, 0.02, (4000, 2, 8)).mean(axis=2)
    assert found == pytest.approx(np.quantile(np.abs(differences[:, 0] - differences[:, 1]), 0.95), rel=0.05)
    assert math.isnan(seed_noise([0.5]))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.0, 1.0), min_size=3, max_size=6, unique=True), st.floats(0.0, 1.0))
def test_uniform_at_the_equivalent_factor_has_the_score(scores: list[float], score: float) -> None:
    curve = sorted(scores)
    factors = [2.0**n for n in range(len(curve))]
    found = equivalent_factor(score, factors, curve)
    if score > curve[-1]:
        assert found == math.inf
    elif score <= curve[0]:
        assert found == factors[0]
    else:
        assert np.interp(math.log(found), np.log(factors), curve) == pytest.approx(score, abs=1e-9)


def test_noise_in_uniforms_curve_is_smoothed() -> None:
    assert equivalent_factor(0.85, [1, 2, 4], [0.8, 0.86, 0.84]) == pytest.approx(2.0)
