"""Profiles: gradients and inputs of the target modules, seen by hooks and kept as sketches."""

from rankscope.profiling.hooks import SUPPORTED, GradientHooks, LocalHook, in_range, is_compiled
from rankscope.profiling.profiler import Shared, head_warmed, leaves, profile
from rankscope.profiling.sketch import Decomposition, RandomMatrices, bytes_of_weights, largest_sketch_size, thin_svd
from rankscope.profiling.statistics import energy_tail, signal_shares
from rankscope.profiling.table import (
    MODALITIES,
    Profile,
    cumulative_energy,
    group_energy,
    rank_modules,
    read_profile,
)

__all__ = [
    "MODALITIES", "SUPPORTED", "Decomposition", "GradientHooks", "LocalHook", "Profile", "RandomMatrices", "Shared",
    "bytes_of_weights", "cumulative_energy", "energy_tail", "group_energy", "head_warmed", "in_range", "is_compiled",
    "largest_sketch_size", "leaves", "profile", "rank_modules", "read_profile", "signal_shares", "thin_svd",
]  # fmt: skip
