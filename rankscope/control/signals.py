"""What the controller sees of a running fine-tuning: gradients at a few steps before each decision, through the profile's hooks.

The j-th rank of a module is worth sigma_j^2 of the present gradient, whatever its component points at: components turn to the
leading directions within a few steps. (Crediting ranks with what their tangent space holds of the gradient, and further ones
with the rest, moved nearly all ranks at every decision on digits-shift, since fresh random rows hold next to nothing.)

The hooks are on the modules only while a step is sampled. They see gradients of module outputs, which neither clipping nor
`zero_grad` touches. Every training forward pass of the model (one a micro-batch under gradient accumulation) counts as a batch;
evaluation, and a checkpointed segment that is run again, do not. Code that `torch.compile` made passes over hooks that come
later, so that eager code takes its place while a step is sampled, if the model may be compiled.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rankscope.control.policy import ModuleSignals
from rankscope.distributed import gathered, is_first, sum_over_processes
from rankscope.profiling import (
    POOLED_BATCHES,
    SUPPORTED,
    Decomposition,
    GradientHooks,
    LocalHook,
    RandomMatrices,
    energy_tail,
    in_range,
    thin_svd,
)
from rankscope.targets import TargetModule, base_modules


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


Floats = NDArray[np.float64]
Factors = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The signals of a window.

    Attributes:
        signals: Of each module, in the model's order.
        directions: Of a module by name: right singular vectors, (n, in), of what its adapter did not reach.
        batches: Seen, on all processes.
        signal_share: The share of the gradient energy of all modules that the batches agree on.
        energy: Of all modules, within the reach of ranks: of twice as many leading values as the largest rank, or all that
            were sketched.
    """

    signals: tuple[ModuleSignals, ...]
    directions: Callable[[str], Tensor] = field(repr=False)
    batches: int
    signal_share: float
    energy: float


