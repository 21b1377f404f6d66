"""`search`: opens or resumes an Optuna study, asks for allocations, trains them, and confirms the finalists."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import optuna
import pandas as pd
from optuna.trial import FrozenTrial, TrialState

from rankscope.allocation import RankAllocation
from rankscope.budget import Bound, ParameterBudget, RankLimits
from rankscope.errors import SettingsError, TrainingError, checked
from rankscope.files import FORMAT, digest, replacing
from rankscope.performance import PerformanceModel, Validation, believable
from rankscope.profiling import Profile
from rankscope.searching import confirmation, storage
from rankscope.searching.attachments import Attachments, artifact_folder
from rankscope.searching.sampler import PerformanceModelSampler, make_pruner, make_sampler, suggest_allocation
from rankscope.searching.space import BUDGET, OLD_NAMES, HierarchicalSpace, make_space
from rankscope.searching.storage import LEARNING_RATE, ONE_SHOT, POSTERIOR_MEAN, SAMPLER, STEPS_KEY, UNIFORM
from rankscope.settings import SearchSettings, TrainingSettings
from rankscope.targets import TargetModule, fingerprint_targets
from rankscope.tasks import Task, fingerprint_task, load_task
from rankscope.training import TrainingResult, train

logger = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]  # stage, runs done and runs in all

LAST_SHARES = (1 / 16, 1 / 4, 1.0)  # of a search over budgets: what the posterior mean's last trials take of the budget
UNDER_WAY = (TrialState.RUNNING, TrialState.WAITING)  # another process may be at it
COLUMNS = [
    "trial", "origin", "learning_rate", "parameters", "metric", "loss", "difference", "wall_seconds", "reused", "ranks",
    "fingerprint",
]  # fmt: skip
POSTERIOR = ("posterior", "posterior_low", "posterior_high")
PROFILE_TERMS = ("schema", "weights", "data", "batches", "seed", "head_steps", "sketch_size")  # which profile it is


@dataclass(frozen=True, eq=False)
class SearchResult:
    """A finished search."""

    study: optuna.Study
    targets: tuple[TargetModule, ...]
    metric_name: str
    finalists: tuple[confirmation.Finalist, ...] = ()  # what was trained again on fresh seeds
    model: PerformanceModel | None = None  # on all trials; None for other samplers, and with too few trials
    validation: Validation | None = None  # how well the model predicts trials it has not seen; None with too few
    belief: PerformanceModel | None = None  # what chooses finalists: the model, or the profile alone; None: only trials
    unconfirmed: str | None = None  # why nothing was trained again on fresh seeds; None where it was

    @property
    def trials(self) -> list[storage.Trial]:
        """The completed trials, in order."""
        return storage.read_trials(self.study, self.targets)

    @property
    def agreements(self) -> list[confirmation.Agreement]:
        """Whether short training ranks allocations like long training, as far as these trials can tell."""
        about = self.study.user_attrs[storage.STUDY_KEY]
        return confirmation.agreements(self.trials, self.finalists, about["trial_steps"], about["training"]["steps"])

    @property
    def confirming_runs(self) -> int:
        """Trainings on fresh seeds that the study holds, those of earlier finalists included."""
        return len(confirmation.confirmed_keys(self.study))

    @property
    def steps(self) -> int:
        """Optimizer steps that the search took in all, without those that a killed process lost."""
        exploring = sum(trial.user_attrs.get(STEPS_KEY, 0) for trial in self.study.get_trials(deepcopy=False))
        return int(exploring + self.confirming_runs * self.study.user_attrs[storage.STUDY_KEY]["training"]["steps"])

    @cached_property
    def recommendation(self) -> confirmation.Recommendation:
        """What trials and fresh seeds together value most, and why; uniform or one-shot where they are too few to tell."""
        fresh = [list(finalist.metrics_by_seed.values()) for finalist in self.finalists]
        trials = [finalist.trial for finalist in self.finalists] or confirmation.choose_finalists(
            self.trials, self.belief
        )
        trials = trials or [self.best_of_origin(None)]
        return confirmation.recommend(trials, np.reshape(fresh, (len(trials), -1)), self._weighing)

    @property
    def best_trial(self) -> storage.Trial:
        """The recommendation's trial."""
        return self.recommendation.trial

    @cached_property
    def posterior(self) -> dict[RankAllocation, confirmation.Interval]:
        """How much better than uniform each allocation is, by trials and fresh seeds; empty without a model to believe."""
        first = {trial.allocation: trial for trial in reversed(self.trials)}
        starts = [i for i, trial in enumerate(first.values()) if trial.origin == UNIFORM]
        if self._weighing is None or not starts:
            return {}
        fresh = {each.trial.allocation: list(each.metrics_by_seed.values()) for each in self.finalists}
        unknown = [math.nan] * len(next(iter(fresh.values()), []))
        table = [fresh.get(allocation, unknown) for allocation in first]
        found = confirmation.posterior_over(starts[0], list(first.values()), table, self._weighing)
        return dict(zip(first, found, strict=True))

    @property
    def _weighing(self) -> PerformanceModel | None:
        """What weighs trials and fresh seeds; not the profile alone, in which fresh seeds would hardly count."""
        return None if self.belief is None else self.model

    @property
    def over_budgets(self) -> bool:
        """Whether the search tried smaller budgets as well."""
        return OLD_NAMES[BUDGET] in self.study.user_attrs[storage.STUDY_KEY]["tilts"]

    @property
    def front(self) -> list[storage.Trial]:
        """Trials whose posterior mean none with as many or fewer parameters reaches, from few parameters to many."""
        first = {trial.allocation: trial for trial in reversed(self.trials) if trial.allocation in self.posterior}
        return confirmation.pareto_front(list(first.values()), (self.posterior[each].mean for each in first))

    @property
    def best_allocation(self) -> RankAllocation:
        """The allocation of `best_trial`."""
        return self.best_trial.allocation

    def best_of_origin(self, origin: str | None) -> storage.Trial:
        """The best observed trial of one origin, as in `"uniform"`, or of any; SettingsError where there is none."""
        trials = [trial for trial in self.trials if origin in (None, trial.origin)]
        if not trials:
            name = self.study.study_name
            raise SettingsError(f"study `{name}` must hold a completed trial, but holds none; run the search.")
        return min(trials, key=lambda trial: (-trial.metric, trial.loss, trial.number))

    def to_frame(self) -> pd.DataFrame:
        """One row a completed trial, with the posterior difference to uniform; ranks in the order of the targets."""
        known = {trial.number: self.posterior.get(trial.allocation, [math.nan] * 3) for trial in self.trials}
        rows = [trial.to_row() | dict(zip(POSTERIOR, known[trial.number], strict=True)) for trial in self.trials]
        return pd.DataFrame(rows, columns=[*COLUMNS, *POSTERIOR]).astype({"reused": "Int64"})

    def to_parquet(self, path: str | os.PathLike[str]) -> Path:
        """Write `trials.parquet`, atomically; returns the path."""
        with replacing(path) as temporary:
            self.to_frame().to_parquet(temporary, index=False)
        return Path(path)


