"""Trials as records, the storages that keep them, and the Optuna studies in those."""

from __future__ import annotations

import logging
import math
import random
import re
import sqlite3
import time
import uuid
import warnings
from abc import update_abstractmethods
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, fields, replace
from functools import partialmethod
from json import JSONDecodeError
from pathlib import Path
from statistics import fmean
from threading import Lock
from typing import Any

import optuna
from optuna.storages import BaseStorage, InMemoryStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from rankscope.allocation import RankAllocation
from rankscope.errors import SettingsError, checked, one_line, shown_url
from rankscope.files import require_same
from rankscope.settings import TrainingSettings
from rankscope.targets import TargetModule

logger = logging.getLogger(__name__)

STUDY_KEY = "rankscope"  # study attribute: what the search is about
ID_KEY = "search"  # study attribute: what names this search, apart from one of the same name that was deleted
TRIAL_KEY = "rankscope"  # trial attribute: `Trial.to_row` without the ranks
RANKS_KEY = "ranks"  # trial attribute: ranks in the order of the targets
STEPS_KEY = "steps"  # trial attribute: optimizer steps taken over all seeds, however the trial ended
FAILURE_KEY = "failure"  # trial attribute: why its training failed; of a failed trial without it nothing counts
LEARNING_RATE = "learning_rate"  # the parameter beside the tilts
UNIFORM, ONE_SHOT, SAMPLER, POSTERIOR_MEAN = "uniform", "one-shot", "sampler", "posterior-mean"  # a trial's origin
LAYOUT = 2  # of what a study keeps; raise it where an older study cannot be resumed

PATIENCE = 300.0  # seconds for which a call is tried again while a server does not answer
OPENING = 10.0  # seconds for which opening is: several processes may create the tables at the same moment
DRIVERS = {  # of SQLAlchemy, by the schemes that leave the choice open: driver, package and extra
    "postgresql": ("postgresql+psycopg", "psycopg", "postgresql"),
    "postgres": ("postgresql+psycopg", "psycopg", "postgresql"),
    "mysql": ("mysql+pymysql", "pymysql", "mysql"),
}


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
    """The completed trials, in order, each with its difference to uniform at its best rate.

    SettingsError for one that rankscope did not make, unless those are skipped.
    """
    frozen = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    ours = [trial for trial in frozen if is_ours(trial, skip_foreign=skip_foreign)]
    return with_differences([as_record(trial, targets) for trial in ours])


def is_ours(trial: FrozenTrial, *, skip_foreign: bool = False) -> bool:
    """Whether rankscope made a completed trial; SettingsError where it did not, unless such trials are skipped."""
    ours = TRIAL_KEY in trial.user_attrs
    if not (ours or skip_foreign):
        what = "the study must hold trials of rankscope only"
        raise SettingsError(f"{what}, but trial {trial.number} is foreign; use another study name.")
    return ours


def as_record(trial: FrozenTrial, targets: tuple[TargetModule, ...]) -> Trial:
    """A completed trial of rankscope as a record."""
    return Trial.from_row({**trial.user_attrs, **trial.user_attrs[TRIAL_KEY], "trial": trial.number}, targets)


def with_differences(trials: Sequence[Trial]) -> list[Trial]:
    """The trials with their paired differences to uniform at its best learning rate, as far as it is known."""
    uniform = best_uniform(trials)
    return [compared(trial, uniform) for trial in trials]


def best_uniform(trials: Iterable[Trial]) -> Trial | None:
    """Uniform's trial at its best learning rate; None where it has completed none."""
    return max((trial for trial in trials if trial.origin == UNIFORM), key=lambda trial: trial.metric, default=None)


def compared(trial: Trial, uniform: Trial | None) -> Trial:
    """The trial with its paired difference to uniform's."""
    if uniform is None or trial.origin == UNIFORM:
        return replace(trial, difference=None)
    mine, theirs = trial.metrics_by_seed, uniform.metrics_by_seed
    return replace(trial, difference=fmean(mine[seed] - theirs[seed] for seed in mine))


# --- studies ------------------------------------------------------------------------------------------------------


