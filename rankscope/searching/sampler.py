"""`PerformanceModelSampler`: an Optuna sampler that proposes allocations by Thompson sampling from the performance model.

After a few start trials on the tilts, each proposal draws a value for every rank of every module from the model's posterior
and solves it exactly, by water-filling (Thompson 1933; design.md 5.4). The proposal is an allocation in the full space;
its parameters in the study are the tilts that sum it up, and the realised ranks are a trial attribute.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState
from sklearn.base import clone

from rankscope.allocation import RankAllocation
from rankscope.exceptions import StudyError
from rankscope.performance import PerformanceModel, Validation, believable, rank_features, validate
from rankscope.searching.fidelity import observe
from rankscope.searching.noise import residual_variance
from rankscope.searching.pruners import judges_seeds
from rankscope.searching.trials import LEARNING_RATE, RANKS_KEY, TRIAL_KEY
from rankscope.space import HierarchicalSpace

SamplerName = Literal["performance-model", "tpe", "random"]
START_TRIALS = 8
DRAWS = 10  # until one is an allocation that was not tried yet


class PerformanceModelSampler(BaseSampler):
    """Proposes allocations; works in any study whose objective calls `suggest_allocation`.

    Parallel workers differ by nature: each draws from the posterior. A pruned trial counts by its last intermediate value, with
    less weight (`searching/fidelity.py`); failed trials are passed over.

    Args:
        space: The tilts, targets, budget, and one-shot's gains, which carry the prior.
        n_startup_trials: Trials with a metric before the model proposes; before, tilts are drawn around one-shot. At least 2.
        seed: Of the draws.

    >>> from rankscope.budget import ParameterBudget
    >>> from rankscope.targets import TargetModule
    >>> targets = tuple(TargetModule(name=f"h.{i}.fc1", in_features=8, out_features=8, block=i) for i in range(4))
    >>> space = HierarchicalSpace(
    ...     targets=targets,
    ...     gains={t.name: np.ones(8) / np.arange(1, 9) for t in targets},
    ...     budget=ParameterBudget.uniform(targets, 2),
    ...     groups={t.name: f"model/{t.block // 2}" for t in targets},
    ... )
    >>> study = optuna.create_study(direction="maximize", sampler=PerformanceModelSampler(space, seed=0))
    >>> study.optimize(lambda trial: suggest_allocation(trial, space).vector[3], n_trials=15)
    >>> sum(study.trials[-1].user_attrs["ranks"]), study.trials[-1].user_attrs["ranks"][3] > 2
    (8, True)
    """

    def __init__(
        self,
        space: HierarchicalSpace,
        *,
        n_startup_trials: int = START_TRIALS,
        seed: int | None = None,
    ) -> None:
        self.space = space
        self.n_startup_trials = max(2, n_startup_trials)
        features = rank_features(space.targets, space.budget, gains=space.gains, groups=space.groups)
        self._rng = np.random.default_rng(seed)
        self._independent = RandomSampler(seed)
        self._model = PerformanceModel(features)
        self._one_shot = space.allocation(space.point(tau=1.0))
        self._seen: dict[int, tuple[int, ...]] = {}
        self._proposals: dict[int, tuple[RankAllocation, Any]] = {}

    # --- Optuna's side ---------------------------------------------------------------------------------------------

    def reseed_rng(self) -> None:
        """See `optuna.samplers.BaseSampler`."""
        self._rng = np.random.default_rng()
        self._independent.reseed_rng()

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The tilts."""
        return {tilt.name: FloatDistribution(tilt.low, tilt.high) for tilt in self.space.tilts}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A point around one-shot, or the tilts that sum up a draw from the posterior."""
        if RANKS_KEY in trial.user_attrs or set(search_space) & set(trial.system_attrs.get("fixed_params", {})):
            return {}
        self._learn(study)
        if len(self._seen) < self.n_startup_trials or self._model.constant:
            return self._explore()
        allocation, condition = self._draw()
        self._proposals[trial.number] = allocation, condition
        return self.describe(allocation)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The learning rate that is best in the posterior draw; anything else at random."""
        choices = getattr(param_distribution, "choices", ())
        if param_name == LEARNING_RATE and trial.number in self._proposals:
            condition = self._proposals[trial.number][1]
            if condition in choices:
                return condition
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    # --- rankscope's side ------------------------------------------------------------------------------------------

    def take(self, number: int) -> RankAllocation | None:
        """The allocation proposed for a trial, by its number, once; None where the tilts are the proposal."""
        return self._proposals.pop(number, (None, None))[0]

    def best(self, study: optuna.Study) -> tuple[RankAllocation, Any]:
        """The allocation that the posterior mean values most, and the learning rate; of the profile alone, if it is believed."""
        self._learn(study)
        return self._solve((self.believed(study) or self._model).utilities()), self._model.best_condition

    def believed(self, study: optuna.Study) -> PerformanceModel | None:
        """The model, or the profile alone, fitted to the same trials, whichever predicts left-out trials; None: neither does."""
        return None if self.model(study) is None else believable(self._model, self.validate(study))

    def model(self, study: optuna.Study) -> PerformanceModel | None:
        """The performance model on the study's trials; None with fewer than it starts with, or where all are equal.

        It is fitted anew: one that learned trial by trial depends on when it was interrupted.
        """
        self._seen, self._model = {}, clone(self._model, safe=False)
        self._learn(study)
        return self._model if len(self._seen) >= self.n_startup_trials and not self._model.constant else None

    def validate(self, study: optuna.Study) -> Validation | None:
        """The model's scores on left-out allocations; None with too few."""
        trials = [trial for trial in study.get_trials(deepcopy=False) if self._counts(trial)]
        return validate(
            self._model,
            [trial.user_attrs[RANKS_KEY] for trial in trials],
            [_sign(study) * float(trial.value or 0.0) for trial in trials],
            conditions=[trial.params.get(LEARNING_RATE) for trial in trials],
            noise_variance=_noise(trials),
        )

    def describe(self, allocation: RankAllocation) -> dict[str, float]:
        """The tilts that sum an allocation up: by how much, in logs, each group and role has more parameters than one-shot's."""
        least = min(target.rank_cost for target in self.space.targets)
        mine, theirs = self._parameters_by_tilt(allocation), self._parameters_by_tilt(self._one_shot)
        point = self.space.point(tau=1.0)
        for tilt in self.space.tilts:
            if tilt.name != "tau":
                offset = math.log((mine[tilt.name] + least) / (theirs[tilt.name] + least))
                point[tilt.name] = float(np.clip(offset, tilt.low, tilt.high))
        return point

    # --- inside ----------------------------------------------------------------------------------------------------

    def _parameters_by_tilt(self, allocation: RankAllocation) -> Counter[str]:
        """Adapter parameters of each group and role, under their tilts' names."""
        spent: Counter[str] = Counter()
        for target, rank in zip(self.space.targets, allocation.vector, strict=True):
            spent[f"group/{self.space.groups[target.name]}"] += rank * target.rank_cost
            spent[f"role/{target.role}"] += rank * target.rank_cost
        return spent

    def _learn(self, study: optuna.Study) -> None:
        """Shows the model what has completed or was pruned since it last looked."""
        trials = study.get_trials(deepcopy=False)
        complete = [trial for trial in trials if self._counts(trial)]
        by_seed = judges_seeds(study.pruner)
        new = [t for t in trials if t.number not in self._seen and (t.state == TrialState.PRUNED or self._counts(t))]
        seen = [(t, found) for t in new if self._fits(t) and (found := observe(t, complete, by_seed=by_seed))]
        if not seen or len(self._seen) + len(seen) < 2:
            return
        self._seen |= {trial.number: tuple(trial.user_attrs[RANKS_KEY]) for trial, _ in seen}
        self._model.update(
            [trial.user_attrs[RANKS_KEY] for trial, _ in seen],
            [_sign(study) * value for _, (value, _) in seen],
            [weight for _, (_, weight) in seen],
            conditions=[trial.params.get(LEARNING_RATE) for trial, _ in seen],
        )

    def _counts(self, trial: FrozenTrial) -> bool:
        """Whether a trial is a measurement of its own: complete, of these modules, and no copy of an equal one."""
        return (
            trial.state == TrialState.COMPLETE
            and self._fits(trial)
            and trial.user_attrs.get(TRIAL_KEY, {}).get("reused") is None
            and trial.value is not None
            and math.isfinite(trial.value)
        )

    def _fits(self, trial: FrozenTrial) -> bool:
        """Whether a trial's ranks are of these modules."""
        return len(trial.user_attrs.get(RANKS_KEY, ())) == len(self.space.targets)

    def _explore(self) -> dict[str, float]:
        """Between uniform and beyond one-shot, with small or large offsets."""
        width = self._rng.choice([0.25, 0.5, 1.0])
        point = {tilt.name: float(self._rng.uniform(tilt.low, tilt.high) * width) for tilt in self.space.tilts}
        return point | {"tau": float(self._rng.uniform(0.25, 1.25))}

    def _draw(self) -> tuple[RankAllocation, Any]:
        tried = set(self._seen.values())
        for _ in range(DRAWS):
            gains, condition = self._model.sample(self._rng)
            allocation = self._solve(gains)
            if allocation.vector not in tried:
                break
        return allocation, condition

    def _solve(self, gains: Mapping[str, np.ndarray[Any, Any]]) -> RankAllocation:
        if not any(values.any() for values in gains.values()):  # a draw in which nothing helps: all ranks are equal
            return self.space.allocation(self.space.point(tau=0.0))
        return self.space.solve(gains).renamed("performance-model")


