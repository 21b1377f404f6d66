"""`search`: opens or resumes the study, runs uniform and one-shot first, then what the sampler proposes, and confirms."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Literal, get_args

import optuna
from optuna.trial import FrozenTrial, TrialState

from rankscope.budget import Bound, ParameterBudget
from rankscope.exceptions import StudyError, TrainingError
from rankscope.performance import PerformanceModel, Validation
from rankscope.profiling import Profile
from rankscope.searching.confirmation import Finalist, choose_finalists, confirm
from rankscope.searching.objective import Objective
from rankscope.searching.results import SearchResult
from rankscope.searching.sampler import PerformanceModelSampler
from rankscope.searching.samplers import SamplerName, make_sampler
from rankscope.searching.screening import CHECK_TRIALS, N_PROMOTED, SHARED, EvaluatorName, Screener
from rankscope.searching.study import fail_orphans, open_study, signature
from rankscope.searching.trials import (
    LEARNING_RATE,
    ONE_SHOT,
    POSTERIOR_MEAN,
    RANKS_KEY,
    UNIFORM,
    Trial,
    completed,
    read_trial,
)
from rankscope.space import HierarchicalSpace, group_by_depth, group_by_gradient
from rankscope.targets import TargetModule, fingerprint_targets
from rankscope.tasks import Task
from rankscope.training import TrainingConfig

logger = logging.getLogger(__name__)

DEFAULT_STORAGE = "sqlite:///rankscope.db"
Grouping = Literal["depth", "gradient"]
_UNDER_WAY = (TrialState.RUNNING, TrialState.WAITING)  # another process may be at it


def search(
    task: Task,
    *,
    budget: ParameterBudget,
    profile: Profile,
    n_trials: int = 60,
    targets: Sequence[TargetModule] | None = None,
    training: TrainingConfig | None = None,
    learning_rates: Sequence[float] | None = None,
    n_seeds: int = 1,
    n_confirm: int = 4,
    storage: str | optuna.storages.BaseStorage | None = DEFAULT_STORAGE,
    study_name: str | None = None,
    seed: int = 0,
    sampler: SamplerName | optuna.samplers.BaseSampler = "performance-model",
    grouping: Grouping = "depth",
    n_groups: int = 3,
    min_rank: Bound = 0,
    max_rank: Bound = None,
    pruner: optuna.pruners.BasePruner | None = None,
    evaluator: EvaluatorName = "stand-alone",
    n_judged: int = 200,
    shared_folder: str | os.PathLike[str] | None = None,
    on_trial: Callable[[Trial | FrozenTrial], None] | None = None,
    on_judged: Callable[[int, int], None] | None = None,
    on_confirm: Callable[[int, int], None] | None = None,
) -> SearchResult:
    """Searches for the allocation with the best validation metric under a budget.

    Uniform and one-shot are the first trials, at every learning rate. An existing study goes on where it stopped, until it
    has `n_trials` in all; an allocation that was already trained at a learning rate is not trained again.

    Args:
        task: Where model, data, loss and metric come from.
        budget: The limit in adapter parameters.
        profile: A profile of the task's model; its spectra are what the search tilts.
        n_trials: Finished trials in all, earlier ones included.
        targets: The target modules; default: the profile's.
        training: The schedule.
        learning_rates: Rates to search over beside the ranks; default: the schedule's.
        n_seeds: Training seeds of each trial: 0, 1, ….
        n_confirm: Fresh seeds on which uniform, one-shot and three more are trained again in the end: the allocation of the
            performance model's posterior mean, the best by its prediction, and the best observed. The recommendation
            is the simplest of these within one standard error of the best, since the best observed trial is
            flattered by noise. 0: none.
        storage: As Optuna takes it; None keeps the study in memory.
        study_name: Default: the task's name.
        seed: Of the sampler.
        sampler: `"performance-model"`, or one of Optuna's over the tilts: `"tpe"`, `"gp"`, `"cma-es"`, `"qmc"`, `"random"`; or a
            sampler of your own.
        grouping: Block groups by `"depth"` or by k-means over the `"gradient"`.
        n_groups: Block groups in each tower.
        min_rank: The least rank, for all modules or by name.
        max_rank: The greatest rank, for all modules or by name; None: full rank.
        pruner: Stops bad trials early, where `training.evaluate_every` is set; default: none is stopped.
        evaluator: `"stand-alone"` trains every allocation. `"shared"` also trains one nested super-adapter, for four times a
            trial's steps, that judges an allocation by a validation pass. It is compared with the first ten stand-alone trials;
            if Kendall's tau is at least 0.5 it judges `n_judged` more allocations, and the best five of these are trained
            as trials. Else the search goes on without it, and says so. Only trained trials are ever recommended.
        n_judged: Allocations that the shared evaluator judges, if it is trusted.
        shared_folder: Where the super-adapter is kept; None: in memory, so that an interrupted search trains it again.
        on_trial: Called after each trial: with a `Trial` if it completed, else with Optuna's.
        on_judged: Called after each allocation that the shared evaluator judges, with their number and how many in all.
        on_confirm: Called after each confirming run, with the number of runs done and of runs in all.

    Raises:
        StudyError: The storage holds trials of another task, budget or schedule, or every trial failed.
        BudgetError: Nothing feasible.
        ProfileError: The profile does not cover the targets.

    >>> import rankscope as rs
    >>> task = rs.load_task("digits-shift")
    >>> profile = rs.profile(task.build_model(), list(task.train_batches(0)), loss_fn=task.loss)
    >>> budget = rs.ParameterBudget.uniform(profile.targets, 1)
    >>> short = rs.TrainingConfig(steps=2, learning_rate=0.01)
    >>> result = rs.search(
    ...     task, budget=budget, profile=profile, n_trials=3, n_confirm=1, training=short, storage=None
    ... )
    >>> [trial.origin for trial in result.trials]
    ['uniform', 'one-shot', 'sampler']
    >>> result.best_allocation.parameters <= budget.limit
    True
    """
    _check_evaluator(evaluator, n_trials, n_judged)
    training = training or TrainingConfig()
    rates = tuple(learning_rates or (training.learning_rate,))
    targets = tuple(targets) if targets is not None else profile.targets
    profile.require(targets)
    space = HierarchicalSpace(
        targets=targets,
        gains={name: values**2 for name, values in profile.spectra().items()},
        budget=budget,
        groups=_groups(grouping, targets, profile, n_groups),
        min_rank=min_rank,
        max_rank=max_rank,
    )
    space.allocation(space.point(tau=1.0))  # an infeasible budget must not leave an empty study behind
    name = study_name or task.name
    about = _about(task, space, training, rates, n_seeds, profile)
    study = open_study(
        name=name,
        storage=storage,
        sampler=optuna.samplers.RandomSampler(seed),
        pruner=pruner or optuna.pruners.NopPruner(),
        about=about,
    )
    study.sampler = make_sampler(sampler, space, seed + len(study.get_trials(deepcopy=False)))
    fail_orphans(study)
    objective = Objective(task=task, space=space, training=training, learning_rates=rates, seeds=range(n_seeds))

    def report(study: optuna.Study, trial: FrozenTrial) -> None:
        if on_trial:
            on_trial(read_trial(trial, targets) if trial.state == TrialState.COMPLETE else trial)

    # Uniform comes first and alone: every later trial is paired with it.
    for origin, tau in ((UNIFORM, 0.0), (ONE_SHOT, 1.0)):
        missing = _enqueue(study, space.point(tau=tau), origin, rates)
        _optimize(study, objective, min(missing, _remaining(study, n_trials)), report)
    if not completed(study) and not study.get_trials(deepcopy=False, states=_UNDER_WAY):
        raise StudyError(
            f"study `{name}` must have a trial that completes, but every one failed; lower `learning_rate`."
        )

    def train_another(fixed: dict[str, Any]) -> bool:
        if not _remaining(study, n_trials):
            return False
        study.enqueue_trial(fixed, user_attrs=signature())
        _optimize(study, objective, 1, report)
        return True

    screening = None
    if evaluator == SHARED:
        screener = Screener(
            task=task,
            space=space,
            training=training,
            about=about,
            storage=storage,
            sampler=sampler if isinstance(sampler, str) else "performance-model",
            seed=seed,
            n_judged=n_judged,
            folder=shared_folder,
            on_judged=on_judged,
        )
        screening = screener.run(study, train_another)
    _optimize(study, objective, _remaining(study, n_trials) - 1, report)
    if _remaining(study, n_trials):
        _enqueue_posterior_mean(study)
    _optimize(study, objective, _remaining(study, n_trials), report)
    model, validation = _model(study)
    smoothed = None
    if model is not None and (validation is None or validation.trustworthy):
        smoothed = partial(_predicted, model)
    elif model is not None:
        logger.warning("the performance model does not beat the profile alone and chooses no finalist: %s", validation)
    finalists: tuple[Finalist, ...] = ()
    if n_confirm:
        chosen = choose_finalists([read_trial(trial, targets) for trial in completed(study)], smoothed)
        finalists = confirm(study, task, chosen, training, n_seeds=n_confirm, on_run=on_confirm)
    return SearchResult(study, targets, task.metric, finalists, model, validation, screening)


def _check_evaluator(evaluator: str, n_trials: int, n_judged: int) -> None:
    if evaluator not in get_args(EvaluatorName):
        raise StudyError(f"`evaluator` must be 'stand-alone' or 'shared', but got {evaluator!r}.")
    if evaluator == SHARED and n_trials < CHECK_TRIALS + N_PROMOTED:
        raise StudyError(
            f"`n_trials` must be at least {CHECK_TRIALS + N_PROMOTED} for the evaluator 'shared' ({CHECK_TRIALS} to check it, "
            f"{N_PROMOTED} to train its best), but got {n_trials}; raise it, or use 'stand-alone'."
        )
    if n_judged < N_PROMOTED:
        raise StudyError(
            f"`n_judged` must be at least {N_PROMOTED} (the best of them are trained), but got {n_judged}."
        )


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


def _model(study: optuna.Study) -> tuple[PerformanceModel | None, Validation | None]:
    """The performance model on the study's trials, and its scores on left-out ones."""
    sampler = study.sampler
    if not isinstance(sampler, PerformanceModelSampler) or (model := sampler.model(study)) is None:
        return None, None
    return model, sampler.validate(study)


