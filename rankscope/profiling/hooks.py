"""The hooks of a profile: they see x and delta of every target module and keep sketches and sums, never a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rankscope.distributed import gathered, sum_over_processes
from rankscope.errors import ModelError
from rankscope.profiling.sketch import GradientStore, Increment, RandomMatrices, as_rows, new_gradient_store, solvable
from rankscope.targets import TargetModule

_ROWS = 2048  # at a time, since they become float32


@dataclass(slots=True)
class ActivationSketch:
    """Sums over input rows x about their mean m: their number, sum ||x - m||^2, and the sketch sum (x - m) (x - m)^T Omega.

    Attributes:
        omega: (in, k), independent standard normal.
        count: Of rows, a whole scalar.
        mean: m, (in,).
        squares: sum ||x - m||^2, a scalar.
        product: sum (x - m) (x - m)^T Omega, (in, k).
    """

    omega: Tensor
    count: Tensor
    mean: Tensor
    squares: Tensor
    product: Tensor

    @classmethod
    def zeros(cls, omega: Tensor) -> ActivationSketch:
        """A sketch of nothing."""
        count = torch.zeros((), dtype=torch.int64, device=omega.device)
        zero = torch.zeros((), device=omega.device)
        return cls(omega, count, omega.new_zeros(len(omega)), zero, torch.zeros_like(omega))

    def copy(self) -> ActivationSketch:
        """The same sums in memory of their own."""
        return ActivationSketch(
            self.omega, self.count.clone(), self.mean.clone(), self.squares.clone(), self.product.clone()
        )

    def add(self, inputs: Tensor, mask: Tensor | None = None) -> None:
        """Adds rows, (n, in), of any floating type; where a mask (n,) is 0, the row is padding and does not count."""
        padding = None if mask is None else mask.eq(0)[:, None]
        for start in range(0, len(inputs), _ROWS):
            part = slice(start, start + _ROWS)
            self._add(inputs[part].float(), None if padding is None else padding[part])

    def _add(self, rows: Tensor, padding: Tensor | None) -> None:
        n = torch.full_like(self.count, len(rows))
        if padding is not None:
            n -= padding.sum()
            rows = rows.masked_fill(padding, 0.0)
        mean = rows.sum(dim=0) / n.clamp_min(1)
        rows = rows - mean
        if padding is not None:
            rows = rows.masked_fill(padding, 0.0)
        apart = mean - self.mean
        total = self.count + n
        between = self.count * (n / total.clamp_min(1))
        self.squares += rows.square().sum() + between * apart.square().sum()
        self.product += rows.T @ (rows @ self.omega) + between * torch.outer(apart, apart @ self.omega)
        self.mean += apart * (n / total.clamp_min(1))
        self.count = total

    def sum_over_processes(self) -> None:
        """Makes it the sketch of the rows of all processes, each of which must call it."""
        total, mean = self.count.clone(), self.mean * self.count
        sum_over_processes([total, mean])
        mean /= total.clamp_min(1)
        apart = self.mean - mean
        self.squares += self.count * apart.square().sum()
        self.product += self.count * torch.outer(apart, apart @ self.omega)
        sum_over_processes([self.squares, self.product])
        self.count, self.mean = total, mean

    def second_moment(self) -> float:
        """Mean ||x||^2."""
        return self.variance() + float(self.mean.square().sum())

    def variance(self) -> float:
        """Tr C: the trace of the covariance C of x."""
        return float(self.squares / self.count.clamp_min(1))

    def effective_rank(self) -> float:
        """(tr C)^2 / ||C||_F^2 (the participation ratio), with ||C||_F^2 = E ||C Omega||_F^2 / k."""
        squared = float((self.product / self.count.clamp_min(1)).square().sum()) / self.omega.shape[1]
        return self.variance() ** 2 / squared if squared else 0.0

    def variances(self) -> Tensor:
        """Leading eigenvalues of C, descending, at least 0 (Nystrom: Halko, Martinsson, Tropp 2011, sec. 5.5): EVA's signal."""
        omega, sketch = solvable(self.omega), solvable(self.product / self.count.clamp_min(1))
        basis = torch.linalg.qr(sketch).Q
        core = torch.linalg.lstsq((basis.T @ omega).T, (basis.T @ sketch).T).solution
        values: Tensor = torch.linalg.eigvalsh((core + core.T) / 2.0)
        return values.flip(0).clamp_min(0.0)


