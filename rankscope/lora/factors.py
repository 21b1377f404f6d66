"""Arithmetic on one adapter's factors, and the optimizer state that follows: same group, same place, moments carried.

A is (rank, inputs) and B (outputs, rank); component i is row i of A and column i of B.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import transformers
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from rankscope.errors import ModelError


class RankMap(Protocol):
    """How gradients and optimizer moments follow a change of rank."""

    def carry(self, tensor: Tensor, dim: int, *, squared: bool = False) -> Tensor:
        """What a tensor with the ranks along `dim` becomes; `squared`: one of squared gradients."""


class Selection(NamedTuple):
    """Keeps components in the given order and appends `added` zeros."""

    kept: tuple[int, ...]
    added: int = 0

    def carry(self, tensor: Tensor, dim: int, *, squared: bool = False) -> Tensor:
        """Select and pad along `dim`."""
        kept = tensor.index_select(dim, torch.tensor(self.kept, dtype=torch.long, device=tensor.device))
        shape = (*tensor.shape[:dim], self.added, *tensor.shape[dim + 1 :])
        return torch.cat([kept, tensor.new_zeros(shape)], dim)


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
    """New factors, and the maps for gradients and moments of each."""

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
    Qa, Ra, Qb, Rb = _triangular(a, b)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.T, full_matrices=False)
    U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    norm = torch.linalg.matrix_norm(_precise(a)) / math.sqrt(len(a))
    c = torch.where(norm > 0, norm, torch.ones_like(norm))
    N = Ra.T @ Vh.T / c
    M = c * Vh @ torch.linalg.pinv(Ra.T)
    new_a, new_b = (c * Vh @ Qa.T).to(a.dtype), (Qb @ (U * S) / c).to(b.dtype)
    return Resized(new_a, new_b, Rotation(matrix=N.T.contiguous()), Rotation(matrix=M))


def singular_values(a: Tensor, b: Tensor) -> Tensor:
    """Those of `B @ A`, without the scaling, descending; shape (at most rank,)."""
    _, Ra, _, Rb = _triangular(a, b)
    values: Tensor = torch.linalg.svdvals(Rb @ Ra.T)
    return values


def _triangular(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Qa, Ra, Qb and Rb with A^T = Qa Ra and B = Qb Rb."""
    return *torch.linalg.qr(_precise(a).T), *torch.linalg.qr(_precise(b))


SHRINKS = {"drop": drop_components, "svd": truncate_svd}


def grow(
    a: Tensor, b: Tensor, rows: Tensor | int, generator: torch.Generator | None = None, *, embedding: bool = False
) -> Resized:
    """Append components whose product is 0: (added, inputs) rows of A, or as many as are to be drawn, and zeros in B.

    In embeddings it is columns of B that are drawn, as PEFT does, and A that is zero.
    """
    added = rows if isinstance(rows, int) else len(rows)
    new_a, new_b = a.new_zeros(added, a.shape[1]), b.new_zeros(len(b), added)
    if isinstance(rows, Tensor):
        new_a = rows
    elif embedding:
        new_b = torch.randn(len(b), added, generator=generator, device=(generator or b).device)
    else:
        new_a = kaiming_rows(added, a, generator)
    selection = Selection(kept=tuple(range(len(a))), added=added)
    return Resized(torch.cat([a, new_a.to(a)]), torch.cat([b, new_b.to(b)], dim=1), selection, selection)


