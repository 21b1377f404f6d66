"""From what the hooks kept to the rows of a profile."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

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
from rankscope.profiling.sketch import ExactGradient
from rankscope.targets import TargetModule


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
    return frame


def _row(target: TargetModule, module: nn.Module, seen: Observed, tally: Tally, keep_directions: int) -> dict[str, Any]:
    total = sum(tally.weights)
    found = seen.store.decompose()
    energy = max(found.energy, 0.0) / total**2
    measured = float(seen.store.measure(seen.store.tensors())) / total**2
    split = split_energy(energy, float(seen.squares) * tally.first_size, tally.sizes, measured=measured)
    weight, activations = dense_weight(module), seen.activations
    kept = slice(0, keep_directions)
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
        "sensitivity": None
        if weight is None
        else sensitivity(weight, found.left, found.values[:, None] * found.right) / total,
        "weight_norm": None if weight is None else frobenius_norm(weight),
        "weight_rank": None if weight is None else stable_rank(weight),
        "activation_moment": activations.second_moment() if activations else 0.0,
        "activation_rank": activations.effective_rank() if activations else 0.0,
        "activation_variance": activations.variance() if activations else 0.0,
        "activation_values": activations.variances().tolist() if activations else [],
        "left_directions": found.left[:, kept].T.flatten().tolist() if keep_directions else None,
        "right_directions": found.right[kept].flatten().tolist() if keep_directions else None,
    }
