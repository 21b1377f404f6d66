"""Ranks and alphas of named modules as the fields of a `peft.LoraConfig`: anchored, escaped, never a suffix match."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any


def alpha_for(rank: int, scaling: float, *, rslora: bool) -> float:
    """The alpha at which PEFT's scaling (alpha / r, or alpha / sqrt(r)) is `scaling`; an int where it is one.

    >>> alpha_for(3, 2.0, rslora=False), alpha_for(4, 0.7, rslora=True)
    (6, 1.4)
    """
    alpha = scaling * (math.sqrt(rank) if rslora else rank)
    return int(alpha) if float(alpha).is_integer() else alpha


def most_common(values: Mapping[str, Any]) -> Any:
    """The most frequent value, which becomes the config's own; among equals the first."""
    return Counter(values.values()).most_common(1)[0][0]


def target_pattern(names: Iterable[str]) -> str:
    """One regex that matches exactly these full names."""
    return f"^(?:{'|'.join(re.escape(name) for name in names)})$"


def exceptions(values: Mapping[str, Any]) -> dict[str, Any]:
    r"""A `rank_pattern` or `alpha_pattern`: the values that are not the most common one.

    >>> exceptions({"a": 2, "b.c": 8, "d": 2})
    {'^b\\.c': 8}
    """
    common = most_common(values)
    return {f"^{re.escape(name)}": value for name, value in values.items() if value != common}  # PEFT appends `$`