# Of two: the square of a gradient beyond, or of a thousandth of one below, may leave float32's range.
SAFE_EXPONENT = 30


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
        factor: Multiplies gradients before they are kept; see `in_range`.
        copied: Modules whose inputs are copied, since they are changed in place afterwards. One that is found to be is added, its
            present gradient lost. None: an error is raised instead.

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
        factor: float = 1.0,
        copied: set[str] | None = None,
    ) -> None:
        self.weight = 1.0
        self.mask: Tensor | None = None
        self.observed: dict[str, Observed] = {}
        self._modules, self._matrices, self._inputs = modules, matrices, inputs
        self._in_features = {target.name: target.in_features for target in targets}
        self._last: tuple[Tensor, ActivationSketch] | None = None
        self._active, self._factor, self._copied = False, factor, copied
        for target in targets:
            device = module_device(modules[target.name])
            dtype = torch.float64 if _is_double(modules[target.name]) else torch.float32
            store = new_gradient_store(target.in_features, target.out_features, matrices, device, dtype)
            self.observed[target.name] = Observed(store, torch.zeros((), device=device, dtype=dtype))

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """With hooks on the modules."""
        handles = [
            module.register_forward_hook(LocalHook(partial(self._called, name)), with_kwargs=True)
            for name, module in self._modules.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def begin_batch(self, weight: float, mask: Tensor | None = None) -> None:
        """Starts recording. Gradients are assumed to be multiplied by `weight`."""
        self.weight, self.mask, self._active = weight, mask, True

    def end_batch(self) -> None:
        """Stops recording, and adds up what modules that were called several times have pending."""
        for seen in self.observed.values():
            if seen.pending is not None:
                seen.take(seen.pending, self.weight)
        self.drop_batch()

    def drop_batch(self) -> None:
        """Stops recording a batch of which nothing was added."""
        self._last, self.mask, self._active = None, None, False
        for seen in self.observed.values():
            seen.calls, seen.pending = 0, None

    def reset(self) -> None:
        """Forgets all that was seen."""
        for seen in self.observed.values():
            for tensor in seen.tensors():
                tensor.zero_()
            seen.activations, seen.batches = None, 0

    def peak(self) -> float:
        """The largest absolute entry of all gradient stores."""
        return max(float(tensor.abs().max()) for seen in self.observed.values() for tensor in seen.store.tensors())

    def sum_over_processes(self) -> None:
        """Makes all that was seen what all processes have seen, whichever modules the batches of each one reached."""
        sum_over_processes(tensor for seen in self.observed.values() for tensor in seen.tensors())
        batches = gathered([seen.batches for seen in self.observed.values()])
        for seen, counts in zip(self.observed.values(), zip(*batches, strict=True), strict=True):
            seen.batches = sum(counts)
        for name, seen in self.observed.items() if self._inputs else ():
            mine = seen.activations or self._new_activations(self._in_features[name], seen.squares.device)
            mine = mine.copy()  # which modules share one may differ between processes
            mine.sum_over_processes()
            seen.activations = mine if mine.count else None

    def _new_activations(self, in_features: int, device: torch.device) -> ActivationSketch:
        return ActivationSketch.zeros(self._matrices.omega(in_features, device)[:, : self._matrices.k // 2])

    def _called(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Waits for the gradient of an output; returns what stands in for the output, or None if it may stay."""
        if not self._active:
            return None
        seen = self.observed[name]
        seen.calls += 1  # also without gradients: a reentrant checkpoint runs such a segment again
        first: Tensor = output if isinstance(output, Tensor) else output[0]
        if not (torch.is_grad_enabled() and first.is_floating_point()):
            return None
        # Where an output changes in place later on, a hook on a view of it would be lost, and a leaf may not change.
        replaced = first._is_view() or not first.requires_grad
        if not first.requires_grad:  # nothing before the first modules needs a gradient
            first = first.detach().requires_grad_()
        if replaced:
            first = torch.ops.aten._unsafe_view(first, first.shape)  # the same memory, which nothing else refers to
        inputs: Tensor = args[0] if args else next(iter(kwargs.values()))
        if self._copied and name in self._copied:
            inputs = inputs.detach().clone()
        version = None if inputs.is_inference() else inputs._version

        def receive(gradient: Tensor) -> None:
            if version is not None and inputs._version != version:
                if self._copied is not None:
                    self._copied.add(name)
                    return
                raise ModelError(
                    f"the input of `{name}` must stay as it was until the backward pass, but was changed in place; change "
                    "it out of place."
                )
            self._receive(seen, module, inputs, gradient.detach())

        first.register_hook(receive)
        if not replaced:
            return None
        return first if isinstance(output, Tensor) else type(output)((first, *output[1:]))

    def _receive(self, seen: Observed, module: nn.Module, inputs: Tensor, gradient: Tensor) -> None:
        rows, deltas = as_rows(module, inputs.detach(), gradient)
        if self._inputs:
            self._see_inputs(seen, inputs, rows)
        dtype = torch.float32 if deltas.dtype == torch.float16 else deltas.dtype  # sums of float16 overflow
        deltas = deltas.to(dtype) if self._factor == 1.0 else deltas.to(dtype) * self._factor
        increment = seen.store.increment(rows.to(dtype), deltas)
        if seen.calls == 1:
            seen.take(increment, self.weight)
        elif seen.pending is None:
            seen.pending = increment
        else:
            seen.pending = tuple(a + b for a, b in zip(seen.pending, increment, strict=True))

    def _see_inputs(self, seen: Observed, inputs: Tensor, rows: Tensor) -> None:
        shared = self._last[1] if self._last is not None and self._last[0] is inputs else None
        if shared is not None and (seen.activations is None or seen.activations is shared):
            seen.activations = shared
            return
        if seen.activations is None:
            seen.activations = self._new_activations(rows.shape[1], rows.device)
        masked = self.mask is not None and inputs.ndim == 3 and inputs.shape[:2] == self.mask.shape
        seen.activations.add(rows, self.mask.flatten().to(rows.device) if masked and self.mask is not None else None)
        self._last = (inputs, seen.activations)


def module_device(module: nn.Module) -> torch.device:
    """Where a module computes: an offloaded one where accelerate's hook loads it to, others where their first parameter is."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            if (device := getattr(each, "execution_device", None)) is not None:
                return torch.device(device)
    return next(module.parameters()).device


def _is_double(module: nn.Module) -> bool:
    return any(parameter.dtype == torch.float64 for parameter in module.parameters())


def in_range(peak: float) -> float:
    """The factor on gradients, or on the loss, at which float32 sums of squared gradients fit: a power of two, mostly 1.

    Args:
        peak: The largest entry of the first batch's gradients.
    """
    exponent = math.frexp(peak)[1] if 0.0 < peak < math.inf else 0
    return 1.0 if abs(exponent) <= SAFE_EXPONENT else 2.0**-exponent
