"""What the controller sees: gradients of a few steps before each decision, sketched by the profile's hooks.

The j-th rank of a module is worth sigma_j^2 of the present gradient, whatever its component points at: components turn to the
leading directions within a few steps. (Crediting ranks with what their tangent space holds of the gradient, and further ones
with the rest, moved nearly all ranks at every decision on digits-shift, since fresh random rows hold next to nothing.)
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
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

Floats = NDArray[np.float64]
Factors = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """What the gradients of a window say.

    Attributes:
        modules: The signals of each watched module, in the model's order.
        directions: Maps a module's name to the right singular vectors, (n, in), of the gradient that its adapter misses.
        batches: Number of batches seen, on all processes.
        signal_share: Share of the gradient energy of all modules that the batches agree on.
        energy: The gradient energy of all modules within the reach of ranks: of twice as many leading values as the largest
            rank, or of all that were sketched.
    """

    modules: tuple[ModuleSignals, ...]
    directions: Callable[[str], Tensor] = field(repr=False)
    batches: int
    signal_share: float
    energy: float


class GradientWindow:
    """Sketches of the gradients of some steps.

    The hooks are on the modules only while a step is sampled. They see gradients of module outputs, which neither clipping nor
    `zero_grad` touches. Every training forward pass of the model (a micro-batch) counts as a batch; evaluation and the
    recomputation of checkpointed segments do not. Nothing is copied from the device before `measure`.

    Args:
        model: The PEFT model, whose own forward passes count.
        targets: The modules to watch.
        sketch_size: Columns of the narrow sketch: how many singular values are found; those beyond are estimated.
        seed: Of the sketches.
        compiled: Whether `torch.compile` may have compiled the model. Sampled steps then run eagerly, since compiled code
            ignores new hooks.
    """

    def __init__(
        self, model: nn.Module, targets: Sequence[TargetModule], *, sketch_size: int, seed: int, compiled: bool = False
    ) -> None:
        self._model, self._compiled = model, compiled
        self._targets = tuple(target for target in targets if target.kind in SUPPORTED)
        present = dict(base_modules(model))
        modules = {target: present[target.name] for target in self._targets}
        self._hooks = partial(GradientHooks, modules, RandomMatrices(k=sketch_size, seed=seed), inputs=False)
        self._sums = self._hooks().accumulators
        self._factor: float | None = None
        self._copied: set[str] = set()  # modules whose inputs change in place
        self._broken = 0
        self._weights: list[float] = []
        self._unread: list[tuple[Tensor, list[float]]] = []
        self._step: tuple[GradientHooks, list[float], int] | None = None
        self._remove: Callable[[], Any] | None = None

    @property
    def broken(self) -> int:
        """Sampled steps so far whose gradients were not finite; they are left out."""
        self._read()
        return self._broken

    def watch(self, weight: float = 1.0) -> None:
        """Record the gradients of what follows until `end_step`.

        Args:
            weight: The factor on the loss, as a GradScaler's scale, which is divided out. Where it changes within a window, the
                batches are weighted by it.
        """
        self.close()
        observer = self._hooks(factor=self._factor or 1.0, copied=self._copied)
        passes: list[float] = []
        hooks = ExitStack()
        if self._compiled:
            hooks.enter_context(torch.compiler.set_stance("force_eager"))
        hooks.enter_context(observer.hooked())
        begin = LocalHook(partial(_begin_pass, observer, passes, weight))
        hooks.callback(self._model.register_forward_pre_hook(begin).remove)
        hooks.callback(observer.end_batch)
        self._step = observer, passes, len(self._copied)
        self._remove = remove = weakref.finalize(self, hooks.close)  # at the latest with the window: a step may raise
        remove.atexit = False

    def end_step(self) -> None:
        """Add the step that was watched, if one was."""
        step = self._step
        self.close()
        if step is None:
            return
        observer, passes, n_copied = step
        if (self._factor is None and not self._fits(observer)) or not passes:
            return
        if len(self._copied) > n_copied:  # the gradient of an input that was changed in place is lost
            return
        squares = [seen.squares for seen in observer.accumulators.values()]
        finite = torch.isfinite(torch.stack([each.to(squares[0].device) for each in squares]).sum())
        for name, seen in observer.accumulators.items():
            for total, new in zip(self._sums[name].tensors(), seen.tensors(), strict=True):
                total += torch.where(finite.to(new.device), new, torch.zeros_like(new))
        self._unread.append((finite, passes))

    def _fits(self, observer: GradientHooks) -> bool:
        """Whether float32 holds the squares of the gradients; if not, later steps are multiplied by a power of two.

        Every process must call it. The first sampled step that is finite and not zero decides.
        """
        peak = max(gathered(observer.peak()))
        if 0.0 < peak < math.inf:
            self._factor = in_range(peak)
        return self._factor in (None, 1.0)

    def close(self) -> None:
        """Remove the hooks."""
        if self._remove is not None:
            self._remove()
        self._step = self._remove = None

    def clear(self) -> None:
        """Forget what was seen."""
        for seen in self._sums.values():
            seen.clear()
        self._read()
        self._weights.clear()

    def measure(self, factors: Factors) -> Signals | None:
        """The signals of all processes' batches since `clear`; None if there was no gradient, or all were zero.

        Args:
            factors: A of shape (r, in) and B of shape (out, r) of each module, by name.
        """
        sum_over_processes(tensor for seen in self._sums.values() for tensor in seen.tensors())
        self._read()
        self._weights = [weight for each in gathered(self._weights) for weight in each]
        found = self._measure(factors, np.array(self._weights)) if self._weights else None
        if not is_first():  # the first process holds what all have seen
            self.clear()
        return found

    def _measure(self, factors: Factors, weights: Floats) -> Signals | None:
        sums = self._sums
        found = {name: seen.decompose() for name, seen in sums.items()}
        total = float(weights.sum())
        energy = np.array([max(each.energy, 0.0) for each in found.values()]) / total**2
        if not energy.any():
            return None
        measured = np.array([float(seen.measure(seen.kept)) for seen in sums.values()]) / total**2
        squares = np.array([float(seen.squares) for seen in sums.values()]) / total
        noise = noise_of_mean(measured, squares, float((weights**2).sum()) / total**2)
        pooled = float(np.clip(1.0 - noise.sum() / energy.sum(), 0.0, 1.0))
        shares = _cautious_shares(energy - noise, energy, pooled, len(weights))
        reach = 2 * max(len(factors[target.name][0]) for target in self._targets)
        modules, within = [], 0.0
        for target, share in zip(self._targets, shares, strict=True):
            gradient, rank = found[target.name], len(factors[target.name][0])
            spectrum = full_spectrum(gradient, total, float(share), target.full_rank, factor=self._factor or 1.0)
            values, gains = spectrum[:rank], spectrum[rank:]
            within += sum(values) + sum(gains[: max(reach, len(gradient.values)) - rank])
            values += [0.0] * (rank - len(values))  # beyond full rank
            modules.append(ModuleSignals(target=target, values=tuple(values), gains=tuple(gains)))
        return Signals(
            modules=tuple(modules),
            directions=lambda name: residual_directions(found[name], *factors[name]),  # for the few modules that grow
            batches=len(weights),
            signal_share=pooled,
            energy=within,
        )

    def state_dict(self) -> dict[str, Any]:
        """What all processes saw, as tensors and numbers. Every process must call it."""
        sums = {name: [tensor.clone() for tensor in seen.tensors()] for name, seen in self._sums.items()}
        sum_over_processes(tensor for tensors in sums.values() for tensor in tensors)
        broken = sum(gathered(self.broken))
        weights = [weight for each in gathered(self._weights) for weight in each]
        return {"sums": sums, "weights": weights, "broken": broken, "factor": self._factor}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`. The first process takes what all saw, however many they were."""
        self.clear()
        self._broken, self._factor = 0, state.get("factor")
        if not is_first():
            return
        for name, seen in self._sums.items():
            for tensor, value in zip(seen.tensors(), state["sums"][name], strict=True):
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


