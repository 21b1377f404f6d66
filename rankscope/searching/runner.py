"""`search`: opens or resumes the study, explores, and confirms the finalists."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from rankscope.budget import Bound, ParameterBudget
from rankscope.exceptions import StudyError
from rankscope.fingerprints import FORMAT, digest
from rankscope.performance import PerformanceModel, Validation, believable
from rankscope.profiling import Profile
from rankscope.searching.confirmation import CONFIRM_FRACTION, confirm, split_budget
from rankscope.searching.exploring import explore
from rankscope.searching.finalists import choose_finalists, smoothing
from rankscope.searching.grouping import Grouping, make_space
from rankscope.searching.objective import Objective
from rankscope.searching.pruners import PrunerName, make_pruner
from rankscope.searching.results import SearchResult
from rankscope.searching.sampler import PerformanceModelSampler, SamplerName, make_sampler
from rankscope.searching.study import fail_orphans, open_study
from rankscope.searching.trials import UNIFORM, Trial, completed, read_trial
from rankscope.space import HierarchicalSpace
from rankscope.targets import TargetModule, fingerprint_targets
from rankscope.tasks import Task, fingerprint_task
from rankscope.training import TrainingConfig

logger = logging.getLogger(__name__)

DEFAULT_STORAGE = "sqlite:///rankscope.db"
_PROFILE = (
    "schema",
    "weights",
    "data",
    "batches",
    "seed",
    "head_steps",
    "sketch_size",
)  # what tells a profile from others


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
    confirm_fraction: float = CONFIRM_FRACTION,
    fidelity: float = 1.0,
    storage: str | optuna.storages.BaseStorage | None = DEFAULT_STORAGE,
    study_name: str | None = None,
    seed: int = 0,
    sampler: SamplerName | optuna.samplers.BaseSampler = "performance-model",
    grouping: Grouping = "depth",
    n_groups: int = 3,
    min_rank: Bound = 0,
    max_rank: Bound = None,
    pruner: PrunerName | optuna.pruners.BasePruner = "none",
    on_trial: Callable[[Trial | FrozenTrial], None] | None = None,
    on_confirm: Callable[[int, int], None] | None = None,
) -> SearchResult:
    """Searches for the allocation with the best validation metric under a budget.

    Uniform and one-shot are the first trials, at every learning rate; the last share of the trainings confirms the finalists on
    fresh seeds. An existing study resumes: with more `n_trials` it explores further, then confirms the
    finalists of then, on more seeds; runs that it holds are not repeated, nor is an allocation that was already trained at a
    learning rate. Several processes may work on one study at once.

    Args:
        task: Where model, data, loss and metric come from.
        budget: The limit in adapter parameters.
        profile: A profile of the task's model; its spectra are what the search tilts.
        n_trials: Trainings in all, earlier and confirming ones included. A trial counts as its `n_seeds` trainings, also
            where it failed, was pruned, or equals an earlier one.
        targets: The target modules; default: the profile's.
        training: The schedule.
        learning_rates: Rates to search over beside the ranks; default: the schedule's.
        n_seeds: Training seeds of each trial: 0, 1, ….
        confirm_fraction: Share of the trainings that is kept for training uniform, one-shot and three more on fresh seeds in
            the end: the allocation of the performance model's posterior mean, the best by its prediction, and the best
            observed. As many seeds of each as fit in; where not one does, all trainings explore and
            `SearchResult.unconfirmed` says so. The recommendation is what trials and fresh seeds together value most
            (`rankscope.searching.finalists.recommend`), since the best observed trial is flattered by noise. 0: none.
        fidelity: Share of the schedule's steps that a trial takes, on a complete schedule of its own; confirming takes all of
            them. A short trial counts as one of `n_trials`, as a long one does; `SearchResult.steps` is what all
            took. Trials of one study share one fidelity.
        storage: As Optuna takes it; None keeps the study in memory.
        study_name: Default: the task's name.
        seed: Of the sampler.
        sampler: `"performance-model"`, or one over the tilts: `"tpe"`, `"random"`, or any Optuna sampler object, as
            `optuna.samplers.GPSampler()`.
        grouping: Block groups by `"depth"` or by k-means over the `"gradient"`.
        n_groups: Block groups in each tower.
        min_rank: The least rank, for all modules or by name.
        max_rank: The greatest rank, for all modules or by name; None: full rank.
        pruner: Stops bad trials early: `"median"` or `"hyperband"`, where `training.evaluate_every` is set; `"none"`; or any
            Optuna pruner object. Optuna's `WilcoxonPruner` compares seeds and needs `n_seeds` of five or more to prune
            anything. The performance model learns from pruned trials too.
        on_trial: Called after each trial: with a `Trial` if it completed, else with Optuna's.
        on_confirm: Called after each confirming run, with the number of runs done and of runs in all.

    Raises:
        StudyError: The storage holds trials of another task, budget or schedule, or an argument is out of its range.
        TrainingError: Every trial failed.
        BudgetError: Nothing feasible.
        ProfileError: The profile does not cover the targets.

    >>> import rankscope as rs
    >>> task = rs.load_task("digits-shift")
    >>> profile = rs.profile(task.build_model(), list(task.train_batches(0)), loss_fn=task.loss)
    >>> budget = rs.ParameterBudget.uniform(profile.targets, 1)
    >>> short = rs.TrainingConfig(steps=2, learning_rate=0.01)
    >>> result = rs.search(
    ...     task, budget=budget, profile=profile, n_trials=6, confirm_fraction=0.5, training=short, storage=None
    ... )
    >>> [trial.origin for trial in result.trials], [len(f.metrics_by_seed) for f in result.finalists]
    (['uniform', 'one-shot', 'sampler'], [1, 1, 1])
    >>> result.best_allocation.parameters <= budget.limit
    True
    """
    exploring, confirming = split_budget(n_trials, confirm_fraction, n_seeds)
    training = training or TrainingConfig()
    short = _shortened(training, fidelity)
    rates = tuple(learning_rates or (training.learning_rate,))
    targets = tuple(targets) if targets is not None else profile.targets
    profile.require(targets)
    space = make_space(
        profile, targets, budget, grouping=grouping, n_groups=n_groups, min_rank=min_rank, max_rank=max_rank
    )
    space.allocation(space.point(tau=1.0))  # an infeasible budget must not leave an empty study behind
    name = study_name or task.name
    about = {
        **_about(task, space, training, short.steps, rates, n_seeds, profile),
        "grouping": grouping,
        "n_groups": n_groups,
        "min_rank": _plain_bound(min_rank),
        "max_rank": _plain_bound(max_rank),
    }
    study = open_study(
        name=name,
        storage=storage,
        sampler=optuna.samplers.RandomSampler(seed),
        pruner=make_pruner(pruner, short),
        about=about,
    )
    study.sampler = make_sampler(sampler, space, seed + len(study.get_trials(deepcopy=False)))
    fail_orphans(study)
    objective = Objective(task=task, space=space, training=short, learning_rates=rates, seeds=range(n_seeds))

    def report(study: optuna.Study, trial: FrozenTrial) -> None:
        if on_trial:
            on_trial(read_trial(trial, targets) if trial.state == TrialState.COMPLETE else trial)

    explore(study, objective, exploring, report)
    model, validation = _model(study)
    belief = None if model is None else believable(model, validation)
    if validation is not None and not validation.trustworthy:
        instead = "nothing but fresh seeds" if belief is None else "the profile alone"
        logger.warning("the performance model does not beat the profile alone, so %s chooses: %s", instead, validation)
    trials = [read_trial(trial, targets) for trial in completed(study)]
    if trials and not any(trial.origin == UNIFORM for trial in trials):
        logger.warning("uniform completed no trial: differences to it are not known")
    chosen = choose_finalists(trials, smoothing(belief))
    finalists, unconfirmed = confirm(study, task, chosen, training, n_runs=confirming, on_run=on_confirm)
    if unconfirmed and confirm_fraction:
        logger.warning("nothing is confirmed: %s", unconfirmed)
    return SearchResult(study, targets, task.metric, finalists, model, validation, belief, unconfirmed)


def _shortened(training: TrainingConfig, fidelity: float) -> TrainingConfig:
    """The schedule of a trial."""
    if not 0.0 < fidelity <= 1.0:
        raise StudyError(f"`fidelity` must lie in (0, 1], but got {fidelity:g}.")
    return replace(training, steps=max(1, round(fidelity * training.steps)))


def _model(study: optuna.Study) -> tuple[PerformanceModel | None, Validation | None]:
    """The performance model on the study's trials, and its scores on left-out ones."""
    sampler = study.sampler
    if not isinstance(sampler, PerformanceModelSampler) or (model := sampler.model(study)) is None:
        return None, None
    return model, sampler.validate(study)


def _plain_bound(bound: Bound) -> int | str | None:
    """A bound as it is kept; of one by name, a hash."""
    return digest(dict(bound)) if isinstance(bound, Mapping) else bound


def _about(
    task: Task,
    space: HierarchicalSpace,
    training: TrainingConfig,
    trial_steps: int,
    rates: Sequence[float],
    n_seeds: int,
    profile: Profile,
) -> dict[str, Any]:
    """What trials must share to be comparable."""
    return {
        "format": FORMAT,
        **fingerprint_task(task),
        "metric": task.metric,
        "model": fingerprint_targets(space.targets),
        "budget": space.budget.limit,
        "training": asdict(training),
        "trial_steps": trial_steps,
        "learning_rates": list(rates),
        "n_seeds": n_seeds,
        "tilts": [tilt.name for tilt in space.tilts],
        "profile": {key: profile.metadata.get(key) for key in _PROFILE},
    }
