"""Screening: the shared evaluator, checked against stand-alone trials, picks the allocations that are worth training.

The search's own study holds trained trials only. What the shared evaluator judges goes to a study of its own beside it,
`NAME/shared`, with a sampler of its own, so that the two kinds of metric never meet in one performance model; the best few of
it are queued in the search's study, where they are trained like any other.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import kendalltau

from rankscope.allocation import RankAllocation
from rankscope.exceptions import TrainingError
from rankscope.performance import rank_features
from rankscope.searching.sampler import suggest_allocation
from rankscope.searching.samplers import SamplerName, make_sampler
from rankscope.searching.shared import STEPS, SharedEvaluator, load_shared, train_shared
from rankscope.searching.study import fail_orphans, open_study, signature
from rankscope.searching.trials import LEARNING_RATE, RANKS_KEY, SCREENED, TRIAL_KEY, UNIFORM, completed
from rankscope.space import HierarchicalSpace
from rankscope.tasks import Task
from rankscope.training import TrainingConfig

logger = logging.getLogger(__name__)

EvaluatorName = Literal["stand-alone", "shared"]
SHARED: EvaluatorName = "shared"
Ranks = tuple[int, ...]
CHECK_TRIALS = 10  # different stand-alone trials that the shared evaluator is compared with
MIN_KENDALL = 0.5  # of that comparison; without any merit it is reached one time in forty (n = 10)
N_PROMOTED = 5
SCREENING_KEY = "screening"


@dataclass(frozen=True, slots=True, kw_only=True)
class Screening:
    """What came of the shared evaluator in a search.

    Attributes:
        kendall: Kendall's tau of its metric with that of stand-alone training; None where it could not be told, because its
            training diverged, trials were too few, or all metrics were equal.
        profile: The same of the profile alone (the captured norm), which costs nothing.
        trials: Different allocations that were compared.
        steps: Optimizer steps of its training, beside those of all trials.
        judged: Allocations that it judged afterwards.
    """

    kendall: float | None
    trials: int
    profile: float | None = None
    steps: int = 0
    judged: int = 0

    @property
    def trusted(self) -> bool:
        """Whether the correlation is high enough for the evaluator to be used: `MIN_KENDALL`, and above the profile's."""
        return self.kendall is not None and self.kendall >= MIN_KENDALL and self.kendall > (self.profile or 0.0)

    def __str__(self) -> str:
        tau = "no Kendall's tau" if self.kendall is None else f"Kendall's tau {self.kendall:.2f}"
        profile = "" if self.profile is None else f" (profile alone {self.profile:.2f})"
        found = f"{tau} with {self.trials} stand-alone trials{profile}, after {self.steps:,} steps of its own"
        if self.trusted:
            return f"{found}; judged {self.judged} allocations, and the best {N_PROMOTED} were trained"
        return (
            f"{found}; not used: {MIN_KENDALL:.2f} with {CHECK_TRIALS} trials, and more than the profile's, is needed"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Screener:
    """The shared evaluator's part of one search.

    Attributes:
        task: Where model, data, loss and metric come from.
        space: Points to allocations.
        training: A trial's schedule; its learning rate is replaced by uniform's best.
        about: What the search's study is about.
        storage: Of the search's study.
        sampler: Proposes the allocations to judge.
        seed: Of the super-adapter and the sampler.
        n_judged: Allocations to judge.
        folder: Where the super-adapter is kept; None: in memory, so that a search which goes on in another process trains
            it again, to the same weights.
        on_judged: Called with the number of allocations judged and to judge.
    """

    task: Task
    space: HierarchicalSpace
    training: TrainingConfig
    about: Mapping[str, Any]
    storage: str | optuna.storages.BaseStorage | None
    sampler: SamplerName
    seed: int
    n_judged: int
    folder: str | os.PathLike[str] | None = None
    on_judged: Callable[[int, int], None] | None = None

    def run(self, study: optuna.Study, train_another: Callable[[dict[str, Any]], bool]) -> Screening:
        """Checks the evaluator on stand-alone trials, once a study; if it is to be trusted, judges and queues the best.

        Args:
            study: The search's, with uniform and one-shot.
            train_another: Runs one more stand-alone trial with these parameters fixed; False where none is left to run.
        """
        training = replace(self.training, learning_rate=_uniforms_rate(study, self.training.learning_rate))
        fixed = {LEARNING_RATE: training.learning_rate} if len(self.about["learning_rates"]) > 1 else {}
        shared = functools.cache(functools.partial(self._evaluator, training))
        if SCREENING_KEY in study.user_attrs:
            found = Screening(**study.user_attrs[SCREENING_KEY])
        else:
            while len(trained := _trained_at(study, training.learning_rate)) < CHECK_TRIALS and train_another(fixed):
                pass
            found = self._check(shared, trained)
            if found.trials >= CHECK_TRIALS:  # with fewer, a longer search asks again
                study.set_user_attr(SCREENING_KEY, asdict(found))
        if not found.trusted:
            logger.warning("shared evaluator: %s", found)
            return found
        judging = self._judge_all(shared, f"{study.study_name}/shared")
        found = replace(found, judged=len(completed(judging)))
        study.set_user_attr(SCREENING_KEY, asdict(found))
        _promote(judging, study, fixed)
        return found

    # --- inside ----------------------------------------------------------------------------------------------------

    def _evaluator(self, training: TrainingConfig) -> SharedEvaluator:
        """The super-adapter of the folder, or a new one."""
        about = {**self.about, "seed": self.seed, "learning_rate": training.learning_rate}
        if self.folder is not None and (kept := load_shared(self.task, self.folder, about)):
            return kept
        trained = train_shared(self.task, self.space, training, seed=self.seed)
        if self.folder is not None:
            trained.save(self.folder, about)
        return trained

    def _check(self, shared: Callable[[], SharedEvaluator], trained: Mapping[Ranks, float]) -> Screening:
        """Kendall's tau of judged and trained metrics."""
        steps = STEPS * self.training.steps
        if len(trained) < CHECK_TRIALS:
            return Screening(kendall=None, trials=len(trained))
        try:
            evaluator = shared()
        except TrainingError as error:
            logger.warning("the shared evaluator cannot be trained: %s", error)
            return Screening(kendall=None, trials=len(trained), steps=steps)
        allocations = [RankAllocation(self.space.targets, ranks) for ranks in trained]
        judged = [evaluator.judge(allocation)[self.task.metric] for allocation in allocations]
        metrics = list(trained.values())
        return Screening(
            kendall=_kendall(judged, metrics),
            trials=len(trained),
            profile=_kendall(_captured_norms(self.space, trained), metrics),
            steps=steps,
        )

    def _judge_all(self, shared: Callable[[], SharedEvaluator], name: str) -> optuna.Study:
        """The study beside, once it holds `n_judged` allocations."""
        judging = open_study(
            name=name,
            storage=self.storage,
            sampler=optuna.samplers.RandomSampler(self.seed),
            pruner=optuna.pruners.NopPruner(),
            about={**self.about, "evaluator": SHARED},
        )
        judging.sampler = make_sampler(self.sampler, self.space, self.seed + len(judging.get_trials(deepcopy=False)))
        fail_orphans(judging)
        while (done := len(completed(judging))) < self.n_judged:
            judging.optimize(functools.partial(self._judge, shared), n_trials=1)
            if self.on_judged:
                self.on_judged(done + 1, self.n_judged)
        return judging

    def _judge(self, shared: Callable[[], SharedEvaluator], trial: optuna.Trial) -> float:
        """The objective of the study beside: a validation pass."""
        for key, value in signature().items():
            trial.set_user_attr(key, value)
        allocation = suggest_allocation(trial, self.space)
        metrics = shared().judge(allocation)
        stored = {
            "evaluator": SHARED,
            "budget": self.space.budget.limit,
            "parameters": allocation.parameters,
            "metric": metrics[self.task.metric],
            "loss": metrics["loss"],
        }
        trial.set_user_attr(TRIAL_KEY, stored)
        return metrics[self.task.metric]


def _kendall(found: Sequence[float], metrics: Sequence[float]) -> float | None:
    """Kendall's tau; None where one side is constant."""
    tau = float(kendalltau(found, metrics)[0])
    return None if math.isnan(tau) else tau


def _captured_norms(space: HierarchicalSpace, ranks: Collection[Ranks]) -> list[float]:
    """The sum of the gradients' singular values that the ranks capture: the profile's own guess at their merit."""
    features = rank_features(space.targets, space.budget, gains=space.gains, groups=space.groups)
    column = features.names.index("profile/norm")
    return [float(value) for value in features.transform(list(ranks))[:, column]]


def _uniforms_rate(study: optuna.Study, default: float) -> float:
    """The learning rate of the best uniform trial."""
    uniform = [trial for trial in completed(study) if trial.user_attrs[TRIAL_KEY]["origin"] == UNIFORM]
    best = max(uniform, key=lambda trial: trial.value or 0.0, default=None)
    return default if best is None else float(best.user_attrs[TRIAL_KEY]["learning_rate"])


def _trained_at(study: optuna.Study, rate: float) -> dict[Ranks, float]:
    """The different allocations trained at a learning rate, and their metrics."""
    trials = [trial for trial in completed(study) if trial.user_attrs[TRIAL_KEY]["learning_rate"] == rate]
    return {tuple(trial.user_attrs[RANKS_KEY]): trial.value or 0.0 for trial in trials}


def _promote(judging: optuna.Study, study: optuna.Study, fixed: Mapping[str, Any]) -> None:
    """Queues the best judged that were never trained in the search's study, `N_PROMOTED` in all."""
    standing = [trial for trial in study.get_trials(deepcopy=False) if _stands(trial)]
    known = {tuple(trial.user_attrs.get(RANKS_KEY, ())) for trial in standing}
    missing = N_PROMOTED - sum(trial.user_attrs.get("origin") == SCREENED for trial in standing)
    for trial in sorted(completed(judging), key=_merit, reverse=True):
        ranks = tuple(trial.user_attrs[RANKS_KEY])
        if missing > 0 and ranks not in known:
            attributes = {"origin": SCREENED, RANKS_KEY: list(ranks), **signature()}
            study.enqueue_trial(trial.params | dict(fixed), user_attrs=attributes)
            known.add(ranks)
            missing -= 1


def _merit(trial: FrozenTrial) -> tuple[float, float]:
    """The metric, and the loss where metrics are equal."""
    return trial.value or 0.0, -trial.user_attrs[TRIAL_KEY]["loss"]


def _stands(trial: FrozenTrial) -> bool:
    """Whether a trial need not be queued again: all but those whose process was killed."""
    return trial.state != TrialState.FAIL or "failure" in trial.user_attrs
