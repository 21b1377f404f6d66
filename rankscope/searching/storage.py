"""Trials as records, the Optuna studies that keep them, and resuming a study whose process was killed."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from rankscope.allocation import RankAllocation
from rankscope.errors import SettingsError
from rankscope.files import require_same
from rankscope.targets import TargetModule

STUDY_KEY = "rankscope"  # study attribute: what the search is about
TRIAL_KEY = "rankscope"  # trial attribute: the rest of `Trial.to_row`
RANKS_KEY = "ranks"  # trial attribute: ranks in the order of the targets
STEPS_KEY = "steps"  # trial attribute: optimizer steps taken over all seeds, however the trial ended
WORKER_KEY = "worker"  # trial attribute: the process that runs it
LEARNING_RATE = "learning_rate"  # the parameter beside the tilts
UNIFORM, ONE_SHOT, SAMPLER, POSTERIOR_MEAN = "uniform", "one-shot", "sampler", "posterior-mean"  # a trial's origin


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One evaluated allocation.

    Attributes:
        number: Number of the Optuna trial.
        origin: Where the allocation comes from: `"uniform"`, `"one-shot"`, `"sampler"`, or `"posterior-mean"`.
        allocation: The realised ranks.
        learning_rate: Peak learning rate.
        metric: Validation metric, mean over seeds; higher is better. `loss` likewise.
        metrics_by_seed: Validation metric of each seed.
        difference: Mean paired difference of the metric to uniform at uniform's best learning rate; None for uniform.
        wall_seconds: Training time; 0 where the result of an equal trial was reused.
        reused: Number of the trial whose result was reused.
        history: Validation metric of the first seed by step, the last included.
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
        """Whether the search proposed it; start points it only compares with."""
        return self.origin not in (UNIFORM, ONE_SHOT)

    def to_row(self) -> dict[str, Any]:
        """The trial as plain values: a row of `trials.parquet`, then what only the study keeps."""
        return {
            "trial": self.number,
            "origin": self.origin,
            "learning_rate": self.learning_rate,
            "parameters": self.allocation.parameters,
            "metric": self.metric,
            "loss": self.loss,
            "difference": self.difference,
            "wall_seconds": self.wall_seconds,
            "reused": self.reused,
            "ranks": list(self.allocation.vector),
            "fingerprint": self.allocation.fingerprint,
            "budget": self.allocation.budget,
            "metrics_by_seed": dict(self.metrics_by_seed),
            "history": dict(self.history),
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any], targets: tuple[TargetModule, ...]) -> Trial:
        """The inverse of `to_row`; names in JSON are texts, so steps are read as numbers."""
        allocation = RankAllocation(targets, tuple(row["ranks"]), strategy=row["origin"], budget=row["budget"])
        known = {each.name: row[each.name] for each in fields(cls) if each.name in row}
        history = {int(step): metric for step, metric in row["history"].items()}
        return cls(**{**known, "number": row["trial"], "allocation": allocation, "history": history})


def store_trial(running: optuna.Trial, trial: Trial) -> None:
    """Keep a trial's row in the attributes of Optuna's trial, which has number and ranks already."""
    row = trial.to_row()
    running.set_user_attr(TRIAL_KEY, {key: row[key] for key in row if key not in ("trial", "ranks", "fingerprint")})


def read_trials(study: optuna.Study, targets: tuple[TargetModule, ...], *, skip_foreign: bool = False) -> list[Trial]:
    """The completed trials, in order; SettingsError for one that rankscope did not make, unless those are skipped."""
    trials = []
    for frozen in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        if (stored := frozen.user_attrs.get(TRIAL_KEY)) is not None:
            row = {**stored, "trial": frozen.number, "ranks": frozen.user_attrs[RANKS_KEY]}
            trials.append(Trial.from_row(row, targets))
        elif not skip_foreign:
            raise SettingsError(
                f"the study must hold trials of rankscope only, but trial {frozen.number} is foreign; use another study name."
            )
    return trials


def open_study(name: str, storage: str | optuna.storages.BaseStorage | None, about: Mapping[str, Any]) -> optuna.Study:
    """Create the study, or open it again if what it is about is the same; else, or with a broken storage, SettingsError."""
    if file := _sqlite_file(storage):
        file.parent.mkdir(parents=True, exist_ok=True)
    with _openable(storage):
        study = optuna.create_study(study_name=name, storage=storage, direction="maximize", load_if_exists=True)
    stored, remedy = study.user_attrs.get(STUDY_KEY), "use another study name or storage."
    if stored is None:
        if study.get_trials(deepcopy=False):
            raise SettingsError(f"study `{name}` must be rankscope's, but holds foreign trials; {remedy}")
        study.set_user_attr(STUDY_KEY, dict(about))
    else:
        what = f"study `{name}`"
        require_same(stored, about, what=what, remedy=remedy, holds="its trials are", error=SettingsError)
    return study


def find_storage(url: str) -> optuna.storages.RDBStorage:
    """The database of an earlier search; SettingsError where there is none, or Optuna cannot open it."""
    if (file := _sqlite_file(url)) and not file.exists():
        raise SettingsError(
            f"`storage` must hold an earlier search, but there is no file `{file}`; run `rankscope search` first."
        )
    with _openable(url):
        return optuna.storages.RDBStorage(url, skip_table_creation=True)


def load_study(*, name: str, storage: optuna.storages.BaseStorage) -> optuna.Study:
    """The study of an earlier search; SettingsError where there is none of this name, or rankscope did not make it."""
    try:
        with _openable(storage):
            study = optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        known = ", ".join(optuna.get_all_study_names(storage)) or "none"
        raise SettingsError(
            f"`storage` must hold a search of study `{name}`, but its studies are: {known}; run `rankscope search` first."
        ) from None
    if STUDY_KEY not in study.user_attrs:
        raise SettingsError(f"study `{name}` must be rankscope's, but is foreign; use another study name or storage.")
    return study


def worker() -> dict[str, Any]:
    """The trial attribute that names the process which runs the trial, for `fail_orphans`."""
    return {WORKER_KEY: {"host": socket.gethostname(), "pid": os.getpid()}}


def fail_orphans(study: optuna.Study) -> None:
    """Fail running trials whose process is gone: by its id on this machine, by Optuna's heartbeats where the storage has them."""
    with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
        optuna.storages.fail_stale_trials(study)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        runs_on = trial.user_attrs.get(WORKER_KEY, {})
        if runs_on.get("host") == socket.gethostname() and not _alive(runs_on["pid"]):
            study.tell(trial.number, state=TrialState.FAIL)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)  # another user's process cannot be signalled
    return True


def _sqlite_file(storage: object) -> Path | None:
    """The file of an SQLite database; None for others."""
    if not isinstance(storage, str) or not storage.startswith("sqlite:///"):
        return None
    return Path(storage.removeprefix("sqlite:///").split("?")[0])


@contextmanager
def _openable(storage: object) -> Iterator[None]:
    """Says in one line, without the password, why Optuna cannot open a storage."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError

    try:
        yield
    except (ValueError, RuntimeError, optuna.exceptions.OptunaError, SQLAlchemyError) as error:
        shown = storage
        with suppress(ArgumentError):
            shown = make_url(storage).render_as_string(hide_password=True) if isinstance(storage, str) else storage
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SettingsError(
            f"`storage` must be a database that Optuna can open, but {shown!r} is not: {reason}"
        ) from None
