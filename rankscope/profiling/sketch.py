"""Sketches of a module's weight gradient: streamed from inputs and output gradients, never as large as the weight.

The gradient of a linear module is G = sum_n delta_n x_n^T (out x in). Two random projections of it are kept,

    Y = G Omega   and   Z = Psi G,

and from them the leading singular triples follow: Q = orth(Y), X = (Psi Q)^+ Z, G ~ Q X
(Tropp, Yurtsever, Udell, Cevher, "Practical sketching algorithms for low-rank matrix approximation", 2017, Alg. 4).
Both are linear in G, so sketches of sums and differences are sums and differences of sketches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class GradientAccumulator(Protocol):
    """What the profiler needs of a gradient store: feed it, combine two, take triples and energy."""

    def add(self, inputs: Tensor, deltas: Tensor) -> None:
        """Adds sum_n deltas_n inputs_n^T; `inputs` is (n, in), `deltas` is (n, out)."""
        ...

    def combine(self, weight: float, other: GradientAccumulator, other_weight: float) -> GradientAccumulator:
        """The store of `weight * G + other_weight * G_other`."""
        ...

    def factors(self) -> tuple[Tensor, Tensor]:
        """(Q, X) with G ~ Q X and Q's columns orthonormal; (out, k) and (k, in)."""
        ...

    def energy(self) -> float:
        """||G||_F^2, exact or without bias."""
        ...

    def is_finite(self) -> bool:
        """Whether no number kept is NaN or infinite."""
        ...

    def numel(self) -> int:
        """Numbers kept."""
        ...


class RandomMatrices:
    """The random matrices Omega and Psi of every size, made once and shared by all modules of that size.

    Args:
        k: Columns of the narrow sketch: how many singular triples can be found.
        l: Rows of the wide sketch, at least k + 2; about 4 k for singular values within a few per cent.
        seed: Equal seeds give equal matrices on every device and process.
    """

    def __init__(self, *, k: int, l: int, seed: int) -> None:
        self.k, self.l, self.seed = k, l, seed
        self._made: dict[tuple[str, int, torch.device], Tensor] = {}

    def omega(self, size: int, device: torch.device) -> Tensor:
        """Omega, (size, k), independent standard normal."""
        return self._get("omega", size, (size, self.k), device)

    def psi(self, size: int, device: torch.device) -> Tensor:
        """Psi, (l, size), independent standard normal and independent of Omega."""
        return self._get("psi", size, (self.l, size), device)

    def _get(self, which: str, size: int, shape: tuple[int, int], device: torch.device) -> Tensor:
        if (which, size, device) not in self._made:
            seed = 2 * (self.seed * 1_000_003 + size) + (which == "psi")
            generator = torch.Generator().manual_seed(seed)
            self._made[which, size, device] = torch.randn(shape, generator=generator).to(device)
        return self._made[which, size, device]


@dataclass(slots=True)
class ExactGradient:
    """The gradient itself, for modules so small that a sketch would not be smaller."""

    gradient: Tensor

    @classmethod
    def zeros(cls, in_features: int, out_features: int, device: torch.device) -> ExactGradient:
        """A store of the zero gradient."""
        return cls(torch.zeros(out_features, in_features, device=device))

    def add(self, inputs: Tensor, deltas: Tensor) -> None:
        """See `GradientAccumulator`."""
        self.gradient += (deltas.T @ inputs).float()

    def combine(self, weight: float, other: GradientAccumulator, other_weight: float) -> ExactGradient:
        """See `GradientAccumulator`."""
        assert isinstance(other, ExactGradient)
        return ExactGradient(weight * self.gradient + other_weight * other.gradient)

    def factors(self) -> tuple[Tensor, Tensor]:
        """See `GradientAccumulator`."""
        left, values, right = torch.linalg.svd(self.gradient, full_matrices=False)
        return left, values[:, None] * right

    def energy(self) -> float:
        """See `GradientAccumulator`."""
        return float(self.gradient.square().sum())

    def is_finite(self) -> bool:
        """See `GradientAccumulator`."""
        return bool(torch.isfinite(self.gradient).all())

    def numel(self) -> int:
        """See `GradientAccumulator`."""
        return self.gradient.numel()