def _predicted(model: PerformanceModel, trial: Trial) -> float:
    return float(model.predict([trial.allocation.vector])[0])


def _groups(grouping: Grouping, targets: tuple[TargetModule, ...], profile: Profile, n_groups: int) -> dict[str, str]:
    if grouping == "depth":
        return group_by_depth(targets, n_groups)
    if grouping == "gradient":
        return group_by_gradient(targets, {n: v**2 for n, v in profile.column("gradient_norm").items()}, n_groups)
    raise StudyError(f"`grouping` must be 'depth' or 'gradient', but got {grouping!r}.")


def _about(
    task: Task,
    space: HierarchicalSpace,
    training: TrainingConfig,
    rates: Sequence[float],
    n_seeds: int,
    profile: Profile,
) -> dict[str, Any]:
    """What trials must share to be comparable."""
    return {
        "schema": 1,
        "task": task.name,
        "metric": task.metric,
        "model": fingerprint_targets(space.targets),
        "budget": space.budget.limit,
        "training": asdict(training),
        "learning_rates": list(rates),
        "n_seeds": n_seeds,
        "tilts": [tilt.name for tilt in space.tilts],
        "profile": [profile.metadata["weights"], profile.metadata["data"], profile.metadata["seed"]],
    }


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


def _optimize(
    study: optuna.Study, objective: Objective, n_trials: int, report: Callable[[optuna.Study, FrozenTrial], None]
) -> None:
    """Runs trials one by one; each is queued with its signature first, so that none ever runs unsigned."""
    for _ in range(n_trials):
        if not _waiting(study):
            study.enqueue_trial({}, user_attrs=signature())  # no parameter is fixed: the sampler chooses all
        study.optimize(objective, n_trials=1, callbacks=[report], catch=(TrainingError,))
