"""Arithmetic on one adapter's factors A (rank, inputs) and B (outputs, rank); component i is row i of A, column i of B."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class RankMap(Protocol):
    """How gradients and optimizer moments follow a change of rank along `dim`; `squared`: of squared gradients."""

    def carry(self, tensor: Tensor, dim: int, *, squared: bool = False) -> Tensor: ...  # noqa: D102


class Selection(NamedTuple):
    """Keeps components in the given order and appends `added` zeros."""

    kept: tuple[int, ...]
    added: int = 0

    def carry(self, tensor: Tensor, dim: int, *, squared: bool = False) -> Tensor:
        """Select and pad along `dim`."""
        index = torch.tensor(self.kept, dtype=torch.long, device=tensor.device)
        shape = list(tensor.shape)
        shape[dim] = self.added
        return torch.cat([tensor.index_select(dim, index), tensor.new_zeros(shape)], dim)


class Rotation(NamedTuple):
    """Mixes components: new component i is the sum over j of `matrix[i, j]` times old component j.

    Gradients follow exactly; squared gradients only if the old components' gradients are uncorrelated.
    """

    matrix: Tensor

    def carry(self, tensor: Tensor, dim: int, *, squared: bool = False) -> Tensor:
        """Multiply along `dim` by the matrix, or by its elementwise square."""
        matrix = self.matrix.square() if squared else self.matrix
        mixed: Tensor = torch.tensordot(matrix, tensor.to(matrix.dtype), dims=([1], [dim]))
        return mixed.movedim(0, dim).to(tensor.dtype).contiguous()


class Resized(NamedTuple):
    """New factors A (rank, inputs) and B (outputs, rank), and the maps for gradients and moments of each."""

    a: Tensor
    b: Tensor
    a_map: RankMap
    b_map: RankMap


def component_norms(a: Tensor, b: Tensor) -> Tensor:
    """The Frobenius norm of each component, `||b_i|| * ||a_i||`; shape (rank,), without the scaling."""
    norms: Tensor = torch.linalg.vector_norm(_precise(a), dim=1) * torch.linalg.vector_norm(_precise(b), dim=0)
    return norms


def keep_components(a: Tensor, b: Tensor, kept: Sequence[int]) -> Resized:
    """Keep these components, unchanged to the bit, with their gradients and moments."""
    selection = Selection(kept=tuple(kept))
    return Resized(selection.carry(a, 0), selection.carry(b, 1), selection, selection)


def drop_components(a: Tensor, b: Tensor, rank: int) -> Resized:
    """Keep the `rank` components of largest norm, in their order; the earlier ones on ties."""
    order = torch.argsort(component_norms(a, b), descending=True, stable=True)
    return keep_components(a, b, sorted(order[:rank].tolist()))


def truncate_svd(a: Tensor, b: Tensor, rank: int) -> Resized:
    """The truncated SVD of `B @ A` (Eckart and Young, 1936), in O((inputs + outputs) * rank^2).

    With A^T = Qa Ra, B = Qb Rb and Rb Ra^T = U S V^T, the new factors are A' = c V^T Qa^T and B' = Qb U S / c. All rows of
    A' have A's root mean square row norm c, so that components with singular value 0 still get a gradient. Since
    A' = M A with M = c V^T Ra^-T and B' = B N with N = Ra^T V / c, the gradients become N^T dA and dB M^T, exactly.
    """
    wide_a = _precise(a)
    Qa, Ra = torch.linalg.qr(wide_a.T)
    Qb, Rb = torch.linalg.qr(_precise(b))
    U, S, Vh = torch.linalg.svd(Rb @ Ra.T, full_matrices=False)
    U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    norm = torch.linalg.matrix_norm(wide_a) / math.sqrt(len(a))
    c = torch.where(norm > 0, norm, torch.ones_like(norm))
    N = Ra.T @ Vh.T / c
    M = c * Vh @ torch.linalg.pinv(Ra.T)
    new_a, new_b = (c * Vh @ Qa.T).to(a.dtype), (Qb @ (U * S) / c).to(b.dtype)
    return Resized(new_a, new_b, Rotation(matrix=N.T.contiguous()), Rotation(matrix=M))


SHRINKS = {"drop": drop_components, "svd": truncate_svd}


def add_components(a: Tensor, b: Tensor, new_rows: Tensor, new_columns: Tensor) -> Resized:
    """Append (added, inputs) rows to A and (outputs, added) columns to B; one of the two is zero in each component."""
    selection = Selection(kept=tuple(range(len(a))), added=len(new_rows))
    return Resized(torch.cat([a, new_rows.to(a)]), torch.cat([b, new_columns.to(b)], dim=1), selection, selection)


def kaiming_rows(added: int, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """(added, inputs) rows as PEFT initialises A (Kaiming uniform, a = sqrt(5)), drawn on the generator's device."""
    inputs = like.shape[1]
    device = like.device if generator is None else generator.device
    rows = torch.rand(added, inputs, generator=generator, device=device, dtype=torch.float32)
    return ((2 * rows - 1) / math.sqrt(inputs)).to(like)


def _precise(tensor: Tensor) -> Tensor:
    """In float32 at least: half precision has no QR, and its norms overflow early."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
