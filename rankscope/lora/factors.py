"""Pure kernels on one adapter's factors: which components a smaller rank keeps, and what new components start as.

An adapter's update is `s * B @ A` with A of shape (rank, inputs) and B of shape (outputs, rank); component i is row i of A with
column i of B. A convolution's kernel is flattened into `inputs`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class RankMap(Protocol):
    """How tensors shaped like a factor (gradients, an optimizer's moments) follow a change of rank."""

    def carry(self, tensor: Tensor, dim: int, *, squared: bool = False) -> Tensor:
        """The tensor after the change, along its rank dimension `dim`; `squared` for moments of squared gradients."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Components that stay as they are, in order, and zeros for `added` new ones behind them.

    >>> Selection(kept=(2, 0), added=1).carry(torch.tensor([5.0, 6.0, 7.0]), 0)
    tensor([7., 5., 0.])
    """

    kept: tuple[int, ...]
    added: int = 0

    def carry(self, tensor: Tensor, dim: int, *, squared: bool = False) -> Tensor:
        """Selects and pads; whether the tensor holds squares does not matter."""
        index = torch.tensor(self.kept, dtype=torch.long, device=tensor.device)
        shape = list(tensor.shape)
        shape[dim] = self.added
        return torch.cat([tensor.index_select(dim, index), tensor.new_zeros(shape)], dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """Components that are mixed: new component i is the sum over j of `matrix[i, j]` times old component j.

    Gradients follow exactly. Squared gradients follow as far as the old components' gradients are uncorrelated.

    Attributes:
        matrix: (new rank, old rank).
    """

    matrix: Tensor

    def carry(self, tensor: Tensor, dim: int, *, squared: bool = False) -> Tensor:
        """Mixes along `dim`; squares are mixed by the squared matrix."""
        matrix = self.matrix.square() if squared else self.matrix
        mixed: Tensor = torch.tensordot(matrix, tensor.to(matrix.dtype), dims=([1], [dim]))
        return mixed.movedim(0, dim).to(tensor.dtype).contiguous()


@dataclass(frozen=True, slots=True, kw_only=True)
class Resized:
    """New factors, and how what belongs to them follows.

    Attributes:
        a: (new rank, inputs).
        b: (outputs, new rank).
        a_map: For gradients and moments of A.
        b_map: For gradients and moments of B.
    """

    a: Tensor
    b: Tensor
    a_map: RankMap
    b_map: RankMap


def component_norms(a: Tensor, b: Tensor) -> Tensor:
    """The Frobenius norm of each component's share of the update, `||b_i|| * ||a_i||`; (rank,), without the scaling.

    >>> component_norms(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[2.0, 0.5]]))
    tensor([10.0000,  0.5000])
    """
    a, b = _precise(a), _precise(b)
    norms: Tensor = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=0)
    return norms


def drop_components(a: Tensor, b: Tensor, rank: int) -> Resized:
    """Keeps the `rank` components of largest norm, in their order, as they are; at equal norms the earlier ones.

    Moments and gradients of what is kept stay valid to the bit. The damage is at most the norms that are dropped.
    """
    order = torch.argsort(component_norms(a, b), descending=True, stable=True)
    selection = Selection(kept=tuple(sorted(order[:rank].tolist())))
    return Resized(a=selection.carry(a, 0), b=selection.carry(b, 1), a_map=selection, b_map=selection)


def truncate_svd(a: Tensor, b: Tensor, rank: int) -> Resized:
    """The closest factors of a smaller rank: the truncated SVD of `B @ A` (Eckart and Young, 1936), from small matrices only.

    With A^T = Qa Ra, B = Qb Rb and Rb Ra^T = U S V^T, the new factors are A' = c V^T Qa^T and B' = Qb U S / c. Rows of A' all
    have A's root mean square row norm c, so that a component whose singular value is 0 still gets a gradient. Since
    B' = B N with N = Ra^T V / c, and A' = M A with M = c V^T Ra^-T, the gradients become N^T dA and dB M^T, exactly.

    Costs O((inputs + outputs) * rank^2).
    """
    wide_a, wide_b = _precise(a), _precise(b)
    Qa, Ra = torch.linalg.qr(wide_a.T)
    Qb, Rb = torch.linalg.qr(wide_b)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.T, full_matrices=False)
    U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    norm = torch.linalg.matrix_norm(wide_a) / math.sqrt(len(a))
    c = torch.where(norm > 0, norm, torch.ones_like(norm))
    N = Ra.T @ Vh.T / c
    M = c * Vh @ torch.linalg.pinv(Ra.T)
    return Resized(
        a=(c * Vh @ Qa.T).to(a.dtype),
        b=(Qb @ (U * S) / c).to(b.dtype),
        a_map=Rotation(matrix=N.T.contiguous()),
        b_map=Rotation(matrix=M),
    )


def add_components(a: Tensor, b: Tensor, new_rows: Tensor, new_columns: Tensor) -> Resized:
    """Appends components: (added, inputs) rows to A and (outputs, added) columns to B.

    The update stays the same where, for each component, one of the two is zero.
    """
    selection = Selection(kept=tuple(range(len(a))), added=len(new_rows))
    return Resized(
        a=torch.cat([a, new_rows.to(a)]), b=torch.cat([b, new_columns.to(b)], dim=1), a_map=selection, b_map=selection
    )


def kaiming_rows(added: int, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """(added, inputs) rows as PEFT draws A: Kaiming uniform with a = sqrt(5), within 1 / sqrt(inputs) of 0.

    Drawn on the generator's device, so that a CPU generator gives the same rows on every device.
    """
    inputs = like.shape[1]
    device = like.device if generator is None else generator.device
    rows = torch.rand(added, inputs, generator=generator, device=device, dtype=torch.float32)
    return ((2 * rows - 1) / math.sqrt(inputs)).to(like)


def _precise(tensor: Tensor) -> Tensor:
    """Half precision has no QR, and its norms overflow early."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
