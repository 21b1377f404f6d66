"""What an earlier search believes, for those who would use its performance model without searching again."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Mapping
from threading import RLock
from typing import Any, Literal, get_args

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState
from sklearn.base import clone

from rankscope.allocation import RankAllocation
from rankscope.errors import SettingsError
from rankscope.performance import PerformanceModel, Validation, believable, rank_features, validate
from rankscope.searching.confirmation import observe, residual_variance
from rankscope.searching.space import HierarchicalSpace
from rankscope.searching.storage import LEARNING_RATE, RANKS_KEY, STUDY_KEY, TRIAL_KEY, learning_rate_of, seeds_of
from rankscope.targets import fingerprint_targets
from rankscope.training import TrainingConfig

PrunerName = Literal["none", "median", "hyperband"]


def make_pruner(pruner: PrunerName | optuna.pruners.BasePruner, training: TrainingConfig) -> optuna.pruners.BasePruner:
    """The pruner of a name; a pruner object is passed through.

    Pruners judge a trial by evaluations on its way (of the first seed); Optuna's `WilcoxonPruner` by its seeds, one after the
    other, against those of the best trial.

    Args:
        pruner: Name or pruner.
        training: The schedule of a trial.

    Raises:
        SettingsError: There is none of that name, or trials give it nothing to judge by.
    """
    made = pruner if isinstance(pruner, optuna.pruners.BasePruner) else _named(pruner)
    if isinstance(made, optuna.pruners.NopPruner) or judges_seeds(made):
        return made
    if training.evaluate_every is None or training.evaluate_every >= training.steps:
        raise SettingsError(
            f"`evaluate_every` must be below the {training.steps} steps of a trial, for a pruner to judge by, "
            f"but is {training.evaluate_every}; lower it, or prune nothing."
        )
    return made


def judges_seeds(pruner: optuna.pruners.BasePruner) -> bool:
    """Whether a pruner compares repeats, and not evaluations on the way."""
    return isinstance(pruner, optuna.pruners.WilcoxonPruner)


def _named(pruner: str) -> optuna.pruners.BasePruner:
    match pruner:
        case "none":
            return optuna.pruners.NopPruner()
        case "median":
            return optuna.pruners.MedianPruner()
        case "hyperband":
            return optuna.pruners.HyperbandPruner()
    raise SettingsError(
        f"`pruner` must be one of {', '.join(get_args(PrunerName))} or an Optuna pruner, but got {pruner!r}."
    )


SamplerName = Literal["performance-model", "tpe", "random"]
START_TRIALS = 8
DRAWS = 10  # until one is an allocation that was not tried yet
PROPOSAL_KEY = "rankscope:proposal"  # of a trial's system attributes: ranks and learning rate of a draw


class PerformanceModelSampler(BaseSampler):
    """Proposes allocations; works in any study whose objective calls `suggest_allocation`.

    Threads may share it (`study.optimize(n_jobs=...)`), and parallel workers differ by nature: each draws from the posterior.
    A pruned trial counts by its last intermediate value, with less weight (`searching/fidelity.py`); failed trials, and
    trials whose ranks are not of these modules, are passed over. Where some tilts are fixed from outside, as by Optuna's
    `PartialFixedSampler`, it proposes the other tilts, and the allocation is that of the tilts. It copies and pickles without
    what it has learned, which it learns again from the study.

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
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        learned = ("_lock", "_learned_from", "_seen")
        kept = {name: value for name, value in self.__dict__.items() if name not in learned}
        return kept | {"_model": clone(self._model, safe=False)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def _forget(self) -> None:
        self._lock = RLock()
        self._seen: dict[int, tuple[int, ...]] = {}
        self._learned_from: tuple[weakref.ref[Any], int] | None = None  # storage and study

    # --- Optuna's side ---------------------------------------------------------------------------------------------

    def reseed_rng(self) -> None:
        """See `optuna.samplers.BaseSampler`."""
        with self._lock:
            self._rng = np.random.default_rng()
            self._independent.reseed_rng()

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The tilts."""
        return {tilt.name: FloatDistribution(tilt.low, tilt.high) for tilt in self.space.tilts}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A point around one-shot, or the tilts that sum up a draw from the posterior.

        Raises:
            ValueError: The study has several objectives.
        """
        self._raise_error_if_multi_objective(study)
        ours = self.infer_relative_search_space(study, trial)
        if RANKS_KEY in trial.user_attrs or set(ours) & set(trial.system_attrs.get("fixed_params", {})):
            return {}
        mine = {name for name, distribution in search_space.items() if ours.get(name) == distribution}
        if not mine:
            point = {}
        elif mine == set(ours):
            point = self._propose(study, trial)
        else:  # ranks of the full space would not keep to what is fixed
            point = self._proposal(study)[0]
        return {
            name: point[name]
            if name in mine
            else self._independent.sample_independent(study, trial, name, distribution)
            for name, distribution in search_space.items()
        }

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The learning rate that is best in the posterior draw; anything else at random.

        Raises:
            ValueError: The study has several objectives.
        """
        self._raise_error_if_multi_objective(study)
        if param_name == LEARNING_RATE:
            rate = trial.system_attrs.get(PROPOSAL_KEY, {}).get("learning_rate")
            if rate is not None and rate in getattr(param_distribution, "choices", ()):
                return rate
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    # --- rankscope's side ------------------------------------------------------------------------------------------

    def best(self, study: optuna.Study) -> tuple[RankAllocation, Any]:
        """The allocation that the posterior mean values most, and the learning rate; of the profile alone, if it is believed.

        Raises:
            SettingsError: The study holds fewer than two trials with a metric.
        """
        with self._lock:
            model = self.believed(study) or self._model
            if not self._seen:
                raise SettingsError(
                    f"study `{study.study_name}` must hold at least 2 trials with ranks of these modules and a metric, but "
                    "holds fewer; run more trials."
                )
            if self._model.constant:  # nothing was learned: what the profile says
                return self._one_shot, self._model.best_condition
            return self._solve(model.utilities()), self._model.best_condition

    def believed(self, study: optuna.Study) -> PerformanceModel | None:
        """The model, or the profile alone, fitted to the same trials, whichever predicts left-out trials; None: neither does."""
        with self._lock:
            return None if self.model(study) is None else believable(self._model, self.validate(study))

    def model(self, study: optuna.Study) -> PerformanceModel | None:
        """The performance model on the study's trials; None with fewer than it starts with, or where all are equal.

        It is fitted anew: one that learned trial by trial depends on when it was interrupted.
        """
        with self._lock:
            self._learned_from = None
            self._learn(study)
            return self._model if len(self._seen) >= self.n_startup_trials and not self._model.constant else None

    def validate(self, study: optuna.Study) -> Validation | None:
        """The model's scores on left-out allocations; None with too few."""
        self._raise_error_if_multi_objective(study)
        trials = [trial for trial in study.get_trials(deepcopy=False) if self._counts(trial)]
        return validate(
            self._model,
            [trial.user_attrs[RANKS_KEY] for trial in trials],
            [_sign(study) * float(trial.value or 0.0) for trial in trials],
            sample_weight=[float(seeds_of(trial)) for trial in trials],
            conditions=[learning_rate_of(trial) for trial in trials],
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
        """Shows the model what has completed or was pruned since it last looked; another study is learned from scratch."""
        self._raise_error_if_multi_objective(study)
        source = study._storage, study._study_id
        known = self._learned_from
        if known is None or (known[0](), known[1]) != source:
            self._seen, self._model = {}, clone(self._model, safe=False)
            self._learned_from = weakref.ref(source[0]), source[1]
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
            [runs for _, (_, runs) in seen],
            conditions=[learning_rate_of(trial) for trial, _ in seen],
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
        ranks = trial.user_attrs.get(RANKS_KEY)
        return (
            isinstance(ranks, list | tuple)
            and len(ranks) == len(self.space.targets)
            and all(
                isinstance(rank, int) and 0 <= rank <= target.full_rank
                for rank, target in zip(ranks, self.space.targets, strict=True)
            )
        )

    def _propose(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, float]:
        """The tilts of a proposal; its ranks and learning rate are stored with the trial, for `suggest_allocation`."""
        point, allocation, rate = self._proposal(study)
        if allocation is not None:
            proposal = {"ranks": list(allocation.vector), "learning_rate": rate}
            study._storage.set_trial_system_attr(trial._trial_id, PROPOSAL_KEY, proposal)
        return point

    def _proposal(self, study: optuna.Study) -> tuple[dict[str, float], RankAllocation | None, Any]:
        """Tilts, and the allocation and learning rate that they sum up; None where the tilts are the proposal."""
        with self._lock:
            self._learn(study)
            if len(self._seen) < self.n_startup_trials or self._model.constant:
                return self._explore(), None, None
            allocation, rate = self._draw()
        return self.describe(allocation), allocation, rate

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
        SettingsError: There is none of that name.
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
    raise SettingsError(
        f"`sampler` must be one of {', '.join(get_args(SamplerName))} or an Optuna sampler, but got {sampler!r}."
    )


def suggest_allocation(trial: optuna.trial.BaseTrial, space: HierarchicalSpace) -> RankAllocation:
    """The allocation of a trial under any sampler; it stores the realised ranks as the trial's attribute `ranks`.

    Args:
        trial: In an objective, or from `study.ask()`. A finished trial gives its own allocation again.
        space: The same that the sampler was made with.

    Raises:
        SettingsError: The trial was queued with ranks above the budget.
        SettingsError: It was queued with something else than ranks.
        SettingsError: It was queued with ranks of other modules.
    """
    point = {tilt.name: trial.suggest_float(tilt.name, tilt.low, tilt.high) for tilt in space.tilts}
    ranks = trial.user_attrs.get(RANKS_KEY, _proposed_ranks(trial))
    if ranks is None:
        allocation = space.allocation(point)
    elif isinstance(ranks, list | tuple):
        allocation = RankAllocation(space.targets, tuple(ranks), budget=space.budget.limit)
    else:
        raise SettingsError(f"the trial's attribute `{RANKS_KEY}` must list a rank for each module, but is {ranks!r}.")
    if allocation.parameters > space.budget.limit:
        raise SettingsError(
            f"the trial's ranks must keep within the budget of {space.budget.limit:,} parameters, but take "
            f"{allocation.parameters:,}; queue lower ones."
        )
    trial.set_user_attr(RANKS_KEY, list(allocation.vector))
    return allocation


def _proposed_ranks(trial: optuna.trial.BaseTrial) -> list[int] | None:
    """The ranks that the sampler drew for a running trial; None where its tilts are the proposal."""
    if not isinstance(trial, optuna.Trial):
        return None
    proposal = trial.storage.get_trial_system_attrs(trial._trial_id).get(PROPOSAL_KEY)
    return None if proposal is None else list(proposal["ranks"])


def _sign(study: optuna.Study) -> float:
    """1 where higher is better."""
    return 1.0 if study.direction == optuna.study.StudyDirection.MAXIMIZE else -1.0


def _noise(trials: list[FrozenTrial]) -> float | None:
    """Variance of a trial's mean over its seeds, beyond what the seeds have in common; None with one seed."""
    seeds = [list(t.user_attrs.get(TRIAL_KEY, {}).get("metrics_by_seed", {}).values()) for t in trials]
    if len({len(values) for values in seeds}) != 1 or len(seeds[0]) < 2 or len(seeds) < 2:
        return None
    return residual_variance(seeds) / len(seeds[0])


def belief_of(study: optuna.Study, space: HierarchicalSpace) -> PerformanceModel | None:
    """The performance model on a search's trials, or the profile alone where the model does not beat it.

    Args:
        study: rankscope's, as `load_study` gives it.
        space: What was searched.

    Returns:
        None where neither predicts trials that were left out, or where there are too few of them.

    Raises:
        SettingsError: The search was of other modules or another budget.
    """
    about = study.user_attrs[STUDY_KEY]
    for key, ours in (("model", fingerprint_targets(space.targets)), ("budget", space.budget.limit)):
        if about[key] != ours:
            raise SettingsError(
                f"study `{study.study_name}` must be about {key} {ours!r}, but its trials are about {about[key]!r}; "
                "search again, or use another output folder."
            )
    return PerformanceModelSampler(space).believed(study)
