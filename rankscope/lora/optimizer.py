"""An optimizer's state carried over a change of rank: same parameter group, same place, moments of what stays kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from rankscope.errors import ModelError
from rankscope.lora.factors import RankMap

Moment = Literal["gradient", "square"]

# What each state entry of the parameter's shape is made of. Entries that are numbers (`step`) are kept as they are.
_ADAM: Mapping[str, Moment] = {"exp_avg": "gradient", "exp_avg_sq": "square", "max_exp_avg_sq": "square"}
_ENTRIES: dict[type, Mapping[str, Moment]] = {
    torch.optim.SGD: {"momentum_buffer": "gradient"},
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
    torch.optim.Adafactor: {"variance": "square"},
    transformers.Adafactor: {"exp_avg": "gradient", "exp_avg_sq": "square"},
}
# Adafactor's second moments of matrices: means over the last and the last but one dimension.
_FACTORED = {
    torch.optim.Adafactor: ("row_var", "col_var"),
    transformers.Adafactor: ("exp_avg_sq_row", "exp_avg_sq_col"),
}
_BITSANDBYTES: Mapping[str, Moment] = {"state1": "gradient", "state2": "square"}
_BITSANDBYTES_OF = {"gradient": "1", "square": "2"}
_KNOWN = "SGD, Adam, AdamW, Adafactor (torch's and transformers') and bitsandbytes' Adam and AdamW"


@dataclass(frozen=True, slots=True, kw_only=True)
class Replacement:
    """A parameter that takes another's place.

    Attributes:
        old: The parameter in use.
        new: Its successor.
        dim: The rank dimension of both.
        map: How tensors of the old shape follow.
    """

    old: nn.Parameter
    new: nn.Parameter
    dim: int
    map: RankMap

    def carry(self, tensor: Tensor, moment: Moment) -> Tensor:
        """A tensor of the old parameter's shape in the new one's."""
        return self.map.carry(tensor, self.dim, squared=moment == "square")


def check_known(optimizer: Optimizer) -> None:
    """Refuses an optimizer whose state could not be carried, before there is one.

    Raises:
        ModelError: It is of a kind that is not known.
    """
    optimizer = unwrap_optimizer(optimizer)
    if _kind(optimizer) is None and not _is_bitsandbytes_adam(optimizer):
        raise ModelError(
            f"`optimizer` must be one whose state can be carried ({_KNOWN}), but is {type(optimizer).__name__}; use one of these."
        )


def unwrap_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer that holds the state: accelerate's wrapper taken off."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def carry_state(optimizer: Optimizer, replacements: Sequence[Replacement]) -> list[dict[str, Any]]:
    """The state of each new parameter; the optimizer itself is left as it is, see `replace_parameters`.

    New components start with moments of 0 and the parameter's own `step`. A state that is empty, as before the first step,
    stays empty.

    Args:
        optimizer: Not wrapped.
        replacements: One for each parameter.

    Raises:
        ModelError: A parameter that the optimizer does not own, or a state of unknown meaning.
    """
    owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if strangers := sum(id(replacement.old) not in owned for replacement in replacements):
        raise ModelError(
            f"`optimizer` must own the adapter's parameters, but lacks {strangers} of the {len(replacements)} to be resized; "
            "pass the optimizer that trains this model, or None."
        )
    return [_carry(optimizer, replacement) for replacement in replacements]


def replace_parameters(
    optimizer: Optimizer, replacements: Sequence[Replacement], states: Sequence[dict[str, Any]]
) -> None:
    """Puts new parameters and their states in the place of the old: no group is added, learning-rate schedulers stay right."""
    successors = {id(replacement.old): replacement.new for replacement in replacements}
    for group in optimizer.param_groups:
        group["params"] = [successors.get(id(parameter), parameter) for parameter in group["params"]]
    for replacement, state in zip(replacements, states, strict=True):
        optimizer.state.pop(replacement.old, None)
        if state:
            optimizer.state[replacement.new] = state


def _carry(optimizer: Optimizer, replacement: Replacement) -> dict[str, Any]:
    state = optimizer.state.get(replacement.old, {})
    if not state:
        return {}
    if _is_bitsandbytes_adam(optimizer):
        return _carry_bitsandbytes(optimizer, state, replacement)
    return _carry_plain(optimizer, state, replacement)


def _carry_plain(optimizer: Optimizer, state: Mapping[str, Any], replacement: Replacement) -> dict[str, Any]:
    kind = _kind(optimizer)
    if kind is None:
        raise ModelError(
            f"`optimizer` must be one whose state can be carried ({_KNOWN}), but is {type(optimizer).__name__}; use one of these."
        )
    carried: dict[str, Any] = {}
    factored = _FACTORED.get(kind)
    if factored and state.get(factored[0]) is not None:
        carried |= _carry_factored(state, replacement, factored, keepdim=kind is torch.optim.Adafactor)
    for name, value in state.items():
        if name in carried:
            continue
        if not isinstance(value, Tensor) or value.ndim == 0:
            carried[name] = value
        elif name in _ENTRIES[kind]:
            carried[name] = replacement.carry(value, _ENTRIES[kind][name])
        else:
            raise _unknown_entry(optimizer, name)
    return carried


def _kind(optimizer: Optimizer) -> type | None:
    return next((known for known in _ENTRIES if isinstance(optimizer, known)), None)


def _unknown_entry(optimizer: Optimizer, name: str) -> ModelError:
    return ModelError(
        f"`optimizer` must hold state of known meaning, but {type(optimizer).__name__} holds {name!r} as well; "
        f"use one of {_KNOWN}."
    )


# --- Adafactor -----------------------------------------------------------------------------------------------------


def _carry_factored(
    state: Mapping[str, Any], replacement: Replacement, names: tuple[str, str], *, keepdim: bool
) -> dict[str, Any]:
    """Carries the row and column means whose product estimates the second moment (Shazeer and Stern, 2018).

    The mean over the ranks is scaled as the mean of the other factor changes, so that estimates of what stays are the same.
    """
    row, col = (
        state[name] if keepdim else state[name].unsqueeze(dim) for name, dim in zip(names, (-1, -2), strict=True)
    )
    ndim, dim = replacement.old.ndim, replacement.dim
    if dim < ndim - 2:  # a convolution's rank lies outside the two factored dimensions
        row, col = (replacement.map.carry(factor, dim, squared=True) for factor in (row, col))
    elif dim == ndim - 2:
        row, col = _carry_pair(row, col, replacement)
    else:
        col, row = _carry_pair(col, row, replacement)
    if not keepdim:
        row, col = row.squeeze(-1), col.squeeze(-2)
    return dict(zip(names, (row, col), strict=True))


def _carry_pair(along: Tensor, across: Tensor, replacement: Replacement) -> tuple[Tensor, Tensor]:
    """`along` has the rank dimension, `across` is the mean over it."""
    carried = replacement.map.carry(along, replacement.dim, squared=True)
    before, after = (factor.mean(dim=replacement.dim, keepdim=True) for factor in (along, carried))
    known = (before > 0) & (after > 0)  # not so where no component stays
    return carried, across * torch.where(known, after / before, torch.ones_like(before))


# --- bitsandbytes --------------------------------------------------------------------------------------------------


def _is_bitsandbytes_adam(optimizer: Optimizer) -> bool:
    """Told by names, so that bitsandbytes need not be installed."""
    modules = {base.__module__.split(".")[0] for base in type(optimizer).__mro__}
    return "bitsandbytes" in modules and getattr(optimizer, "optimizer_name", None) == "adam"


def _carry_bitsandbytes(optimizer: Any, state: Mapping[str, Any], replacement: Replacement) -> dict[str, Any]:
    """Moments in 8 bits are widened, carried, and quantised again where the optimizer would: a rounding in 256 steps."""
    from bitsandbytes import functional

    group = next(g for g in optimizer.param_groups if any(p is replacement.old for p in g["params"]))
    config = optimizer.get_config(*_position(optimizer, replacement.old), group)
    quantised = config["optim_bits"] == 8 and replacement.new.numel() >= config["min_8bit_size"]
    carried: dict[str, Any] = {}
    for name, moment in _BITSANDBYTES.items():
        digit = _BITSANDBYTES_OF[moment]
        value = state[name]
        if value.dtype == torch.uint8:
            value = functional.dequantize_blockwise(
                value, absmax=state[f"absmax{digit}"], code=state[f"qmap{digit}"], blocksize=256
            )
        value = replacement.carry(value, moment)
        if quantised:
            qmap = _qmap(optimizer, moment).to(value.device)
            value, quant_state = functional.quantize_blockwise(value, code=qmap, blocksize=256)
            carried[f"qmap{digit}"], carried[f"absmax{digit}"] = qmap, quant_state.absmax
        carried[name] = value
    handled = {*_BITSANDBYTES, "qmap1", "qmap2", "absmax1", "absmax2"}
    return {name: value for name, value in state.items() if name not in handled} | carried


def _position(optimizer: Optimizer, parameter: nn.Parameter) -> tuple[int, int]:
    return next(
        (i, j) for i, g in enumerate(optimizer.param_groups) for j, p in enumerate(g["params"]) if p is parameter
    )


def _qmap(optimizer: Any, moment: Moment) -> Tensor:
    if not optimizer.name2qmap:
        optimizer.fill_qmap()
    qmap: Tensor = optimizer.name2qmap["dynamic" if moment == "gradient" else "udynamic"]
    return qmap
