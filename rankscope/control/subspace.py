"""The part of a gradient that an adapter's factors do not reach: pure tensor maths.

With W = W_0 + s B A, a step on A and B moves W within the tangent space of the matrices of that rank: those whose columns lie
in the span of B's, or whose rows in that of A's. What is left of G is R = (I - P_B) G (I - P_A) (e.g. Vandereycken, SIAM J.
Optim. 23, 2013, sec. 2.1). A new rank captures most of it with its row of A along R's leading right singular vector.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankscope.profiling.layers import thin_svd
from rankscope.profiling.sketch import Decomposition


@torch.no_grad()
def residual_directions(gradient: Decomposition, a: Tensor, b: Tensor) -> Tensor:
    """Right singular vectors of (I - P_B) G (I - P_A), (n, in), of descending singular values, those of 0 left out.

    Args:
        gradient: Leading singular triples, G ~ left diag(values) right.
        a: (r, in), r may be 0.
        b: (out, r); columns of zeros, as of new ranks, span nothing.
    """
    left, right = gradient.left * gradient.values, gradient.right
    columns, rows = _basis(b.to(left)), _basis(a.to(right).T)
    left_core = torch.linalg.qr(left - columns @ (columns.T @ left)).R
    basis, right_core = torch.linalg.qr((right - (right @ rows) @ rows.T).T)
    _, values, directions = thin_svd(left_core @ right_core.T)
    scale = float(gradient.values[:1].sum())
    found: Tensor = (directions @ basis.T)[values > 1e-5 * scale]
    return found


def _basis(matrix: Tensor) -> Tensor:
    """(n, r): an orthonormal basis of the columns' span, filled up with zeros."""
    left, values, _ = thin_svd(matrix)
    basis: Tensor = left * (values > 1e-5 * values[:1]).to(left)
    return basis