def _begin_pass(observer: GradientHooks, passes: list[float], weight: float, model: nn.Module, _: Any) -> None:
    """A forward pass begins, so the backward pass of the one before is over."""
    observer.end_batch()
    if model.training and torch.is_grad_enabled():
        passes.append(weight)
        observer.begin_batch(weight)


def full_spectrum(found: Decomposition, weight: float, share: float, size: int, *, factor: float = 1.0) -> list[float]:
    """Energies of a mean gradient's signal up to full rank, descending; `energy_tail` estimates those beyond the sketch.

    Args:
        found: The summed gradient.
        weight: What to divide the sum by.
        share: Share of the energy that is signal.
        size: The full rank.
        factor: The power of two that gradients were multiplied by.
    """
    leading: list[float] = ((found.values / weight).square() * share).tolist()
    tail = energy_tail(np.asarray(leading), max(found.energy, 0.0) / weight**2 * share, size)
    return [value / factor**2 for value in (*leading, *np.minimum(tail, leading[-1]).tolist())]


def noise_of_mean(energy: Floats, squares: Floats, concentration: float) -> Floats:
    """The noise in the energy of a weighted mean gradient, by the scatter between batches.

    With E ||G_b||^2 = S + v and weights w_b of sum 1, E sum_b w_b ||G_b||^2 = S + v and E ||sum_b w_b G_b||^2 = S + v q, where
    q = sum_b w_b^2. The estimate of v q is returned; at equal weights it is that of a profile.

    Args:
        energy: (n,) squared norms of the weighted means.
        squares: (n,) weighted means of the squared norms.
        concentration: q. At 1 there is one batch only, and all of it counts as signal.
    """
    if concentration >= 1.0:
        return np.zeros_like(energy)
    return (squares - energy) * concentration / (1.0 - concentration)


