"""Profiling: gradient sketches, the hooks that feed them, and the store that keeps their features."""

from rankscope.profiling.profiler import profile
from rankscope.profiling.store import Profile, read_profile

__all__ = ["Profile", "profile", "read_profile"]
