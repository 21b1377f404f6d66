"""Strategies: from targets, a budget and (most of them) a profile to an allocation, without a trial.

A strategy is a function of a `Request` that returns, by module name, either scores, in proportion to which `allocate` shares out
the parameters, or the gains of the first, second, … rank, with which it fills the budget up.
"""

from __future__ import annotations

import inspect
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankscope.allocation import RankAllocation
from rankscope.budget import Bound, ParameterBudget, RankLimits, allocate_marginal, allocate_proportional
from rankscope.errors import ModelError, SettingsError, checked, did_you_mean, shown
from rankscope.performance import PRIOR_DEPTH, PRIOR_POWER, prior_gains
from rankscope.plugins import entry_points, load_entry_point, user_function
from rankscope.profiling import Profile
from rankscope.targets import TargetModule

logger = logging.getLogger(__name__)

Scores = Mapping[str, float]
Gains = Mapping[str, NDArray[np.float64]]
Strategy = Callable[..., Scores | Gains]
_TINY = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a strategy is asked for."""

    targets: tuple[TargetModule, ...]
    budget: ParameterBudget
    profile: Profile | None
    seed: int  # for strategies that draw

    @property
    def profiled(self) -> Profile:
        """The profile; a `ModelError` where there is none, or it does not cover the targets."""
        if self.profile is None:
            raise ModelError("this strategy needs a profile, but got none; take one with `rs.profile(model, batches)`.")
        self.profile.require(self.targets)
        return self.profile


@checked
def allocate(
    strategy: str | Strategy,
    *,
    targets: Sequence[TargetModule],
    budget: ParameterBudget | int,
    profile: Profile | None = None,
    seed: int = 0,
    min_rank: Bound = 0,
    max_rank: Bound = None,
    **options: Any,
) -> RankAllocation:
    """Computes an allocation without a trial.

    `strategy` is a name in `STRATEGIES`, that of an entry point in the group `rankscope.strategies`, or a function like theirs;
    `options` are its further arguments, such as `power=1` for `one-shot`. All but `uniform` and `random` need a profile;
    `random` draws with `seed`. `min_rank` and `max_rank` (None: full rank) are for all modules, or for some by name.

    >>> targets = [TargetModule(name=f"fc{i}", in_features=64, out_features=64) for i in (1, 2)]
    >>> dict(allocate("uniform", targets=targets, budget=ParameterBudget(1024)).ranks)
    {'fc1': 4, 'fc2': 4}
    """
    if isinstance(strategy, str) and ":" in strategy:
        given: Any = {"targets": targets, "budget": budget, "profile": profile, "seed": seed, **options}
        with user_function(strategy, Path(), gives="scores or gains", error=SettingsError) as own:
            return allocate(own, min_rank=min_rank, max_rank=max_rank, **given)
    (name, function), budget = _find(strategy), ParameterBudget.of(budget)
    taken = list(inspect.signature(function).parameters)[1:]
    if unknown := sorted(set(options) - set(taken)):
        raise SettingsError(f"`{name}` takes {', '.join(taken) or 'no options'}, but got {unknown[0]!r}.")
    worth: Any = function(Request(targets=tuple(targets), budget=budget, profile=profile, seed=seed), **options)
    if not isinstance(worth, Mapping):
        must = "must return a score, or the gains of ranks, by module name"
        raise SettingsError(f"`{name}` {must}, but returned a {type(worth).__name__}.")
    by_rank = np.ndim(next(iter(worth.values()), 0.0)) > 0
    worth = {
        t.name: _numbers(name, t, worth[t.name]) / (1 if by_rank else t.rank_cost) for t in targets if t.name in worth
    }
    if worth and not any(np.max(value, initial=0.0) > 0 for value in worth.values()):
        raise SettingsError(
            f"`targets` must hold a module that the profile gives a score above 0, but all {len(targets)} have 0, as "
            f"`{targets[0].name}`; choose other targets, or another strategy."
        )
    project = allocate_marginal if by_rank else allocate_proportional
    return project(targets, worth, budget, RankLimits(min_rank, max_rank)).renamed(name)


def _numbers(strategy: str, target: TargetModule, worth: Any) -> NDArray[np.float64]:
    """A score, or gains, as a strategy returned it; a SettingsError where a strategy of the user's own returned none."""
    try:
        found = np.asarray(worth, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError):  # a text, a list of lists, a tensor that requires a gradient
        found = np.array(math.nan)
    if strategy not in STRATEGIES and not (np.isfinite(found) & (found >= 0)).all():
        must = "must return finite numbers that are not negative"
        raise SettingsError(f"`{strategy}` {must}, but for `{target.name}` returned {shown(worth)}; mend the function.")
    return found