def kaiming_rows(added: int, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """(added, inputs) rows as PEFT initialises A (Kaiming uniform, a = sqrt(5)), drawn on the generator's device."""
    device = (generator or like).device
    rows = torch.rand(added, like.shape[1], generator=generator, device=device, dtype=torch.float32)
    return ((2 * rows - 1) / math.sqrt(like.shape[1])).to(like)


def _precise(tensor: Tensor) -> Tensor:
    """In float32 at least: half precision has no QR, and its norms overflow early."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


# --- optimizer state ----------------------------------------------------------------------------------------------

_CLASSES = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adafactor, transformers.Adafactor
_KNOWN = "SGD, Adam, AdamW, Adafactor (torch's and transformers') and bitsandbytes' Adam and AdamW"
# State of the parameter's shape, and whether it holds squared gradients. Numbers (`step`) are kept as they are.
_MOMENTS = {"momentum_buffer": False, "exp_avg": False, "exp_avg_sq": True, "max_exp_avg_sq": True, "variance": True}
# Adafactor's second moments of matrices, torch's and transformers': means over the last and the last but one dimension.
_FACTORED = {"row_var": "col_var", "exp_avg_sq_row": "exp_avg_sq_col"}


class Replacement(NamedTuple):
    """A parameter that takes another's place; `dim` is the rank dimension of both."""

    old: nn.Parameter
    new: nn.Parameter
    dim: int
    map: RankMap

    def carry(self, tensor: Tensor, squared: bool = False) -> Tensor:
        """What a tensor of the old parameter's shape becomes."""
        return self.map.carry(tensor, self.dim, squared=squared)


def unwrap_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside accelerate's wrapper."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def check_known(optimizer: Optimizer) -> None:
    """Raise a ModelError unless the state of this kind of optimizer can be carried."""
    optimizer = unwrap_optimizer(optimizer)
    if not (isinstance(optimizer, _CLASSES) or _is_bitsandbytes_adam(optimizer)):
        but = f"but is {type(optimizer).__name__}; use one of these."
        raise ModelError(f"`optimizer` must be one whose state can be carried ({_KNOWN}), {but}")


def replace_parameters(optimizer: Optimizer | None, replacements: Sequence[Replacement]) -> None:
    """Put new parameters and their carried state in the place of the old; all of them or, on any error, none.

    No group is added, so learning-rate schedulers stay right. New components start with moments of 0 and the parameter's `step`.
    """
    if optimizer is None:
        return
    optimizer = unwrap_optimizer(optimizer)
    owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if strangers := sum(id(replacement.old) not in owned for replacement in replacements):
        but = f"but lacks {strangers} of the {len(replacements)} to be resized; pass the one that trains this model, or None."
        raise ModelError(f"`optimizer` must own the adapter's parameters, {but}")
    states = [_carried(optimizer, replacement) for replacement in replacements]
    successors = {id(replacement.old): replacement.new for replacement in replacements}
    for group in optimizer.param_groups:
        group["params"] = [successors.get(id(parameter), parameter) for parameter in group["params"]]
    for replacement, state in zip(replacements, states, strict=True):
        optimizer.state.pop(replacement.old, None)
        if state:
            optimizer.state[replacement.new] = state


def _carried(optimizer: Optimizer, replacement: Replacement) -> dict[str, Any]:
    state: dict[str, Any] = optimizer.state.get(replacement.old, {})
    if not state:
        return {}
    check_known(optimizer)
    if _is_bitsandbytes_adam(optimizer):
        return _carried_bitsandbytes(optimizer, state, replacement)
    carried: dict[str, Any] = {}
    for row, col in _FACTORED.items():
        if state.get(row) is not None:
            carried[row], carried[col] = _carried_factored(state[row], state[col], replacement)
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            carried.setdefault(name, value)
        elif name in _MOMENTS:
            carried[name] = replacement.carry(value, _MOMENTS[name])
        elif name not in carried:
            but = f"but {type(optimizer).__name__} holds {name!r} as well; use one of {_KNOWN}."
            raise ModelError(f"`optimizer` must hold state of known meaning, {but}")
    return carried


def _carried_factored(row: Tensor, col: Tensor, replacement: Replacement) -> tuple[Tensor, Tensor]:
    """Adafactor's row and column means, whose product estimates the second moment (Shazeer and Stern, 2018).

    The one that is a mean over the ranks is scaled so that estimates of what stays are unchanged.
    """
    flat = row.ndim < replacement.old.ndim  # without the dimension of the mean, which torch keeps
    if flat:
        row, col = row.unsqueeze(-1), col.unsqueeze(-2)
    from_last = replacement.old.ndim - replacement.dim
    along, across = (col, row) if from_last == 1 else (row, col)
    carried = replacement.carry(along, True)
    if from_last > 2:  # a convolution's rank lies outside the two factored dimensions
        across = replacement.carry(across, True)
    else:
        before, after = (factor.mean(dim=replacement.dim, keepdim=True) for factor in (along, carried))
        known = (before > 0) & (after > 0)  # not so where no component stays
        across = across * torch.where(known, after / before, torch.ones_like(before))
    row, col = (across, carried) if from_last == 1 else (carried, across)
    return (row.squeeze(-1), col.squeeze(-2)) if flat else (row, col)


def _is_bitsandbytes_adam(optimizer: Optimizer) -> bool:
    """Judged by names, so that bitsandbytes need not be installed."""
    modules = {base.__module__.split(".")[0] for base in type(optimizer).__mro__}
    return "bitsandbytes" in modules and getattr(optimizer, "optimizer_name", None) == "adam"


def _carried_bitsandbytes(optimizer: Any, state: Mapping[str, Any], replacement: Replacement) -> dict[str, Any]:
    """Moments in 8 bits are dequantised, carried, and quantised again where the optimizer would: a rounding in 256 steps."""
    from bitsandbytes import functional

    carried = {name: value for name, value in state.items() if not name.startswith(("state", "qmap", "absmax"))}
    for moment, qmap_name in (("1", "dynamic"), ("2", "udynamic")):
        value = state[f"state{moment}"]
        if value.dtype == torch.uint8:
            absmax, code = state[f"absmax{moment}"], state[f"qmap{moment}"]
            value = functional.dequantize_blockwise(value, absmax=absmax, code=code, blocksize=256)
        value = replacement.carry(value, moment == "2")
        if optimizer.args.optim_bits == 8 and replacement.new.numel() >= optimizer.args.min_8bit_size:
            if not optimizer.name2qmap:
                optimizer.fill_qmap()
            qmap = optimizer.name2qmap[qmap_name].to(value.device)
            value, quantisation = functional.quantize_blockwise(value, code=qmap, blocksize=256)
            carried |= {f"qmap{moment}": qmap, f"absmax{moment}": quantisation.absmax}
        carried[f"state{moment}"] = value
    return carried
