"""Trials as plain values, read from the attributes of an Optuna study."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from rankscope.allocation import RankAllocation
from rankscope.exceptions import StudyError
from rankscope.targets import TargetModule

TRIAL_KEY = "rankscope"
RANKS_KEY = "ranks"
STEPS_KEY = "steps"  # optimizer steps that a trial took, over all its seeds, however it ended
LEARNING_RATE = "learning_rate"  # the parameter beside the tilts
UNIFORM, ONE_SHOT, SAMPLER, POSTERIOR_MEAN = "uniform", "one-shot", "sampler", "posterior-mean"  # a trial's origin


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One evaluated allocation.

    Attributes:
        number: Of the Optuna trial.
        origin: Where the allocation comes from: `"uniform"`, `"one-shot"`, `"sampler"`, or `"posterior-mean"`.
        allocation: The realised ranks.
        learning_rate: The rate it was trained with.
        metric: Validation metric, mean over seeds; higher is better.
        loss: Validation loss, mean over seeds.
        metrics_by_seed: Validation metric of each seed.
        difference: Mean paired difference of the metric to uniform at uniform's best learning rate, seed by seed; None
            for uniform itself.
        wall_seconds: Training time; 0 where the result of an equal trial was reused.
        reused: Number of the trial whose result was reused; None for one that was trained.
        history: Validation metric of the first seed by step, where it was evaluated on the way, the end included.
    """

    number: int
    origin: str
    allocation: RankAllocation
    learning_rate: float
    metric: float
    loss: float
    metrics_by_seed: Mapping[str, float]
    difference: float | None
    wall_seconds: float
    reused: int | None
    history: Mapping[int, float] = field(default_factory=dict)

    @property
    def proposed(self) -> bool:
        """Whether the search came up with it, and did not start from it."""
        return self.origin not in (UNIFORM, ONE_SHOT)


def seeds_of(trial: FrozenTrial) -> int:
    """How many training runs a complete trial's value is the mean of; 1 in studies that do not say."""
    return max(1, len(trial.user_attrs.get(TRIAL_KEY, {}).get("metrics_by_seed", {})))


def learning_rate_of(trial: FrozenTrial) -> Any:
    """The learning rate where it is a choice of a few; None where there is none, or where it is a number of its own."""
    choice = isinstance(trial.distributions.get(LEARNING_RATE), CategoricalDistribution)
    return trial.params[LEARNING_RATE] if choice else None


def completed(study: optuna.Study) -> list[FrozenTrial]:
    """The study's completed trials, in order."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def read_trial(trial: FrozenTrial, targets: tuple[TargetModule, ...]) -> Trial:
    """A completed Optuna trial as a `Trial`.

    Raises:
        StudyError: The trial was not made by rankscope.
    """
    stored: dict[str, Any] | None = trial.user_attrs.get(TRIAL_KEY)
    if stored is None:
        raise StudyError(
            f"the study must hold trials of rankscope only, but trial {trial.number} is foreign; use another study name."
        )
    allocation = RankAllocation(
        targets, tuple(trial.user_attrs[RANKS_KEY]), strategy=stored["origin"], budget=stored["budget"]
    )
    return Trial(
        number=trial.number,
        origin=stored["origin"],
        allocation=allocation,
        learning_rate=stored["learning_rate"],
        metric=stored["metric"],
        loss=stored["loss"],
        metrics_by_seed=stored["metrics_by_seed"],
        difference=stored["difference"],
        wall_seconds=stored["wall_seconds"],
        reused=stored["reused"],
        history={int(step): metric for step, metric in stored["history"].items()},
    )
