"""Optimizer state over a change of rank: same parameter group, same place, moments carried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import transformers
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from rankscope.errors import ModelError
from rankscope.lora.factors import RankMap

# State entries of the parameter's shape, and whether they hold squared gradients. Numbers (`step`) are kept as they are.
_ADAM = {"exp_avg": False, "exp_avg_sq": True, "max_exp_avg_sq": True}
_ENTRIES: dict[type, dict[str, bool]] = {
    torch.optim.SGD: {"momentum_buffer": False},
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
    torch.optim.Adafactor: {"variance": True},
    transformers.Adafactor: {"exp_avg": False, "exp_avg_sq": True},
}
# Adafactor's second moments of matrices: means over the last and the last but one dimension.
_FACTORED = {
    torch.optim.Adafactor: ("row_var", "col_var"),
    transformers.Adafactor: ("exp_avg_sq_row", "exp_avg_sq_col"),
}
_KNOWN = "SGD, Adam, AdamW, Adafactor (torch's and transformers') and bitsandbytes' Adam and AdamW"


class Replacement(NamedTuple):
    """A parameter that takes another's place; `dim` is the rank dimension of both."""

    old: nn.Parameter
    new: nn.Parameter
    dim: int
    map: RankMap

    def carry(self, tensor: Tensor, squared: bool) -> Tensor:  # noqa: D102
        return self.map.carry(tensor, self.dim, squared=squared)


def unwrap_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside accelerate's wrapper."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def check_known(optimizer: Optimizer) -> type | None:
    """The known class that an optimizer belongs to, None for bitsandbytes' Adam; a ModelError for any other."""
    optimizer = unwrap_optimizer(optimizer)
    if _is_bitsandbytes_adam(optimizer):
        return None
    if known := [kind for kind in _ENTRIES if isinstance(optimizer, kind)]:
        return known[0]
    raise ModelError(
        f"`optimizer` must be one whose state can be carried ({_KNOWN}), but is {type(optimizer).__name__}; use one of these."
    )


def replace_parameters(optimizer: Optimizer | None, replacements: Sequence[Replacement]) -> None:
    """Put new parameters and their carried state in the place of the old; all of them or, on any error, none.

    No group is added, so learning-rate schedulers stay right. New components start with moments of 0 and the parameter's `step`.

    Raises:
        ModelError: The optimizer does not own a parameter, or its state is of unknown meaning.
    """
    if optimizer is None:
        return
    optimizer = unwrap_optimizer(optimizer)
    owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if strangers := sum(id(replacement.old) not in owned for replacement in replacements):
        raise ModelError(
            f"`optimizer` must own the adapter's parameters, but lacks {strangers} of the {len(replacements)} to be resized; "
            "pass the optimizer that trains this model, or None."
        )
    states = [_carried(optimizer, replacement) for replacement in replacements]
    successors = {id(replacement.old): replacement.new for replacement in replacements}
    for group in optimizer.param_groups:
        group["params"] = [successors.get(id(parameter), parameter) for parameter in group["params"]]
    for replacement, state in zip(replacements, states, strict=True):
        optimizer.state.pop(replacement.old, None)
        if state:
            optimizer.state[replacement.new] = state


def _carried(optimizer: Optimizer, replacement: Replacement) -> dict[str, Any]:
    state: dict[str, Any] = optimizer.state.get(replacement.old, {})
    if not state:
        return {}
    if (kind := check_known(optimizer)) is None:
        return _carried_bitsandbytes(optimizer, state, replacement)
    carried: dict[str, Any] = {}
    if (factored := _FACTORED.get(kind)) and state.get(factored[0]) is not None:
        carried |= _carried_factored(state, replacement, factored, keepdim=kind is torch.optim.Adafactor)
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            carried.setdefault(name, value)
        elif name in _ENTRIES[kind]:
            carried[name] = replacement.carry(value, _ENTRIES[kind][name])
        elif name not in carried:
            raise ModelError(
                f"`optimizer` must hold state of known meaning, but {type(optimizer).__name__} holds {name!r} as well; "
                f"use one of {_KNOWN}."
            )
    return carried


def _carried_factored(
    state: Mapping[str, Any], replacement: Replacement, names: tuple[str, str], *, keepdim: bool
) -> dict[str, Any]:
    """Adafactor's row and column means, whose product estimates the second moment (Shazeer and Stern, 2018)."""
    row, col = (state[name] for name in names)
    if not keepdim:
        row, col = row.unsqueeze(-1), col.unsqueeze(-2)
    from_last = replacement.old.ndim - replacement.dim
    if from_last > 2:  # a convolution's rank lies outside the two factored dimensions
        row, col = replacement.carry(row, True), replacement.carry(col, True)
    elif from_last == 2:
        row, col = _carried_pair(row, col, replacement)
    else:
        col, row = _carried_pair(col, row, replacement)
    if not keepdim:
        row, col = row.squeeze(-1), col.squeeze(-2)
    return dict(zip(names, (row, col), strict=True))


def _carried_pair(along: Tensor, across: Tensor, replacement: Replacement) -> tuple[Tensor, Tensor]:
    """`along` has the rank dimension; `across`, the mean over it, is scaled so that estimates of what stays are unchanged."""
    carried = replacement.carry(along, True)
    before, after = (factor.mean(dim=replacement.dim, keepdim=True) for factor in (along, carried))
    known = (before > 0) & (after > 0)  # not so where no component stays
    return carried, across * torch.where(known, after / before, torch.ones_like(before))


def _is_bitsandbytes_adam(optimizer: Optimizer) -> bool:
    """Judged by names, so that bitsandbytes need not be installed."""
    modules = {base.__module__.split(".")[0] for base in type(optimizer).__mro__}
    return "bitsandbytes" in modules and getattr(optimizer, "optimizer_name", None) == "adam"


def _carried_bitsandbytes(optimizer: Any, state: Mapping[str, Any], replacement: Replacement) -> dict[str, Any]:
    """Moments in 8 bits are dequantised, carried, and quantised again where the optimizer would: a rounding in 256 steps."""
    from bitsandbytes import functional

    index, place, group = next(
        (index, place, group)
        for index, group in enumerate(optimizer.param_groups)
        for place, parameter in enumerate(group["params"])
        if parameter is replacement.old
    )
    config = optimizer.get_config(index, place, group)
    carried = {name: value for name, value in state.items() if not name.startswith(("state", "qmap", "absmax"))}
    for moment, qmap_name in (("1", "dynamic"), ("2", "udynamic")):
        value = state[f"state{moment}"]
        if value.dtype == torch.uint8:
            absmax, code = state[f"absmax{moment}"], state[f"qmap{moment}"]
            value = functional.dequantize_blockwise(value, absmax=absmax, code=code, blocksize=256)
        value = replacement.carry(value, moment == "2")
        if config["optim_bits"] == 8 and replacement.new.numel() >= config["min_8bit_size"]:
            if not optimizer.name2qmap:
                optimizer.fill_qmap()
            qmap = optimizer.name2qmap[qmap_name].to(value.device)
            value, quantisation = functional.quantize_blockwise(value, code=qmap, blocksize=256)
            carried |= {f"qmap{moment}": qmap, f"absmax{moment}": quantisation.absmax}
        carried[f"state{moment}"] = value
    return carried
