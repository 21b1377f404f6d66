"""What the controller sees: gradients of a few steps before each decision, sketched by the profile's hooks.

The j-th rank of a module is worth sigma_j^2 of the present gradient, whatever its component points at: components turn to the
leading directions within a few steps. (Crediting ranks with what their tangent space holds of the gradient moved nearly all
ranks at every decision on digits-shift, since fresh random rows hold next to nothing.)
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

from rankscope.control.decisions import ModuleSignals
from rankscope.distributed import gathered, is_first, sum_over_processes
from rankscope.profiling import (
    SUPPORTED,
    Decomposition,
    GradientHooks,
    LocalHook,
    RandomMatrices,
    energy_tail,
    in_range,
    leaves,
    signal_shares,
    thin_svd,
)
from rankscope.targets import TargetModule, base_modules

Floats = NDArray[np.float64]
Factors = Mapping[str, tuple[Tensor, Tensor]]  # A, (r, in), and B, (out, r), by module


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """What the gradients of a window say, on all processes."""

    modules: tuple[ModuleSignals, ...] = ()  # of each watched module, in the model's order
    directions: Callable[[str], Tensor] | None = field(default=None, repr=False)  # see `residual_directions`; by name
    batches: int = 0
    signal_share: float = math.nan  # of the gradient energy of all modules, what the batches agree on


class GradientWindow:
    """Sketches of the gradients of some steps.

    The hooks are on the modules only while a step is sampled; a forward or backward pass that raises removes them, and the
    step does not count. They see gradients of module outputs, which neither clipping nor
    `zero_grad` touches. Every training forward pass of the PEFT model (a micro-batch) counts as a batch, or, if processes have
    `shared` it, as part of one; evaluation and the recomputation of checkpointed segments do not. If the model may be
    `compiled`, sampled steps run eagerly, since compiled code ignores new hooks. Nothing is copied from the device before
    `measure`.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[TargetModule],
        *,
        sketch_size: int,
        seed: int,
        compiled: bool = False,
        shared: bool = False,
    ) -> None:
        self._model, self._compiled, self._shared = model, compiled, shared
        self._targets = tuple(target for target in targets if target.kind in SUPPORTED)
        present = dict(base_modules(model))
        modules = {target: present[target.name] for target in self._targets}
        matrices = RandomMatrices(k=sketch_size, seed=seed)
        self._hooks = partial(GradientHooks, modules, matrices, inputs=False, shared=shared)
        self._sums = self._hooks().accumulators
        self._factor: float | None = None
        self._copied: set[str] = set()  # modules whose inputs change in place
        self._broken = 0
        self._weights: list[float] = []
        self._unread: list[tuple[Tensor, list[float]]] = []
        self._step: tuple[GradientHooks, list[float], int, Callable[[], Any]] | None = None

    @property
    def broken(self) -> int:
        """Sampled steps so far whose gradients were not finite; they are left out."""
        self._read()
        return self._broken

    def watch(self, weight: float = 1.0) -> None:
        """Record gradients until `end_step`. The weight, a GradScaler's scale, is divided out; batches are weighted by it."""
        self.close()
        observer, factor = self._hooks(copied=self._copied), self._factor or 1.0  # no cycle: see `remove`
        passes: list[float] = []

        def begin_pass(model: nn.Module, _: Any) -> None:
            observer.end_batch()  # the backward pass of the one before is over
            if model.training and torch.is_grad_enabled():
                passes.append(weight)
                observer.begin_batch(weight, factor=factor)

        def end_pass(model: nn.Module, _: Any, output: Any) -> None:
            # The last hook without an output: the pass raised, and torch is past all others.
            if output is None and next(reversed(model._forward_hooks)) == handle.id:
                abandon()
            for _, tensor in leaves(output):
                if tensor.requires_grad:
                    tensor.register_hook(lambda _: _at_failed_backward(abandon))

        def abandon() -> None:
            passes.clear()
            remove()

        hooks, model = ExitStack(), self._model
        if self._compiled:
            hooks.enter_context(torch.compiler.set_stance("force_eager"))
        hooks.enter_context(observer.hooked())
        hooks.callback(model.register_forward_pre_hook(LocalHook(begin_pass)).remove)
        handle = model.register_forward_hook(LocalHook(end_pass), always_call=True)
        hooks.callback(handle.remove)
        hooks.callback(observer.end_batch)
        remove = weakref.finalize(self, hooks.close)  # at the latest with the window: what follows a pass may raise
        remove.atexit = False
        self._step = observer, passes, len(self._copied), remove

    def end_step(self) -> None:
        """Add the step that was watched, if one was."""
        step = self._step
        self.close()
        if step is None:
            return
        observer, passes, n_copied, _ = step
        if self._shared:
            observer.merge()
            passes = passes if is_first() else []
        if self._factor is None:
            peak = max(gathered(observer.peak()))  # of the first gradients: if float32 does not hold their squares,
            if 0.0 < peak < math.inf:  # later ones are multiplied by a power of two
                self._factor = in_range(peak)
            if self._factor not in (None, 1.0):
                return
        if not passes or len(self._copied) > n_copied:  # of an input that was changed in place the gradient is lost
            return
        squares = [seen.squares for seen in observer.accumulators.values()]
        finite = torch.isfinite(torch.stack([each.to(squares[0].device) for each in squares]).sum())
        for name, seen in observer.accumulators.items():
            for total, new in zip(self._sums[name].tensors(), seen.tensors(), strict=True):
                total += torch.where(finite.to(new.device), new, torch.zeros_like(new))
        self._unread.append((finite, passes))

    def close(self) -> None:
        """Remove the hooks."""
        if self._step is not None:
            *_, remove = self._step
            remove()
        self._step = None

    def measure(self, factors: Factors) -> Signals:
        """The signals of all batches since the last call: none without a gradient that is not 0. Every process must call it."""
        sum_over_processes(tensor for seen in self._sums.values() for tensor in seen.tensors())
        self._read()
        weights = [weight for each in gathered(self._weights) for weight in each]
        found = self._signals(factors, np.array(weights)) if weights else Signals()
        self._clear()
        return found

    def _clear(self) -> None:
        for seen in self._sums.values():
            seen.clear()
        self._unread, self._weights = [], []

    def _signals(self, factors: Factors, weights: Floats) -> Signals:
        sums = self._sums
        found = {name: seen.decompose() for name, seen in sums.items()}
        total = float(weights.sum())
        energy = np.array([max(each.energy, 0.0) for each in found.values()]) / total**2
        if not energy.any():
            return Signals()
        measured = np.array([float(seen.measure(seen.kept)) for seen in sums.values()]) / total**2
        squares = np.array([float(seen.squares) for seen in sums.values()]) / total
        noise = noise_of_mean(measured, squares, float((weights**2).sum()) / total**2)
        pooled = float(np.clip(1.0 - noise.sum() / energy.sum(), 0.0, 1.0))
        # Late in a run a few batches may hold noise alone: without a floor, shares near 0 would differ by large factors.
        shares = signal_shares(energy - noise, energy, len(weights), pooled=max(pooled, 0.5))
        reach = 2 * max(len(factors[target.name][0]) for target in self._targets)
        modules = []
        for target, share in zip(self._targets, shares, strict=True):
            gradient, rank = found[target.name], len(factors[target.name][0])
            spectrum = full_spectrum(gradient, total, float(share), target.full_rank, factor=self._factor or 1.0)
            worth = (*spectrum, *[0.0] * (rank - len(spectrum)))  # beyond full rank
            modules.append(ModuleSignals(target=target, rank=rank, worth=worth, reach=max(reach, len(gradient.values))))
        return Signals(
            modules=tuple(modules),
            directions=lambda name: residual_directions(found[name], *factors[name]),  # for the few modules that grow
            batches=len(weights),
            signal_share=pooled,
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
        self._clear()
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
        finite = torch.stack([flag.cpu() for flag, _ in unread]).tolist() if unread else []
        self._broken += finite.count(False)
        self._weights += [w for fine, (_, weights) in zip(finite, unread, strict=True) if fine for w in weights]


def _at_failed_backward(call: Callable[[], object]) -> None:
    """Call if the backward pass that is running raises: the engine then drops, uncalled, what it was to call at its end."""

    def ended() -> None:
        dropped.detach()

    dropped = weakref.finalize(ended, call)
    torch.autograd.Variable._execution_engine.queue_callback(ended)


def full_spectrum(found: Decomposition, weight: float, share: float, size: int, *, factor: float = 1.0) -> list[float]:
    """Energies of a mean gradient's signal up to full rank (`size`), descending; `energy_tail` estimates those beyond the sketch.

    `found` is the sum of gradients times `factor`, a power of two; `weight` divides it; `share` of the energy is signal.
    """
    leading: list[float] = ((found.values / weight).square() * share).tolist()
    tail = energy_tail(np.asarray(leading), max(found.energy, 0.0) / weight**2 * share, size)
    return [value / factor**2 for value in (*leading, *np.minimum(tail, leading[-1]).tolist())]


def noise_of_mean(energy: Floats, squares: Floats, concentration: float) -> Floats:
    """The noise in the energy of a weighted mean gradient, by the scatter between batches.

    With E ||G_b||^2 = S + v and weights w_b of sum 1, E sum_b w_b ||G_b||^2 = S + v (`squares`) and E ||sum_b w_b G_b||^2 =
    S + v q (`energy`), where q = sum_b w_b^2 (`concentration`; at 1 there is one batch only, and all counts as signal). The
    estimate of v q is returned; at equal weights it is that of a profile.
    """
    if concentration >= 1.0:
        return np.zeros_like(energy)
    return (squares - energy) * concentration / (1.0 - concentration)


@torch.no_grad()
def residual_directions(gradient: Decomposition, a: Tensor, b: Tensor) -> Tensor:
    """Right singular vectors of the part of a gradient that an adapter misses, (n, in), by descending singular values.

    A step on A (r, in) and B (out, r) moves W_0 + s B A within the tangent space of the matrices of that rank, whose columns lie
    in the span of B's or whose rows in that of A's. It misses R = (I - P_B) G (I - P_A) of the gradient G (Vandereycken, SIAM J.
    Optim. 23, 2013, sec. 2.1). A new row of A along R's leading right singular vector captures most of it.
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
