"""`hp_space`: ranks as hyperparameters of `Trainer.hyperparameter_search`, which people know."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial

from rankscope.allocation import RankAllocation
from rankscope.budget import ParameterBudget, RankLimits
from rankscope.distributed import n_processes
from rankscope.errors import SettingsError, checked, shown
from rankscope.lora import apply_allocation
from rankscope.profiling import Profile
from rankscope.searching.sampler import PROPOSAL_KEY, PerformanceModelSampler, suggest_allocation
from rankscope.searching.space import HierarchicalSpace, make_space
from rankscope.searching.storage import LEARNING_RATE
from rankscope.settings import TrainingSettings
from rankscope.strategies import allocate


class _StartingSampler(PerformanceModelSampler):
    """The first trials are of given allocations, so that all others can be compared with them."""

    def __init__(self, space: HierarchicalSpace, starts: Sequence[RankAllocation], *, seed: int | None) -> None:
        super().__init__(space, seed=seed)
        self._starts = starts

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The tilts of a start point, then those of proposals."""
        if trial.number >= len(self._starts):
            return super().sample_relative(study, trial, search_space)
        start = self._starts[trial.number]
        stored = {"ranks": list(start.vector), "learning_rate": None}
        study._storage.set_trial_system_attr(trial._trial_id, PROPOSAL_KEY, stored)
        return {name: value for name, value in self._tilts_of(start).items() if name in search_space}


class HyperparameterSpace:
    """What `hp_space` returns: the `hp_space` itself, and what else `Trainer.hyperparameter_search` needs for it."""

    def __init__(
        self,
        space: HierarchicalSpace,
        starts: Sequence[RankAllocation],
        learning_rates: Sequence[float],
        others: Callable[[optuna.Trial], Mapping[str, Any]] | None,
    ) -> None:
        self.space, self._starts, self._rates, self._others = space, starts, learning_rates, others
        self._trials: dict[int, RankAllocation] = {}

    def __call__(self, trial: optuna.Trial) -> dict[str, Any]:
        """The trial's `TrainingArguments`; its ranks are for `model_init`."""
        self._ranks_of(trial)
        rates = {LEARNING_RATE: trial.suggest_categorical(LEARNING_RATE, self._rates)} if self._rates else {}
        return {**rates, **(self._others(trial) if self._others else {})}

    def model_init(self, make_model: Callable[[], Any], **peft_kwargs: Any) -> Callable[[Any], Any]:
        """The Trainer's `model_init`: `make_model()`, the bare model, under LoRA of the trial's ranks.

        Outside a search the ranks are one-shot's. `peft_kwargs` are `scaling` and fields of `LoraConfig`, such as
        `modules_to_save` for a fresh head.
        """

        def init(trial: Any = None) -> Any:
            ranks = self._starts[0] if trial is None else self._ranks_of(trial)
            return apply_allocation(make_model(), ranks, **peft_kwargs)

        return init

    def sampler(self, *, seed: int | None = None) -> PerformanceModelSampler:
        """The performance model's sampler, to pass as `sampler`: one-shot first, then uniform. Optuna's own work, too."""
        return _StartingSampler(self.space, self._starts, seed=seed)

    def allocation(self, run: Any) -> RankAllocation:
        """The ranks of a `BestRun`, or of a trial's number."""
        number = int(getattr(run, "run_id", run))
        if number not in self._trials:
            known = f"it has seen {len(self._trials)} trials" if self._trials else "it has seen none"
            raise SettingsError(f"`run` must be of a search with this space, but got {shown(run)}, and {known}.")
        return self._trials[number]

    def _ranks_of(self, trial: optuna.Trial) -> RankAllocation:
        """The ranks of a trial, whether the Trainer asks for its model or its arguments first."""
        if n_processes() > 1:
            must = "`hp_space` must run in one process, since a Trainer tells the others nothing of the ranks"
            raise SettingsError(f"{must}, but there are {n_processes()}; start it without a launcher.")
        if trial.number not in self._trials:
            self._trials[trial.number] = suggest_allocation(trial, self.space)
        return self._trials[trial.number]


@checked
def hp_space(
    profile: Profile,
    budget: ParameterBudget | int,
    *,
    learning_rate: Sequence[float] | float | None = None,
    min_rank: int | Mapping[str, int] = 0,
    max_rank: int | Mapping[str, int] | None = None,
    others: Callable[[optuna.Trial], Mapping[str, Any]] | None = None,
) -> HyperparameterSpace:
    """Ranks within the budget as hyperparameters of transformers' `Trainer.hyperparameter_search`, by Optuna.

    Every trial has ranks of its own that keep to the budget. The best trial is mostly a lucky one: `rs.search`, which runs your
    Trainer as the task `train.py:make_trainer`, trains the best again on fresh seeds.

    Args:
        profile: Of the model that `make_model` gives.
        budget: The most adapter parameters.
        learning_rate: Rates to choose from. Default: that of the `TrainingArguments`.
        min_rank: The least rank of a module.
        max_rank: The largest rank of a module. Default: its full rank.
        others: Gives further `TrainingArguments` of a trial, as an `hp_space` of your own would.

    >>> space = hp_space(profile, budget=100_000, learning_rate=[1e-4, 3e-4, 1e-3])  # doctest: +SKIP
    >>> trainer = Trainer(model_init=space.model_init(make_model), args=args, train_dataset=train)  # doctest: +SKIP
    >>> best = trainer.hyperparameter_search(  # doctest: +SKIP
    ...     hp_space=space, sampler=space.sampler(), backend="optuna", direction="minimize", n_trials=30
    ... )
    >>> space.allocation(best).to_lora_config()  # doctest: +SKIP
    """
    rates = () if learning_rate is None else TrainingSettings.of(learning_rate=learning_rate).learning_rates
    limits, targets, budget = RankLimits(min_rank, max_rank), profile.targets, ParameterBudget.of(budget)
    options: Any = {"targets": targets, "budget": budget, "min_rank": min_rank, "max_rank": max_rank}
    starts = [allocate("one-shot", profile=profile, **options), allocate("uniform", **options)]
    return HyperparameterSpace(make_space(profile, targets, budget, limits=limits), starts, rates, others)
