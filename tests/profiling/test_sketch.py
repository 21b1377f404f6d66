"""Gradient sketches against exact linear algebra."""

import numpy as np
import pytest
import torch

from rankscope.profiling.sketch import GradientAccumulator, RandomMatrices
from rankscope.profiling.statistics import split_energy

CPU, LIKE = torch.device("cpu"), torch.empty(0)


def matrices(k: int = 8, seed: int = 0) -> RandomMatrices:
    return RandomMatrices(k=k, seed=seed)


def numel(store: GradientAccumulator) -> int:
    return sum(tensor.numel() for tensor in store.kept)


def decaying(out: int, in_: int, rate: float, generator: torch.Generator) -> torch.Tensor:
    """A matrix with singular values rate ** j."""
    short = min(out, in_)
    left = torch.linalg.qr(torch.randn(out, short, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(in_, short, generator=generator)).Q
    return left @ torch.diag(rate ** torch.arange(short, dtype=torch.float32)) @ right.T


def sketch_of(gradient: torch.Tensor, tests: RandomMatrices) -> GradientAccumulator:
    """A sketch fed with `gradient` as a sum of outer products: deltas are its rows' unit vectors."""
    out, in_ = gradient.shape
    store = GradientAccumulator(in_, out, tests, LIKE)
    assert not store.exact
    store.add(store.increment(gradient, torch.eye(out)))
    return store


@pytest.mark.parametrize(("out", "in_"), [(120, 200), (200, 120), (160, 160)])
def test_leading_values_and_vectors_match_exact_svd(out: int, in_: int) -> None:
    gradient = decaying(out, in_, 0.8, torch.Generator().manual_seed(out))
    store = sketch_of(gradient, matrices(k=16))
    exact = torch.linalg.svdvals(gradient)
    found = store.decompose()
    left, values, right = found.left, found.values, found.right
    torch.testing.assert_close(values[:4], exact[:4], rtol=0.03, atol=0)
    u, _, v = torch.linalg.svd(gradient)
    assert (left[:, :4].T @ u[:, :4]).square().sum() > 3.9  # of 4: the leading subspaces agree
    assert (right[:4] @ v[:4].T).square().sum() > 3.9
    basis, core = left, values[:, None] * right
    assert basis.shape[0] == out
    assert core.shape[1] == in_
    torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), atol=1e-4, rtol=0)
    assert torch.linalg.norm(basis @ core - gradient) < 1.5 * exact[8:].norm()


@pytest.mark.parametrize(("out", "in_"), [(90, 150), (150, 90)])
def test_matrices_of_low_rank_are_recovered_exactly(out: int, in_: int) -> None:
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(out, 5, generator=generator) @ torch.randn(5, in_, generator=generator)
    store = sketch_of(gradient, matrices())
    torch.testing.assert_close(store.decompose().values[:5], torch.linalg.svdvals(gradient)[:5], rtol=1e-4, atol=0)
    assert store.decompose().energy == pytest.approx(float(gradient.square().sum()), rel=1e-4)


def test_streaming_equals_the_whole_and_increments_measure_the_energy() -> None:
    generator = torch.Generator().manual_seed(2)
    x, delta = torch.randn(30, 60, generator=generator), torch.randn(30, 80, generator=generator)
    whole, parts = (GradientAccumulator(60, 80, matrices(k=6), LIKE) for _ in range(2))
    whole.add(whole.increment(x, delta))
    for rows in torch.arange(30).split(7):
        parts.add(parts.increment(x[rows], delta[rows]))
    torch.testing.assert_close(parts.kept[0], whole.kept[0])
    torch.testing.assert_close(parts.kept[1], whole.kept[1])
    assert float(whole.measure(whole.kept)) == pytest.approx(float((delta.T @ x).square().sum()), rel=0.5)


