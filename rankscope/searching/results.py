"""What a search leaves: the study, its trials, its finalists, and the allocation to recommend."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import optuna
import pandas as pd

from rankscope.allocation import RankAllocation
from rankscope.exceptions import StudyError
from rankscope.files import replacing
from rankscope.performance import PerformanceModel, Validation
from rankscope.searching.confirmation import confirmed_keys
from rankscope.searching.fidelity import Agreement, agreement_on_the_way, agreement_when_confirmed
from rankscope.searching.finalists import Finalist, recommend
from rankscope.searching.study import STUDY_KEY
from rankscope.searching.trials import STEPS_KEY, Trial, completed, read_trial
from rankscope.targets import TargetModule


@dataclass(frozen=True, eq=False)
class SearchResult:
    """A finished search.

    Attributes:
        study: The `optuna.Study`, usable as any other.
        targets: The target modules.
        metric_name: The task's metric.
        finalists: What was trained again on fresh seeds; empty where nothing was.
        model: The performance model on all trials; None for other samplers, and with too few trials.
        validation: How well the model predicts trials it has not seen; None where there are too few.
        belief: What chooses: the model, or the profile alone where the model does not beat it; None: only fresh seeds do.
        unconfirmed: Why nothing was trained again on fresh seeds; None where it was.
    """

    study: optuna.Study
    targets: tuple[TargetModule, ...]
    metric_name: str
    finalists: tuple[Finalist, ...] = ()
    model: PerformanceModel | None = None
    validation: Validation | None = None
    belief: PerformanceModel | None = None
    unconfirmed: str | None = None

    @property
    def trials(self) -> list[Trial]:
        """The completed trials, in order."""
        return [read_trial(trial, self.targets) for trial in completed(self.study)]

    @property
    def agreements(self) -> list[Agreement]:
        """Whether short training ranks allocations like long training, as far as these trials can tell."""
        return [*agreement_on_the_way(self.trials), *agreement_when_confirmed(self.finalists, *self._schedule)]

    @property
    def confirming_runs(self) -> int:
        """Trainings on fresh seeds that the study holds, those of earlier finalists included."""
        return len(confirmed_keys(self.study))

    @property
    def steps(self) -> int:
        """Optimizer steps that the search took in all; those that a killed process lost are not counted."""
        exploring: int = sum(trial.user_attrs.get(STEPS_KEY, 0) for trial in self.study.get_trials(deepcopy=False))
        return exploring + self.confirming_runs * self._schedule[1]

    @property
    def _schedule(self) -> tuple[int, int]:
        """Steps of a trial, and of a confirming run."""
        about = self.study.user_attrs[STUDY_KEY]
        return about["trial_steps"], about["training"]["steps"]

    @property
    def recommendation(self) -> Finalist | None:
        """The finalist that trials and fresh seeds together value most; None without finalists.

        See `rankscope.searching.finalists.recommend`. Its difference to uniform comes with a 95 % interval.
        """
        return recommend(self.finalists, self.belief) if self.finalists else None

    @property
    def best_trial(self) -> Trial:
        """The recommendation's trial.

        Where nothing was confirmed it is the best observed, which noise flatters: compare it on fresh seeds before you
        believe it.
        """
        return self.recommendation.trial if self.recommendation else self.best_of(self.trials)

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