@checked
def open_study(name: str, storage: str | BaseStorage | None, about: Mapping[str, Any]) -> optuna.Study:
    """Create the study, or open it again if what it is about is the same; else, or with a broken storage, SettingsError."""
    opened = make_storage(storage)
    study: optuna.Study = _opening(
        lambda: optuna.create_study(study_name=name, storage=opened, direction="maximize", load_if_exists=True), storage
    )
    what, remedy = f"study `{name}`", "use another study name or storage."
    if kept := study.user_attrs.get(STUDY_KEY):
        if kept.get("layout") != LAYOUT:
            raise SettingsError(
                f"{what} must be kept as this rankscope keeps searches, but another version made it; "
                f"finish it with that version, or {remedy}"
            )
        if "training" in kept:
            kept = {**kept, "training": TrainingSettings.filled(kept["training"])}
        wanted = {**about, "layout": LAYOUT}
        require_same(kept, wanted, what=what, remedy=remedy, holds="its trials are", error=SettingsError)
    elif study.get_trials(deepcopy=False):
        raise SettingsError(f"{what} must be rankscope's, but holds foreign trials; {remedy}")
    else:
        study.set_user_attr(ID_KEY, uuid.uuid4().hex)
        study.set_user_attr(STUDY_KEY, {**about, "layout": LAYOUT})
    return study


def load_study(name: str, storage: str | BaseStorage) -> optuna.Study:
    """The study of an earlier search; SettingsError where there is none of this name, or rankscope did not make it."""
    if (file := _sqlite_file(storage)) and not file.exists():
        what = "`storage` must hold an earlier search"
        raise SettingsError(f"{what}, but there is no file `{file}`; run `rankscope search` first.")
    opened = make_storage(storage, create=False)
    known = _opening(lambda: optuna.get_all_study_names(opened), storage)
    if name not in known:
        what, held = f"`storage` must hold a search of study `{name}`", ", ".join(known) or "none"
        raise SettingsError(f"{what}, but its studies are: {held}; run `rankscope search` first.")
    study = optuna.load_study(study_name=name, storage=opened)
    if STUDY_KEY not in study.user_attrs:
        raise SettingsError(f"study `{name}` must be rankscope's, but is foreign; use another study name or storage.")
    return study


# --- storages -----------------------------------------------------------------------------------------------------


@checked
def make_storage(storage: str | BaseStorage | None, *, create: bool = True) -> BaseStorage:
    """The storage of a URL; Optuna's own objects are taken as they are.

    While a server does not answer, calls to the storage are tried again for five minutes.

    Args:
        storage: `sqlite:///FILE`, `postgresql://…`, `mysql://…`, `journal:FILE`, `grpc://HOST:PORT`, or what else SQLAlchemy
            takes; None: memory.
        create: Whether to create a database's tables where there are none.

    Raises:
        SettingsError: The storage cannot be opened, is damaged, or its driver is not installed.

    >>> make_storage("grpc:no-port")
    Traceback (most recent call last):
    rankscope.errors.SettingsError: `storage` must be grpc://HOST:PORT, but got 'grpc:no-port'.
    """
    if not isinstance(storage, str):
        opened = optuna.storages.get_storage(storage)
        return opened if isinstance(opened, InMemoryStorage | PatientStorage) else patient(opened)
    url = storage.strip()
    if re.fullmatch(r"sqlite(\+\w+)?://(/(:memory:)?)?", url):
        return InMemoryStorage()  # SQLite's own memory is another in each thread
    if url.startswith("journal:"):
        return patient(_opening(lambda: _journal(url), url))
    if url.startswith("grpc:"):
        return patient(_opening(lambda: _grpc(url), url))
    if file := _sqlite_file(url):
        file.parent.mkdir(parents=True, exist_ok=True)
        _check_file(file)
    return patient(_opening(lambda: _database(url, create=create), url, create=create))


def _database(url: str, *, create: bool) -> BaseStorage:
    scheme, colon, rest = url.partition(":")
    driver, _, _ = DRIVERS.get(scheme, (scheme, "", ""))
    options: dict[str, Any] = {"pool_pre_ping": True, "pool_logging_name": "rankscope"}
    # A connection that breaks gets a line of ours, and no page of the pool's.
    logging.getLogger("sqlalchemy.pool.impl.QueuePool.rankscope").setLevel(logging.CRITICAL)
    if scheme.startswith("sqlite"):
        options["connect_args"] = {"timeout": 60}  # seconds to wait for other processes' writes
    elif driver == "postgresql+psycopg":  # a host that has vanished closes no connection
        options["connect_args"] = {"connect_timeout": 10, "keepalives_idle": 30, "keepalives_count": 3}
    elif driver == "mysql+pymysql":
        options["connect_args"] = {"connect_timeout": 10, "read_timeout": 60, "write_timeout": 60}
    filled = f"{driver}{colon}{rest}".replace("{", "{{").replace("}", "}}")  # Optuna formats it
    database = RDBStorage(filled, engine_kwargs=options, skip_table_creation=not create)
    if scheme.startswith("sqlite") and create:
        _serialise(database.engine)
    return optuna.storages.get_storage(database)


