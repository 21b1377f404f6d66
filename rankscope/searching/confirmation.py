"""Confirmation: the finalists of a search, trained again on fresh seeds, so that no lucky trial is recommended."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import optuna

from rankscope.allocation import RankAllocation
from rankscope.searching.trials import Trial
from rankscope.tasks import Task
from rankscope.training import TrainingConfig, train

CONFIRMATION_KEY = "confirmation"
FIRST_SEED = 500  # trials train on seeds 0, 1, …


@dataclass(frozen=True, slots=True, kw_only=True)
class Finalist:
    """An allocation that was trained again on fresh seeds.

    Attributes:
        trial: The trial that made it a finalist.
        metrics_by_seed: Validation metric of each fresh seed.
        difference: Mean paired difference to the finalist `uniform` on these seeds; None for uniform itself.
    """

    trial: Trial
    metrics_by_seed: Mapping[str, float]
    difference: float | None

    @property
    def metric(self) -> float:
        """Mean validation metric over the fresh seeds."""
        return fmean(self.metrics_by_seed.values())


def choose_finalists(trials: Sequence[Trial], n_sampled: int = 3) -> list[Trial]:
    """The best trial of uniform, of one-shot, and the best few different ones that the sampler proposed."""
    ranked = sorted((t for t in trials if t.reused is None), key=lambda t: (-t.metric, t.loss, t.number))
    starts = [next((t for t in ranked if t.origin == origin), None) for origin in ("uniform", "one-shot")]
    chosen = [t for t in starts if t is not None]
    taken: set[RankAllocation] = {t.allocation for t in chosen}
    for trial in (t for t in ranked if t.origin == "sampler"):
        if len(chosen) == len([t for t in starts if t is not None]) + n_sampled:
            break
        if trial.allocation not in taken:
            chosen.append(trial)
            taken.add(trial.allocation)
    return chosen


def confirm(
    study: optuna.Study,
    task: Task,
    finalists: Sequence[Trial],
    training: TrainingConfig,
    *,
    n_seeds: int,
    on_run: Callable[[int, int], None] | None = None,
) -> tuple[Finalist, ...]:
    """Trains each finalist on the same fresh seeds; runs that the study already holds are not repeated.

    Args:
        study: Keeps the runs, so that an interrupted confirmation goes on.
        task: Where model, data, loss and metric come from.
        finalists: Trials, each with its allocation and learning rate.
        training: The schedule.
        n_seeds: Fresh seeds.
        on_run: Called with the number of runs done and of runs in all.
    """
    known: dict[str, dict[str, float]] = dict(study.user_attrs.get(CONFIRMATION_KEY, {}))
    for index, trial in enumerate(finalists):
        runs = known.setdefault(_key(trial), {})
        for seed in range(FIRST_SEED, FIRST_SEED + n_seeds):
            if str(seed) not in runs:
                config = replace(training, learning_rate=trial.learning_rate)
                _, result = train(task, trial.allocation, config, seed=seed)
                runs[str(seed)] = result.metrics[task.metric]
                study.set_user_attr(CONFIRMATION_KEY, known)
            if on_run:
                on_run(index * n_seeds + seed - FIRST_SEED + 1, len(finalists) * n_seeds)
    seeds = [str(seed) for seed in range(FIRST_SEED, FIRST_SEED + n_seeds)]
    metrics = {_key(t): {seed: known[_key(t)][seed] for seed in seeds} for t in finalists}
    uniform = next((metrics[_key(t)] for t in finalists if t.origin == "uniform"), None)
    return tuple(
        Finalist(
            trial=t,
            metrics_by_seed=metrics[_key(t)],
            difference=None
            if uniform is None or t.origin == "uniform"
            else fmean(metrics[_key(t)][seed] - uniform[seed] for seed in seeds),
        )
        for t in finalists
    )


def _key(trial: Trial) -> str:
    return f"{trial.allocation.fingerprint}@{trial.learning_rate:g}"
