"""`PerformanceModelSampler` proposes allocations by Thompson sampling (Thompson 1933) from the performance model.

After a few start trials on the tilts, a proposal draws a value for every rank of every module from the model's posterior and
solves it exactly, by water-filling. The tilts in Optuna's records then only sum the allocation up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from threading import RLock
from typing import Any, NamedTuple

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, WilcoxonPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sklearn.base import clone

from rankscope.allocation import RankAllocation
from rankscope.errors import SettingsError, checked
from rankscope.performance import PerformanceModel, Validation, believable, validate
from rankscope.searching.confirmation import residual_variance
from rankscope.searching.space import BUDGET, TAU, HierarchicalSpace
from rankscope.searching.storage import LEARNING_RATE, RANKS_KEY, TRIAL_KEY
from rankscope.settings import SearchSettings, TrainingSettings

Trials = Sequence[FrozenTrial]

START_TRIALS = 8  # with a metric, before the model proposes
DRAWS = 10  # until one is an allocation that was not tried yet
PROPOSAL_KEY = "rankscope:proposal"  # of a trial's system attributes, which `suggest_allocation` can read at once


class Proposal(NamedTuple):
    """What to try next: an allocation, the tilts that say or sum up what it is, and the learning rate; None: any."""

    allocation: RankAllocation
    tilts: dict[str, float]
    learning_rate: Any


class PerformanceModelSampler(BaseSampler):
    """Proposes allocations, in any study whose objective calls `suggest_allocation`.

    The first eight trials with a metric are drawn around one-shot, on the tilts; the space's gains carry the model's prior. A
    pruned trial counts by its last intermediate value, with less weight; failed and foreign trials do not count. Where tilts are
    fixed from outside, as by `PartialFixedSampler`, the allocation is that of the tilts. Threads may share a sampler.

    >>> import rankscope as rs
    >>> targets = tuple(rs.TargetModule(name=f"h.{i}.fc1", in_features=8, out_features=8, block=i) for i in range(4))
    >>> gains, groups = {t.name: 1.0 / np.arange(1, 9) for t in targets}, {t.name: f"model/{t.block // 2}" for t in targets}
    >>> budget = rs.ParameterBudget.uniform(targets, 2)
    >>> space = HierarchicalSpace(targets=targets, gains=gains, budget=budget, groups=groups)
    >>> study = optuna.create_study(direction="maximize", sampler=PerformanceModelSampler(space, seed=0))
    >>> study.optimize(lambda trial: suggest_allocation(trial, space).vector[3], n_trials=15)
    >>> sum(study.trials[-1].user_attrs["ranks"]), study.trials[-1].user_attrs["ranks"][3] > 2
    (8, True)
    """

    @checked
    def __init__(self, space: HierarchicalSpace, *, seed: int | None = None) -> None:
        self.space, seed = space, SearchSettings.of(seed=seed).seed
        self._rng, self._independent = np.random.default_rng(seed), RandomSampler(seed)
        self._one_shot = space.allocation(space.point(tau=1.0))
        self._model, self._seen = PerformanceModel(space.features), dict[int, tuple[int, ...]]()
        self._learned_from: tuple[Any, int] | None = None  # storage and study
        self._lock = RLock()

    def __getstate__(self) -> dict[str, Any]:
        fresh = {"_model": clone(self._model, safe=False), "_seen": {}, "_learned_from": None, "_lock": None}
        return self.__dict__ | fresh

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=RLock())

    def reseed_rng(self) -> None:
        """Draw from a new seed."""
        self._rng = np.random.default_rng()
        self._independent.reseed_rng()

    def reseed(self, *seed: int) -> None:
        """Draw from these seeds, together."""
        self._rng, self._independent = np.random.default_rng(seed), RandomSampler(sum(seed) % 2**32)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The tilts."""
        return {tilt.name: FloatDistribution(tilt.low, tilt.high) for tilt in self.space.tilts}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The tilts of a proposal; its allocation and learning rate are stored with the trial, for `suggest_allocation`."""
        self._raise_error_if_multi_objective(study)
        ours = self.infer_relative_search_space(study, trial)
        if RANKS_KEY in trial.user_attrs or set(ours) & set(trial.system_attrs.get("fixed_params", {})):
            return {}
        mine = [name for name, distribution in search_space.items() if ours.get(name) == distribution]
        found: dict[str, Any] = {}
        if mine:
            allocation, tilts, rate = self.propose(study)
            found = {name: tilts[name] for name in mine}
            if len(mine) == len(ours):  # else ranks of the full space would not keep to what is fixed
                stored = {"ranks": list(allocation.vector), "learning_rate": rate}
                study._storage.set_trial_system_attr(trial._trial_id, PROPOSAL_KEY, stored)
        others = {name: each for name, each in search_space.items() if name not in mine}
        return found | {name: self._independent.sample_independent(study, trial, name, others[name]) for name in others}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The learning rate that goes with the proposal; anything else at random."""
        self._raise_error_if_multi_objective(study)
        rate = trial.system_attrs.get(PROPOSAL_KEY, {}).get("learning_rate")
        if param_name == LEARNING_RATE and rate is not None and rate in getattr(param_distribution, "choices", ()):
            return rate
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    def propose(self, study: optuna.Study) -> Proposal:
        """The next allocation: around one-shot at first, then the solution of a posterior draw."""
        with self._lock:
            self._learn(study)
            if not self._ready:
                width = self._rng.choice([0.25, 0.5, 1.0])
                tilts = {t.name: float(self._rng.uniform(t.low, t.high) * width) for t in self.space.tilts}
                tilts[TAU] = float(self._rng.uniform(0.25, 1.25))
                tilts |= {
                    name: float(self._rng.uniform(low, high)) for name, low, high in self.space.tilts if name == BUDGET
                }
                return Proposal(self.space.allocation(tilts), tilts, None)
            running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))  # elsewhere
            tried = {*self._seen.values(), *(tuple(trial.user_attrs.get(RANKS_KEY, ())) for trial in running)}
            for _ in range(DRAWS):
                gains, rate = self._model.sample(self._rng)
                shares = [2.0 ** self._rng.uniform(low, high) for name, low, high in self.space.tilts if name == BUDGET]
                allocation = self._solve(gains, *shares)
                if allocation.vector not in tried:
                    break
            return Proposal(allocation, self._tilts_of(allocation), rate)

    def best(self, study: optuna.Study, share: float = 1.0) -> Proposal:
        """What the believed model's posterior mean values most at a share of the budget; SettingsError below two trials."""
        with self._lock:
            model = self.believed(study) or self._model
            if not self._seen:
                what = "at least 2 trials with ranks of these modules and a metric"
                raise SettingsError(f"study `{study.study_name}` must hold {what}, but holds fewer; run more trials.")
            best = self._one_shot if self._model.constant else self._solve(model.utilities(), share)
            return Proposal(best, self._tilts_of(best), self._model.best_condition)

    def believed(self, study: optuna.Study) -> PerformanceModel | None:
        """The model, or the profile alone on the same trials, whichever predicts left-out trials; None: neither does."""
        with self._lock:
            return None if self.model(study) is None else believable(self._model, self.validate(study))

    def model(self, study: optuna.Study) -> PerformanceModel | None:
        """The performance model on the study's trials; None with fewer than it starts with, or where all are equal."""
        with self._lock:
            self._learned_from = None  # what was learned trial by trial depends on when it was interrupted
            self._learn(study)
            return self._model if self._ready else None

    def validate(self, study: optuna.Study) -> Validation | None:
        """The model's scores on left-out allocations; None with too few."""
        trials, _ = self._measured(study)
        seeds, noise = [_seeds(trial) for trial in trials], None
        if len({len(values) for values in seeds}) == 1 and len(seeds[0]) > 1:
            noise = residual_variance(seeds) / len(seeds[0])  # of a mean over seeds, beyond what seeds have in common
        return validate(self._model, **self._observations(study, trials, trials)[1], noise_variance=noise)

    @property
    def _ready(self) -> bool:
        """Whether the model has seen enough, and metrics that differ."""
        return len(self._seen) >= START_TRIALS and not self._model.constant

    def _tilts_of(self, allocation: RankAllocation) -> dict[str, float]:
        """The tilts that sum an allocation up: by how much, in logs, each level has more parameters than in one-shot's.

        A group's is beyond its tower's.
        """
        targets, tilts = self.space.targets, self.space.point(tau=1.0)
        costs = np.array([target.rank_cost for target in targets])
        share = allocation.parameters / self.space.budget.limit if BUDGET in tilts else 1.0
        for name, low, high in self.space.tilts[1:]:
            members = [name in self.space.offsets_of(target) for target in targets]
            mine, one_shots = (costs * members @ each.vector + costs.min() for each in (allocation, self._one_shot))
            offset = math.log2(share) if name == BUDGET else math.log(mine / (share * one_shots))
            tower, group, _ = self.space.offsets_of(targets[members.index(True)]) if name != BUDGET else ("", "", "")
            offset -= tilts.get(tower, 0.0) if name == group else 0.0
            tilts[name] = float(np.clip(offset, low, high))
        return tilts

    def _solve(self, gains: Mapping[str, np.ndarray[Any, Any]], share: float = 1.0) -> RankAllocation:
        if not any(values.any() for values in gains.values()):  # a draw in which nothing helps: all ranks are equal
            return self.space.allocation(self.space.point(tau=0.0) | {BUDGET: math.log2(share)})
        return self.space.solve(gains, share).renamed("performance-model")

    def _learn(self, study: optuna.Study) -> None:
        """Show the model what has completed or was pruned since it last looked; another study is learned from scratch."""
        source = study._storage, study._study_id
        if self._learned_from != source:
            self._model, self._seen, self._learned_from = clone(self._model, safe=False), {}, source
        complete, pruned = self._measured(study)
        new = sorted((t for t in complete + pruned if t.number not in self._seen), key=lambda t: t.number)
        numbers, observed = self._observations(study, new, complete)
        if numbers and len(self._seen) + len(numbers) >= 2:
            self._seen |= dict(zip(numbers, map(tuple, observed["ranks"]), strict=True))
            self._model.update(**observed)

    def _observations(self, study: optuna.Study, trials: Trials, complete: Trials) -> tuple[list[int], dict[str, Any]]:
        """The numbers of trials that tell something, and these as `PerformanceModel.update` takes them."""
        by_seed = isinstance(study.pruner, WilcoxonPruner)  # intermediate values are those of seeds
        sign = 1.0 if study.direction == StudyDirection.MAXIMIZE else -1.0
        seen = [(t, found) for t in trials if (found := observe(t, complete, by_seed=by_seed))]
        return [trial.number for trial, _ in seen], {
            "ranks": [trial.user_attrs[RANKS_KEY] for trial, _ in seen],
            "y": [sign * value for _, (value, _) in seen],
            "sample_weight": [runs for _, (_, runs) in seen],
            "conditions": [_rate_of(trial) for trial, _ in seen],
        }

    def _measured(self, study: optuna.Study) -> tuple[list[FrozenTrial], list[FrozenTrial]]:
        """Complete trials of these modules that are no copies of equal ones, and pruned trials of these modules."""
        self._raise_error_if_multi_objective(study)
        found: dict[TrialState, list[FrozenTrial]] = {TrialState.COMPLETE: [], TrialState.PRUNED: []}
        for trial in study.get_trials(deepcopy=False, states=tuple(found)):
            copied = trial.user_attrs.get(TRIAL_KEY, {}).get("reused") is not None
            if self._fits(trial.user_attrs.get(RANKS_KEY)) and not copied and math.isfinite(trial.value or 0.0):
                found[trial.state].append(trial)
        return found[TrialState.COMPLETE], found[TrialState.PRUNED]

    def _fits(self, ranks: Any) -> bool:
        full = [target.full_rank for target in self.space.targets]
        good = isinstance(ranks, list | tuple) and len(ranks) == len(full)
        return good and all(isinstance(r, int) and 0 <= r <= most for r, most in zip(ranks, full, strict=True))


