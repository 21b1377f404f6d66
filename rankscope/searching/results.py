"""What a search leaves: trials as plain values read from the study, and the best of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from optuna.trial import FrozenTrial, TrialState

from rankscope.allocation import RankAllocation
from rankscope.exceptions import StudyError
from rankscope.files import replacing
from rankscope.targets import TargetModule

TRIAL_KEY = "rankscope"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One evaluated allocation.

    Attributes:
        number: Of the Optuna trial.
        origin: Where the allocation comes from: `"uniform"`, `"one-shot"` or `"sampler"`.
        allocation: The realised ranks.
        learning_rate: The rate it was trained with.
        metric: Validation metric, mean over seeds; higher is better.
        loss: Validation loss, mean over seeds.
        metrics_by_seed: Validation metric of each seed.
        difference: Mean paired difference of the metric to uniform at uniform's best learning rate, seed by seed.
        wall_seconds: Training time; 0 where the result of an equal trial was reused.
        reused: Number of the trial whose result was reused; None for one that was trained.
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


@dataclass(frozen=True, eq=False)
class SearchResult:
    """A finished search.

    Attributes:
        study: The `optuna.Study`, usable as any other.
        targets: The target modules.
        metric_name: The task's metric.
    """

    study: optuna.Study
    targets: tuple[TargetModule, ...]
    metric_name: str

    @property
    def trials(self) -> list[Trial]:
        """The completed trials, in order."""
        return [read_trial(trial, self.targets) for trial in completed(self.study)]

    @property
    def best_trial(self) -> Trial:
        """The trial with the highest validation metric; equal ones by lower loss, then by number.

        It is the best *observed*, and so flattered by noise: compare it on fresh seeds before you believe it.
        """
        return self.best_of(self.trials)

    @property
    def best_allocation(self) -> RankAllocation:
        """The allocation of `best_trial`."""
        return self.best_trial.allocation

    def best_of(self, trials: list[Trial]) -> Trial:
        """The best of some trials.

        Raises:
            StudyError: There is none.
        """
        if not trials:
            raise StudyError(
                f"study `{self.study.study_name}` must hold a completed trial, but holds none; run the search."
            )
        return min(trials, key=lambda trial: (-trial.metric, trial.loss, trial.number))

    def best_of_origin(self, origin: str) -> Trial:
        """The best trial among those of one origin, as in `"uniform"`: its learning rate is the tuned one."""
        return self.best_of([trial for trial in self.trials if trial.origin == origin])

    def to_frame(self) -> pd.DataFrame:
        """One row a completed trial; ranks as a list column in the order of the targets."""
        return pd.DataFrame(
            {
                "trial": t.number,
                "origin": t.origin,
                "learning_rate": t.learning_rate,
                "parameters": t.allocation.parameters,
                "metric": t.metric,
                "loss": t.loss,
                "difference": t.difference,
                "wall_seconds": t.wall_seconds,
                "reused": t.reused,
                "ranks": list(t.allocation.vector),
                "fingerprint": t.allocation.fingerprint,
            }
            for t in self.trials
        ).astype({"reused": "Int64"})

    def to_parquet(self, path: str | os.PathLike[str]) -> Path:
        """Writes `trials.parquet`, atomically; returns the path."""
        with replacing(path) as temporary:
            self.to_frame().to_parquet(temporary, index=False)
        return Path(path)


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
        targets, tuple(trial.user_attrs["ranks"]), strategy=stored["origin"], budget=stored["budget"]
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
    )