def make_sampler(sampler: SamplerName | BaseSampler, space: HierarchicalSpace, seed: int) -> BaseSampler:
    """The sampler of a name; a sampler object is passed through.

    Raises:
        StudyError: There is none of that name.
    """
    match sampler:
        case BaseSampler():
            return sampler
        case "performance-model":
            return PerformanceModelSampler(space, seed=seed)
        case "tpe":
            return TPESampler(seed=seed, multivariate=True)
        case "random":
            return RandomSampler(seed=seed)
    raise StudyError(
        f"`sampler` must be one of {', '.join(get_args(SamplerName))} or an Optuna sampler, but got {sampler!r}."
    )


def suggest_allocation(trial: optuna.Trial, space: HierarchicalSpace) -> RankAllocation:
    """The allocation of a trial under any sampler; it stores the realised ranks as the trial's attribute `ranks`.

    Args:
        trial: In an objective, or from `study.ask()`.
        space: The same that the sampler was made with.
    """
    queued = trial.user_attrs.get(RANKS_KEY)
    point = {tilt.name: trial.suggest_float(tilt.name, tilt.low, tilt.high) for tilt in space.tilts}
    sampler = trial.study.sampler
    allocation = sampler.take(trial.number) if isinstance(sampler, PerformanceModelSampler) else None
    if queued is not None:
        allocation = RankAllocation(space.targets, tuple(queued), budget=space.budget.limit)
    if allocation is None:
        allocation = space.allocation(point)
    trial.set_user_attr(RANKS_KEY, list(allocation.vector))
    return allocation


def _sign(study: optuna.Study) -> float:
    """1 where higher is better."""
    return 1.0 if study.direction == optuna.study.StudyDirection.MAXIMIZE else -1.0


def _noise(trials: list[FrozenTrial]) -> float | None:
    """Variance of a trial's mean over its seeds, beyond what the seeds have in common; None with one seed."""
    seeds = [list(t.user_attrs.get(TRIAL_KEY, {}).get("metrics_by_seed", {}).values()) for t in trials]
    if len({len(values) for values in seeds}) != 1 or len(seeds[0]) < 2 or len(seeds) < 2:
        return None
    return residual_variance(seeds) / len(seeds[0])
