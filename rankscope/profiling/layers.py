"""Module kinds: how each turns inputs and output gradients into the rows of a weight gradient, and what its weight is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SUPPORTED = ("linear", "conv1d", "conv2d")


def as_rows(module: nn.Module, inputs: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor]:
    """(n, in) and (n, out) with the weight gradient sum_n deltas_n inputs_n^T; positions and patches are rows.

    Half precision becomes single, since sums of float16 overflow; bfloat16 stays.
    """
    module = getattr(module, "base_layer", module)
    if isinstance(module, nn.Conv2d):
        inputs, deltas = _patches(module, inputs), deltas.flatten(2).transpose(1, 2)
    inputs, deltas = inputs.reshape(-1, inputs.shape[-1]), deltas.reshape(-1, deltas.shape[-1])
    dtype = torch.float32 if deltas.dtype == torch.float16 else deltas.dtype
    return inputs.to(dtype), deltas.to(dtype)


def _patches(module: nn.Conv2d, inputs: Tensor) -> Tensor:
    """(batch, positions, channels * height * width) as the kernel sees them."""
    around = module._reversed_padding_repeated_twice
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = nn.functional.pad(inputs, around, mode=mode)
    columns = nn.functional.unfold(padded, module.kernel_size, dilation=module.dilation, stride=module.stride)
    return columns.transpose(1, 2)


def dense_weight(module: nn.Module) -> Tensor | None:
    """The weight as (out, in), dequantised where bitsandbytes holds it; None where it cannot be read."""
    module = getattr(module, "base_layer", module)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    weight = weight.detach()
    if hasattr(module.weight, "quant_state") or hasattr(module.weight, "SCB"):
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        weight = dequantize_bnb_weight(module.weight, state=getattr(module, "state", None)).detach()
    if not weight.is_floating_point():
        return None
    if type(module).__name__ == "Conv1D":
        return weight.T
    return weight.flatten(1)
