"""Gradient sketches against exact linear algebra."""

import numpy as np
import pytest
import torch

from rankscope.profiling.sketch import (
    ExactGradient,
    RandomMatrices,
    SketchedGradient,
    cross_values,
    new_gradient_store,
    signal_energy,
    singular_values,
)

CPU = torch.device("cpu")


def matrices(k: int = 8, seed: int = 0) -> RandomMatrices:
    return RandomMatrices(k=k, l=4 * k, seed=seed)


def decaying(out: int, in_: int, rate: float, generator: torch.Generator) -> torch.Tensor:
    """A matrix with singular values rate ** j."""
    short = min(out, in_)
    left = torch.linalg.qr(torch.randn(out, short, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(in_, short, generator=generator)).Q
    return left @ torch.diag(rate ** torch.arange(short, dtype=torch.float32)) @ right.T


def sketch_of(gradient: torch.Tensor, tests: RandomMatrices) -> SketchedGradient:
    """A sketch fed with `gradient` as a sum of outer products: deltas are its rows' unit vectors."""
    out, in_ = gradient.shape
    store = SketchedGradient.zeros(in_, out, tests, CPU)
    store.add(gradient, torch.eye(out))
    return store


@pytest.mark.parametrize(("out", "in_"), [(120, 200), (200, 120), (160, 160)])
def test_leading_values_and_vectors_match_exact_svd(out: int, in_: int) -> None:
    gradient = decaying(out, in_, 0.8, torch.Generator().manual_seed(out))
    store = sketch_of(gradient, matrices(k=16))
    exact = torch.linalg.svdvals(gradient)
    torch.testing.assert_close(singular_values(store)[:4], exact[:4], rtol=0.03, atol=0)
    basis, core = store.factors()
    assert basis.shape[0] == out
    assert core.shape[1] == in_
    torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), atol=1e-4, rtol=0)
    assert torch.linalg.norm(basis @ core - gradient) < 1.5 * exact[8:].norm()


@pytest.mark.parametrize(("out", "in_"), [(90, 150), (150, 90)])
def test_matrices_of_low_rank_are_recovered_exactly(out: int, in_: int) -> None:
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(out, 5, generator=generator) @ torch.randn(5, in_, generator=generator)
    store = sketch_of(gradient, matrices())
    torch.testing.assert_close(singular_values(store)[:5], torch.linalg.svdvals(gradient)[:5], rtol=1e-4, atol=0)
    assert store.energy() == pytest.approx(float(gradient.square().sum()), rel=1e-4)


def test_streaming_equals_the_sum_and_combination_is_linear() -> None:
    generator = torch.Generator().manual_seed(2)
    x, delta = torch.randn(30, 60, generator=generator), torch.randn(30, 80, generator=generator)
    whole, parts = (SketchedGradient.zeros(60, 80, tests, CPU) for tests in [matrices()] * 2)
    whole.add(x, delta)
    for rows in torch.arange(30).split(7):
        parts.add(x[rows], delta[rows])
    torch.testing.assert_close(parts.narrow, whole.narrow)
    torch.testing.assert_close(parts.wide, whole.wide)
    doubled = whole.combine(3.0, parts, -1.0) if parts.psi is whole.psi else None
    assert doubled is not None
    torch.testing.assert_close(doubled.wide, 2 * whole.wide, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("out", "in_"), [(60, 90), (90, 60)])
def test_energy_is_unbiased(out: int, in_: int) -> None:
    gradient = torch.randn(out, in_, generator=torch.Generator().manual_seed(3))  # flat: the worst case
    estimates = np.array([sketch_of(gradient, matrices(k=6, seed=seed)).energy() for seed in range(300)])
    error = estimates.std(ddof=1) / np.sqrt(len(estimates))
    assert abs(estimates.mean() - float(gradient.square().sum())) < 3.5 * error


@pytest.mark.parametrize("sketched", [True, False])
def test_signal_energy_is_unbiased_under_noise(sketched: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    signal = decaying(50, 70, 0.5, generator)
    found, raw = [], []
    for seed in range(300):
        halves = [signal + 0.05 * torch.randn(50, 70, generator=generator) for _ in range(2)]
        tests = matrices(k=4, seed=seed)
        first, second = (sketch_of(half, tests) if sketched else ExactGradient(half) for half in halves)
        found.append(signal_energy(first, second))
        raw.append(first.combine(0.5, second, 0.5).energy())
    truth = float(signal.square().sum())
    assert abs(np.mean(found) - truth) < 3.5 * np.std(found, ddof=1) / np.sqrt(len(found))
    assert np.mean(raw) > 1.5 * truth  # what would be believed without the correction


def test_cross_values_see_no_signal_in_noise() -> None:
    generator = torch.Generator().manual_seed(5)
    halves = [ExactGradient(torch.randn(64, 64, generator=generator)) for _ in range(2)]
    assert singular_values(halves[0])[0] > 10
    assert cross_values(*halves).abs().max() < 3
    signal = 30 * torch.outer(torch.ones(64), torch.ones(64)) / 64
    noisy = [ExactGradient(half.gradient + signal) for half in halves]
    # Noise turns the singular vectors a little (their overlap squared is 0.93 here: Benaych-Georges, Nadakuditi 2012).
    assert 25 < cross_values(*noisy)[0] < 30 < singular_values(noisy[0])[0]


def test_bfloat16_inputs_are_accumulated_in_float32() -> None:
    generator = torch.Generator().manual_seed(6)
    x, delta = torch.randn(40, 60, generator=generator), torch.randn(40, 80, generator=generator)
    full, half = (SketchedGradient.zeros(60, 80, matrices(), CPU) for _ in range(2))
    full.add(x, delta)
    half.add(x.bfloat16(), delta.bfloat16())
    assert half.narrow.dtype == torch.float32
    assert torch.linalg.norm(half.narrow - full.narrow) < 0.02 * torch.linalg.norm(full.narrow)


def test_small_modules_are_kept_whole_and_large_ones_are_not() -> None:
    tests = matrices(k=32)
    assert isinstance(new_gradient_store(64, 256, tests, CPU), ExactGradient)
    large = new_gradient_store(4096, 4096, tests, CPU)
    assert isinstance(large, SketchedGradient)
    assert large.numel() == 32 * 4096 + 128 * 4096 < 4096 * 4096 / 25


def test_equal_seeds_give_equal_matrices() -> None:
    torch.testing.assert_close(matrices(seed=7).omega(20, CPU), matrices(seed=7).omega(20, CPU), rtol=0, atol=0)
    assert not torch.equal(matrices(seed=7).omega(20, CPU), matrices(seed=8).omega(20, CPU))
    assert not torch.equal(matrices(seed=7).omega(20, CPU).T[:, :8], matrices(seed=7).psi(20, CPU)[:8, :8])
