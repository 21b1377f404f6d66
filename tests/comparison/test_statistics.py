"""Intervals of paired differences against how often they cover the truth."""

import numpy as np
import pytest

from rankscope.comparison import paired_difference


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