def _serialise(engine: Any) -> None:
    """Take SQLite's write lock at the start of each transaction: else two may both read, and then both write what follows."""
    from sqlalchemy import event

    def begin_by_hand(connection: Any, _record: Any) -> None:
        connection.isolation_level = None

    engine.dispose()  # of connections that were opened without it
    event.listen(engine, "connect", begin_by_hand)
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))


def _journal(url: str) -> BaseStorage:
    path = Path(url.removeprefix("journal:").removeprefix("//")).absolute()  # its lock is a link to it
    path.parent.mkdir(parents=True, exist_ok=True)
    return optuna.storages.JournalStorage(JournalFileBackend(str(path)))


def _grpc(url: str) -> BaseStorage:
    found = re.fullmatch(r"grpc://([^/:]+):(\d+)/?", url)
    if not found:
        raise SettingsError(f"`storage` must be grpc://HOST:PORT, but got {shown_url(url)!r}.")
    with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
        proxy = optuna.storages.GrpcStorageProxy(host=found[1], port=int(found[2]))
    proxy.wait_server_ready(timeout=OPENING)
    return proxy


def _opening(call: Callable[[], Any], storage: object, *, create: bool = True) -> Any:
    """What a call gives, tried again while others create tables or a server starts; else a SettingsError that says why not."""
    from sqlalchemy.exc import SQLAlchemyError

    url, deadline = str(storage).strip(), time.monotonic() + OPENING
    while True:
        try:
            return call()
        except SettingsError:
            raise
        except (ImportError, AttributeError) as error:
            package = DRIVERS.get(url.partition(":")[0], ("", "", ""))[2] or ("grpc" if url.startswith("grpc:") else "")
            if not package:
                raise SettingsError(_unopened(storage, error)) from None
            raise SettingsError(
                f"`storage` {shown_url(url)} needs a driver, but it is not installed; "
                f"run pip install 'rankscope[{package}]'."
            ) from None
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError, AssertionError) as error:
            if not (create and (_raced(error) or _may_pass(error))) or time.monotonic() > deadline:
                raise SettingsError(_unopened(storage, error)) from None
            time.sleep(random.uniform(0.05, 0.3))
        except (ValueError, RuntimeError, KeyError, OSError, optuna.exceptions.OptunaError) as error:
            raise SettingsError(_unopened(storage, error)) from None


def _raced(error: BaseException) -> bool:
    """Whether opening may have failed because another process was creating the tables."""
    there = r"already exists|[Dd]uplicate|UNIQUE constraint|is locked|deadlock"
    not_yet = r"relation .* does not exist|no such table|doesn't exist"
    text = f"{error} {error.__cause__ or ''}"
    return isinstance(error, AssertionError) or re.search(f"{there}|{not_yet}", text) is not None


def _unopened(storage: object, error: BaseException) -> str:
    """Why a storage cannot be opened, without what its URL keeps secret, of which others' errors quote parts."""
    texts = (str(each).strip() for each in (error.__cause__, error) if each is not None)
    reason = next(filter(None, texts), type(error).__name__).splitlines()[0]
    parts = re.compile(r"[:/?#@&=\s]+")
    for part in sorted(set(parts.split(str(storage))) - set(parts.split(shown_url(storage))), key=len, reverse=True):
        reason = reason.replace(part, "***") if len(part) > 2 else reason
    shown = repr(shown_url(storage)) if isinstance(storage, str) else repr(storage)
    return f"`storage` must be a database that Optuna can open, but {shown} is not: {reason}"


def _sqlite_file(storage: object) -> Path | None:
    """The file of an SQLite database; None for others."""
    found = re.fullmatch(r"sqlite(?:\+\w+)?:///([^?]+)(?:\?.*)?", storage.strip()) if isinstance(storage, str) else None
    return Path(found[1]) if found and found[1] != ":memory:" and not found[1].startswith("file:") else None


def _check_file(file: Path) -> None:
    """Raise a SettingsError where an SQLite file is damaged; one that cannot be opened is told by who opens it."""
    if not file.exists():
        return
    try:
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, timeout=60)) as database:
            problem = database.execute("PRAGMA quick_check(1)").fetchone()[0]
    except sqlite3.OperationalError:
        return
    except sqlite3.DatabaseError as error:
        problem = str(error)
    if problem != "ok":
        what = f"`storage` must be a database that Optuna can open, but 'sqlite:///{file}' is not: it is damaged"
        raise SettingsError(f"{what} ({one_line(Exception(problem))}); restore a copy, or use another storage.")


