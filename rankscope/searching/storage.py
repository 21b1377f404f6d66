"""Trials as records, the Optuna studies that keep them, and resuming a study whose process was killed."""

from __future__ import annotations

import os
import re
import socket
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from rankscope.allocation import RankAllocation
from rankscope.errors import SettingsError, checked
from rankscope.files import require_same
from rankscope.settings import TrainingSettings
from rankscope.targets import TargetModule

STUDY_KEY = "rankscope"  # study attribute: what the search is about
TRIAL_KEY = "rankscope"  # trial attribute: `Trial.to_row` without the ranks
RANKS_KEY = "ranks"  # trial attribute: ranks in the order of the targets
STEPS_KEY = "steps"  # trial attribute: optimizer steps taken over all seeds, however the trial ended
WORKER_KEY = "worker"  # trial attribute: the process that runs it
LEARNING_RATE = "learning_rate"  # the parameter beside the tilts
UNIFORM, ONE_SHOT, SAMPLER, POSTERIOR_MEAN = "uniform", "one-shot", "sampler", "posterior-mean"  # a trial's origin


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One evaluated allocation."""

    number: int  # of the Optuna trial
    origin: str  # "uniform", "one-shot", "sampler" or "posterior-mean"
    allocation: RankAllocation
    learning_rate: float
    metric: float  # on the validation split, mean over seeds; higher is better
    loss: float
    metrics_by_seed: Mapping[str, float]
    difference: float | None = None  # of the metric to uniform's at its best learning rate; None for uniform
    wall_seconds: float = 0.0  # of training; 0 where the result of an equal trial was reused
    reused: int | None = None  # number of that trial
    history: Mapping[int, float] = field(default_factory=dict)  # metric of the first seed by step, the last included

    @property
    def name(self) -> str:
        """What tables call it: its origin, or its number."""
        return f"trial {self.number}" if self.origin == SAMPLER else self.origin

    @property
    def proposed(self) -> bool:
        """Whether the search proposed it; start points are only compared with."""
        return self.origin not in (UNIFORM, ONE_SHOT)

    def to_row(self) -> dict[str, Any]:
        """The trial as plain values: what `trials.parquet` shows, and what the study keeps."""
        row = {each.name: getattr(self, each.name) for each in fields(self)}
        number, allocation = row.pop("number"), row.pop("allocation")
        ranks = {"ranks": list(allocation.vector), "fingerprint": allocation.fingerprint}
        size = {"parameters": allocation.parameters, "budget": allocation.budget}
        towers = {"tower_bounds": dict(allocation.tower_bounds)} if allocation.tower_bounds else {}
        return {"trial": number, **row, **ranks, **size, **towers}

    @classmethod
    def from_row(cls, row: Mapping[str, Any], targets: tuple[TargetModule, ...]) -> Trial:
        """The inverse of `to_row`; names in JSON are texts, so steps are read as numbers."""
        limits: Any = {"budget": row["budget"], "tower_bounds": row.get("tower_bounds", {})}
        allocation = RankAllocation(targets, tuple(row["ranks"]), strategy=row["origin"], **limits)
        history = {int(step): metric for step, metric in row["history"].items()}
        known = {each.name: row[each.name] for each in fields(cls) if each.name in row}
        return cls(**{**known, "number": row["trial"], "allocation": allocation, "history": history})


def read_trials(study: optuna.Study, targets: tuple[TargetModule, ...], *, skip_foreign: bool = False) -> list[Trial]:
    """The completed trials, in order; SettingsError for one that rankscope did not make, unless those are skipped."""
    trials = []
    for frozen in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        if (stored := frozen.user_attrs.get(TRIAL_KEY)) is not None:
            trials.append(Trial.from_row({**frozen.user_attrs, **stored, "trial": frozen.number}, targets))
        elif not skip_foreign:
            what = "the study must hold trials of rankscope only"
            raise SettingsError(f"{what}, but trial {frozen.number} is foreign; use another study name.")
    return trials


@checked
def open_study(name: str, storage: str | optuna.storages.BaseStorage | None, about: Mapping[str, Any]) -> optuna.Study:
    """Create the study, or open it again if what it is about is the same; else, or with a broken storage, SettingsError."""
    if file := _sqlite_file(storage):
        file.parent.mkdir(parents=True, exist_ok=True)
    with _openable(storage):
        study = optuna.create_study(study_name=name, storage=storage, direction="maximize", load_if_exists=True)
    what, remedy = f"study `{name}`", "use another study name or storage."
    if kept := study.user_attrs.get(STUDY_KEY):
        if "training" in kept:
            kept = {**kept, "training": TrainingSettings.filled(kept["training"])}
        require_same(kept, about, what=what, remedy=remedy, holds="its trials are", error=SettingsError)
    elif study.get_trials(deepcopy=False):
        raise SettingsError(f"{what} must be rankscope's, but holds foreign trials; {remedy}")
    else:
        study.set_user_attr(STUDY_KEY, dict(about))
    return study


def load_study(name: str, url: str) -> optuna.Study:
    """The study of an earlier search; SettingsError where there is none of this name, or rankscope did not make it."""
    if (file := _sqlite_file(url)) and not file.exists():
        what = "`storage` must hold an earlier search"
        raise SettingsError(f"{what}, but there is no file `{file}`; run `rankscope search` first.")
    with _openable(url):
        storage = optuna.storages.RDBStorage(url, skip_table_creation=True)
        known = optuna.get_all_study_names(storage)
    if name not in known:
        what, held = f"`storage` must hold a search of study `{name}`", ", ".join(known) or "none"
        raise SettingsError(f"{what}, but its studies are: {held}; run `rankscope search` first.")
    study = optuna.load_study(study_name=name, storage=storage)
    if STUDY_KEY not in study.user_attrs:
        raise SettingsError(f"study `{name}` must be rankscope's, but is foreign; use another study name or storage.")
    return study


def this_worker() -> dict[str, Any]:
    """What names this process, for `fail_orphans`."""
    return {"host": socket.gethostname(), "pid": os.getpid()}


def fail_orphans(study: optuna.Study) -> None:
    """Fail running trials whose process is gone: by its id on this machine, or by heartbeats where the storage has them."""
    with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
        optuna.storages.fail_stale_trials(study)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        runs_on = trial.user_attrs.get(WORKER_KEY, {})
        if runs_on.get("host") == socket.gethostname():
            try:
                os.kill(runs_on["pid"], 0)
            except ProcessLookupError:
                study.tell(trial.number, state=TrialState.FAIL)
            except PermissionError:
                pass  # it lives, as another user's


def _sqlite_file(storage: object) -> Path | None:
    """The file of an SQLite database; None for others."""
    if isinstance(storage, str) and storage.startswith("sqlite:///"):
        return Path(storage.removeprefix("sqlite:///").split("?")[0])
    return None


@contextmanager
def _openable(storage: object) -> Iterator[None]:
    """Says in one line, without the password, why Optuna cannot open a storage."""
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (ValueError, RuntimeError, optuna.exceptions.OptunaError, SQLAlchemyError) as error:
        shown = re.sub(r"(//[^/:@]*:).*@", r"\1***@", repr(storage))
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        message = f"`storage` must be a database that Optuna can open, but {shown} is not: {reason}"
        raise SettingsError(message) from None
