"""The hooks of a profile: they see x and delta of every target module and keep sketches and sums, never a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankscope.profiling.activations import ActivationSketch
from rankscope.profiling.layers import as_rows
from rankscope.profiling.sketch import GradientStore, Increment, RandomMatrices, new_gradient_store
from rankscope.targets import TargetModule


@dataclass(slots=True)
class Observed:
    """What is kept of one module.

    Attributes:
        store: The sum over batches of weight times mean gradient.
        squares: The sum over batches of weight times the mean gradient's energy, a scalar.
        activations: Sums over input rows; one object for modules that read the same tensor (q, k and v).
        calls: In the present batch's forward pass.
        pending: The present batch's increment where the module is called several times: its energy is that of the sum.
        batches: That reached the module.
    """

    store: GradientStore
    squares: Tensor
    activations: ActivationSketch | None = None
    calls: int = 0
    pending: Increment | None = None
    batches: int = 0

    def take(self, increment: Increment, weight: float) -> None:
        """Adds one batch's gradient, already multiplied by the batch's weight."""
        self.squares += self.store.measure(increment) / weight
        self.store.add(increment)
        self.batches += 1

    def tensors(self) -> list[Tensor]:
        """What is summed over processes, but for the activations, which modules share."""
        return [*self.store.tensors(), self.squares]


class LocalHook:
    """A forward hook that stays behind where its module is copied or pickled; a hook that does nothing takes its place.

    Without it, a copy that is made while a step is sampled would feed the sketches of the original, or fail to be made.
    """

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        """Pass a module's call on."""
        return self._call(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")  # takes anything, returns None, and loads without rankscope


class Observer:
    """Hooks on modules, and what they have seen.

    Args:
        targets: The target modules.
        modules: Each one's module, by name.
        matrices: Of the sketches.
        inputs: Whether to sketch the modules' inputs too.

    Attributes:
        observed: By module name.
        weight: Of the present batch.
        mask: The present batch's tokens against padding, (batch, length): inputs of that shape count without padding.
    """

    def __init__(
        self,
        targets: Sequence[TargetModule],
        modules: Mapping[str, nn.Module],
        matrices: RandomMatrices,
        *,
        inputs: bool = True,
    ) -> None:
        self.weight = 1.0
        self.mask: Tensor | None = None
        self.observed: dict[str, Observed] = {}
        self._modules, self._matrices, self._inputs = modules, matrices, inputs
        self._last: tuple[Tensor, ActivationSketch] | None = None
        self._active = False
        for target in targets:
            device = module_device(modules[target.name])
            store = new_gradient_store(target.in_features, target.out_features, matrices, device)
            self.observed[target.name] = Observed(store, torch.zeros((), device=device))

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """With hooks on the modules."""
        handles = [
            module.register_forward_hook(LocalHook(self._hook(name)), with_kwargs=True)
            for name, module in self._modules.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def begin_batch(self, weight: float, mask: Tensor | None = None) -> None:
        """From now on the hooks see; the batch's gradients come multiplied by its weight."""
        self.weight, self.mask, self._active = weight, mask, True

    def end_batch(self) -> None:
        """Takes what modules that were called several times have pending."""
        for seen in self.observed.values():
            if seen.pending is not None:
                seen.take(seen.pending, self.weight)
        self.drop_batch()

    def drop_batch(self) -> None:
        """Forgets a batch of which nothing was added."""
        self._last, self.mask, self._active = None, None, False
        for seen in self.observed.values():
            seen.calls, seen.pending = 0, None

    def activations(self) -> list[ActivationSketch]:
        """Every activation sketch once."""
        kept = (seen.activations for seen in self.observed.values() if seen.activations is not None)
        return list({id(sketch): sketch for sketch in kept}.values())

    def _hook(self, name: str) -> Callable[..., None]:
        """A forward hook that waits for the gradient of the module's output, at every call of the module."""
        seen = self.observed[name]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            if not self._active:
                return
            seen.calls += 1  # also without gradients: a reentrant checkpoint runs such a segment again
            if not torch.is_grad_enabled():
                return
            if not output.requires_grad:  # the first modules: nothing before them needs a gradient
                output.requires_grad_()
            inputs: Tensor = args[0] if args else next(iter(kwargs.values()))

            def receive(gradient: Tensor) -> None:
                rows, deltas = as_rows(module, inputs.detach(), gradient.detach())
                if self._inputs:
                    self._see_inputs(seen, inputs, rows)
                increment = seen.store.increment(rows, deltas)
                if seen.calls == 1:
                    seen.take(increment, self.weight)
                elif seen.pending is None:
                    seen.pending = increment
                else:
                    seen.pending = tuple(a + b for a, b in zip(seen.pending, increment, strict=True))

            output.register_hook(receive)

        return hook

    def _see_inputs(self, seen: Observed, inputs: Tensor, rows: Tensor) -> None:
        shared = self._last[1] if self._last is not None and self._last[0] is inputs else None
        if shared is not None and (seen.activations is None or seen.activations is shared):
            seen.activations = shared
            return
        if seen.activations is None:
            omega = self._matrices.omega(rows.shape[1], rows.device)
            seen.activations = ActivationSketch.zeros(omega[:, : self._matrices.k // 2])
        masked = self.mask is not None and inputs.ndim == 3 and inputs.shape[:2] == self.mask.shape
        seen.activations.add(rows, self.mask.flatten() if masked and self.mask is not None else None)
        self._last = (inputs, seen.activations)


def module_device(module: nn.Module) -> torch.device:
    """Where a module's first parameter lies."""
    return next(module.parameters()).device
