"""Profiling: gradient sketches, the hooks that feed them, and the store that keeps their features."""

from rankscope.profiling.hooks import LocalHook, Observer, in_range, module_device
from rankscope.profiling.profiler import profile
from rankscope.profiling.sketch import (
    SUPPORTED,
    Decomposition,
    GradientStore,
    RandomMatrices,
    bytes_of_weights,
    is_compiled,
    largest_sketch_size,
    new_gradient_store,
    thin_svd,
)
from rankscope.profiling.statistics import POOLED_BATCHES, energy_tail
from rankscope.profiling.table import (
    Profile,
    cumulative_energy,
    group_energy,
    pooled_signal,
    rank_modules,
    read_profile,
)

__all__ = [
    "POOLED_BATCHES",
    "SUPPORTED",
    "Decomposition",
    "GradientStore",
    "LocalHook",
    "Observer",
    "Profile",
    "RandomMatrices",
    "bytes_of_weights",
    "cumulative_energy",
    "energy_tail",
    "group_energy",
    "in_range",
    "is_compiled",
    "largest_sketch_size",
    "module_device",
    "new_gradient_store",
    "pooled_signal",
    "profile",
    "rank_modules",
    "read_profile",
    "thin_svd",
]