@checked
def suggest_allocation(trial: optuna.trial.BaseTrial, space: HierarchicalSpace) -> RankAllocation:
    """The allocation of a trial under any sampler; a finished trial gives its own again.

    Stores the ranks as the trial's attribute `ranks`. SettingsError where a trial was queued with ranks that are of other
    modules, above the budget, or outside the bounds of towers.
    """
    tilts = {tilt.name: trial.suggest_float(tilt.name, tilt.low, tilt.high) for tilt in space.tilts}
    ranks = trial.user_attrs.get(RANKS_KEY)
    if ranks is None and isinstance(trial, optuna.Trial):
        ranks = trial.storage.get_trial_system_attrs(trial._trial_id).get(PROPOSAL_KEY, {}).get("ranks")
    if ranks is None:
        allocation = space.allocation(tilts)
    else:
        vector = tuple(ranks) if isinstance(ranks, list | tuple) else (ranks,)
        allocation = RankAllocation(space.targets, vector, budget=space.budget.limit, tower_bounds=space.budget.bounds)
    if allocation.parameters > space.budget.limit:
        within = f"the budget of {space.budget.limit:,} parameters"
        raise SettingsError(
            f"the trial's ranks must keep within {within}, but take {allocation.parameters:,}; queue lower ones."
        )
    if not space.budget.search:
        space.budget.require(allocation, "the trial's ranks")
    if trial.user_attrs.get(RANKS_KEY) != list(allocation.vector):
        trial.set_user_attr(RANKS_KEY, list(allocation.vector))
    return allocation


