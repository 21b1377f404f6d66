"""The objective: a point of the space becomes an allocation, is trained on the search's seeds, and is stored whole."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import optuna

from rankscope.allocation import RankAllocation
from rankscope.exceptions import TrainingError
from rankscope.searching.pruners import judges_seeds
from rankscope.searching.sampler import suggest_allocation
from rankscope.searching.study import signature
from rankscope.searching.trials import (
    LEARNING_RATE,
    SAMPLER,
    STEPS_KEY,
    TRIAL_KEY,
    UNIFORM,
    Trial,
    completed,
    read_trial,
)
from rankscope.space import HierarchicalSpace
from rankscope.tasks import Task
from rankscope.training import TrainingConfig, TrainingResult, train

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """Callable for `optuna.Study.optimize`: validation metric of one point, mean over the seeds.

    Attributes:
        task: Where model, data, loss and metric come from.
        space: Points to allocations.
        training: The schedule; its learning rate is replaced where the search has several.
        learning_rates: The rates searched over, at least one.
        seeds: Training seeds of each trial.
    """

    task: Task
    space: HierarchicalSpace
    training: TrainingConfig
    learning_rates: Sequence[float]
    seeds: Sequence[int]

    def __call__(self, trial: optuna.Trial) -> float:
        """Trains, or reuses an equal trial's result; stores everything in the trial's attributes."""
        for key, value in signature().items():  # a trial that waited may have been queued by another process
            trial.set_user_attr(key, value)
        allocation = suggest_allocation(trial, self.space)
        rate = self._learning_rate(trial)
        finished = completed(trial.study)
        earlier = [read_trial(frozen, self.space.targets) for frozen in finished]
        origin = trial.user_attrs.get("origin", SAMPLER)
        same = next((t for t in earlier if t.allocation == allocation and t.learning_rate == rate), None)
        if same:
            metrics, loss, seconds, history = dict(same.metrics_by_seed), same.loss, 0.0, same.history
            for step, value in finished[earlier.index(same)].intermediate_values.items():
                trial.report(value, step)  # pruners compare with the best trial, which may be this one
        else:
            results = self._train(trial, allocation, rate, may_prune=origin == SAMPLER)
            metrics = {str(s): r.metrics[self.task.metric] for s, r in zip(self.seeds, results, strict=True)}
            loss = fmean(r.metrics["loss"] for r in results)
            seconds = sum(r.wall_seconds for r in results)
            history = {step: found[self.task.metric] for step, found in results[0].history.items()}
        stored = {
            "origin": origin,
            "budget": self.space.budget.limit,
            "parameters": allocation.parameters,
            "learning_rate": rate,
            "metric": fmean(metrics.values()),
            "loss": loss,
            "metrics_by_seed": metrics,
            "difference": None if origin == UNIFORM else _paired_difference(metrics, earlier),
            "wall_seconds": seconds,
            "reused": (same.number if same.reused is None else same.reused) if same else None,
            "history": history,
        }
        trial.set_user_attr(TRIAL_KEY, stored)
        return float(fmean(metrics.values()))

    def _learning_rate(self, trial: optuna.Trial) -> float:
        if len(self.learning_rates) == 1:
            return self.learning_rates[0]
        return float(trial.suggest_categorical(LEARNING_RATE, list(self.learning_rates)))

    def _train(
        self, trial: optuna.Trial, allocation: RankAllocation, rate: float, *, may_prune: bool
    ) -> list[TrainingResult]:
        by_seed = judges_seeds(trial.study.pruner)
        steps: list[int] = []

        def report(step: int, metric: float, last: int) -> None:
            trial.report(metric, step)
            if may_prune and step < last and trial.should_prune():
                raise optuna.TrialPruned(f"pruned at {'seed' if by_seed else 'step'} {step}")

        def on_evaluation(step: int, metrics: Mapping[str, float]) -> None:
            report(step, metrics[self.task.metric], self.training.steps)

        config = replace(self.training, learning_rate=rate)
        results: list[TrainingResult] = []
        try:
            for number, seed in enumerate(self.seeds, start=1):
                watch = on_evaluation if number == 1 and not by_seed else None  # later seeds repeat, they do not go on
                # No name for the model: it would live through the next seed's training.
                result = train(self.task, allocation, config, seed=seed, on_evaluation=watch, on_step=steps.append)[1]
                results.append(result)
                if by_seed:
                    report(number, result.metrics[self.task.metric], len(self.seeds))
        except (TrainingError, optuna.TrialPruned) as error:
            if isinstance(error, TrainingError):
                trial.set_user_attr("failure", str(error))
                logger.warning("trial %d failed: %s", trial.number, error)
            raise error.with_traceback(
                None
            ) from error.__cause__  # Optuna keeps the error in a cycle, and its frames keep the model
        finally:
            trial.set_user_attr(STEPS_KEY, len(steps))
        return results


def _paired_difference(metrics: Mapping[str, float], earlier: Sequence[Trial]) -> float | None:
    """Mean difference to uniform at its best learning rate, seed by seed; None before uniform is known."""
    uniform: Any = max((t for t in earlier if t.origin == UNIFORM), key=lambda t: t.metric, default=None)
    if uniform is None:
        return None
    return fmean(metrics[seed] - uniform.metrics_by_seed[seed] for seed in metrics)