@checked
def search(
    task: Task | str | Mapping[str, Any],
    *,
    budget: ParameterBudget | int,
    profile: Profile,
    settings: SearchSettings | Mapping[str, Any] | None = None,
    training: TrainingSettings | Mapping[str, Any] | None = None,
    targets: Sequence[TargetModule] | None = None,
    min_rank: Bound = 0,
    max_rank: Bound = None,
    on_progress: Progress | None = None,
    **overrides: Any,
) -> SearchResult:
    """Search for the allocation with the best validation metric under a budget.

    Uniform and one-shot are the first trials, at each learning rate of `training`. The last share of the trainings confirms
    finalists on fresh seeds, since noise flatters the best observed trial. An existing study resumes, also with more
    `n_trials`, and trains nothing again. Several processes may work on one study.

    Args:
        task: Where model, data, loss and metric come from, or what `load_task` takes.
        budget: The limit in adapter parameters.
        profile: A profile of the task's model, whose spectra are tilted.
        settings: How to search. `sampler`, `pruner` and `storage` may be Optuna's objects. No storage: memory.
        training: The full schedule.
        targets: The target modules; default: the profile's.
        min_rank: The least rank, for all modules or by name.
        max_rank: The greatest rank, likewise; None: full rank.
        on_progress: Called after each run with "searching" or "confirming", and the numbers of runs done and in all.
        **overrides: Fields of `settings` by name.

    Raises:
        SettingsError: The storage holds trials of another task, budget or schedule, or nothing is feasible.
        TrainingError: Every trial failed.

    >>> import rankscope as rs
    >>> task = rs.load_task("digits-shift")
    >>> profile = rs.profile(task.build_model(), list(task.train_batches(0)), loss_fn=task.loss)
    >>> budget = rs.ParameterBudget.uniform(profile.targets, 1)
    >>> short = rs.TrainingSettings(steps=2, learning_rate=0.01)
    >>> result = rs.search(task, budget=budget, profile=profile, n_trials=6, confirm_fraction=0.5, training=short)
    >>> [trial.origin for trial in result.trials], [len(f.metrics_by_seed) for f in result.finalists]
    (['uniform', 'one-shot', 'sampler'], [1, 1, 1])
    """
    settings, targets = SearchSettings.of(settings, **overrides), tuple(targets or profile.targets)
    task, budget = load_task(task), ParameterBudget.of(budget)
    profile.require(targets)
    space = make_space(profile, targets, budget, settings, RankLimits(min_rank, max_rank))
    run = _Search(task, space, settings, TrainingSettings.of(training), profile)
    on_progress = on_progress or (lambda stage, done, total: None)
    run.explore(on_progress)
    return run.result(on_progress)


