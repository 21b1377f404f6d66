"""Confirmation: the last share of a search's trainings, spent on its finalists on fresh seeds, so that no luck is recommended."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import optuna

from rankscope.exceptions import StudyError, TrainingError
from rankscope.searching.finalists import N_SAMPLED, Finalist, judge
from rankscope.searching.trials import Trial
from rankscope.tasks import Task
from rankscope.training import TrainingConfig, train

logger = logging.getLogger(__name__)

CONFIRMATION_KEY = "confirmation"  # of study attributes: one a run, so that processes which share a study lose none
CONFIRM_FRACTION = 0.25  # of the trainings, by default
FIRST_SEED = 500  # trials train on seeds 0, 1, …


def split_budget(n_trials: int, confirm_fraction: float, n_seeds: int = 1) -> tuple[int, int]:
    """How many trials explore, and how many trainings confirm.

    Confirming takes as many whole seeds of all finalists (five at most) as fit into its share; what is left explores.

    Args:
        n_trials: Trainings in all.
        confirm_fraction: The share that confirms.
        n_seeds: Trainings of an exploring trial.

    Raises:
        StudyError: There is no room for one trial, or the share is not in [0, 1).

    >>> split_budget(60, 1 / 3), split_budget(60, 1 / 3, n_seeds=2), split_budget(12, 1 / 3)
    ((40, 20), (20, 20), (12, 0))
    """
    if not 0.0 <= confirm_fraction < 1.0:
        raise StudyError(f"`confirm_fraction` must lie in [0, 1), but got {confirm_fraction:g}.")
    if n_seeds < 1:
        raise StudyError(f"`n_seeds` must be at least 1, but got {n_seeds}.")
    if n_trials < n_seeds:
        raise StudyError(f"`n_trials` must cover one trial of {n_seeds} seeds, but got {n_trials}; raise it.")
    share = math.floor(confirm_fraction * n_trials + 1e-9)

    def whole_seeds(confirming: int) -> bool:
        finalists = min(2 + N_SAMPLED, (n_trials - confirming) // n_seeds)
        return finalists > 1 and confirming % finalists == 0

    confirming = next(filter(whole_seeds, range(share, 0, -1)), 0)
    return (n_trials - confirming) // n_seeds, confirming


def confirm(
    study: optuna.Study,
    task: Task,
    finalists: Sequence[Trial],
    training: TrainingConfig,
    *,
    n_runs: int,
    on_run: Callable[[int, int], None] | None = None,
) -> tuple[tuple[Finalist, ...], str | None]:
    """Trains the finalists on fresh seeds, the same for each; runs that the study already holds are not repeated.

    A finalist that diverges on a fresh seed is dropped. Processes that share a study share the runs: each goes through them
    in an order of its own and passes over what another has stored.

    Args:
        study: Keeps the runs, so that an interrupted confirmation goes on.
        task: Where model, data, loss and metric come from.
        finalists: Trials, each with its allocation and learning rate.
        training: The schedule.
        n_runs: Trainings for confirming in all, those included that the study already holds, also of earlier finalists.
        on_run: Called with the number of runs done and of runs in all.

    Returns:
        The finalists, and why there are none.
    """
    if len(finalists) < 2:
        return (), "there are fewer than two allocations to compare; raise `n_trials`."
    seeds = [str(FIRST_SEED + i) for i in range(_affordable_seeds(study, finalists, n_runs))]
    if not seeds:
        return (), (
            f"{n_runs} trainings are left, too few to confirm {len(finalists)} finalists on a fresh seed each; "
            "raise `n_trials` or `confirm_fraction`."
        )
    runs = [(trial, seed) for trial in finalists for seed in seeds]
    random.Random().shuffle(runs)
    for done, (trial, seed) in enumerate(runs, start=1):
        if _key(trial, seed) not in study.user_attrs:
            study.set_user_attr(_key(trial, seed), _metric(task, trial, training, int(seed)))
        if on_run:
            on_run(done, len(runs))
    known = study.user_attrs
    metrics = [{seed: known[_key(trial, seed)] for seed in seeds} for trial in finalists]
    steady = [(t, m) for t, m in zip(finalists, metrics, strict=True) if None not in m.values()]
    if not steady:
        return (), "every finalist diverged on a fresh seed; lower `learning_rate`."
    return judge([t for t, _ in steady], [m for _, m in steady]), None


def confirmed_keys(study: optuna.Study) -> set[str]:
    """The attributes of the study that hold a confirming run each."""
    return {key for key in study.user_attrs if key.startswith(f"{CONFIRMATION_KEY}:")}


def _affordable_seeds(study: optuna.Study, finalists: Sequence[Trial], n_runs: int) -> int:
    """The most fresh seeds on which each finalist can be trained; what is known costs nothing more."""
    known = confirmed_keys(study)
    seeds, left = 0, n_runs - len(known)
    while True:
        missing = sum(_key(trial, str(FIRST_SEED + seeds)) not in known for trial in finalists)
        if missing > max(left, 0):
            return seeds
        seeds, left = seeds + 1, left - missing


def _metric(task: Task, trial: Trial, training: TrainingConfig, seed: int) -> float | None:
    """The validation metric of one run; None where it diverges."""
    try:
        _, result = train(task, trial.allocation, replace(training, learning_rate=trial.learning_rate), seed=seed)
    except TrainingError as error:
        logger.warning("trial %d is no finalist: on seed %d %s", trial.number, seed, error)
        return None
    return result.metrics[task.metric]


def _key(trial: Trial, seed: str) -> str:
    return f"{CONFIRMATION_KEY}:{trial.allocation.fingerprint}@{trial.learning_rate:g}:{seed}"