def _find(strategy: Any) -> tuple[str, Strategy]:
    if callable(strategy):
        return getattr(strategy, "__name__", type(strategy).__name__), strategy
    if isinstance(strategy, str) and strategy in STRATEGIES:
        return strategy, STRATEGIES[strategy]
    installed = entry_points("strategies")
    if isinstance(strategy, str) and strategy in installed:
        return strategy, load_entry_point(installed[strategy], error=SettingsError)
    known = [*STRATEGIES, *installed]
    hint = did_you_mean(strategy, known, "")
    got = shown(strategy) + (f"; {hint}" if hint else ".")
    raise SettingsError(f"`strategy` must be one of {', '.join(known)}, but got {got}")


def uniform(request: Request) -> Scores:
    """The same rank everywhere, as even as the budget allows: plain LoRA."""
    return {target.name: float(target.rank_cost) for target in request.targets}


def random(request: Request, concentration: float = 1.0) -> Scores:
    """A symmetric Dirichlet draw. A small `concentration` favours few modules; a large one approaches equal shares."""
    _check_positive("concentration", concentration)
    _check("seed", request.seed, request.seed >= 0, "be a whole number of 0 or more")
    names = sorted(target.name for target in request.targets)  # the draw must not depend on the targets' order
    shares = np.random.default_rng(int(request.seed)).gamma(concentration, size=len(names))
    return dict(zip(names, np.maximum(shares, _TINY).tolist(), strict=True))


def gradient_norm(request: Request) -> Scores:
    """The gradient's Frobenius norm."""
    return request.profiled.column("gradient_norm")


def sensitivity(request: Request) -> Scores:
    """The sum of |w g|: GoRA's rule (arXiv 2502.12171), with the sum where it takes the mean."""
    values = request.profiled.column("sensitivity")
    if unread := [target.name for target in request.targets if math.isnan(values[target.name])]:
        raise ModelError(
            f"the profile must hold every sensitivity, but lacks that of `{unread[0]}`; use another strategy."
        )
    return values


def activation(request: Request) -> Gains:
    """The r-th principal component's share of the variance of the inputs: EVA's rule (arXiv 2410.07170), per parameter."""
    variance = request.profiled.column("activation_variance")
    return {name: values / max(variance[name], _TINY) for name, values in request.profiled.input_variances().items()}


def one_shot(request: Request, power: float = PRIOR_POWER, depth: float = PRIOR_DEPTH, signal: bool = True) -> Gains:
    """The gradient's r-th singular value to a power, times the share of blocks that a change passes through to a power.

    The first step of LoRA with B = 0 and A along the gradient's leading right singular vectors moves the weight along the best
    rank-r part of the gradient, whose energy is the sum of its r leading sigma^2 (LoRA-GA, arXiv 2407.05000, Thm 3.1). How that
    becomes a gain is `rankscope.performance.prior_gains`. With `signal`, only what the profile's batches agree on counts.
    """
    _check_positive("power", power)
    _check("depth", depth, _is_number(depth) and 0 <= depth <= sys.float_info.max, "be a finite number of 0 or more")
    _check("signal", signal, isinstance(signal, bool), "be true or false")
    profile = request.profiled
    mean_rank = request.budget.limit / max(sum(target.rank_cost for target in request.targets), 1)
    if not profile.table["exact"].all() and (columns := int(profile.metadata["sketch_size"])) < mean_rank:
        logger.warning(
            f"the profile's sketches have {columns} columns, but the budget's mean rank is {mean_rank:.0f}: gains beyond "
            f"{columns} are estimates; take the profile with `budget`"
        )
    spectra = profile.spectra(signal=signal)
    return prior_gains(spectra, request.targets, power, depth)


def _check_positive(option: str, value: Any) -> None:
    _check(option, value, _is_number(value) and 0 < value <= sys.float_info.max, "be a number above 0 and finite")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check(option: str, value: Any, valid: bool, must: str) -> None:
    if not valid:
        raise SettingsError(f"`{option}` must {must}, but got {shown(value)}.")


_ALL = (uniform, random, gradient_norm, sensitivity, activation, one_shot)
STRATEGIES: Mapping[str, Strategy] = {function.__name__.replace("_", "-"): function for function in _ALL}
NEEDS_PROFILE = frozenset(STRATEGIES) - {"uniform", "random"}


def needs_profile(strategy: str) -> bool:
    """Whether a strategy is given a profile: all are but `uniform` and `random`."""
    return strategy in NEEDS_PROFILE or ":" in strategy or strategy in entry_points("strategies")
