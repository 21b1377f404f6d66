"""Strategies: from targets, a budget and (most of them) a profile to an allocation, without a trial.

Each strategy is one function of a `Request`; `allocate` is the door to all of them.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankscope.allocation import RankAllocation
from rankscope.budget import Bound, ParameterBudget, allocate_marginal, allocate_proportional
from rankscope.exceptions import BudgetError, ProfileError
from rankscope.profiling import Profile
from rankscope.targets import TargetModule


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a strategy is asked for.

    Attributes:
        targets: The target modules.
        budget: The limit in parameters.
        profile: A profile that covers the targets; None where there is none.
        seed: For strategies that draw.
        min_rank: The least rank, for all or by name.
        max_rank: The greatest rank, for all or by name; None: full rank.
        options: What the strategy takes besides, by name.
    """

    targets: tuple[TargetModule, ...]
    budget: ParameterBudget
    profile: Profile | None = None
    seed: int = 0
    min_rank: Bound = 0
    max_rank: Bound = None
    options: Mapping[str, Any]

    def proportional(self, scores: Mapping[str, float]) -> RankAllocation:
        """The request's projection of scores."""
        return allocate_proportional(self.targets, scores, self.budget, min_rank=self.min_rank, max_rank=self.max_rank)

    def marginal(self, gains: Mapping[str, NDArray[np.float64]]) -> RankAllocation:
        """The request's projection of marginal gains."""
        return allocate_marginal(self.targets, gains, self.budget, min_rank=self.min_rank, max_rank=self.max_rank)

    def profiled(self) -> Profile:
        """The profile.

        Raises:
            ProfileError: There is none, or it does not cover the targets.
        """
        if self.profile is None:
            raise ProfileError(
                "this strategy needs a profile, but got none; take one with `rs.profile(model, batches)`."
            )
        self.profile.require(self.targets)
        return self.profile


def allocate(
    strategy: str,
    *,
    targets: Sequence[TargetModule],
    budget: ParameterBudget,
    profile: Profile | None = None,
    seed: int = 0,
    min_rank: Bound = 0,
    max_rank: Bound = None,
    **options: Any,
) -> RankAllocation:
    """Computes an allocation without a trial.

    Every strategy stays within the budget and the bounds, and leaves less over than the cheapest rank that could
    still be placed.

    Args:
        strategy: `"uniform"`, `"random"`, `"gradient-norm"` or `"one-shot"`.
        targets: The target modules.
        budget: The limit in parameters.
        profile: Needed by `gradient-norm` and `one-shot`.
        seed: For `random`.
        min_rank: The least rank, for all modules or by name.
        max_rank: The greatest rank, for all modules or by name; None: full rank.
        **options: `random` takes `concentration`; `one-shot` takes `power` and `signal`.

    Raises:
        BudgetError: Nothing feasible, or an unknown strategy or option.
        ProfileError: The profile is missing or does not cover the targets.

    >>> targets = [TargetModule(name=f"fc{i}", in_features=64, out_features=64) for i in (1, 2)]
    >>> dict(allocate("uniform", targets=targets, budget=ParameterBudget(1024)).ranks)
    {'fc1': 4, 'fc2': 4}
    """
    if strategy not in STRATEGIES:
        close = difflib.get_close_matches(strategy, STRATEGIES, n=1)
        raise BudgetError(
            f"`strategy` must be one of {', '.join(STRATEGIES)}, but got {strategy!r}"
            + (f"; did you mean {close[0]!r}?" if close else ".")
        )
    taken = OPTIONS.get(strategy, ())
    if unknown := sorted(set(options) - set(taken)):
        raise BudgetError(f"`{strategy}` takes {', '.join(taken) or 'no options'}, but got {unknown[0]!r}.")
    request = Request(
        targets=tuple(targets),
        budget=budget,
        profile=profile,
        seed=seed,
        min_rank=min_rank,
        max_rank=max_rank,
        options=options,
    )
    return STRATEGIES[strategy](request).renamed(strategy)


def uniform(request: Request) -> RankAllocation:
    """The same rank everywhere, as even as the budget allows: plain LoRA."""
    return request.proportional(dict.fromkeys((t.name for t in request.targets), 1.0))


def random(request: Request) -> RankAllocation:
    """Parameter shares drawn from a symmetric Dirichlet distribution.

    Option `concentration` (default 1): small values give most parameters to few modules, large ones approach equal
    shares.
    """
    concentration = float(request.options.get("concentration", 1.0))
    if not 0 < concentration < math.inf:
        raise BudgetError(f"`concentration` must be above 0 and finite, but got {concentration}.")
    rng = np.random.default_rng(request.seed)
    names = sorted(target.name for target in request.targets)  # the draw must not depend on the targets' order
    shares = dict(zip(names, rng.gamma(concentration, size=len(names)), strict=True))
    floor = np.finfo(np.float64).tiny
    return request.proportional({t.name: max(shares[t.name], floor) / t.rank_cost for t in request.targets})


def gradient_norm(request: Request) -> RankAllocation:
    """Parameters in proportion to the gradient's Frobenius norm, so ranks to the norm per parameter."""
    norms = request.profiled().column("gradient_norm")
    return request.proportional({t.name: norms[t.name] / t.rank_cost for t in request.targets})


def one_shot(request: Request) -> RankAllocation:
    """Water-filling on the gradient spectrum: each rank goes where it captures most gradient energy per parameter.

    The first step of LoRA with B = 0 and A along the gradient's leading right singular vectors moves the weight along
    the best rank-r part of the gradient, whose energy is the sum of its r leading squared singular values
    (Eckart and Young 1936; LoRA-GA, arXiv 2407.05000, Thm 3.1). The gain of rank r is therefore sigma_r ** 2.

    Options: `power` of the singular values (default 2), and `signal` (default True): only what both halves of the
    profile's batches agree on.
    """
    power = float(request.options.get("power", 2.0))
    if not 0 < power < math.inf:
        raise BudgetError(f"`power` must be above 0 and finite, but got {power}.")
    spectra = request.profiled().spectra(signal=bool(request.options.get("signal", True)))
    return request.marginal({t.name: spectra[t.name] ** power for t in request.targets})


STRATEGIES: Mapping[str, Callable[[Request], RankAllocation]] = {
    "uniform": uniform,
    "random": random,
    "gradient-norm": gradient_norm,
    "one-shot": one_shot,
}
NEEDS_PROFILE = frozenset({"gradient-norm", "one-shot"})
OPTIONS: Mapping[str, tuple[str, ...]] = {"random": ("concentration",), "one-shot": ("power", "signal")}