def observe(trial: FrozenTrial, complete: Sequence[FrozenTrial], *, by_seed: bool) -> tuple[float, float] | None:
    """A trial's final metric, and how many training runs it counts as; None where it tells nothing.

    A pruned trial is expected to gain, from where it was seen last (`by_seed`: from its seeds), what complete trials at its rate
    gained on average. It counts as the share of the run that it was given, or as its seeds.
    """
    if trial.state == TrialState.COMPLETE and trial.value is not None:
        return trial.value, float(max(1, len(_seeds(trial))))
    if trial.state != TrialState.PRUNED or not trial.intermediate_values:
        return None
    seen = sorted(trial.intermediate_values)
    steps, rate = seen if by_seed else seen[-1:], _rate_of(trial)

    def mean_at(each: FrozenTrial) -> float:
        return fmean(each.intermediate_values[step] for step in steps)

    like = [t for t in complete if _rate_of(t) == rate and set(steps) <= set(t.intermediate_values)]
    if not like:
        return None
    value = mean_at(trial) + fmean(float(t.value or 0.0) - mean_at(t) for t in like)
    runs = len(seen) if by_seed else seen[-1] / max(like[0].intermediate_values)
    return (value, float(runs)) if math.isfinite(value) and runs > 0 else None


def make_sampler(sampler: str | BaseSampler, space: HierarchicalSpace, seed: int) -> BaseSampler:
    """The sampler of a name; a sampler object is passed through."""
    known: dict[str, Callable[[], BaseSampler]] = {
        "performance-model": lambda: PerformanceModelSampler(space, seed=seed),
        "tpe": lambda: TPESampler(seed=seed, multivariate=True),
        "random": lambda: RandomSampler(seed=seed),
    }
    made: BaseSampler = _made("sampler", sampler, BaseSampler, known)
    return made