class _Search:
    """One process's work on a study: it asks for allocations, trains them, and tells Optuna what came out."""

    def __init__(
        self, task: Task, space: HierarchicalSpace, settings: SearchSettings, full: TrainingSettings, profile: Profile
    ) -> None:
        """Opens the study, or resumes it if its trials are comparable."""
        self.task, self.space, self.settings, self.full = task, space, settings, full
        n_seeds, share = settings.n_seeds, settings.confirm_fraction
        self.n_trials = confirmation.split_budget(settings.n_trials, share, n_seeds)[0]
        self.training = TrainingSettings.of(full, steps=max(1, round(settings.fidelity * full.steps)))
        pruner = make_pruner(settings.pruner, self.training)
        space.allocation(space.point(tau=1.0))  # an infeasible budget must not leave an empty study behind
        bounds = space.limits.min_rank, space.limits.max_rank
        lowest, highest = (digest(dict(bound)) if isinstance(bound, Mapping) else bound for bound in bounds)
        about = {
            "format": FORMAT,
            **fingerprint_task(task),
            "metric": task.metric,
            "model": fingerprint_targets(space.targets),
            **space.budget.terms(),
            "training": full.at(full.learning_rates[0]).model_dump(),
            "trial_steps": self.training.steps,
            "learning_rates": list(full.learning_rates),
            "n_seeds": n_seeds,
            "tilts": space.dimensions,
            "profile": {key: profile.metadata.get(key) for key in PROFILE_TERMS},
            "grouping": settings.grouping,
            "n_groups": settings.n_groups,
            "min_rank": lowest,
            "max_rank": highest,
        }
        self.study = storage.open_study(settings.study_name or task.name, settings.storage, about)
        seed = (settings.seed or 0) + len(self._trials())
        self.study.sampler, self.study.pruner = make_sampler(settings.sampler, space, seed), pruner
        storage.fail_orphans(self.study)
        folder = Path(settings.artifacts) if settings.artifacts else artifact_folder(settings.storage)
        self.attachments = Attachments(self.study, space.targets, folder)

    def explore(self, on_progress: Progress) -> None:
        """Runs trials until so many are finished: uniform and one-shot, proposals, and the posterior mean's allocation last."""

        def run(n_trials: int) -> None:
            """Runs trials one by one. `optimize` asks and tells, and keeps up heartbeats where the storage has them."""
            for _ in range(n_trials):
                if not self._trials(TrialState.WAITING):
                    self._queue({})
                self.study.optimize(self._evaluate, n_trials=1, catch=(TrainingError,))
                on_progress("searching", len(self._trials()) * self.settings.n_seeds, self.settings.n_trials)

        for origin, tau in ((UNIFORM, 0.0), (ONE_SHOT, 1.0)):  # uniform alone: other trials are paired with it
            self._queue_start(origin, self.space.point(tau=tau))
            run(min(len(self._trials(TrialState.WAITING)), self._left()))
        if not self._trials(TrialState.COMPLETE, *UNDER_WAY):
            what = f"study `{self.study.study_name}` must have a trial that completes"
            raise TrainingError(f"{what}, but every one failed; lower `learning_rate`.")
        shares = LAST_SHARES if self.space.budget.search else (1.0,)
        run(self._left() - len(shares))
        for share in shares[max(len(shares) - self._left(), 0) :]:
            self._queue_posterior_mean(share)
        run(self._left())

    def result(self, on_progress: Progress) -> SearchResult:
        """Confirms the finalists, on the full schedule."""
        study, targets = self.study, self.space.targets
        model = validation = belief = None
        if isinstance(study.sampler, PerformanceModelSampler) and (model := study.sampler.model(study)) is not None:
            validation = study.sampler.validate(study)
            belief = believable(model, validation)
        if validation is not None and not validation.trustworthy:
            so = "nothing but fresh seeds chooses" if belief is None else "the profile alone chooses the finalists"
            logger.warning("the performance model does not beat the profile alone, so %s: %s", so, validation)
        trials = storage.read_trials(study, targets)
        if not any(trial.origin == UNIFORM for trial in trials):
            logger.warning("uniform completed no trial: differences to it are not known")
        chosen = confirmation.choose_finalists(trials, belief, over_budgets=self.space.budget.search)
        on_run = partial(on_progress, "confirming")
        finalists, unconfirmed = confirmation.confirm(study, self.task, chosen, self.full, self.settings, on_run)
        if unconfirmed and self.settings.confirm_fraction:
            logger.warning("nothing is confirmed: %s", unconfirmed)
        found = SearchResult(study, targets, self.task.metric, finalists, model, validation, belief, unconfirmed)
        if trials:
            study.set_user_attr("recommendation", f"{found.best_trial.number}: {found.recommendation.reason}")
            self.attachments.finish(found)
        return found

    def _queue_start(self, origin: str, tilts: dict[str, float]) -> None:
        """Queues a start point at each rate at which it is neither finished nor under way."""
        mine = [trial for trial in self._trials() if trial.user_attrs.get("origin") == origin]
        known = {trial.user_attrs["rate"] for trial in mine if _finished(trial) or trial.state in UNDER_WAY}
        for rate in self.training.learning_rates:
            if rate not in known:
                self._queue(tilts | {LEARNING_RATE: rate}, origin=origin, rate=rate)

    def _queue_posterior_mean(self, share: float) -> None:
        """Queues what the performance model values most at a share of the budget, if there is a model and it is new."""
        sampler = self.study.sampler
        if isinstance(sampler, PerformanceModelSampler) and sampler.model(self.study) is not None:
            allocation, tilts, rate = sampler.best(self.study, share)
            if allocation not in [trial.allocation for trial in storage.read_trials(self.study, self.space.targets)]:
                self._queue(tilts | {LEARNING_RATE: rate}, origin=POSTERIOR_MEAN, ranks=list(allocation.vector))

    def _queue(self, parameters: dict[str, Any], **attributes: Any) -> None:
        """Queues a trial, signed first, so that none ever runs unsigned. The sampler chooses what is not given."""
        self.study.enqueue_trial(parameters, user_attrs={**attributes, storage.WORKER_KEY: storage.this_worker()})

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states or None)

    def _left(self) -> int:
        return max(0, self.n_trials - sum(map(_finished, self._trials())))

    def _evaluate(self, running: optuna.Trial) -> float:
        """A trial's objective; its picture and note are attached at its end."""
        with self.attachments.attached(running):
            return self._measure(running)

    def _measure(self, running: optuna.Trial) -> float:
        """The validation metric of a trial's allocation, mean over the seeds: trained, or that of an equal trial."""
        running.set_user_attr(storage.WORKER_KEY, storage.this_worker())  # another process may have queued it
        allocation, rates = suggest_allocation(running, self.space), self.training.learning_rates
        rate = rates[0] if len(rates) == 1 else float(running.suggest_categorical(LEARNING_RATE, list(rates)))
        origin = running.user_attrs.get("origin", SAMPLER)
        earlier = storage.read_trials(self.study, self.space.targets)
        same = next((t for t in earlier if t.allocation == allocation and t.learning_rate == rate), None)
        if same:
            first, number = same.number if same.reused is None else same.reused, running.number
            trial = replace(same, number=number, origin=origin, difference=None, wall_seconds=0.0, reused=first)
            for step, value in self.study.trials[same.number].intermediate_values.items():
                running.report(value, step)  # pruners compare with the best trial, which may be this one
        else:
            trial = self._train(running, origin, allocation, rate)
        uniform = max((t for t in earlier if t.origin == UNIFORM), key=lambda t: t.metric, default=None)
        if uniform is not None and origin != UNIFORM:  # compare with uniform at its best learning rate
            mine, theirs = trial.metrics_by_seed, uniform.metrics_by_seed
            trial = replace(trial, difference=fmean(mine[seed] - theirs[seed] for seed in mine))
        row = {key: value for key, value in trial.to_row().items() if key != storage.RANKS_KEY}
        running.set_user_attr(storage.TRIAL_KEY, row)
        return trial.metric

    def _train(self, running: optuna.Trial, origin: str, allocation: RankAllocation, rate: float) -> storage.Trial:
        """One training a seed; pruned on the first one's way, or between seeds where the pruner compares those."""
        metric, by_seed = self.task.metric, isinstance(self.study.pruner, optuna.pruners.WilcoxonPruner)
        last = self.settings.n_seeds if by_seed else self.training.steps
        schedule, steps, results = self.training.at(rate), list[int](), list[TrainingResult]()

        def report(step: int, metrics: Mapping[str, float]) -> None:
            running.report(metrics[metric], step)
            if origin == SAMPLER and step < last and running.should_prune():
                raise optuna.TrialPruned(f"pruned at {'seed' if by_seed else 'step'} {step}")

        try:
            for seed in range(self.settings.n_seeds):
                watch = None if by_seed or seed else report
                trained = train(self.task, allocation, schedule, seed=seed, on_evaluation=watch, on_step=steps.append)
                results.append(trained[1])
                del trained  # its model would live through the next seed's training
                if by_seed:
                    report(seed + 1, results[-1].metrics)
        except (TrainingError, optuna.TrialPruned) as error:
            if isinstance(error, TrainingError):
                running.set_user_attr("failure", str(error))
                logger.warning("trial %d failed: %s", running.number, error)
            # Optuna keeps the error in a cycle, and its frames keep the model.
            raise error.with_traceback(None) from error.__cause__
        finally:
            running.set_user_attr(STEPS_KEY, len(steps))
        metrics = {str(seed): result.metrics[metric] for seed, result in enumerate(results)}
        return storage.Trial(
            number=running.number,
            origin=origin,
            allocation=allocation,
            learning_rate=rate,
            metric=fmean(metrics.values()),
            loss=fmean(result.metrics["loss"] for result in results),
            metrics_by_seed=metrics,
            wall_seconds=sum(result.wall_seconds for result in results),
            history={step: found[metric] for step, found in results[0].history.items()},
        )


def _finished(trial: FrozenTrial) -> bool:
    """Whether a trial counts: it completed, was pruned, or failed of its own (and not because its process was killed)."""
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or "failure" in trial.user_attrs
