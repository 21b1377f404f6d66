"""`search`: opens or resumes the study, explores, and confirms the finalists."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import optuna
import pandas as pd
from optuna.trial import FrozenTrial, TrialState

from rankscope.allocation import RankAllocation
from rankscope.budget import Bound, ParameterBudget
from rankscope.errors import SettingsError, TrainingError
from rankscope.files import FORMAT, digest, replacing
from rankscope.performance import PerformanceModel, Validation, believable
from rankscope.profiling import Profile
from rankscope.searching.confirmation import (
    CONFIRM_FRACTION,
    Agreement,
    Finalist,
    agreement_on_the_way,
    agreement_when_confirmed,
    choose_finalists,
    confirm,
    confirmed_keys,
    recommend,
    smoothing,
    split_budget,
)
from rankscope.searching.sampler import (
    PerformanceModelSampler,
    PrunerName,
    SamplerName,
    judges_seeds,
    make_pruner,
    make_sampler,
    suggest_allocation,
)
from rankscope.searching.space import Grouping, HierarchicalSpace, make_space
from rankscope.searching.storage import (
    LEARNING_RATE,
    ONE_SHOT,
    POSTERIOR_MEAN,
    RANKS_KEY,
    SAMPLER,
    STEPS_KEY,
    STUDY_KEY,
    TRIAL_KEY,
    UNIFORM,
    Trial,
    completed,
    fail_orphans,
    open_study,
    read_trial,
    signature,
)
from rankscope.targets import TargetModule, fingerprint_targets
from rankscope.tasks import Task, fingerprint_task
from rankscope.training import TrainingConfig, TrainingResult, train

logger = logging.getLogger(__name__)


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

        See `rankscope.searching.confirmation.recommend`. Its difference to uniform comes with a 95 % interval.
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
            SettingsError: There is none.
        """
        if not trials:
            raise SettingsError(
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

        config = self.training.at(rate)
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
            (`rankscope.searching.confirmation.recommend`), since the best observed trial is flattered by noise. 0: none.
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
        SettingsError: The storage holds trials of another task, budget or schedule, or an argument is out of its range.
        TrainingError: Every trial failed.
        SettingsError: Nothing feasible.
        ModelError: The profile does not cover the targets.

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
    rates = tuple(learning_rates or training.learning_rates)
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
        raise SettingsError(f"`fidelity` must lie in (0, 1], but got {fidelity:g}.")
    return training.of(training, steps=max(1, round(fidelity * training.steps)))


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
        "training": training.terms(),
        "trial_steps": trial_steps,
        "learning_rates": list(rates),
        "n_seeds": n_seeds,
        "tilts": [tilt.name for tilt in space.tilts],
        "profile": {key: profile.metadata.get(key) for key in _PROFILE},
    }