class GradientWindow:
    """Sketches of the gradients of some steps.

    Args:
        model: The PEFT model; its own forward passes are what counts.
        targets: The modules to watch.
        sketch_size: Columns of the narrow sketch: how many singular values are found; those beyond are estimated.
        seed: Of the sketches.
        compiled: Whether `torch.compile` may have compiled the model.

    Nothing is copied from the device before `measure`.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[TargetModule],
        *,
        sketch_size: int,
        seed: int,
        compiled: bool = False,
    ) -> None:
        self._broken = 0
        self._compiled = compiled
        self._model = model
        self._targets = tuple(target for target in targets if target.kind in SUPPORTED)
        present = dict(base_modules(model))
        self._modules = {target: present[target.name] for target in self._targets}
        self._matrices = RandomMatrices(k=sketch_size, seed=seed)
        self._sums = GradientHooks(self._modules, self._matrices, inputs=False).accumulators
        self._factor: float | None = None
        self._copied: set[str] = set()  # modules whose inputs change in place
        self._weights: list[float] = []
        self._unread: list[tuple[Tensor, list[float]]] = []
        self._step: _Step | None = None
        self._end: weakref.finalize[..., Any] | None = None

    @property
    def broken(self) -> int:
        """Sampled steps so far whose gradients were not finite; they are left out."""
        self._read()
        return self._broken

    def watch(self, weight: float = 1.0) -> None:
        """Sees what comes until `end_step`.

        Args:
            weight: The factor on the loss, as a GradScaler's scale, which is divided out; where it changes within a window, the
                batches are weighted by it.
        """
        self.close()
        observer = GradientHooks(
            self._modules,
            self._matrices,
            inputs=False,
            factor=self._factor or 1.0,
            copied=self._copied,
        )
        self._step = _Step(self._model, observer, weight, n_copied=len(self._copied), compiled=self._compiled)
        self._end = weakref.finalize(self, self._step.close)  # at the latest with the window: a step may raise
        self._end.atexit = False

    def end_step(self) -> None:
        """Takes the step that was watched, if one was."""
        step = self._step
        self.close()
        if step is None or (self._factor is None and not self._fits(step.observer)) or not step.passes:
            return
        if (
            len(self._copied) > step.n_copied
        ):  # a gradient is lost, where the present inputs are not those that were used
            return
        observed = step.observer.accumulators
        finite = torch.isfinite(_total([seen.squares for seen in observed.values()]))
        for name, seen in observed.items():
            for kept, new in zip(self._sums[name].tensors(), seen.tensors(), strict=True):
                kept += torch.where(finite.to(new.device), new, torch.zeros_like(new))
        self._unread.append((finite, [step.weight] * step.passes))

    def _fits(self, observer: GradientHooks) -> bool:
        """Whether float32 holds the squares of the gradients; where not, later steps are multiplied by a power of two.

        Asked once, of the first sampled step that is finite and not zero. Every process must ask.
        """
        peak = max(gathered(observer.peak()))
        if 0.0 < peak < math.inf:
            self._factor = in_range(peak)
        return self._factor in (None, 1.0)

    def close(self) -> None:
        """Takes the hooks off."""
        if self._end is not None:
            self._end()  # once only
        self._step = self._end = None

    def clear(self) -> None:
        """Forgets what was seen."""
        for sums in self._sums.values():
            sums.clear()
        self._read()
        self._weights.clear()

    def measure(self, factors: Factors) -> Measured | None:
        """The signals of what was seen since `clear`, on all processes; None where no gradient was, or all were zero.

        What was seen stays, the first process having all of it.

        Args:
            factors: A of shape (r, in) and B of shape (out, r) of each module, by name.
        """
        sum_over_processes(tensor for sums in self._sums.values() for tensor in sums.tensors())
        self._read()
        self._weights = [w for each in gathered(self._weights) for w in each]
        measured = self._measure(factors, np.array(self._weights)) if self._weights else None
        if not is_first():
            self.clear()
        return measured

    def _measure(self, factors: Factors, weights: Floats) -> Measured | None:
        found = {name: sums.decompose() for name, sums in self._sums.items()}
        energy, noise = self._energies(found, weights)
        if not energy.any():
            return None
        pooled = float(np.clip(1.0 - noise.sum() / energy.sum(), 0.0, 1.0))
        shares = cautious_shares(energy - noise, energy, pooled, len(weights))
        reach = 2 * max(len(factors[target.name][0]) for target in self._targets)
        signals, within = [], 0.0
        for target, share in zip(self._targets, shares, strict=True):
            a = factors[target.name][0]
            spectrum = full_spectrum(
                found[target.name], float(weights.sum()), float(share), target.full_rank, factor=self._factor or 1.0
            )
            values, gains = spectrum[: len(a)], spectrum[len(a) :]
            within += sum(values) + sum(gains[: max(reach, len(found[target.name].values)) - len(a)])
            values += [0.0] * (len(a) - len(values))  # beyond full rank
            signals.append(ModuleSignals(target=target, values=tuple(values), gains=tuple(gains)))

        def directions(name: str) -> Tensor:  # asked for the few modules that grow
            return residual_directions(found[name], *factors[name])

        return Measured(
            signals=tuple(signals), directions=directions, batches=len(weights), signal_share=pooled, energy=within
        )

    def state_dict(self) -> dict[str, Any]:
        """What all processes saw, as tensors and numbers; every process must call it."""
        sums = {name: [tensor.clone() for tensor in sums.tensors()] for name, sums in self._sums.items()}
        sum_over_processes(tensor for tensors in sums.values() for tensor in tensors)
        broken = sum(gathered(self.broken))
        weights = [weight for each in gathered(self._weights) for weight in each]
        return {"sums": sums, "weights": weights, "broken": broken, "factor": self._factor}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`: the first process takes what all saw, however many they were."""
        self.clear()
        self._broken, self._factor = 0, state.get("factor")
        if not is_first():
            return
        for name, sums in self._sums.items():
            for tensor, value in zip(sums.tensors(), state["sums"][name], strict=True):
                tensor.copy_(value)
        self._weights, self._broken = [float(weight) for weight in state["weights"]], int(state["broken"])

    def _read(self) -> None:
        """Learn which steps were finite, in one copy from the device."""
        unread, self._unread = self._unread, []
        if not unread:
            return
        device = unread[0][0].device
        finite = torch.stack([flag.to(device) for flag, _ in unread]).tolist()
        self._broken += finite.count(False)
        self._weights += [w for fine, (_, weights) in zip(finite, unread, strict=True) if fine for w in weights]

    def _energies(self, found: Mapping[str, Decomposition], weights: Floats) -> tuple[Floats, Floats]:
        """The energy of each module's mean gradient, and what of it is noise; (n,) each."""
        total = float(weights.sum())
        energy = np.array([max(each.energy, 0.0) for each in found.values()]) / total**2
        measured = np.array([float(s.measure(s.kept)) for s in self._sums.values()]) / total**2
        squares = np.array([float(sums.squares) for sums in self._sums.values()]) / total
        return energy, noise_of_mean(measured, squares, float((weights**2).sum()) / total**2)


