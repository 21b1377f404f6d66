"""Hooks that see the inputs x and output gradients delta of target modules, and keep sketches and sums, never a batch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from rankscope.distributed import gathered, is_first, sum_in_buckets, sum_over_processes, whole
from rankscope.errors import ModelError
from rankscope.profiling.sketch import GradientAccumulator, Increment, InputSketch, RandomMatrices
from rankscope.targets import TargetModule, base_layer

Modules = Mapping[TargetModule, nn.Module]
SUPPORTED = ("linear", "conv1d", "conv2d")
NOT_OF_TOKENS = ("vision", "audio", "projector")  # towers that see no tokens, even where shapes agree
SAFE_EXPONENT = 30  # of two: squares of gradients beyond, or of a thousandth of one below, may leave float32's range


class LocalHook(partial[Any]):
    """A forward hook that is not copied or pickled with its module: it would feed the original's sketches, or fail."""

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")  # takes anything, returns None, and loads without rankscope


class GradientHooks:
    """Hooks on modules, and the sums that they feed: `accumulators` of gradients, and `inputs`, shared by q, k and v.

    Inputs of modules in `copied` are copied, since they change in place later on. A module found to need it is added, its
    present gradient lost; None: it raises. `shared`: processes see their rows of one batch, and `merge` adds them up.
    """

    def __init__(
        self,
        modules: Modules,
        matrices: RandomMatrices,
        *,
        inputs: bool = True,
        copied: set[str] | None = None,
        shared: bool = False,
    ) -> None:
        self.accumulators = {target.name: _accumulator(target, module, matrices) for target, module in modules.items()}
        self.inputs: dict[str, InputSketch] = {}
        self._modules, self._matrices = modules, matrices
        self._see_inputs, self._copied, self._shared = inputs, copied, shared
        self._unmerged: list[tuple[dict[str, Increment], float]] = []  # of shared batches, with their weights
        self._active, self._weight, self._factor = False, 1.0, 1.0
        self._mask: Tensor | None = None
        self._images: Tensor | None = None
        self._towers = {target.name: target.tower for target in modules}
        self._calls: Counter[str] = Counter()  # in the present forward pass
        self._pending: dict[str, Increment] = {}  # of modules called several times: their energy is that of the sum
        self._last: tuple[Tensor | None, InputSketch | None] = None, None

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Keep hooks on the modules."""
        with ExitStack() as handles:
            for target, module in self._modules.items():
                hook = LocalHook(self._called, target.name)
                handles.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            yield

    def begin_batch(
        self, weight: float, mask: Tensor | None = None, *, factor: float = 1.0, images: Tensor | None = None
    ) -> None:
        """Start recording gradients that `factor` multiplies by the batch's weight, and inputs without padding, by the mask.

        `images`, (batch, sequence), is true at image tokens; what they add to gradients is told apart.
        """
        self._weight, self._factor, self._mask, self._active = weight, factor, mask, True
        self._images = images

    def end_batch(self) -> None:
        """Stop recording."""
        if self._shared and self._active:
            self._unmerged.append((dict(self._pending), self._weight))
            self._pending.clear()
        for name, increment in self._pending.items():
            self.accumulators[name].add(increment, self._weight)
        self._last, self._mask, self._images, self._active = (None, None), None, None, False
        self._calls.clear()
        self._pending.clear()

    def merge(self) -> None:
        """Sum shared batches' gradients over processes; the first one counts them. Every process must have seen as many."""
        batches, self._unmerged = self._unmerged, []
        for held, weight in batches:
            found = {
                name: held.get(name) or tuple(torch.zeros_like(kept) for kept in each.kept)
                for name, each in self.accumulators.items()
            }
            sum_in_buckets(chain.from_iterable(found.values()))
            for name, increment in found.items() if is_first() else ():
                self.accumulators[name].add(increment, weight)

    def clear(self) -> None:
        """Forget all batches."""
        self.inputs.clear()
        for sums in self.accumulators.values():
            sums.clear()

    def peak(self) -> float:
        """The largest absolute entry of all that is kept."""
        return max(float(kept.abs().max()) for each in self.accumulators.values() for kept in each.kept)

    def sum_over_processes(self) -> None:
        """Sum over processes, whichever modules the batches of each one reached."""
        told = [name for name, each in self.accumulators.items() if each.part is not None]
        for name in dict.fromkeys(chain.from_iterable(gathered(told))):
            each = self.accumulators[name]
            each.part = torch.zeros_like(each.kept[-1]) if each.part is None else each.part
            sum_over_processes([each.part])
        sum_over_processes(tensor for each in self.accumulators.values() for tensor in each.tensors())
        for target in self._modules if self._see_inputs else ():
            device = self.accumulators[target.name].squares.device
            mine = self.inputs.pop(target.name, None) or self._new_inputs(target.in_features, device)
            total = mine.over_processes()  # not in place: which modules share a sketch may differ between processes
            if total.count:
                self.inputs[target.name] = total

    def _called(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Hook the gradient of a module's output; returns what stands in for the output, or None if it may stay."""
        if not self._active:
            return None
        self._calls[name] += 1  # also without gradients: a reentrant checkpoint runs such a segment again
        first: Tensor = output if isinstance(output, Tensor) else output[0]
        if not (torch.is_grad_enabled() and first.is_floating_point()):
            return None
        # If an output changes in place later on, a hook on a view of it would be lost, and a leaf may not change.
        replaced = first._is_view() or not first.requires_grad
        if replaced:  # nothing before the first modules needs a gradient
            first = first if first.requires_grad else first.detach().requires_grad_()
            first = torch.ops.aten._unsafe_view(first, first.shape)  # the same memory, which nothing else refers to
        inputs: Tensor = args[0] if args else next(iter(kwargs.values()))
        if self._copied and name in self._copied:
            inputs = inputs.detach().clone()
        version = None if inputs.is_inference() else inputs._version

        def receive(gradient: Tensor) -> None:
            if version is None or inputs._version == version:
                self._receive(name, module, inputs, gradient.detach())
            elif self._copied is not None:
                self._copied.add(name)
            else:
                must = f"the input of `{name}` must stay as it was until the backward pass"
                raise ModelError(f"{must}, but was changed in place; change it out of place.")

        first.register_hook(receive)
        if not replaced:
            return None
        return first if isinstance(output, Tensor) else type(output)((first, *output[1:]))

    def _receive(self, name: str, module: nn.Module, inputs: Tensor, gradient: Tensor) -> None:
        rows, deltas = as_rows(module, inputs.detach(), gradient)
        if self._see_inputs:
            self._add_inputs(name, inputs, rows)
        dtype = torch.float32 if deltas.dtype == torch.float16 else deltas.dtype  # sums of float16 overflow
        rows, deltas = rows.to(dtype), deltas.to(dtype)
        if self._images is not None and _of_tokens(inputs, self._images, self._towers[name]):
            chosen = self._images.flatten().to(rows.device)
            self.accumulators[name].add_part(rows[chosen], deltas[chosen], self._factor)
        increment = self.accumulators[name].increment(rows, deltas)
        for part in increment if self._factor != 1.0 else ():
            part *= self._factor
        if self._calls[name] == 1 and not self._shared:
            self.accumulators[name].add(increment, self._weight)
        else:
            others = self._pending.get(name)
            self._pending[name] = tuple(map(torch.add, others, increment)) if others else increment

    def _add_inputs(self, name: str, inputs: Tensor, rows: Tensor) -> None:
        sketch, (last, of_last) = self.inputs.get(name), self._last
        if last is inputs and of_last and sketch in (None, of_last):
            self.inputs[name] = of_last
            return
        if sketch is None:
            sketch = self.inputs[name] = self._new_inputs(rows.shape[1], rows.device)
        fits = self._mask is not None and inputs.ndim == 3 and inputs.shape[:2] == self._mask.shape
        sketch.add(rows, self._mask if fits else None)
        self._last = inputs, sketch

    def _new_inputs(self, in_features: int, device: torch.device) -> InputSketch:
        return InputSketch(self._matrices.omega(in_features, device)[:, : self._matrices.k // 2])


def _of_tokens(inputs: Tensor, images: Tensor, tower: str) -> bool:
    """Whether a module's inputs are at the tokens of a batch: as (batch, sequence, in), or with both in one dimension."""
    fits = inputs.shape[:2] == images.shape if inputs.ndim == 3 else inputs.ndim == 2 and len(inputs) == images.numel()
    return fits and tower not in NOT_OF_TOKENS


def in_range(peak: float) -> float:
    """The factor on gradients with this largest entry at which float32 holds sums of their squares: a power of two, mostly 1."""
    exponent = math.frexp(peak)[1] if 0.0 < peak < math.inf else 0
    return 1.0 if abs(exponent) <= SAFE_EXPONENT else 2.0**-exponent


def is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile` wraps the model or a part of it, or `Module.compile` compiled one in place."""
    return any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m in model.modules())


def _accumulator(target: TargetModule, module: nn.Module, matrices: RandomMatrices) -> GradientAccumulator:
    """On the module's device; for an offloaded module, on that to which accelerate's hook loads it."""
    outer: list[Any] = [getattr(part, "_hf_hook", None) for part in module.modules()]
    devices = [getattr(hook, "execution_device", None) for each in outer for hook in getattr(each, "hooks", (each,))]
    device = next((device for device in devices if device is not None), next(module.parameters()).device)
    double = any(parameter.dtype == torch.float64 for parameter in module.parameters())
    like = torch.empty(0, device=device, dtype=torch.float64 if double else torch.float32)
    return GradientAccumulator(target.in_features, target.out_features, matrices, like)


def as_rows(module: nn.Module, inputs: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor]:
    """(n, in) and (n, out) with the weight gradient sum_n deltas_n inputs_n^T; positions and patches are rows."""
    module = base_layer(module)
    if isinstance(module, nn.Conv2d):
        if inputs.ndim == 3:
            inputs, deltas = inputs[None], deltas[None]
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padded = nn.functional.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
        patches = nn.functional.unfold(padded, module.kernel_size, dilation=module.dilation, stride=module.stride)
        inputs, deltas = patches.transpose(1, 2), deltas.flatten(2).transpose(1, 2)
    return inputs.reshape(-1, inputs.shape[-1]), deltas.reshape(-1, deltas.shape[-1])


def dense_weight(module: nn.Module) -> Tensor | None:
    """The weight as (out, in), loaded if it is offloaded, dequantised if bitsandbytes holds it; None if it cannot be read."""
    module = base_layer(module)
    with align_module_device(module):
        weight = getattr(module, "weight", None)
        if hasattr(weight, "quant_state") or hasattr(weight, "SCB"):
            from transformers.integrations.bitsandbytes import dequantize_bnb_weight

            weight = dequantize_bnb_weight(weight, state=getattr(module, "state", None))
        dense = whole(weight.detach()) if isinstance(weight, Tensor) else None
    if dense is None or not dense.is_floating_point() or dense.is_meta:
        return None
    return dense.T if type(module).__name__ == "Conv1D" else dense.flatten(1)
