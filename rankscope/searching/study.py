"""Opening an Optuna study for one search: what it must be about, and picking up after a kill."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from rankscope.exceptions import StudyError
from rankscope.fingerprints import require_same

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
        StudyError: The storage holds a study of this name about something else, or cannot be opened.
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
            raise StudyError(
                f"study `{name}` must be rankscope's, but holds foreign trials; use another study name or storage."
            )
        study.set_user_attr(STUDY_KEY, dict(about))
    else:
        remedy = "use another study name or storage."
        require_same(stored, about, what=f"study `{name}`", remedy=remedy, holds="its trials are", error=StudyError)
    return study


def find_storage(url: str) -> optuna.storages.RDBStorage:
    """The database of an earlier search; none is made.

    Raises:
        StudyError: There is none, or Optuna cannot open it.
    """
    file = _sqlite_file(url)
    if file and not file.exists():
        raise StudyError(
            f"`storage` must hold an earlier search, but there is no file `{file}`; run `rankscope search` first."
        )
    with storage_errors(_unopened(url)):
        return optuna.storages.RDBStorage(url, skip_table_creation=True)


def load_study(*, name: str, storage: optuna.storages.BaseStorage) -> optuna.Study:
    """The study of an earlier search; none is made.

    Raises:
        StudyError: There is none of this name, or rankscope did not make it.
    """
    try:
        with storage_errors(_unopened(storage)):
            study = optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        known = ", ".join(optuna.get_all_study_names(storage)) or "none"
        raise StudyError(
            f"`storage` must hold a search of study `{name}`, but its studies are: {known}; run `rankscope search` first."
        ) from None
    if STUDY_KEY not in study.user_attrs:
        raise StudyError(f"study `{name}` must be rankscope's, but is foreign; use another study name or storage.")
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
        raise StudyError(f"{said}: {_first_line(error)}") from None


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
