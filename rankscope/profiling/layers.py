"""Module kinds: how each turns inputs and output gradients into the rows of a weight gradient, and what its weight is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rankscope.devices import whole
from rankscope.targets import base_layer

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