class _Step:
    """The hooks of one sampled step."""

    def __init__(
        self, model: nn.Module, observer: GradientHooks, weight: float, *, n_copied: int, compiled: bool
    ) -> None:
        self.observer, self.weight, self.n_copied, self.passes = observer, weight, n_copied, 0
        self._stack = ExitStack()
        if compiled:
            self._stack.enter_context(torch.compiler.set_stance("force_eager"))
        self._stack.enter_context(observer.hooked())
        self._stack.callback(model.register_forward_pre_hook(LocalHook(self._begin_pass)).remove)

    def close(self) -> None:
        self.observer.end_batch()
        self._stack.close()

    def _begin_pass(self, model: nn.Module, _: Any) -> None:
        """A forward pass begins, so the backward pass of the one before is over."""
        self.observer.end_batch()
        if model.training and torch.is_grad_enabled():
            self.passes += 1
            self.observer.begin_batch(self.weight)


def full_spectrum(found: Decomposition, weight: float, share: float, size: int, *, factor: float = 1.0) -> list[float]:
    """The energies of a mean gradient's signal, descending, up to full rank; beyond the sketch as `energy_tail` estimates them.

    Args:
        found: Of the summed gradient.
        weight: What to divide the sum by.
        share: Of the energy, what is signal.
        size: The full rank.
        factor: The power of two that gradients were multiplied by.
    """
    leading: list[float] = ((found.values / weight).square() * share).tolist()
    tail = energy_tail(np.asarray(leading), max(found.energy, 0.0) / weight**2 * share, size)
    return [value / factor**2 for value in (*leading, *np.minimum(tail, leading[-1]).tolist())]


def noise_of_mean(energy: Floats, squares: Floats, concentration: float) -> Floats:
    """The noise in the energy of a weighted mean gradient, by the scatter between batches.

    With E ||G_b||^2 = S + v and weights w_b of sum 1, E sum_b w_b ||G_b||^2 = S + v and E ||sum_b w_b G_b||^2 = S + v q, where
    q = sum_b w_b^2. What is returned estimates v q; at equal weights it is `profiling.features.split_energy`'s.

    Args:
        energy: (n,) squared norms of the weighted means.
        squares: (n,) weighted means of the squared norms.
        concentration: q; at 1 there is but one batch, and all of it passes for signal.
    """
    if concentration >= 1.0:
        return np.zeros_like(energy)
    return (squares - energy) * concentration / (1.0 - concentration)


def cautious_shares(signal: Floats, energy: Floats, pooled: float, n_batches: int) -> Floats:
    """Each module's share of signal, drawn towards that of all modules, or towards a half where that is less.

    As `profiling.features.signal_shares`, but a window is a few batches only, and late in a run its gradient may be all noise:
    then the modules' own shares, near 0 each, would differ by large factors for no reason.
    """
    own = np.clip(np.divide(signal, energy, out=np.zeros_like(signal), where=energy > 0), 0.0, 1.0)
    weight = (n_batches - 1) / (n_batches - 1 + POOLED_BATCHES)
    return np.asarray(weight * own + (1.0 - weight) * max(pooled, 0.5), dtype=np.float64)


def _total(scalars: Sequence[Tensor]) -> Tensor:
    """The sum of scalars that may lie on several devices."""
    device = scalars[0].device
    return torch.stack([scalar.to(device) for scalar in scalars]).sum()