class PatientStorage(BaseStorage):
    """A storage whose calls are tried again while its server does not answer, with back-off, for a bounded time.

    SettingsError where it does not answer in that time, or cannot write.
    """

    def __init__(self, inner: BaseStorage, patience: float = PATIENCE) -> None:
        self._inner, self._patience = inner, patience
        self._away, self._over, self._lock = False, False, Lock()

    def _patiently(self, method: str, *args: Any, **kwargs: Any) -> Any:
        deadline, pause = math.inf, 0.1
        while True:
            try:
                result = getattr(self._inner, method)(*args, **kwargs)
            except Exception as error:
                reason = _reason(error)
                if reason is None:
                    raise
                # Once is enough: what a search does to end would wait as long again.
                deadline = min(deadline, time.monotonic() + (0.0 if self._over else self._patience))
                if not _may_pass(error):
                    raise SettingsError(
                        f"`storage` must keep what trials report, but does not ({reason}); mend it, and run the command "
                        "again: finished trials are kept."
                    ) from None
                if time.monotonic() >= deadline:
                    self._over = True
                    raise SettingsError(
                        f"`storage` must answer, but has not for {self._patience:g} s ({reason}); start its server, and run "
                        "the command again: finished trials are kept."
                    ) from None
                self._note(away=True, reason=reason)
                time.sleep(random.uniform(0.5, 1.0) * pause)
                pause = min(2.0 * pause, 5.0)
            else:
                self._over = False
                self._note(away=False)
                return result

    def _note(self, *, away: bool, reason: str = "") -> None:
        """Log once that the storage does not answer, whichever thread notices, and once that it does again."""
        if away == self._away:
            return
        with self._lock:
            changed, self._away = away != self._away, away
        if changed and away:
            logger.warning("the storage does not answer (%s): trying again for %g s", reason, self._patience)
        elif changed:
            logger.warning("the storage answers again")


def patient(storage: BaseStorage, patience: float = PATIENCE) -> PatientStorage:
    """The storage, with calls that are tried again."""
    return PatientStorage(storage, patience)  # type: ignore[abstract]  # its methods are set below


for _name in [name for name, each in vars(BaseStorage).items() if callable(each) and not name.startswith("_")]:
    setattr(PatientStorage, _name, partialmethod(PatientStorage._patiently, _name))
update_abstractmethods(PatientStorage)  # type: ignore[type-abstract]


def _reason(error: Exception) -> str | None:
    """Why a storage failed, in one line; None where the error is none of a storage that fails."""
    from sqlalchemy.exc import SQLAlchemyError

    if isinstance(error, JSONDecodeError):
        return f"a value in it is damaged: {one_line(error)}"
    internal = isinstance(error, optuna.exceptions.StorageInternalError | SQLAlchemyError)
    lock = isinstance(error, RuntimeError) and str(error) == "Error: did not possess lock"  # a journal's
    if not (internal or lock or _status(error)):
        return None
    text = str(error.__cause__ or error).strip()
    return one_line(Exception(text.splitlines()[0] if text else type(error).__name__), most=160)


def _may_pass(error: Exception) -> bool:
    """Whether a storage may do again what failed: its server restarts, or others hold its locks."""
    from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, PendingRollbackError
    from sqlalchemy.exc import TimeoutError as NoConnection

    if status := _status(error):
        return status in ("UNAVAILABLE", "UNKNOWN", "CANCELLED", "DEADLINE_EXCEEDED", "INTERNAL")
    cause = error if isinstance(error, DBAPIError | NoConnection) else error.__cause__
    if isinstance(cause, DBAPIError) and cause.connection_invalidated:
        return True
    final = (
        r"readonly|read-only|disk is full|malformed|not a database|disk I/O|unable to open|no such table|No space left"
    )
    if isinstance(cause, OperationalError | InterfaceError):
        return re.search(final, str(cause.orig)) is None
    if isinstance(cause, NoConnection | PendingRollbackError):  # the latter: in a transaction whose connection broke
        return True
    return not isinstance(error, JSONDecodeError | optuna.exceptions.OptunaError)


def _status(error: Exception) -> str:
    """The status of a failed gRPC call; empty for other errors."""
    code = getattr(error, "code", None)
    return str(getattr(code(), "name", "")) if callable(code) and hasattr(error, "details") else ""