def make_pruner(pruner: str | BasePruner, training: TrainingSettings) -> BasePruner:
    """The pruner of a name; a pruner object is passed through. SettingsError where trials give it nothing to judge by."""
    known = {"none": NopPruner, "median": MedianPruner, "hyperband": HyperbandPruner}
    made: BasePruner = _made("pruner", pruner, BasePruner, known)
    nothing = training.evaluate_every is None or training.evaluate_every >= training.steps
    if nothing and not isinstance(made, NopPruner | WilcoxonPruner):
        raise SettingsError(
            f"`evaluate_every` must be below the {training.steps} steps of a trial, for a pruner to judge by, "
            f"but is {training.evaluate_every}; lower it, or prune nothing."
        )
    return made


def _made(what: str, value: Any, base: Any, known: Mapping[str, Callable[[], Any]]) -> Any:
    if not isinstance(value, base) and (not isinstance(value, str) or value not in known):
        raise SettingsError(f"`{what}` must be one of {', '.join(known)} or an Optuna {what}, but got {value!r}.")
    return value if isinstance(value, base) else known[value]()


def _seeds(trial: FrozenTrial) -> list[float]:
    """The metric of each training run behind a trial's value; none in studies that do not say."""
    return list(trial.user_attrs.get(TRIAL_KEY, {}).get("metrics_by_seed", {}).values())


def _rate_of(trial: FrozenTrial) -> Any:
    """The learning rate where it is a choice of a few; None where there is none, or where it is a number of its own."""
    choice = isinstance(trial.distributions.get(LEARNING_RATE), CategoricalDistribution)
    return trial.params[LEARNING_RATE] if choice else None
