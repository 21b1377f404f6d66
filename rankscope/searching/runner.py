"""`search`: opens or resumes an Optuna study, asks for allocations, trains them, and confirms the finalists."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import optuna
import pandas as pd
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from rankscope.allocation import RankAllocation
from rankscope.budget import Bound, ParameterBudget, RankLimits
from rankscope.distributed import leads_others, require_one_process
from rankscope.errors import SettingsError, TrainingError, checked
from rankscope.files import FORMAT, digest, replacing
from rankscope.performance import PerformanceModel, Validation, believable
from rankscope.profiling import Profile
from rankscope.searching import confirmation, storage
from rankscope.searching.attachments import Attachments, artifact_folder
from rankscope.searching.claims import Claims, Job, Lease, Patience, Tally, finished, perform, tally
from rankscope.searching.sampler import PerformanceModelSampler, make_pruner, make_sampler, suggest_allocation
from rankscope.searching.space import BUDGET, OLD_NAMES, HierarchicalSpace, make_space
from rankscope.searching.storage import LEARNING_RATE, ONE_SHOT, POSTERIOR_MEAN, SAMPLER, STEPS_KEY, UNIFORM
from rankscope.settings import SearchSettings, TrainingSettings
from rankscope.targets import TargetModule, fingerprint_targets
from rankscope.tasks import Task, fingerprint_task, load_task
from rankscope.training import TrainingResult, train
from rankscope.units import Interval, Unit, unit_of

logger = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]  # stage, runs done and runs in all

LAST_SHARES = (1 / 16, 1 / 4, 1.0)  # of a search over budgets: what the posterior mean's last trials take of the budget
UNDER_WAY = (TrialState.RUNNING, TrialState.WAITING)  # another process may be at it
NONE_SET_ASIDE = "no trainings are set aside for it; raise `confirm_fraction`."
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
    confirming: optuna.Study | None = None  # whose trials are those trainings; None where there are none
    agreed: confirmation.Recommendation | None = None  # of all workers of the study; None where nothing is confirmed

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
        """Trainings on fresh seeds that the search holds, those of earlier finalists included."""
        return 0 if self.confirming is None else len(confirmation.confirmed_runs(self.confirming))

    @property
    def steps(self) -> int:
        """Optimizer steps that the search took in all, without those that a killed process lost."""
        studies = [self.study] if self.confirming is None else [self.study, self.confirming]
        trials = [trial for study in studies for trial in study.get_trials(deepcopy=False)]
        return sum(int(trial.user_attrs.get(STEPS_KEY, 0)) for trial in trials)

    @cached_property
    def recommendation(self) -> confirmation.Recommendation:
        """What trials and fresh seeds together value most, and why; uniform or one-shot where they are too few to tell.

        All workers of a study have the same: that of the first to finish.
        """
        return self.agreed or self.recommended()

    def recommended(self) -> confirmation.Recommendation:
        """The recommendation as this process computes it."""
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
    def posterior(self) -> dict[RankAllocation, Interval]:
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

    @cached_property
    def unit(self) -> Unit:
        """How the metric is shown."""
        return unit_of([*(t.metric for t in self.trials), *(each.metric for each in self.finalists)])

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
    """One worker on a study: it claims what is left to do, trains it, and tells Optuna what came out."""

    def __init__(
        self, task: Task, space: HierarchicalSpace, settings: SearchSettings, full: TrainingSettings, profile: Profile
    ) -> None:
        """Opens the study, or resumes it if its trials are comparable."""
        if not leads_others():
            remedy = "start `rankscope search` so, whose processes share each trial."
            require_one_process("a search from Python", remedy=remedy)
        self.task, self.space, self.settings, self.full = task, space, settings, full
        n_seeds, share = settings.n_seeds, settings.confirm_fraction
        self.n_trials = confirmation.split_budget(settings.n_trials, share, n_seeds)[0]
        self.training = TrainingSettings.of(full, steps=max(1, round(settings.fidelity * full.steps)))
        pruner = make_pruner(settings.pruner, self.training)
        points = {UNIFORM: space.point(tau=0.0), ONE_SHOT: space.point(tau=1.0)}
        ranks = {
            origin: list(space.allocation(point).vector) for origin, point in points.items()
        }  # feasible, or no study
        self.starts: dict[str, dict[str, Any]] = {}
        for origin, rate in product(points, self.training.learning_rates):
            known = self._known(origin, ranks[origin], points[origin], rate)
            self.starts[f"{origin} at {rate!r}"] = known
        about = self._about(profile)
        self.study = storage.open_study(settings.study_name or task.name, settings.storage, about)
        self.study.sampler, self.study.pruner = make_sampler(settings.sampler, space, settings.seed or 0), pruner
        self.claims = Claims(self.study, settings.grace_seconds)
        folder = Path(settings.artifacts) if settings.artifacts else artifact_folder(settings.storage)
        self.attachments = Attachments(self.study, space.targets, folder)
        self._records = dict[int, storage.Trial]()  # of completed trials by number, read once each

    def _about(self, profile: Profile) -> dict[str, Any]:
        """What the trials depend on."""
        task, space, full = self.task, self.space, self.full
        bounds = space.limits.min_rank, space.limits.max_rank
        lowest, highest = (digest(dict(bound)) if isinstance(bound, Mapping) else bound for bound in bounds)
        return {
            "format": FORMAT,
            **fingerprint_task(task),
            "metric": task.metric,
            "model": fingerprint_targets(space.targets),
            **space.budget.terms(),
            "training": full.at(full.learning_rates[0]).model_dump(),
            "trial_steps": self.training.steps,
            "learning_rates": list(full.learning_rates),
            "n_seeds": self.settings.n_seeds,
            "tilts": space.dimensions,
            "profile": {key: profile.metadata.get(key) for key in PROFILE_TERMS},
            "grouping": self.settings.grouping,
            "n_groups": self.settings.n_groups,
            "min_rank": lowest,
            "max_rank": highest,
        }

    def explore(self, on_progress: Progress) -> None:
        """Runs trials, with any other workers, until so many are finished.

        Uniform and one-shot come first, then proposals, and the posterior mean's allocations last. A worker waits only where
        all that is left is under way elsewhere; if that worker dies, this one does its work.
        """
        trials, patience = self.claims.look(), Patience()
        last = sum(map(finished, trials))
        while last < self.n_trials:
            jobs = tally(trials)
            left = [job for job in self._jobs(jobs) if jobs.get(job.name, Tally()).spent(job.places) < job.places]
            self._require_hope(trials, left)
            free = [job for job in left if jobs.get(job.name, Tally()).free(job.places) > 0]
            if not left:
                break
            if not (free and self._claim_and_train(free[0], trials)):
                patience.wait()
            trials = self.claims.look()
            if (now := sum(map(finished, trials))) > last:
                on_progress("searching", now * self.settings.n_seeds, self.settings.n_trials)
                last, patience = now, Patience()
        self._require_hope(trials, [])

    def _jobs(self, jobs: Mapping[str, Tally]) -> list[Job]:
        """What the trials are for, in order; those of an earlier, shorter search count as proposals."""
        starts = [Job(name) for name in self.starts][: self.n_trials]
        room = self.n_trials - len(starts)
        shares = LAST_SHARES if self.space.budget.search else (1.0,)
        means = [Job(self._mean_job(share)) for share in shares[max(len(shares) - room, 0) :]]
        named = {SAMPLER, *(job.name for job in (*starts, *means))}
        others = sum(len(each.done) + len(each.held) for name, each in jobs.items() if name not in named)
        return [*starts, Job(SAMPLER, max(0, room - len(means) - others)), *means]

    def _mean_job(self, share: float) -> str:
        return f"{POSTERIOR_MEAN} at {share:g} of {self.n_trials} trials"

    def _require_hope(self, trials: Sequence[FrozenTrial], left: Sequence[Job]) -> None:
        """Raise a TrainingError where uniform and one-shot are done, and nothing has completed, nor is under way."""
        started = not any(job.name in self.starts for job in left)
        if started and not any(trial.state in (TrialState.COMPLETE, *UNDER_WAY) for trial in trials):
            reasons = [str(t.user_attrs[storage.FAILURE_KEY]) for t in trials if storage.FAILURE_KEY in t.user_attrs]
            remedy = (
                "use smaller batches"
                if any("ran out of memory" in each for each in reasons)
                else "lower `learning_rate`"
            )
            what = f"study `{self.study.study_name}` must have a trial that completes"
            raise TrainingError(f"{what}, but every one failed; {remedy}.")

    def _claim_and_train(self, job: Job, trials: Sequence[FrozenTrial]) -> bool:
        """Run a trial of a job, if no other worker has claimed its last place; whether this one has."""
        claim = None if job.name in self.starts else self.claims.take_queued(job, trials)
        if claim is None:
            self._seed(trials)
            claim = self.claims.take(job, **(self.starts.get(job.name) or self._proposal(job, trials)))
        if claim is None:
            return False
        taken = claim

        def work(lease: Lease) -> float:
            running = optuna.Trial(self.study, taken.trial_id)
            with self.attachments.attached(running):
                return self._evaluate(running, lease, taken.trials)

        perform(self.claims, taken, work, f"trial {taken.number}")
        return True

    def _seed(self, trials: Sequence[FrozenTrial]) -> None:
        """Seeds a sampler of ours by the trials before: a resumed search goes on as it would have.

        Several workers must not propose the same, so beside others each draws a seed of its own.
        """
        alone = not any(trial.state == TrialState.RUNNING for trial in trials)
        self._rng = np.random.default_rng([self.settings.seed or 0, len(trials)] if alone else None)
        if isinstance(self.settings.sampler, str):
            seed = int(self._rng.integers(2**31))
            if isinstance(self.study.sampler, PerformanceModelSampler):
                self.study.sampler.reseed(seed)
            else:
                self.study.sampler = make_sampler(self.settings.sampler, self.space, seed)

    def _proposal(self, job: Job, trials: Sequence[FrozenTrial]) -> dict[str, Any]:
        """What a trial is to be, for `Claims.take`; nothing yet where Optuna asks the sampler.

        The posterior mean's trial is what the performance model values most, if there is a model and that is new.
        """
        sampler, rates = self.study.sampler, self.training.learning_rates
        if not isinstance(sampler, PerformanceModelSampler) or sampler.space is not self.space:
            return {}
        origin, proposal = SAMPLER, None
        shares = [share for share in LAST_SHARES if job.name == self._mean_job(share)]
        if shares and sampler.model(self.study) is not None:
            mean = sampler.best(self.study, shares[0])
            alive = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.RUNNING)]
            if list(mean.allocation.vector) not in [trial.user_attrs.get(storage.RANKS_KEY) for trial in alive]:
                origin, proposal = POSTERIOR_MEAN, mean
        allocation, tilts, rate = proposal or sampler.propose(self.study)
        rate = rate if rate in rates else rates[int(self._rng.integers(len(rates)))]
        return self._known(origin, list(allocation.vector), tilts, rate)

    def _known(self, origin: str, ranks: list[int], tilts: Mapping[str, float], rate: float) -> dict[str, Any]:
        """The attributes and parameters of a trial that is known before it is claimed."""
        rates = self.training.learning_rates
        values: dict[str, Any] = {tilt.name: tilts[tilt.name] for tilt in self.space.tilts}
        kinds: dict[str, Any] = {tilt.name: FloatDistribution(tilt.low, tilt.high) for tilt in self.space.tilts}
        if len(rates) > 1:
            values[LEARNING_RATE], kinds[LEARNING_RATE] = rate, CategoricalDistribution(rates)
        template = {"params": values, "distributions": kinds}
        return {"attributes": {"origin": origin, storage.RANKS_KEY: ranks}, "template": template}

    def _evaluate(self, running: optuna.Trial, lease: Lease, trials: list[FrozenTrial]) -> float:
        """The validation metric of a trial's allocation, mean over the seeds: trained, or that of an equal trial."""
        allocation, rates = suggest_allocation(running, self.space), self.training.learning_rates
        rate = rates[0] if len(rates) == 1 else float(running.suggest_categorical(LEARNING_RATE, list(rates)))
        origin = running.user_attrs.get("origin", SAMPLER)
        patience = Patience()
        while self._equal_runs(trials, running.number, allocation, rate):  # its result can be used
            lease.check()
            patience.wait()
            trials = self.claims.look()
        earlier = self._read(trials)
        same = next((t for t in earlier.values() if t.allocation == allocation and t.learning_rate == rate), None)
        if same:
            first, number = same.number if same.reused is None else same.reused, running.number
            trial = replace(same, number=number, origin=origin, wall_seconds=0.0, reused=first)
            for step, value in trials[same.number].intermediate_values.items():
                running.report(value, step)  # pruners compare with the best trial, which may be this one
        else:
            trial = self._train(running, origin, allocation, rate, lease)
        trial = storage.compared(trial, storage.best_uniform(earlier.values()))  # as far as it is known yet
        row = {key: value for key, value in trial.to_row().items() if key != storage.RANKS_KEY}
        running.set_user_attr(storage.TRIAL_KEY, row)
        return trial.metric

    def _equal_runs(self, trials: Sequence[FrozenTrial], number: int, allocation: RankAllocation, rate: float) -> bool:
        """Whether an earlier trial is under way that trains the same."""
        ranks, several = list(allocation.vector), len(self.training.learning_rates) > 1
        return any(
            trial.user_attrs.get(storage.RANKS_KEY) == ranks
            and (not several or trial.params.get(LEARNING_RATE) == rate)
            for trial in trials
            if trial.state == TrialState.RUNNING and trial.number < number
        )

    def _read(self, trials: Sequence[FrozenTrial]) -> dict[int, storage.Trial]:
        """The completed trials by number; each is read once, since there may be thousands."""
        for trial in trials:
            if trial.state == TrialState.COMPLETE and trial.number not in self._records and storage.is_ours(trial):
                self._records[trial.number] = storage.as_record(trial, self.space.targets)
        return self._records

    def _train(
        self, running: optuna.Trial, origin: str, allocation: RankAllocation, rate: float, lease: Lease
    ) -> storage.Trial:
        """One training a seed; pruned on the first one's way, or between seeds where the pruner compares those."""
        metric, by_seed = self.task.metric, isinstance(self.study.pruner, optuna.pruners.WilcoxonPruner)
        last = self.settings.n_seeds if by_seed else self.training.steps
        schedule, results = self.training.at(rate), list[TrainingResult]()

        def report(step: int, metrics: Mapping[str, float]) -> None:
            running.report(metrics[metric], step)
            if origin == SAMPLER and step < last and running.should_prune():
                raise optuna.TrialPruned(f"pruned at {'seed' if by_seed else 'step'} {step}")

        for seed in range(self.settings.n_seeds):
            watch = None if by_seed or seed else report
            trained = train(self.task, allocation, schedule, seed=seed, on_evaluation=watch, on_step=lease.on_step)
            results.append(trained[1])
            del trained  # its model would live through the next seed's training
            if by_seed:
                report(seed + 1, results[-1].metrics)
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

    def result(self, on_progress: Progress) -> SearchResult:
        """Confirms the finalists, on the full schedule, with any other workers; all of them get the same result."""
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
        found = SearchResult(study, targets, self.task.metric, (), model, validation, belief, NONE_SET_ASIDE)
        if self.settings.confirm_fraction:
            found = self._confirmed(found, trials, chosen, on_progress)
        if trials:
            study.set_user_attr("recommendation", f"{found.best_trial.number}: {found.recommendation.reason}")
            self.attachments.finish(found)
        return found

    def _confirmed(
        self, found: SearchResult, trials: list[storage.Trial], chosen: list[storage.Trial], on_progress: Progress
    ) -> SearchResult:
        """The result with what fresh seeds say, and the recommendation on which all workers agree."""
        claims = Claims(confirmation.open_confirming(self.study), self.settings.grace_seconds)
        stage, on_run = confirmation.stage_of(self.study, trials, self.settings), partial(on_progress, "confirming")
        finalists, unconfirmed = confirmation.confirm(
            claims, stage, trials, chosen, self.task, self.full, self.settings, on_run
        )
        if unconfirmed:
            logger.warning("nothing is confirmed: %s", unconfirmed)
        found = replace(found, finalists=finalists, unconfirmed=unconfirmed, confirming=claims.study)
        if finalists:
            found = replace(found, agreed=confirmation.agree(claims, stage, found.recommended(), trials))
        return found
