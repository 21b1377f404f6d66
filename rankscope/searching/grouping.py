"""The search's space of a profile: which blocks share a tilt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rankscope.budget import Bound, ParameterBudget
from rankscope.exceptions import StudyError
from rankscope.profiling import Profile
from rankscope.space import HierarchicalSpace, group_by_depth, group_by_gradient
from rankscope.targets import TargetModule

Grouping = Literal["depth", "gradient"]


def make_space(
    profile: Profile,
    targets: Sequence[TargetModule],
    budget: ParameterBudget,
    *,
    grouping: Grouping = "depth",
    n_groups: int = 3,
    min_rank: Bound = 0,
    max_rank: Bound = None,
) -> HierarchicalSpace:
    """The hierarchical space whose gains are the profile's gradient spectra.

    Raises:
        StudyError: An unknown grouping.
    """
    if grouping == "depth":
        groups = group_by_depth(targets, n_groups)
    elif grouping == "gradient":
        energy = {name: norm**2 for name, norm in profile.column("gradient_norm").items()}
        groups = group_by_gradient(targets, energy, n_groups)
    else:
        raise StudyError(f"`grouping` must be 'depth' or 'gradient', but got {grouping!r}.")
    return HierarchicalSpace(
        targets=tuple(targets),
        gains={name: values**2 for name, values in profile.spectra().items()},
        budget=budget,
        groups=groups,
        min_rank=min_rank,
        max_rank=max_rank,
    )