def test_compression_is_a_signed_sum_into_buckets() -> None:
    store = GradientAccumulator(30, 70, matrices(k=4), LIKE)
    psi = store.compress(torch.eye(70)).T  # (l, long)
    assert psi.shape == (16, 70)
    assert (psi != 0).sum(dim=0).tolist() == [1] * 70
    assert psi.sum(dim=0).tolist() == store.signs.tolist()
    assert (psi != 0).sum(dim=1).max() == 5  # 70 coordinates over 16 buckets
    rows = torch.randn(600, 70, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(store.compress(rows), rows @ psi.T)


@pytest.mark.parametrize(("out", "in_"), [(60, 90), (90, 60)])
def test_energy_is_unbiased(out: int, in_: int) -> None:
    gradient = torch.randn(out, in_, generator=torch.Generator().manual_seed(3))  # flat: the worst case
    estimates = np.array([sketch_of(gradient, matrices(k=6, seed=seed)).decompose().energy for seed in range(300)])
    error = estimates.std(ddof=1) / np.sqrt(len(estimates))
    assert abs(estimates.mean() - float(gradient.square().sum())) < 3.5 * error


@pytest.mark.parametrize("sketched", [True, False])
def test_signal_energy_is_unbiased_under_noise(sketched: bool) -> None:
    """Eight batches of unequal sizes, whose noise falls with their size; over noise and random matrices."""
    generator = torch.Generator().manual_seed(4)
    signal, sizes = decaying(50, 70, 0.5, generator), [4, 4, 4, 4, 4, 4, 4, 1]
    found, raw, fisher = [], [], []
    for seed in range(300):
        store = GradientAccumulator(70, 50, matrices(k=4 if sketched else 40, seed=seed), LIKE)
        assert store.exact is not sketched
        squares = 0.0
        for size in sizes:
            gradient = signal + 0.1 / size**0.5 * torch.randn(50, 70, generator=generator)
            increment = store.increment(gradient, size * torch.eye(50))
            squares += float(store.measure(increment)) / size
            store.add(increment)
        energy = store.decompose().energy / sum(sizes) ** 2
        measured = float(store.measure(store.kept)) / sum(sizes) ** 2
        split = split_energy(energy, squares, sizes, measured=measured)
        assert split.signal + split.noise == pytest.approx(energy)
        found.append(split.signal)
        fisher.append(split.fisher_trace)
        raw.append(energy)
    truth, noise = float(signal.square().sum()), 0.01 * 50 * 70
    assert abs(np.mean(found) - truth) < 3.5 * np.std(found, ddof=1) / np.sqrt(len(found))
    assert abs(np.mean(fisher) - truth - noise) < 3.5 * np.std(fisher, ddof=1) / np.sqrt(len(fisher))
    assert np.mean(raw) > 1.5 * truth  # what would be believed without the correction


def test_bfloat16_inputs_are_accumulated_in_float32() -> None:
    generator = torch.Generator().manual_seed(6)
    x, delta = torch.randn(40, 60, generator=generator), torch.randn(40, 80, generator=generator)
    full, half = (GradientAccumulator(60, 80, matrices(k=6), LIKE) for _ in range(2))
    full.add(full.increment(x, delta))
    half.add(half.increment(x.bfloat16(), delta.bfloat16()))
    assert half.kept[0].dtype == torch.float32
    assert torch.linalg.norm(half.kept[0] - full.kept[0]) < 0.02 * torch.linalg.norm(full.kept[0])


def test_small_modules_are_kept_whole_and_large_ones_are_not() -> None:
    tests = matrices(k=32)
    assert GradientAccumulator(64, 256, tests, LIKE).exact
    large = GradientAccumulator(4096, 4096, tests, LIKE)
    assert not large.exact
    assert numel(large) == 32 * 4096 + 128 * 4096 < 4096 * 4096 / 25


def test_no_store_is_larger_than_the_gradient() -> None:
    for size in (1, 7, 64, 200, 384, 390, 576, 1000, 1536, 4096):
        for other in (1, 33, 64, 192, 384, 1536, 11008):
            assert numel(GradientAccumulator(size, other, matrices(k=48), LIKE)) <= size * other


def test_equal_seeds_give_equal_matrices() -> None:
    torch.testing.assert_close(matrices(seed=7).omega(20, CPU), matrices(seed=7).omega(20, CPU), rtol=0, atol=0)
    assert not torch.equal(matrices(seed=7).omega(20, CPU), matrices(seed=8).omega(20, CPU))
    assert not torch.equal(matrices(seed=7).signs(200, CPU), matrices(seed=8).signs(200, CPU))
    assert set(matrices().signs(200, CPU).tolist()) == {-1.0, 1.0}


def test_the_error_of_leading_values_is_as_large_as_it_says() -> None:
    generator = torch.Generator().manual_seed(8)
    gradient = decaying(300, 400, 0.9, generator) + 0.002 * torch.randn(300, 400, generator=generator)
    exact = torch.linalg.svdvals(gradient)[:4]
    found = [sketch_of(gradient, matrices(k=16, seed=seed)).decompose() for seed in range(60)]
    deviations = torch.stack([(f.values[:4] - exact) / f.error for f in found])
    assert 0.6 < float(deviations.square().mean().sqrt()) < 1.7
    exact = GradientAccumulator(400, 300, matrices(k=200), LIKE)
    exact.add(exact.increment(gradient, torch.eye(300)))
    assert exact.exact
    assert exact.decompose().error == 0.0
