"""Sketches of a module's weight gradient: streamed from inputs and output gradients, never as large as the weight.

The gradient of a linear module is G = sum_n delta_n x_n^T (out x in). Two random projections of it are kept,

    Y = G Omega   and   Z = Psi G,

and from them the leading singular triples follow: Q = orth(Y), X = (Psi Q)^+ Z, G ~ Q X
(Tropp, Yurtsever, Udell, Cevher, "Practical sketching algorithms for low-rank matrix approximation", 2017, Alg. 4).
Both are linear in G, so the sketch of a sum, over batches or processes, is the sum of sketches. Omega is Gaussian. Psi is
a count sketch (Clarkson and Woodruff 2013): it adds coordinates up in l buckets under random signs, which costs one pass
over the deltas and no memory, and on real gradients reconstructs as well as a Gaussian of l rows.
"""

from __future__ import annotations

import bisect
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rankscope.distributed import whole
from rankscope.targets import TargetModule, base_layer

logger = logging.getLogger(__name__)


SUPPORTED = ("linear", "conv1d", "conv2d")


def is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile` wraps the model or a part of it, or `Module.compile` compiled one in place."""
    return any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m in model.modules())


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Runs what torch.compile made of any part of the model as it was before, since compiled code passes over new hooks."""
    if is_compiled(model):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


def solvable(tensor: Tensor) -> Tensor:
    """The tensor where torch.linalg's solvers run: on its device, but for MPS, which lacks them."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor


def thin_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, k), S (k,) and Vh (k, n), with k = min(m, n); `torch.linalg.svd` of a thin matrix, whatever its device.

    On a GPU the SVD proper is that of the triangular factor, taken on the CPU: cuSOLVER needs tens of milliseconds for it.
    """
    if matrix.device.type == "cpu":
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left, values, right
    if len(matrix) < matrix.shape[1]:
        left, values, right = thin_svd(matrix.T)
        return right.T, values, left.T
    basis, core = torch.linalg.qr(matrix)
    left, values, right = (part.to(matrix.device) for part in torch.linalg.svd(core.cpu(), full_matrices=False))
    return basis @ left, values, right


def row_blocks(matrix: Tensor, on_cpu: int) -> tuple[Tensor, ...]:
    """The matrix in blocks of rows, so that copies of a block are small: `on_cpu` rows, or 64 MB where a block costs launches."""
    size = on_cpu if matrix.device.type == "cpu" else max(on_cpu, 2**24 // max(matrix.shape[1], 1))
    blocks: tuple[Tensor, ...] = matrix.split(size)
    return blocks


def as_rows(module: nn.Module, inputs: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor]:
    """(n, in) and (n, out) with the weight gradient sum_n deltas_n inputs_n^T; positions and patches are rows."""
    module = base_layer(module)
    if isinstance(module, nn.Conv2d):
        if inputs.ndim == 3:
            inputs, deltas = inputs[None], deltas[None]
        inputs, deltas = _patches(module, inputs), deltas.flatten(2).transpose(1, 2)
    return inputs.reshape(-1, inputs.shape[-1]), deltas.reshape(-1, deltas.shape[-1])


def _patches(module: nn.Conv2d, inputs: Tensor) -> Tensor:
    """(batch, positions, channels * height * width) as the kernel sees them."""
    around = module._reversed_padding_repeated_twice
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = nn.functional.pad(inputs, around, mode=mode)
    columns = nn.functional.unfold(padded, module.kernel_size, dilation=module.dilation, stride=module.stride)
    return columns.transpose(1, 2)


def dense_weight(module: nn.Module) -> Tensor | None:
    """The weight as (out, in), dequantised where bitsandbytes holds it; None where it cannot be read, as on the meta device."""
    module = base_layer(module)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    weight = whole(weight.detach())
    if hasattr(module.weight, "quant_state") or hasattr(module.weight, "SCB"):
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        weight = dequantize_bnb_weight(module.weight, state=getattr(module, "state", None)).detach()
    if not weight.is_floating_point() or weight.is_meta:
        return None
    if type(module).__name__ == "Conv1D":
        return weight.T
    return weight.flatten(1)


SKETCH_SIZE = 56  # k, at least, if memory allows
LEAST_SIZE = 8  # whatever memory allows
SKETCH_SHARE = 0.25  # of the bytes that the model's weights take
SKETCH_BYTES = 2**30  # that sketches may take in any case
Increment = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Decomposition:
    """G ~ left diag(values) right.

    Attributes:
        left: Leading left singular vectors, (out, k).
        values: Leading singular values, (k,), descending.
        right: Leading right singular vectors, (k, in).
        energy: ||G||_F^2; in expectation that of `GradientStore.measure`, but less scattered.
        error: Standard error of each leading singular value, in its units; 0 where the gradient was kept whole.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    energy: float
    error: float


class GradientStore(Protocol):
    """What the profiler needs: turn one call into an increment, add increments up, decompose the sum."""

    def increment(self, inputs: Tensor, deltas: Tensor) -> Increment:
        """What sum_n deltas_n inputs_n^T adds to the store; `inputs` is (n, in), `deltas` is (n, out)."""
        ...

    def add(self, increment: Increment) -> None:
        """Adds it."""
        ...

    def measure(self, increment: Increment) -> Tensor:
        """||G||_F^2 of one increment, exact or without bias; a scalar that stays on the device."""
        ...

    def tensors(self) -> Increment:
        """What is kept, itself an increment: these are summed over processes."""
        ...

    def decompose(self) -> Decomposition:
        """The leading singular triples and the energy of all that was added."""
        ...


class RandomMatrices:
    """The random matrices of every size, made once and shared by all modules of that size.

    Args:
        k: Columns of the narrow sketch: how many singular triples can be found. The wide one has l = 4 k rows: with 3 k,
            single modules are off by half as much again.
        seed: Equal seeds give equal matrices on every device and process.
    """

    def __init__(self, *, k: int, seed: int) -> None:
        self.k, self.l, self.seed = k, 4 * k, seed
        self._made: dict[tuple[str, int, torch.device], Tensor] = {}

    def omega(self, size: int, device: torch.device) -> Tensor:
        """Omega, (size, k), independent standard normal."""
        return self._get("omega", size, (size, self.k), device)

    def signs(self, size: int, device: torch.device) -> Tensor:
        """The signs of Psi, (size,), independent and fair."""
        return self._get("signs", size, (size,), device)

    def _get(self, which: str, size: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
        if (which, size, device) not in self._made:
            generator = torch.Generator().manual_seed(2 * (self.seed * 1_000_003 + size) + (which == "signs"))
            if which == "omega":
                made = torch.randn(shape, generator=generator)
            else:
                made = torch.randint(2, shape, generator=generator).float() * 2.0 - 1.0
            self._made[which, size, device] = made.to(device)
        return self._made[which, size, device]


@dataclass(slots=True)
class ExactGradient:
    """The gradient itself, for modules so small that a sketch would save less than half."""

    gradient: Tensor

    @classmethod
    def zeros(
        cls, in_features: int, out_features: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> ExactGradient:
        """A store of the zero gradient."""
        return cls(torch.zeros(out_features, in_features, device=device, dtype=dtype))

    def increment(self, inputs: Tensor, deltas: Tensor) -> Increment:
        """See `GradientStore`."""
        return ((deltas.T @ inputs).to(self.gradient.dtype),)

    def add(self, increment: Increment) -> None:
        """See `GradientStore`."""
        self.gradient += increment[0]

    def measure(self, increment: Increment) -> Tensor:
        """See `GradientStore`."""
        return increment[0].square().sum()

    def tensors(self) -> Increment:
        """See `GradientStore`."""
        return (self.gradient,)

    def decompose(self) -> Decomposition:
        """See `GradientStore`."""
        left, values, right = thin_svd(solvable(self.gradient))
        return Decomposition(left, values, right, float(self.gradient.square().sum()), 0.0)


@dataclass(slots=True)
class SketchedGradient:
    """Two-sided sketch (Y, Z) of a gradient, or of its transpose where `in > out`.

    The narrow sketch Y (k columns) lies on the longer side and the wide one Z (l rows) on the shorter, which costs
    k * max(in, out) + l * min(in, out) numbers. Omega and the signs of Psi are shared by all modules of one size.

    Attributes:
        narrow: Y, (max(in, out), k).
        wide: Z, (l, min(in, out)).
        omega: (min(in, out), k).
        signs: Of Psi, (max(in, out),).
        transposed: Whether it is G^T that is sketched.
    """

    narrow: Tensor
    wide: Tensor
    omega: Tensor
    signs: Tensor
    transposed: bool

    @classmethod
    def zeros(
        cls,
        in_features: int,
        out_features: int,
        matrices: RandomMatrices,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> SketchedGradient:
        """A sketch of the zero gradient."""
        short, long = sorted((in_features, out_features))
        return cls(
            narrow=torch.zeros(long, matrices.k, device=device, dtype=dtype),
            wide=torch.zeros(matrices.l, short, device=device, dtype=dtype),
            omega=matrices.omega(short, device),
            signs=matrices.signs(long, device),
            transposed=in_features > out_features,
        )

    def increment(self, inputs: Tensor, deltas: Tensor) -> Increment:
        """See `GradientStore`."""
        rows, columns = (inputs, deltas) if self.transposed else (deltas, inputs)  # G = rows^T columns
        narrow = rows.T @ (columns @ self.omega.to(columns.dtype))
        return narrow.to(self.narrow.dtype), (self.compress(rows).T @ columns).to(self.wide.dtype)

    def add(self, increment: Increment) -> None:
        """See `GradientStore`."""
        self.narrow += increment[0]
        self.wide += increment[1]

    def measure(self, increment: Increment) -> Tensor:
        """E ||Psi G||^2 = ||G||^2, since Psi's columns are unit vectors of independent signs. See `GradientStore`."""
        return increment[1].square().sum()

    def tensors(self) -> Increment:
        """See `GradientStore`."""
        return self.narrow, self.wide

    def decompose(self) -> Decomposition:
        """See `GradientStore`. The fit X = Q^T G + (Psi Q)^+ Psi R, where R = G - Q Q^T G is what the range Q misses.

        For R's columns of any direction outside Q, with P = Psi Q and D = Psi Psi^T (the buckets' sizes, diagonal), X carries
        (tr P^+ D P^+^T - k) / (n - k) ||R||^2 too much, and the fit's residual has tr (I - P P^+) D / (n - k) ||R||^2.

        A leading direction v loses about ||R||^2 / k to R, of which the fit scatters a k-th of that excess onto its own left
        vector: hence the error of a singular value, to first order (tests/profiling/test_real_gradients.py has MiniLM's).
        """
        wide = solvable(self.wide)
        basis = torch.linalg.qr(solvable(self.narrow)).Q
        projected = solvable(self.compress(basis.T.to(self.signs.device)).T)
        inverse = torch.linalg.pinv(projected.cpu()).to(projected)  # small: see thin_svd
        core = inverse @ wide
        (n, k), l = basis.shape, len(projected)
        sizes = torch.bincount(torch.arange(n, device=basis.device) % l, minlength=l).to(basis.dtype)
        excess = (float((inverse.square() @ sizes).sum()) - k) / (n - k)
        seen = float(((1.0 - (projected * inverse.T).sum(dim=1)) * sizes).sum()) / (n - k)
        missed = float((wide - projected @ core).square().sum()) / seen
        energy = float(core.square().sum()) + (1.0 - excess) * missed
        left, values, right = thin_svd(core)
        left = basis @ left
        if self.transposed:
            left, right = right.T, left.T
        error = math.sqrt(max(missed * excess, 0.0)) / k
        return Decomposition(left, values, right, energy, error)

    def compress(self, rows: Tensor) -> Tensor:
        """Rows Psi^T, (n, l): coordinate i is added to bucket i mod l under its sign, in blocks of rows to save memory."""
        long, l = self.signs.numel(), self.wide.shape[0]
        signs = self.signs.to(rows.dtype)
        pieces = []
        for part in row_blocks(rows, 256):
            padded = part.new_zeros(len(part), -(-long // l) * l)
            torch.mul(part, signs, out=padded[:, :long])
            pieces.append(padded.view(len(part), -1, l).sum(dim=1))
        return torch.cat(pieces)


def choose_sketch_size(targets: Sequence[TargetModule], limit: int | None, weight_bytes: int) -> tuple[int, int]:
    """The size k that a budget asks for, and the largest of it that fits the memory bound.

    Asked for are twice the mean rank of a budget, and 56 at least. All sketches together may take a quarter of the memory of
    the model's weights, or 1 GiB where that is more; below a size of 8 they do not shrink.

    Args:
        targets: The target modules.
        limit: The budget, in adapter parameters; None: 56 will do.
        weight_bytes: Of the model's weights.
    """
    mean_rank = 0.0 if limit is None else limit / max(sum(target.rank_cost for target in targets), 1)
    wanted = max(SKETCH_SIZE, min(math.ceil(2 * mean_rank), max(target.full_rank for target in targets)))
    return wanted, largest_sketch_size(targets, wanted, weight_bytes)


def largest_sketch_size(targets: Sequence[TargetModule], wanted: int, weight_bytes: int, *, copies: int = 1) -> int:
    """The largest size up to the one that is wanted at which all sketches, in so many copies, fit the memory bound.

    A warning says where that is less than what is wanted.
    """
    sides = np.array([sorted((t.in_features, t.out_features)) for t in targets], dtype=np.float64)
    bound = max(SKETCH_SHARE * weight_bytes, SKETCH_BYTES) / copies
    larger = range(LEAST_SIZE + 1, wanted + 1)
    size = LEAST_SIZE + bisect.bisect_right(larger, bound, key=lambda size: _sketch_bytes(sides, size))
    if size < wanted:
        logger.warning(
            "the gradient sketches have %d columns instead of %d, so as to take no more than a quarter of the memory of the "
            "model's weights; singular values beyond are estimated",
            *(size, wanted),
        )
    return size


def bytes_of_weights(model: nn.Module) -> int:
    """The memory that the model's parameters take."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _sketch_bytes(sides: NDArray[np.float64], size: int) -> float:
    """Memory of all gradient stores of one size; `sides` are (n, 2), the shorter first."""
    whole = sides.prod(axis=1)
    sketch = size * sides[:, 1] + 4 * size * sides[:, 0]
    return 4.0 * float(np.where(2 * sketch > whole, whole, sketch).sum())


def new_gradient_store(
    in_features: int,
    out_features: int,
    matrices: RandomMatrices,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> GradientStore:
    """A sketch of the zero gradient, or the gradient itself where a sketch would save less than half of it."""
    short, long = sorted((in_features, out_features))
    if 2 * (matrices.k * long + matrices.l * short) > in_features * out_features:
        return ExactGradient.zeros(in_features, out_features, device, dtype)
    return SketchedGradient.zeros(in_features, out_features, matrices, device, dtype)


def is_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no number is NaN or infinite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