def _cautious_shares(signal: Floats, energy: Floats, pooled: float, n_batches: int) -> Floats:
    """Each module's share of signal, drawn towards that of all modules, or towards a half where that is less.

    A profile's shares are not bounded so. A window is a few batches only, and late in a run its gradient may be all noise: the
    modules' own shares, near 0 each, would then differ by large factors for no reason.
    """
    own = np.clip(np.divide(signal, energy, out=np.zeros_like(signal), where=energy > 0), 0.0, 1.0)
    weight = (n_batches - 1) / (n_batches - 1 + POOLED_BATCHES)
    return np.asarray(weight * own + (1.0 - weight) * max(pooled, 0.5), dtype=np.float64)


@torch.no_grad()
def residual_directions(gradient: Decomposition, a: Tensor, b: Tensor) -> Tensor:
    """Right singular vectors of the gradient that an adapter's factors miss, (n, in), by descending singular values.

    A step on A and B moves W_0 + s B A within the tangent space of the matrices of that rank, whose columns lie in the span of
    B's or whose rows in that of A's. It misses R = (I - P_B) G (I - P_A) of G (Vandereycken, SIAM J. Optim. 23, 2013, sec. 2.1).
    A new row of A along R's leading right singular vector captures most of it. Values of 0 are left out.

    Args:
        gradient: Leading singular triples, G ~ left diag(values) right.
        a: (r, in); r may be 0.
        b: (out, r); columns of zeros, as of new ranks, span nothing.
    """
    left, right = gradient.left * gradient.values, gradient.right
    columns, rows = _basis(b.to(left)), _basis(a.to(right).T)
    left_core = torch.linalg.qr(left - columns @ (columns.T @ left)).R
    basis, right_core = torch.linalg.qr((right - (right @ rows) @ rows.T).T)
    _, values, directions = thin_svd(left_core @ right_core.T)
    found: Tensor = (directions @ basis.T)[values > 1e-5 * float(gradient.values[:1].sum())]
    return found


def _basis(matrix: Tensor) -> Tensor:
    """(n, r): an orthonormal basis of the columns' span, filled up with zeros."""
    left, values, _ = thin_svd(matrix)
    basis: Tensor = left * (values > 1e-5 * values[:1]).to(left)
    return basis
