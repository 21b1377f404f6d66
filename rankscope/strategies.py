"""Strategies: from targets, a budget and (most of them) a profile to an allocation, without a trial.

Each strategy is one function of a `Request`; `allocate` is the door to all of them.
"""

from __future__ import annotations

import difflib
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankscope.allocation import RankAllocation
from rankscope.budget import Bound, ParameterBudget, allocate_marginal, allocate_proportional
from rankscope.errors import ModelError, SettingsError, shown
from rankscope.profiling import Profile
from rankscope.targets import TargetModule

logger = logging.getLogger(__name__)


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
        self._require_some(scores)
        return allocate_proportional(self.targets, scores, self.budget, min_rank=self.min_rank, max_rank=self.max_rank)

    def marginal(self, gains: Mapping[str, NDArray[np.float64]]) -> RankAllocation:
        """The request's projection of marginal gains."""
        self._require_some({name: float(np.max(values, initial=0.0)) for name, values in gains.items()})
        return allocate_marginal(self.targets, gains, self.budget, min_rank=self.min_rank, max_rank=self.max_rank)

    def _require_some(self, scores: Mapping[str, float]) -> None:
        if self.targets and not any(scores[target.name] > 0 for target in self.targets):
            raise SettingsError(
                f"`targets` must hold a module that the profile gives a score above 0, but all {len(self.targets)} have 0, as "
                f"`{self.targets[0].name}`; choose other targets, or another strategy."
            )

    def per_parameter(self, scores: Mapping[str, float]) -> RankAllocation:
        """Parameters in proportion to scores, so ranks to the score per parameter."""
        return self.proportional({t.name: scores[t.name] / t.rank_cost for t in self.targets})

    def number(self, option: str, default: float) -> float:
        """An option that is a number above 0 and finite."""
        value = self.options.get(option, default)
        if not _is_number(value) or not 0 < value < math.inf:
            raise SettingsError(f"`{option}` must be a number above 0 and finite, but got {shown(value)}.")
        return float(value)

    def flag(self, option: str, default: bool) -> bool:
        """An option that is on or off."""
        value = self.options.get(option, default)
        if not isinstance(value, bool):
            raise SettingsError(f"`{option}` must be true or false, but got {shown(value)}.")
        return value

    def profiled(self) -> Profile:
        """The profile.

        Raises:
            ModelError: There is none, or it does not cover the targets.
        """
        if self.profile is None:
            raise ModelError("this strategy needs a profile, but got none; take one with `rs.profile(model, batches)`.")
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
        strategy: `"uniform"`, `"random"`, `"gradient-norm"`, `"fisher"`, `"sensitivity"`, `"activation"`, `"one-shot"` or
            `"blend"`.
        targets: The target modules.
        budget: The limit in parameters.
        profile: Needed by all but `uniform` and `random`.
        seed: For `random`.
        min_rank: The least rank, for all modules or by name.
        max_rank: The greatest rank, for all modules or by name; None: full rank.
        **options: `random` takes `concentration`, `gradient-norm` `signal`, `one-shot` `power` and `signal`, `blend`
            `weights`.

    Raises:
        SettingsError: Nothing feasible, or an unknown strategy or option.
        ModelError: The profile is missing or does not cover the targets.

    >>> targets = [TargetModule(name=f"fc{i}", in_features=64, out_features=64) for i in (1, 2)]
    >>> dict(allocate("uniform", targets=targets, budget=ParameterBudget(1024)).ranks)
    {'fc1': 4, 'fc2': 4}
    """
    name: Any = strategy  # a study file may hold anything
    if not isinstance(name, str) or name not in STRATEGIES:
        close = difflib.get_close_matches(str(name), STRATEGIES, n=1)
        raise SettingsError(
            f"`strategy` must be one of {', '.join(STRATEGIES)}, but got {shown(name)}"
            + (f"; did you mean {close[0]!r}?" if close else ".")
        )
    taken = OPTIONS.get(strategy, ())
    if unknown := sorted(set(options) - set(taken)):
        raise SettingsError(f"`{strategy}` takes {', '.join(taken) or 'no options'}, but got {unknown[0]!r}.")
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
    concentration = request.number("concentration", 1.0)
    seed: Any = request.seed
    if isinstance(seed, bool) or not isinstance(seed, Integral) or int(seed) < 0:
        raise SettingsError(f"`seed` must be a whole number of 0 or more, but got {shown(seed)}.")
    rng = np.random.default_rng(int(seed))
    names = sorted(target.name for target in request.targets)  # the draw must not depend on the targets' order
    shares = dict(zip(names, rng.gamma(concentration, size=len(names)), strict=True))
    floor = np.finfo(np.float64).tiny
    return request.proportional({t.name: max(shares[t.name], floor) / t.rank_cost for t in request.targets})


def gradient_norm(request: Request) -> RankAllocation:
    """Parameters in proportion to the gradient's Frobenius norm, so ranks to the norm per parameter.

    Option `signal` (default False): the norm without the batches' noise.
    """
    profile, signal = request.profiled(), request.flag("signal", False)
    return request.per_parameter(_signal_norms(profile) if signal else profile.column("gradient_norm"))


def fisher(request: Request) -> RankAllocation:
    """Parameters in proportion to the root of the empirical Fisher trace: the scale of single examples' gradients."""
    return request.per_parameter(_fisher_roots(request.profiled()))