@dataclass(slots=True)
class SketchedGradient:
    """Two-sided sketch (Y, Z) of a gradient, or of its transpose where `in > out`.

    The narrow sketch Y (k columns) lies on the longer side and the wide one Z (l rows) on the shorter, which costs
    k * max(in, out) + l * min(in, out) numbers. Psi and Omega have independent standard normal entries and are
    shared by all modules of one size.

    Attributes:
        narrow: Y, (max(in, out), k).
        wide: Z, (l, min(in, out)).
        omega: (min(in, out), k).
        psi: (l, max(in, out)).
        transposed: Whether it is G^T that is sketched.
    """

    narrow: Tensor
    wide: Tensor
    omega: Tensor
    psi: Tensor
    transposed: bool

    @classmethod
    def zeros(
        cls, in_features: int, out_features: int, matrices: RandomMatrices, device: torch.device
    ) -> SketchedGradient:
        """A sketch of the zero gradient."""
        short, long = sorted((in_features, out_features))
        return cls(
            narrow=torch.zeros(long, matrices.k, device=device),
            wide=torch.zeros(matrices.l, short, device=device),
            omega=matrices.omega(short, device),
            psi=matrices.psi(long, device),
            transposed=in_features > out_features,
        )

    def add(self, inputs: Tensor, deltas: Tensor) -> None:
        """See `GradientAccumulator`."""
        rows, columns = (inputs, deltas) if self.transposed else (deltas, inputs)  # G = rows^T columns
        self.narrow += (rows.T @ (columns @ self.omega.to(columns.dtype))).float()
        self.wide += ((rows @ self.psi.T.to(rows.dtype)).T @ columns).float()

    def combine(self, weight: float, other: GradientAccumulator, other_weight: float) -> SketchedGradient:
        """See `GradientAccumulator`."""
        assert isinstance(other, SketchedGradient)
        assert other.psi is self.psi
        return SketchedGradient(
            narrow=weight * self.narrow + other_weight * other.narrow,
            wide=weight * self.wide + other_weight * other.wide,
            omega=self.omega,
            psi=self.psi,
            transposed=self.transposed,
        )

    def factors(self) -> tuple[Tensor, Tensor]:
        """See `GradientAccumulator`."""
        basis, core, _ = self._fit()
        if not self.transposed:
            return basis, core
        left, values, right = torch.linalg.svd(core, full_matrices=False)  # G = core^T basis^T
        return right.T, (values[:, None] * left.T) @ basis.T

    def energy(self) -> float:
        """||G||_F^2 without bias, given Y.

        The least-squares fit X = Q^T G + (Psi Q)^+ Psi R, with R = G - Q Q^T G the part that the range Q misses. Q is
        independent of Psi, so the fit's residual has the expected energy (l - k) ||R||^2, and X carries
        k / (l - k - 1) ||R||^2 too much.
        """
        basis, core, residual = self._fit()
        l, k = self.psi.shape[0], basis.shape[1]
        missed = float(residual.square().sum()) / (l - k)
        return float(core.square().sum()) + (1.0 - k / (l - k - 1)) * missed

    def is_finite(self) -> bool:
        """See `GradientAccumulator`."""
        return bool(torch.isfinite(self.narrow).all() & torch.isfinite(self.wide).all())

    def numel(self) -> int:
        """See `GradientAccumulator`."""
        return self.narrow.numel() + self.wide.numel()

    def _fit(self) -> tuple[Tensor, Tensor, Tensor]:
        """Q, X and the residual of the fit Psi Q X = Z."""
        basis = torch.linalg.qr(self.narrow).Q
        projected = self.psi @ basis
        core = torch.linalg.pinv(projected) @ self.wide
        return basis, core, self.wide - projected @ core


def new_gradient_store(
    in_features: int, out_features: int, matrices: RandomMatrices, device: torch.device
) -> GradientAccumulator:
    """A sketch of the zero gradient, or the gradient itself where a sketch would be as large."""
    short, long = sorted((in_features, out_features))
    if matrices.k * long + matrices.l * short >= in_features * out_features:
        return ExactGradient.zeros(in_features, out_features, device)
    return SketchedGradient.zeros(in_features, out_features, matrices, device)


def singular_values(store: GradientAccumulator) -> Tensor:
    """Leading singular values of the stored gradient, descending."""
    values: Tensor = torch.linalg.svdvals(store.factors()[1])
    return values


def cross_values(first: GradientAccumulator, second: GradientAccumulator) -> Tensor:
    """u_j^T G_2 v_j along the singular directions of G_1, averaged with the same with the roles changed.

    Where G_1 and G_2 are the mean gradients of disjoint batches, their noise is independent, and this is free of the
    inflation by noise that raw singular values have: along a direction that is noise only, its mean is zero.
    """
    one, two = _triples(first), _triples(second)
    return (_along(one, second) + _along(two, first)) / 2.0


def signal_energy(first: GradientAccumulator, second: GradientAccumulator) -> float:
    """||E[G]||_F^2 without bias, from two independent means: <G_1, G_2> = ||(G_1+G_2)/2||^2 - ||(G_1-G_2)/2||^2."""
    return first.combine(0.5, second, 0.5).energy() - first.combine(0.5, second, -0.5).energy()


def _triples(store: GradientAccumulator) -> tuple[Tensor, Tensor]:
    """Left (out, k) and right (k, in) singular vectors, leading first."""
    basis, core = store.factors()
    left, _, right = torch.linalg.svd(core, full_matrices=False)
    return basis @ left, right


def _along(directions: tuple[Tensor, Tensor], store: GradientAccumulator) -> Tensor:
    left, right = directions
    basis, core = store.factors()
    return ((left.T @ basis) * (right @ core.T)).sum(dim=1)
