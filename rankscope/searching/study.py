"""Opening an Optuna study for one search: what it must be about, and picking up after a kill."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from rankscope.exceptions import StudyError

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
    if isinstance(storage, str) and storage.startswith("sqlite:///"):
        Path(storage.removeprefix("sqlite:///").split("?")[0]).parent.mkdir(parents=True, exist_ok=True)
    try:
        study = optuna.create_study(
            study_name=name, storage=storage, sampler=sampler, pruner=pruner, direction="maximize", load_if_exists=True
        )
    except database_errors() as error:
        raise StudyError(
            f"`storage` must be a database that Optuna can open, but {storage!r} is not: {first_line(error)}"
        ) from None
    stored = study.user_attrs.get(STUDY_KEY)
    if stored is None:
        if study.get_trials(deepcopy=False):
            raise StudyError(
                f"study `{name}` must be rankscope's, but holds foreign trials; use another study name or storage."
            )
        study.set_user_attr(STUDY_KEY, dict(about))
    elif differing := [key for key in about if stored.get(key) != about[key]]:
        key = differing[0]
        raise StudyError(
            f"study `{name}` must be about {key} {about[key]!r}, but its trials are about {stored.get(key)!r}; "
            "use another study name or storage."
        )
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


def database_errors() -> tuple[type[Exception], ...]:
    """What Optuna raises where it cannot open a storage."""
    from sqlalchemy.exc import SQLAlchemyError

    return ValueError, RuntimeError, optuna.exceptions.OptunaError, SQLAlchemyError


def first_line(error: Exception) -> str:
    """Of an error's message; its type where it has none."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
