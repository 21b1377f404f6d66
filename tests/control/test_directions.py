"""The residual directions against the projections written out."""

import pytest
import torch

from rankscope.control.signals import residual_directions
from rankscope.profiling import Decomposition, thin_svd


def decomposed(gradient: torch.Tensor) -> Decomposition:
    return Decomposition(*thin_svd(gradient), float(gradient.square().sum()), 0.0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("rank", "grown"), [(0, 0), (2, 0), (2, 1), (3, 3)])
def test_against_explicit_projections(seed: int, rank: int, grown: int) -> None:
    """`grown` of the ranks are new: their columns of B are zero."""
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(9, 7, generator=generator)
    a, b = torch.randn(rank, 7, generator=generator), torch.randn(9, rank, generator=generator)
    b[:, rank - grown :] = 0.0
    found = residual_directions(decomposed(gradient), a, b)
    residual = (torch.eye(9) - b @ torch.linalg.pinv(b)) @ gradient @ (torch.eye(7) - torch.linalg.pinv(a) @ a)
    _, values, right = torch.linalg.svd(residual, full_matrices=False)
    kept = right[values > 1e-4]
    assert found.shape == kept.shape == (7 - rank, 7)
    torch.testing.assert_close((found @ kept.T).abs(), torch.eye(7 - rank), atol=2e-3, rtol=0)
    torch.testing.assert_close(found @ a.T, torch.zeros(7 - rank, rank), atol=1e-4, rtol=0)


def test_factors_in_half_precision() -> None:
    gradient = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
    found = residual_directions(decomposed(gradient), torch.eye(7)[:2].bfloat16(), torch.zeros(9, 2).bfloat16())
    torch.testing.assert_close(found[:, :2], torch.zeros(5, 2), atol=1e-5, rtol=0)
