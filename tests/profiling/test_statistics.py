"""Features against independent references: loops over examples, exact decompositions, finite differences."""

import numpy as np
import pytest
import torch

from rankscope.profiling.sketch import InputSketch
from rankscope.profiling.statistics import frobenius_norm, sensitivity, signal_shares, split_energy


def test_energy_splits_by_all_pairs_of_batches() -> None:
    """For batches of one size the signal is the mean inner product of different batches' gradients."""
    gradients = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).double()
    pairs = gradients @ gradients.T
    signal = float(pairs.sum() - pairs.trace()) / 30
    split = split_energy(float(gradients.mean(0).square().sum()), 5.0 * float(pairs.trace()), [5] * 6)
    assert split.signal == pytest.approx(signal)
    assert split.signal + split.noise == pytest.approx(float(gradients.mean(0).square().sum()))
    assert split.fisher_trace == pytest.approx(split.signal + 30 * split.noise)


def test_signal_shares_lie_between_ones_own_and_the_pooled() -> None:
    signal, energy = np.array([3.0, 0.0, -1.0]), np.array([4.0, 4.0, 0.0])
    few, many = (signal_shares(signal, energy, n) for n in (3, 100_000))
    assert many == pytest.approx([0.75, 0.0, 0.25], abs=1e-3)  # the last has no energy, so only the pooled share
    assert few == pytest.approx([0.2 * 0.75 + 0.8 * 0.25, 0.8 * 0.25, 0.25])
    assert signal_shares(np.zeros(2), np.zeros(2), 5).tolist() == [0.0, 0.0]


def test_sensitivity_is_the_first_order_change_of_the_loss() -> None:
    generator = torch.Generator().manual_seed(2)
    x, weight = torch.randn(20, 6, generator=generator).double(), torch.randn(300, 6, generator=generator).double()

    def loss(w: torch.Tensor) -> torch.Tensor:
        return (x @ w.T).tanh().square().mean()

    changes, small = 0.0, 1e-6
    for i, j in np.ndindex(300, 6):
        moved = weight.clone()
        moved[i, j] *= 1.0 - small  # removed a little
        changes += abs(float(loss(moved) - loss(weight))) / small
    gradient = torch.autograd.functional.jacobian(loss, weight).float()
    left, values, right = torch.linalg.svd(gradient, full_matrices=False)
    assert sensitivity(weight.float(), left, values[:, None] * right) == pytest.approx(changes, rel=1e-3)


def test_activation_features_are_those_of_the_exact_covariance() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(500, 60, generator=generator) @ torch.diag(0.8 ** torch.arange(60.0)) + 2.0
    sketch = InputSketch(torch.randn(60, 24, generator=generator))
    for part in x.split(70):
        sketch.add(part)
    covariance = torch.cov(x.T, correction=0)
    values = torch.linalg.eigvalsh(covariance).flip(0)
    assert sketch.second_moment() == pytest.approx(float(x.square().sum(1).mean()), rel=1e-4)
    assert sketch.variance() == pytest.approx(float(values.sum()), rel=1e-3)
    torch.testing.assert_close(sketch.variances()[:6], values[:6], rtol=0.02, atol=0)


def test_norms_of_half_precision_weights_are_summed_in_float32() -> None:
    weight = torch.randn(300, 80, generator=torch.Generator().manual_seed(1))
    assert frobenius_norm(weight.bfloat16()) == pytest.approx(float(weight.norm()), rel=1e-2)