def sensitivity(request: Request) -> RankAllocation:
    """Parameters in proportion to sum |w g|: GoRA's rule (arXiv 2502.12171), with the sum where it takes the mean."""
    values = request.profiled().column("sensitivity")
    if unread := [target.name for target in request.targets if math.isnan(values[target.name])]:
        raise ModelError(
            f"the profile must hold the sensitivity of every target, but lacks that of `{unread[0]}`, whose weight "
            "cannot be read; use another strategy."
        )
    return request.per_parameter(values)


def activation(request: Request) -> RankAllocation:
    """Each rank goes where it explains most of the inputs' variance: EVA's rule (arXiv 2410.07170), with parameters counted.

    The gain of rank r is the share of the r-th principal component in the variance of the module's inputs.
    """
    profile = request.profiled()
    variance, values = profile.column("activation_variance"), profile.input_variances()
    return request.marginal({t.name: values[t.name] / max(variance[t.name], _TINY) for t in request.targets})


def one_shot(request: Request) -> RankAllocation:
    """Water-filling on the gradient spectrum: each rank goes where it captures most gradient energy per parameter.

    The first step of LoRA with B = 0 and A along the gradient's leading right singular vectors moves the weight along
    the best rank-r part of the gradient, whose energy is the sum of its r leading squared singular values
    (Eckart and Young 1936; LoRA-GA, arXiv 2407.05000, Thm 3.1). The gain of rank r is therefore sigma_r ** 2.

    Options: `power` of the singular values (default 2), and `signal` (default True): only what the profile's batches agree
    on.
    """
    power = request.number("power", 2.0)
    profile = request.profiled()
    _say_if_narrow(profile, request)
    spectra = profile.spectra(signal=request.flag("signal", True))
    top = max((float(np.max(spectra[t.name], initial=0.0)) for t in request.targets), default=0.0) or 1.0
    return request.marginal({t.name: (spectra[t.name] / top) ** power for t in request.targets})  # only ratios count


def blend(request: Request) -> RankAllocation:
    """A weighted geometric mean of three views of what a module needs, its parameters in proportion to it.

    Option `weights` (default `{"gradient": 0.5, "fisher": 0.25, "sensitivity": 0.25}`): exponents of the signal's norm, of
    the root Fisher trace and of the sensitivity, each first divided by its mean over modules.
    """
    given = request.options.get("weights", _BLEND)
    weights = {**dict.fromkeys(_BLEND, 0.0), **(given if isinstance(given, Mapping) else {"": given})}
    if set(weights) != set(_BLEND) or not all(_is_number(w) and 0 <= w < math.inf for w in weights.values()):
        raise SettingsError(f"`weights` must give {', '.join(_BLEND)} numbers of 0 or more, but got {shown(given)}.")
    profile = request.profiled()
    views = {
        "gradient": _signal_norms(profile),
        "fisher": _fisher_roots(profile),
        "sensitivity": {name: 0.0 if math.isnan(v) else v for name, v in profile.column("sensitivity").items()},
    }
    scores = dict.fromkeys((target.name for target in request.targets), 1.0)
    for view, values in views.items():
        mean = max(float(np.mean([values[name] for name in scores])), _TINY)
        with np.errstate(over="ignore"):  # an infinite score is refused where scores are checked
            scores = {n: score * float(np.float64(values[n] / mean) ** weights[view]) for n, score in scores.items()}
    return request.per_parameter(scores)


def _is_number(value: Any) -> bool:
    real = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return real and bool(abs(value) < sys.float_info.max)


def _say_if_narrow(profile: Profile, request: Request) -> None:
    """Warns where much of the spectra that a budget asks for is estimated: its mean rank is above what was sketched."""
    if profile.table["exact"].all():
        return
    columns = int(profile.metadata["sketch_size"])
    mean_rank = request.budget.limit / sum(target.rank_cost for target in request.targets)
    if columns < mean_rank:
        logger.warning(
            "the profile's sketches have %d columns, but the budget's mean rank is %.0f: gains beyond %d are estimates; "
            "take the profile with `budget`",
            *(columns, mean_rank, columns),
        )


def _signal_norms(profile: Profile) -> dict[str, float]:
    """The gradient's norm without the batches' noise."""
    shares = profile.signal_shares()
    return {name: norm * math.sqrt(shares[name]) for name, norm in profile.column("gradient_norm").items()}


def _fisher_roots(profile: Profile) -> dict[str, float]:
    return {name: math.sqrt(max(trace, 0.0)) for name, trace in profile.column("fisher_trace").items()}


_TINY = float(np.finfo(np.float64).tiny)
_BLEND = {"gradient": 0.5, "fisher": 0.25, "sensitivity": 0.25}

STRATEGIES: Mapping[str, Callable[[Request], RankAllocation]] = {
    "uniform": uniform,
    "random": random,
    "gradient-norm": gradient_norm,
    "fisher": fisher,
    "sensitivity": sensitivity,
    "activation": activation,
    "one-shot": one_shot,
    "blend": blend,
}
NEEDS_PROFILE = frozenset(STRATEGIES) - {"uniform", "random"}
OPTIONS: Mapping[str, tuple[str, ...]] = {
    "random": ("concentration",),
    "gradient-norm": ("signal",),
    "one-shot": ("power", "signal"),
    "blend": ("weights",),
}
