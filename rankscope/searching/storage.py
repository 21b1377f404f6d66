"""Opening an Optuna study for one search: what it must be about, and picking up after a kill."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from rankscope.allocation import RankAllocation
from rankscope.errors import SettingsError
from rankscope.files import require_same
from rankscope.targets import TargetModule

TRIAL_KEY = "rankscope"
RANKS_KEY = "ranks"
STEPS_KEY = "steps"  # optimizer steps that a trial took, over all its seeds, however it ended
LEARNING_RATE = "learning_rate"  # the parameter beside the tilts
UNIFORM, ONE_SHOT, SAMPLER, POSTERIOR_MEAN = "uniform", "one-shot", "sampler", "posterior-mean"  # a trial's origin


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One evaluated allocation.

    Attributes:
        number: Of the Optuna trial.
        origin: Where the allocation comes from: `"uniform"`, `"one-shot"`, `"sampler"`, or `"posterior-mean"`.
        allocation: The realised ranks.
        learning_rate: The rate it was trained with.
        metric: Validation metric, mean over seeds; higher is better.
        loss: Validation loss, mean over seeds.
        metrics_by_seed: Validation metric of each seed.
        difference: Mean paired difference of the metric to uniform at uniform's best learning rate, seed by seed; None
            for uniform itself.
        wall_seconds: Training time; 0 where the result of an equal trial was reused.
        reused: Number of the trial whose result was reused; None for one that was trained.
        history: Validation metric of the first seed by step, where it was evaluated on the way, the end included.
    """

    number: int
    origin: str
    allocation: RankAllocation
    learning_rate: float
    metric: float
    loss: float
    metrics_by_seed: Mapping[str, float]
    difference: float | None
    wall_seconds: float
    reused: int | None
    history: Mapping[int, float] = field(default_factory=dict)

    @property
    def proposed(self) -> bool:
        """Whether the search came up with it, and did not start from it."""
        return self.origin not in (UNIFORM, ONE_SHOT)


def seeds_of(trial: FrozenTrial) -> int:
    """How many training runs a complete trial's value is the mean of; 1 in studies that do not say."""
    return max(1, len(trial.user_attrs.get(TRIAL_KEY, {}).get("metrics_by_seed", {})))


def learning_rate_of(trial: FrozenTrial) -> Any:
    """The learning rate where it is a choice of a few; None where there is none, or where it is a number of its own."""
    choice = isinstance(trial.distributions.get(LEARNING_RATE), CategoricalDistribution)
    return trial.params[LEARNING_RATE] if choice else None


