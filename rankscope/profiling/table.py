"""From what the hooks kept to the rows of a profile."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from rankscope.exceptions import ProfileError
from rankscope.profiling.batches import Tally
from rankscope.profiling.features import (
    effective_rank,
    frobenius_norm,
    sensitivity,
    signal_shares,
    split_energy,
    stable_rank,
)
from rankscope.profiling.layers import dense_weight
from rankscope.profiling.observer import Observed
from rankscope.profiling.sketch import Decomposition, ExactGradient
from rankscope.targets import TargetModule, base_layer


def tabulate(
    targets: Sequence[TargetModule],
    modules: Mapping[str, nn.Module],
    observed: Mapping[str, Observed],
    tally: Tally,
    keep_directions: int,
) -> pd.DataFrame:
    """The profile's table: one row a module, with the columns that `store.py` documents.

    Raises:
        ProfileError: The gradient is zero everywhere.
    """
    rows = [_row(t, modules[t.name], observed[t.name], tally, keep_directions) for t in targets]
    frame = pd.DataFrame(rows)
    if not (frame["gradient_norm"] > 0).any():
        raise ProfileError(
            "the gradient must not be zero at every target module, but is; check the loss and the labels."
        )
    energy = frame["gradient_norm"].to_numpy() ** 2
    shares = signal_shares(frame["signal_energy"].to_numpy(), energy, len(tally.losses))
    frame["signal_share"] = shares
    frame["signal_values"] = [
        [value * math.sqrt(share) for value in values]
        for share, values in zip(shares, frame["singular_values"], strict=True)
    ]
    frame["block"] = frame["block"].astype("Int64")
    return frame if tally.scale == 1.0 else _unscaled(frame, tally.scale)


def _unscaled(frame: pd.DataFrame, scale: float) -> pd.DataFrame:
    """The table of gradients that were multiplied by `scale`, in the loss's own units."""
    unit = np.float64(1.0 / scale)
    for column in ("gradient_norm", "singular_error", "sensitivity"):
        frame[column] = frame[column].astype(np.float64) * unit
    for column in ("singular_values", "signal_values"):
        frame[column] = [(np.array(values) * unit).tolist() for values in frame[column]]
    for column in ("signal_energy", "noise_energy", "fisher_trace"):
        with np.errstate(over="ignore"):
            frame[column] *= unit**2
    if not np.isfinite(frame["fisher_trace"]).all():
        raise ProfileError(
            f"squared gradients must be below 1e308, but the gradient is about {frame['gradient_norm'].max():.0e}; scale "
            "the loss down."
        )
    return frame


def _row(target: TargetModule, module: nn.Module, seen: Observed, tally: Tally, keep_directions: int) -> dict[str, Any]:
    total = sum(tally.weights)
    found = seen.store.decompose()
    energy = max(found.energy, 0.0) / total**2
    measured = float(seen.store.measure(seen.store.tensors())) / total**2
    split = split_energy(energy, float(seen.squares) * tally.first_size, tally.sizes, measured=measured)
    activations, kept = seen.activations, slice(0, keep_directions)
    return {
        "module": target.name,
        "tower": target.tower,
        "block": target.block,
        "role": target.role,
        "kind": target.kind,
        "in_features": target.in_features,
        "out_features": target.out_features,
        "rank_cost": target.rank_cost,
        "gradient_norm": math.sqrt(energy),
        "signal_energy": split.signal,
        "noise_energy": split.noise,
        "fisher_trace": split.fisher_trace,
        "gradient_rank": effective_rank(found.values),
        "singular_values": (found.values / total).tolist(),
        "singular_error": found.error / total,
        "exact": isinstance(seen.store, ExactGradient),
        **_weight_features(module, found, total),
        "activation_moment": activations.second_moment() if activations else 0.0,
        "activation_rank": activations.effective_rank() if activations else 0.0,
        "activation_variance": activations.variance() if activations else 0.0,
        "activation_values": activations.variances().tolist() if activations else [],
        "left_directions": found.left[:, kept].T.flatten().tolist() if keep_directions else None,
        "right_directions": found.right[kept].flatten().tolist() if keep_directions else None,
    }


def _weight_features(module: nn.Module, found: Decomposition, total: float) -> dict[str, float | None]:
    """Features of the frozen weight, which is loaded for them where it is offloaded; None where it cannot be read."""
    from accelerate.utils import align_module_device

    with align_module_device(base_layer(module)):
        weight = dense_weight(module)
        if weight is None:
            return dict.fromkeys(("sensitivity", "weight_norm", "weight_rank"))
        left, core = found.left.to(weight.device), (found.values[:, None] * found.right).to(weight.device)
        return {
            "sensitivity": sensitivity(weight, left, core) / total,
            "weight_norm": frobenius_norm(weight),
            "weight_rank": stable_rank(weight),
        }
