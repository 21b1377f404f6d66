"""Statistics against brute force, published tables, and how often they cover the truth."""

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rankscope.comparison import paired_difference
from rankscope.comparison.statistics import (
    holm,
    monotone,
    needed_budget,
    paired_p_value,
    resampled_means,
    seed_noise,
    uniform_budget_multipliers,
)


def normal(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return rng.normal(0.01, 0.02, shape)


def accuracies(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Differences of two accuracies on 200 examples, near the ceiling: discrete and skewed."""
    return (rng.binomial(200, 0.99, shape) - rng.binomial(200, 0.97, shape)) / 200


def uneven_seeds(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Two methods whose true accuracies differ from seed to seed, with a tail of bad seeds, read on 500 examples."""
    return (rng.binomial(500, rng.beta(60, 5, shape)) - rng.binomial(500, rng.beta(60, 6, shape))) / 500


@pytest.mark.parametrize("n", [5, 8, 16])
@pytest.mark.parametrize(
    ("draw", "truth"),
    [(normal, 0.01), (accuracies, 0.02), (uneven_seeds, 60 / 65 - 60 / 66)],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_the_interval_covers_the_truth_in_95_of_100_comparisons(draw: Any, truth: float, n: int) -> None:
    """The formula on 20,000 comparisons at once; the function agrees with it on the first of them."""
    differences = draw(np.random.default_rng(n), (20_000, n))
    found = paired_difference(differences[0].tolist(), [0.0] * n)
    half = stats.t.ppf(0.975, n - 1) * differences.std(axis=1, ddof=1) / math.sqrt(n)
    assert (found.high - found.low) / 2 == pytest.approx(half[0])
    covered = np.abs(differences.mean(axis=1) - truth) <= half
    assert covered[half > 0].mean() >= 0.94


def test_the_interval_is_that_of_the_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=6)  # shared by the pair: it must cancel
    ours, theirs = noise + rng.normal(0.5, 0.1, 6), noise
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.9)
    found = paired_difference(ours.tolist(), theirs.tolist(), confidence=0.9)
    assert found[1:] == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(
    ("ours", "theirs", "text"),
    [
        ([0.6], [0.5], "+0.100 [-]"),
        ([0.6, 0.7], [0.5, 0.4], "+0.200 [-]"),
        ([0.5, 0.6, 0.7], [0.4, 0.5, 0.6], "+0.100 [-]"),
    ],
    ids=["one pair", "two pairs", "equal differences"],
)
def test_there_is_no_interval_of_no_width(ours: list[float], theirs: list[float], text: str) -> None:
    found = paired_difference(ours, theirs)
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert found.text() == text


def test_fewer_than_three_pairs_have_no_p_value() -> None:
    assert math.isnan(paired_p_value([1.0, 2.0], [0.0, 0.0]))
    assert paired_p_value([1.0, 2.0, 3.0], [0.0, 0.0, 0.0]) == 0.25


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


def test_seed_noise_is_what_two_groups_differ_by() -> None:
    rng = np.random.default_rng(0)
    found = np.mean([seed_noise(rng.normal(0.9, 0.02, 8).tolist()) for _ in range(400)])
    differences = rng.normal(0.9, 0.02, (4000, 2, 8)).mean(axis=2)
    assert found == pytest.approx(np.quantile(np.abs(differences[:, 0] - differences[:, 1]), 0.95), rel=0.05)
    assert math.isnan(seed_noise([0.5]))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.0, 1.0), min_size=3, max_size=6, unique=True), st.floats(0.0, 1.0))
def test_a_curve_at_the_needed_budget_has_the_score(scores: list[float], score: float) -> None:
    curve = np.array([sorted(scores)])
    budgets = 2.0 ** np.arange(len(scores))
    (found,) = needed_budget(np.array([score]), budgets, monotone(curve))
    if score > curve[0, -1]:
        assert found == math.inf
    elif score <= curve[0, 0]:
        assert found == budgets[0]
    else:
        assert np.interp(math.log(found), np.log(budgets), curve[0]) == pytest.approx(score, abs=1e-9)


def test_noise_in_a_curve_is_smoothed() -> None:
    rising = monotone(np.array([[0.8, 0.86, 0.84]]))
    assert rising == pytest.approx(np.array([[0.8, 0.85, 0.85]]))
    assert needed_budget(np.array([0.85 - 1e-9]), np.array([1.0, 2.0, 4.0]), rising) == pytest.approx(2.0)


def test_resampled_means_take_the_same_seeds_for_all_cells() -> None:
    rng = np.random.default_rng(0)
    first = rng.normal(size=8)
    scores = np.vstack([first, first + 1.0, np.where(np.arange(8) < 5, first, np.nan)])
    means = resampled_means(scores)
    assert means[0] == pytest.approx([first.mean(), first.mean() + 1.0, first[:5].mean()])
    assert means[:, 1] - means[:, 0] == pytest.approx(np.ones(len(means)))
    assert means[1:, 0].std() == pytest.approx(first.std() / math.sqrt(8), rel=0.05)
    assert np.isfinite(means).all()


BUDGETS = 432.0 * 2 ** np.arange(9)


def rising_curve(budgets: np.ndarray) -> np.ndarray:
    return 0.80 + 0.13 * (1.0 - np.exp(-np.log2(budgets / 200.0) / 4.0))


@pytest.mark.parametrize("n", [5, 8, 16])
def test_the_interval_of_the_factor_covers_the_truth(n: int) -> None:
    """A method with 1,728 parameters that is as good as uniform at 4.4 times as many; noise is in part the seed's."""
    score = 0.895
    dense = np.exp(np.linspace(math.log(BUDGETS[0]), math.log(BUDGETS[-1]), 20_000))
    truth = dense[np.argmax(rising_curve(dense) >= score)] / 1728.0
    rng, covered, centre = np.random.default_rng(n), [], []
    for _ in range(60):
        shared = rng.normal(0, 0.008, n)
        uniform = rising_curve(BUDGETS)[:, None] + shared + rng.normal(0, 0.008, (9, n))
        scores = np.vstack([uniform, score + shared + rng.normal(0, 0.008, n)])
        found = uniform_budget_multipliers(scores, [*BUDGETS, 1728.0], range(9))
        covered.append(found[-1].low <= truth <= found[-1].high)
        centre.append(found[-1].mean)
        assert all(each[0] == 1.0 for each in found[:9])
    assert sum(covered) >= 53  # of 60
    assert np.median(centre) == pytest.approx(truth, rel=0.15)


def test_factors_that_cannot_be_told_are_nan() -> None:
    scores = np.array([[0.8, 0.81, 0.82], [0.9, 0.91, 0.92], [0.95, 0.96, 0.97]])
    assert all(math.isnan(each.mean) for each in uniform_budget_multipliers(scores[:1], [100.0], [0]))
    none, better = uniform_budget_multipliers(scores[[0, 1, 1, 2]], [100.0, 200.0, 0.0, 50.0], [0, 1])[2:]
    assert math.isnan(none.mean)
    assert better == (math.inf, math.inf, math.inf)
    few = uniform_budget_multipliers(scores[:, :2], [100.0, 200.0, 50.0], [0, 1])[-1]
    assert (few.mean, math.isnan(few.low)) == (math.inf, True)
