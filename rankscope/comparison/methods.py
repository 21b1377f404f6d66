"""The methods that `compare` knows by name, each made for one budget: allocations, controllers, peers, and a user's own."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rankscope.allocation import RankAllocation
from rankscope.budget import ParameterBudget
from rankscope.comparison.repeats import Variants
from rankscope.control import ControllerConfig
from rankscope.exceptions import ComparisonError
from rankscope.profiling import Profile
from rankscope.strategies import NEEDS_PROFILE, STRATEGIES, allocate
from rankscope.targets import TargetModule
from rankscope.training import AdaLora, Eva, FullFineTuning, HeadOnly, Lora, Method
from rankscope.user_code import user_function

N_RANDOM = 3  # draws
SCHEDULES = (
    (32.0, 0.7),
    (128.0, 0.7),
    (512.0, 0.7),
    (128.0, 0.4),
)  # of AdaLoRA: alpha, share of steps when ranks settle
RHOS = (2.0, 1.0)  # of EVA: with its own ranks, whose parameters may exceed uniform's, and with uniform ranks
SHARES = (0.75,)  # of AdaLoRA's ranks: its budget is in ranks, and those that it keeps cost up to 1.3 times uniform's
CONTROLLER = "controller"
SEARCHED = "searched"
UNLIMITED = ("full", "head")  # shown beside the others, not at equal parameters
RATE_FACTORS = {"full": 1 / 30}  # all weights want far lower rates than adapters
QUERY_VALUE = ("q_proj", "v_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a method is made for.

    Attributes:
        targets: The target modules.
        budget: In adapter parameters.
        profile: For strategies that need one.
        searched: A search's allocation at this budget; None where there was no search.
        controller: The controller's settings.
        seed: Of random draws.
        base_dir: What relative paths of a user's own methods start from.
    """

    targets: tuple[TargetModule, ...]
    budget: ParameterBudget
    profile: Profile | None = None
    searched: RankAllocation | None = None
    controller: ControllerConfig = field(default_factory=ControllerConfig)
    seed: int = 0
    base_dir: Path = Path()

    def scaled(self, factor: float) -> Terms:
        """The same at a multiple of the budget; what was searched holds for its own budget only.

        Raises:
            ComparisonError: Nothing is left of the budget.
        """
        if factor == 1.0:
            return self
        if not 1 <= factor * self.budget.limit < 2**63:
            raise ComparisonError(
                f"`budgets` must leave a budget between 1 and 2^63 parameters, but {factor:g} times {self.budget.limit:,} is "
                "not; change the factor."
            )
        return replace(self, budget=ParameterBudget(round(factor * self.budget.limit)), searched=None)

    @property
    def uniform_rank(self) -> int:
        """The rank that uniform LoRA has at this budget, at least 1: the budget of peers that count in ranks."""
        return max(1, self.budget.limit // sum(target.rank_cost for target in self.targets))

    def allocate(self, strategy: str, seed: int = 0) -> RankAllocation:
        """A one-shot allocation at these terms, or the searched one."""
        if strategy != SEARCHED:
            return allocate(strategy, targets=self.targets, budget=self.budget, profile=self.profile, seed=seed)
        if self.searched is None:
            raise ComparisonError(
                "`searched` needs a search at this budget, but there is none; run `rankscope search`."
            )
        return self.searched.renamed(SEARCHED)


def need_profile(names: Sequence[str]) -> bool:
    """Whether one of the methods cannot be made without a profile.

    Raises:
        ComparisonError: One of them is not known; better said before a profile is taken.
    """
    for name in names:
        _check_known(name)
    return any(".py:" in name or name.removeprefix(f"{CONTROLLER}-") in NEEDS_PROFILE for name in names)


def known_methods() -> tuple[str, ...]:
    """All names that `make_methods` takes, besides `path/to/file.py:function`."""
    starts = [name for name in (*STRATEGIES, SEARCHED) if name not in ("random", "uniform")]
    return (*STRATEGIES, SEARCHED, *_OTHERS, *(f"{CONTROLLER}-{name}" for name in starts))


def make_methods(name: str, terms: Terms) -> dict[str, Variants]:
    """The methods of a name, by the name that each is shown under: `random` is several.

    Raises:
        ComparisonError: No such method, or it needs what the terms lack.
    """
    _check_known(name)
    if ".py:" in name:
        return {name: _users(name, terms)}
    if name == "random":
        return {f"random {n + 1}": Lora(terms.allocate("random", terms.seed + n)) for n in range(N_RANDOM)}
    if name in STRATEGIES or name == SEARCHED:
        return {name: Lora(terms.allocate(name))}
    if name in _OTHERS:
        return {name: _OTHERS[name](terms)}
    return {name: Lora(terms.allocate(name.removeprefix(f"{CONTROLLER}-")), terms.controller)}


def _check_known(name: str) -> None:
    if ".py:" in name or name in known_methods():
        return
    close = difflib.get_close_matches(name, known_methods(), n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known_methods())}."
    raise ComparisonError(f"`methods` must be known or `path/to/file.py:function`, but {name!r} is not; {hint}")


def _query_value(terms: Terms) -> Method:
    """Uniform over the query and value projections, as LoRA's first paper."""
    chosen = tuple(target for target in terms.targets if target.role in QUERY_VALUE)
    if not chosen:
        raise ComparisonError("`qv-only` needs modules of the roles q_proj and v_proj, but the targets have none.")
    found = allocate("uniform", targets=chosen, budget=terms.budget)
    return Lora(RankAllocation.from_ranks(terms.targets, found.ranks, strategy="qv-only", budget=terms.budget.limit))


def _adalora(terms: Terms) -> list[Method]:
    return [
        AdaLora(terms.targets, terms.uniform_rank, alpha, share, settled)
        for alpha, settled in SCHEDULES
        for share in SHARES
    ]


def _users(spec: str, terms: Terms) -> Variants:
    with user_function(spec, terms.base_dir, gives="an allocation or a method", error=ComparisonError) as function:
        found = function(targets=terms.targets, budget=terms.budget, profile=terms.profile)
        if isinstance(found, RankAllocation):
            return Lora(replace(found, strategy=spec.rpartition(":")[2], budget=terms.budget.limit))
        if not all(hasattr(found, name) for name in ("name", "variant", "adapt", "follow")):
            raise ComparisonError(
                f"`{spec}` must give a RankAllocation or a Method, but gave a {type(found).__name__}."
            )
        own: Method = found
        return own


_OTHERS: Mapping[str, Callable[[Terms], Variants]] = {
    "uniform-rslora": lambda terms: Lora(terms.allocate("uniform"), rank_stabilised=True),
    "qv-only": _query_value,
    CONTROLLER: lambda terms: Lora(terms.allocate("uniform"), terms.controller),
    "adalora": _adalora,
    "eva": lambda terms: [Eva(terms.targets, terms.uniform_rank, rho) for rho in RHOS],
    "full": lambda terms: FullFineTuning(),
    "head": lambda terms: HeadOnly(),
}
