"""Kernels on factor pairs against dense linear algebra."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankscope.lora.factors import (
    Rotation,
    Selection,
    component_norms,
    drop_components,
    grow,
    kaiming_rows,
    truncate_svd,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}


def pair(seed: int, rank: int, inputs: int, outputs: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, inputs, generator=generator, dtype=torch.float64)
    b = torch.randn(outputs, rank, generator=generator, dtype=torch.float64)
    scales = torch.logspace(0, -2, rank, dtype=torch.float64)
    return (a * scales[:, None]).to(dtype), b.to(dtype)


shapes = st.tuples(st.integers(0, 99), st.integers(1, 6), st.integers(6, 20), st.integers(6, 20))


@given(shapes, st.integers(0, 6), st.sampled_from(DTYPES))
@settings(max_examples=60, deadline=None)
def test_svd_is_the_closest_of_its_rank(shape: tuple[int, int, int, int], keep: int, dtype: torch.dtype) -> None:
    a, b = pair(*shape, dtype)
    keep = min(keep, len(a))
    small = truncate_svd(a, b, keep)
    assert small.a.shape == (keep, a.shape[1])
    assert small.a.dtype == small.b.dtype == dtype
    dense = (b.double() @ a.double()).numpy()
    singular = np.linalg.svd(dense, compute_uv=False)
    error = np.linalg.norm(dense - (small.b.double() @ small.a.double()).numpy())
    assert error == pytest.approx(np.linalg.norm(singular[keep:]), abs=TOLERANCE[dtype] * (1 + singular[0]))


@given(shapes, st.integers(0, 6))
@settings(max_examples=60, deadline=None)
def test_dropping_loses_the_least_components_and_never_less_than_svd(
    shape: tuple[int, int, int, int], keep: int
) -> None:
    a, b = pair(*shape)
    keep = min(keep, len(a))
    dropped, best = drop_components(a, b, keep), truncate_svd(a, b, keep)
    norms = np.array([np.linalg.norm(np.outer(b[:, i], a[i])) for i in range(len(a))])
    np.testing.assert_allclose(component_norms(a, b), norms)
    kept = sorted(np.argsort(-norms)[:keep])
    assert torch.equal(dropped.a, a[kept])
    assert torch.equal(dropped.b, b[:, kept])
    damage = torch.linalg.norm(b @ a - dropped.b @ dropped.a)
    least = torch.linalg.norm(b @ a - best.b @ best.a)
    assert least <= damage * (1 + 1e-9) + 1e-12
    assert damage <= norms.sum() - norms[kept].sum() + 1e-9


@given(shapes, st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_gradients_follow_a_rotation_exactly(shape: tuple[int, int, int, int], keep: int) -> None:
    """The gradient at the new factors, computed by autograd from the gradient of the product at the old place."""
    a, b = pair(*shape)
    small = truncate_svd(a, b, min(keep, len(a)))
    G = torch.randn(len(b), a.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    np.testing.assert_allclose(small.a_map.carry(b.T @ G, 0), small.b.T @ G, atol=1e-8)
    np.testing.assert_allclose(small.b_map.carry(G @ a.T, 1), G @ small.a.T, atol=1e-8)


def test_rotation_mixes_variances_of_independent_gradients() -> None:
    matrix = torch.tensor([[2.0, 1.0], [0.0, 3.0]])
    variance = torch.tensor([[1.0, 4.0], [0.25, 0.0]])
    draws = torch.randn(200_000, 2, 2, generator=torch.Generator().manual_seed(0)) * variance.sqrt()
    expected = (matrix @ draws).square().mean(0)
    np.testing.assert_allclose(Rotation(matrix=matrix).carry(variance, 0, squared=True), expected, rtol=0.02)


def test_svd_leaves_no_component_dead() -> None:
    """Columns of B at zero, as after growing: their singular values are zero, their rows of A must not be."""
    a, b = pair(3, 4, 9, 8)
    b[:, 1:] = 0
    small = truncate_svd(a, b, 3)
    torch.testing.assert_close(small.b @ small.a, b @ a)
    np.testing.assert_allclose(small.a.norm(dim=1), a.norm() / 2)  # the root mean square over 4 rows
    assert torch.linalg.matrix_rank(small.a) == 3


@pytest.mark.parametrize("zero", ["a", "b"])
def test_svd_of_nothing_is_nothing(zero: str) -> None:
    a, b = pair(0, 3, 9, 8)
    {"a": a, "b": b}[zero].zero_()
    small = truncate_svd(a, b, 2)
    assert torch.equal(small.b @ small.a, torch.zeros(8, 9, dtype=torch.float64))
    assert (small.a.norm(dim=1) > 0.1).all()


def test_selection_keeps_and_pads_along_any_dimension() -> None:
    tensor = torch.arange(24.0).reshape(2, 3, 4)
    carried = Selection(kept=(0, 2), added=2).carry(tensor, 1)
    assert torch.equal(carried[:, :2], tensor[:, [0, 2]])
    assert not carried[:, 2:].any()
    assert carried.shape == (2, 4, 4)


def test_added_components_leave_the_product() -> None:
    a, b = pair(0, 2, 9, 8)
    grown = grow(a, b, kaiming_rows(3, a))
    assert torch.equal(grown.a[:2], a)
    assert torch.equal(grown.b[:, :2], b)
    assert (grown.a[2:].abs().amax(1) > 0).all()
    assert not grown.b[:, 2:].any()


def test_drawn_rows_are_as_peft_draws_them() -> None:
    rows = kaiming_rows(200, torch.empty(0, 100), torch.Generator().manual_seed(0))
    reference = torch.nn.Linear(100, 200).weight  # torch's default is PEFT's draw
    assert rows.abs().max() <= 0.1
    assert rows.std() == pytest.approx(reference.std().item(), rel=0.05)
    assert torch.equal(rows, kaiming_rows(200, torch.empty(0, 100), torch.Generator().manual_seed(0)))
