"""Exploring: uniform and one-shot first, then what the sampler proposes, last the performance model's best guess."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import optuna
from optuna.trial import FrozenTrial, TrialState

from rankscope.exceptions import TrainingError
from rankscope.searching.objective import Objective
from rankscope.searching.sampler import PerformanceModelSampler
from rankscope.searching.study import signature
from rankscope.searching.trials import LEARNING_RATE, ONE_SHOT, POSTERIOR_MEAN, RANKS_KEY, UNIFORM, completed

_UNDER_WAY = (TrialState.RUNNING, TrialState.WAITING)  # another process may be at it

Report = Callable[[optuna.Study, FrozenTrial], None]


def explore(study: optuna.Study, objective: Objective, n_trials: int, report: Report) -> None:
    """Runs trials until the study has so many that are finished.

    Args:
        study: With its sampler; earlier trials count.
        objective: What a trial does.
        n_trials: Finished trials in all: completed, pruned, or failed of their own.
        report: Called after each trial.

    Raises:
        TrainingError: Every trial failed.
    """
    # Uniform comes first and alone: every later trial is paired with it.
    for origin, tau in ((UNIFORM, 0.0), (ONE_SHOT, 1.0)):
        missing = _enqueue(study, objective.space.point(tau=tau), origin, objective.learning_rates)
        _optimize(study, objective, min(missing, _remaining(study, n_trials)), report)
    if not completed(study) and not study.get_trials(deepcopy=False, states=_UNDER_WAY):
        raise TrainingError(
            f"study `{study.study_name}` must have a trial that completes, but every one failed; lower `learning_rate`."
        )
    _optimize(study, objective, _remaining(study, n_trials) - 1, report)
    if _remaining(study, n_trials):
        _enqueue_posterior_mean(study)
    _optimize(study, objective, _remaining(study, n_trials), report)


def _enqueue_posterior_mean(study: optuna.Study) -> None:
    """Queues the allocation that the performance model values most, if there is a model and it was not tried yet."""
    sampler = study.sampler
    if not isinstance(sampler, PerformanceModelSampler) or sampler.model(study) is None:
        return
    allocation, rate = sampler.best(study)
    if list(allocation.vector) in [trial.user_attrs.get(RANKS_KEY) for trial in completed(study)]:
        return
    point = sampler.describe(allocation) | ({LEARNING_RATE: rate} if rate is not None else {})
    attributes = {"origin": POSTERIOR_MEAN, RANKS_KEY: list(allocation.vector), **signature()}
    study.enqueue_trial(point, user_attrs=attributes)


def _enqueue(study: optuna.Study, point: dict[str, float], origin: str, rates: Sequence[float]) -> int:
    """Queues a start point at each rate at which it is neither finished nor under way; returns how many wait now."""
    trials = study.get_trials(deepcopy=False)
    settled = [t for t in trials if t.user_attrs.get("origin") == origin and (_finished(t) or t.state in _UNDER_WAY)]
    known = {t.user_attrs["rate"] for t in settled}
    for rate in rates:
        if rate not in known:
            parameters = point | ({LEARNING_RATE: rate} if len(rates) > 1 else {})
            study.enqueue_trial(parameters, user_attrs={"origin": origin, "rate": rate, **signature()})
    return _waiting(study)


def _waiting(study: optuna.Study) -> int:
    return len(study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))


def _finished(trial: FrozenTrial) -> bool:
    """Whether a trial counts: it completed, was pruned, or failed of its own (and not because its process was killed)."""
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or "failure" in trial.user_attrs


def _remaining(study: optuna.Study, n_trials: int) -> int:
    return max(0, n_trials - sum(_finished(trial) for trial in study.get_trials(deepcopy=False)))


def _optimize(study: optuna.Study, objective: Objective, n_trials: int, report: Report) -> None:
    """Runs trials one by one; each is queued with its signature first, so that none ever runs unsigned."""
    for _ in range(n_trials):
        if not _waiting(study):
            study.enqueue_trial({}, user_attrs=signature())  # no parameter is fixed: the sampler chooses all
        study.optimize(objective, n_trials=1, callbacks=[report], catch=(TrainingError,))