def completed(study: optuna.Study) -> list[FrozenTrial]:
    """The study's completed trials, in order."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def read_trial(trial: FrozenTrial, targets: tuple[TargetModule, ...]) -> Trial:
    """A completed Optuna trial as a `Trial`.

    Raises:
        SettingsError: The trial was not made by rankscope.
    """
    stored: dict[str, Any] | None = trial.user_attrs.get(TRIAL_KEY)
    if stored is None:
        raise SettingsError(
            f"the study must hold trials of rankscope only, but trial {trial.number} is foreign; use another study name."
        )
    allocation = RankAllocation(
        targets, tuple(trial.user_attrs[RANKS_KEY]), strategy=stored["origin"], budget=stored["budget"]
    )
    return Trial(
        number=trial.number,
        origin=stored["origin"],
        allocation=allocation,
        learning_rate=stored["learning_rate"],
        metric=stored["metric"],
        loss=stored["loss"],
        metrics_by_seed=stored["metrics_by_seed"],
        difference=stored["difference"],
        wall_seconds=stored["wall_seconds"],
        reused=stored["reused"],
        history={int(step): metric for step, metric in stored["history"].items()},
    )


STUDY_KEY = "rankscope"
WORKER_KEY = "worker"


def open_study(
    *,
    name: str,
    storage: str | optuna.storages.BaseStorage | None,
    sampler: optuna.samplers.BaseSampler,
    pruner: optuna.pruners.BasePruner,
    about: Mapping[str, Any],
) -> optuna.Study:
    """Creates the study, or opens it again if it is about the same thing.

    Args:
        name: Of the study.
        storage: As Optuna takes it; for `sqlite:///` the folder is created.
        sampler: Optuna's.
        pruner: Optuna's.
        about: What must be equal for trials to be comparable: task, model, budget, metric, training, ….

    Raises:
        SettingsError: The storage holds a study of this name about something else, or cannot be opened.
    """
    if isinstance(storage, str) and (file := _sqlite_file(storage)):
        file.parent.mkdir(parents=True, exist_ok=True)
    with storage_errors(_unopened(storage)):
        study = optuna.create_study(
            study_name=name, storage=storage, sampler=sampler, pruner=pruner, direction="maximize", load_if_exists=True
        )
    stored = study.user_attrs.get(STUDY_KEY)
    if stored is None:
        if study.get_trials(deepcopy=False):
            raise SettingsError(
                f"study `{name}` must be rankscope's, but holds foreign trials; use another study name or storage."
            )
        study.set_user_attr(STUDY_KEY, dict(about))
    else:
        remedy = "use another study name or storage."
        require_same(stored, about, what=f"study `{name}`", remedy=remedy, holds="its trials are", error=SettingsError)
    return study


def find_storage(url: str) -> optuna.storages.RDBStorage:
    """The database of an earlier search; none is made.

    Raises:
        SettingsError: There is none, or Optuna cannot open it.
    """
    file = _sqlite_file(url)
    if file and not file.exists():
        raise SettingsError(
            f"`storage` must hold an earlier search, but there is no file `{file}`; run `rankscope search` first."
        )
    with storage_errors(_unopened(url)):
        return optuna.storages.RDBStorage(url, skip_table_creation=True)


def load_study(*, name: str, storage: optuna.storages.BaseStorage) -> optuna.Study:
    """The study of an earlier search; none is made.

    Raises:
        SettingsError: There is none of this name, or rankscope did not make it.
    """
    try:
        with storage_errors(_unopened(storage)):
            study = optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        known = ", ".join(optuna.get_all_study_names(storage)) or "none"
        raise SettingsError(
            f"`storage` must hold a search of study `{name}`, but its studies are: {known}; run `rankscope search` first."
        ) from None
    if STUDY_KEY not in study.user_attrs:
        raise SettingsError(f"study `{name}` must be rankscope's, but is foreign; use another study name or storage.")
    return study


def fail_orphans(study: optuna.Study) -> list[int]:
    """Fails running trials whose process on this machine is gone, and returns their numbers.

    A killed process cannot say that its trial is over. Trials of other machines are left alone.
    """
    orphans = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        worker = trial.user_attrs.get(WORKER_KEY, {})
        if worker.get("host") == socket.gethostname() and not _alive(worker["pid"]):
            study.tell(trial.number, state=TrialState.FAIL)
            orphans.append(trial.number)
    return orphans


def signature() -> dict[str, Any]:
    """The trial attribute that says which process runs it, for `fail_orphans`."""
    return {WORKER_KEY: {"host": socket.gethostname(), "pid": os.getpid()}}


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sqlite_file(url: str) -> Path | None:
    """The file of an SQLite database; None for others."""
    return Path(url.removeprefix("sqlite:///").split("?")[0]) if url.startswith("sqlite:///") else None


@contextmanager
def storage_errors(said: str) -> Iterator[None]:
    """Says in one line, after `said`, why Optuna cannot open a storage."""
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (ValueError, RuntimeError, optuna.exceptions.OptunaError, SQLAlchemyError) as error:
        raise SettingsError(f"{said}: {_first_line(error)}") from None


def _unopened(storage: object) -> str:
    return f"`storage` must be a database that Optuna can open, but {_without_password(storage)!r} is not"


def _without_password(storage: object) -> object:
    """A database's URL as it may be shown."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(storage).render_as_string(hide_password=True) if isinstance(storage, str) else storage
    except ArgumentError:
        return storage


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
