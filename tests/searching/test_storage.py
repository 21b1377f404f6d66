"""Storages by URL: what each opens, missing drivers, damaged files, passwords, and servers that go away."""

import importlib.util
import re
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.exceptions import StorageInternalError
from optuna.storages import InMemoryStorage
from sqlalchemy.exc import OperationalError, PendingRollbackError

from rankscope.errors import RankscopeError, SettingsError, shown_url, without_secrets
from rankscope.searching import storage as module
from rankscope.searching.storage import load_study, make_storage, open_study, patient

optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.mark.parametrize(
    "url", ["sqlite:///{}/a/b.db", "sqlite+pysqlite:///{}/b.db", "journal:{}/a/b.log", " journal:{}/b.log"]
)
def test_what_is_kept_is_read_again(url: str, tmp_path: Path) -> None:
    url = url.format(tmp_path)
    open_study("mine", url, {"budget": 5}).set_user_attr("x", 1)
    assert open_study("mine", url, {"budget": 5}).user_attrs["x"] == 1
    assert load_study("mine", url).user_attrs["x"] == 1
    with pytest.raises(SettingsError, match=r"^study `mine` must be about budget 6, but its trials are about 5; "):
        open_study("mine", url, {"budget": 6})


def test_a_study_of_another_version_is_refused(tmp_path: Path) -> None:
    study = open_study("mine", f"sqlite:///{tmp_path}/a.db", {"budget": 5})
    study.set_user_attr("rankscope", {"budget": 5})
    message = (
        "study `mine` must be kept as this rankscope keeps searches, but another version made it; finish it with that "
        "version, or use another study name or storage."
    )
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
        open_study("mine", f"sqlite:///{tmp_path}/a.db", {"budget": 5})


# --- passwords -------------------------------------------------------------------------------------------------------

SECRET = "s3cr3t"
URLS = [
    f"postgresql://me:{SECRET}@host:5432/db", f" postgresql://me:{SECRET}@host/db", f"postgresql//me:{SECRET}@host/db",
    f"postgresql:/me:{SECRET}@host/db", f"me:{SECRET}@host", f"postgresql://me:{SECRET}", f"mysql://me:a/{SECRET}@host/db",
    f"postgresql://me:a@{SECRET}@host/db", f"postgresql://me:a?{SECRET}@host/db", f"postgresql://me:a#{SECRET}@host/db",
    f"postgresql://host/db?user=me&password={SECRET}", f"postgresql://host/db?password=a&{SECRET}",
    f"postgresql://host/db?sslpassword={SECRET}", f"grpc://me:{SECRET}@host:1", f"nosuch://me:{SECRET}@host/db",
    f"postgresql://me:{{{SECRET}}}@host/db", f"postgresql://me:{SECRET}@host:port/db", f"redis://:{SECRET}@host",
]  # fmt: skip


@pytest.mark.parametrize("url", URLS)
def test_no_password_is_in_a_message(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OPENING", 0.1)
    assert SECRET not in shown_url(url)
    with pytest.raises(SettingsError) as error:
        open_study("mine", url, {})
    assert SECRET not in str(error.value)
    assert "\n" not in str(error.value)


@given(
    st.text(min_size=4),
    st.sampled_from(["postgresql://me:{}@host/db", "mysql//me:{}@h", "postgresql://h/db?password={}"]),
)
def test_no_password_is_shown(password: str, url: str) -> None:
    assert "QQ" not in shown_url(url.replace("{}", f"QQ{password}QQ"))


def test_errors_hide_the_passwords_of_urls_in_them() -> None:
    message = f"cannot open postgresql://me:{SECRET}@host/db?password={SECRET} or `mysql://me:{SECRET}@host`; see a@b"
    shown = "cannot open postgresql://me:***@host/db?password=*** or `mysql://me:***@host`; see a@b"
    assert str(RankscopeError(message)) == without_secrets(message) == shown


# --- drivers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "package", "extra"),
    [
        ("postgresql://me:pw@host/db", "psycopg", "postgresql"),
        ("postgres://me:pw@host/db", "psycopg", "postgresql"),
        ("mysql://me:pw@host/db", "pymysql", "mysql"),
        ("grpc://host:13000", "grpc", "grpc"),
    ],
)
def test_a_missing_driver_is_named_with_how_to_install_it(
    url: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec(package):
        for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
            monkeypatch.setitem(sys.modules, name, None)
    shown = url.replace(":pw@", ":***@")
    message = f"`storage` {shown} needs a driver, but it is not installed; run pip install 'rankscope[{extra}]'."
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
        make_storage(url)


@pytest.mark.parametrize("url", ["grpc:host", "grpc://host", "grpc://host:1/a", "grpc:///host:1"])
def test_grpc_needs_host_and_port(url: str) -> None:
    with pytest.raises(SettingsError, match=f"^`storage` must be grpc://HOST:PORT, but got '{url}'.$"):
        make_storage(url)


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OPENING", 0.2)
    with pytest.raises(SettingsError, match=r"can open, but 'grpc://127\.0\.0\.1:1' is not: GRPC connection timeout$"):
        make_storage("grpc://127.0.0.1:1")
    with pytest.raises(SettingsError, match=r"can open, but 'postgresql://127\.0\.0\.1:1/a' is not: .*refused"):
        make_storage("postgresql://127.0.0.1:1/a")


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_damaged_database_is_told(tmp_path: Path) -> None:
    file = tmp_path / "a.db"
    study = open_study("mine", f"sqlite:///{file}", {})
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=40)
    study._storage.remove_session()
    data = bytearray(file.read_bytes())
    with closing(sqlite3.connect(file)) as database:
        page = database.execute("SELECT rootpage FROM sqlite_master WHERE name = 'trials'").fetchone()[0]
        size = database.execute("PRAGMA page_size").fetchone()[0]
    data[(page - 1) * size : (page - 1) * size + 8] = b"\xff" * 8
    file.write_bytes(bytes(data))
    with pytest.raises(
        SettingsError, match=r"can open, but 'sqlite:///.*a\.db' is not: it is damaged \(.*\); restore a copy"
    ):
        open_study("mine", f"sqlite:///{file}", {})


def test_sqlite_lets_one_transaction_write_at_a_time(tmp_path: Path) -> None:
    """Two workers must not both pop a queued trial, as they could with SQLite's own transactions."""
    url = f"sqlite:///{tmp_path}/a.db"
    one, two = open_study("mine", url, {}), open_study("mine", url, {})
    one.enqueue_trial({})
    (waiting,) = two.get_trials()
    engine = one._storage._inner._backend.engine  # type: ignore[attr-defined]
    with engine.begin() as held:
        held.exec_driver_sql("SELECT * FROM trials")
        other = sqlite3.connect(tmp_path / "a.db", timeout=0.1)
        with closing(other), pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("UPDATE trials SET state = 'RUNNING'")
    running = optuna.trial.TrialState.RUNNING
    popped = [study._storage.set_trial_state_values(waiting._trial_id, state=running) for study in (one, two)]
    assert popped == [True, False]


# --- servers that go away --------------------------------------------------------------------------------------------


class Away(InMemoryStorage):
    """A storage whose server is away for some calls."""

    def __init__(self, error: Exception, calls: int) -> None:
        super().__init__()
        self.error, self.calls = error, calls

    def get_all_studies(self) -> list[Any]:
        self.calls -= 1
        if self.calls >= 0:
            raise self.error
        return super().get_all_studies()


def internal(cause: Exception) -> Exception:
    error = StorageInternalError("An exception is raised during the commit.")
    error.__cause__ = cause
    return error


def gone(reason: str) -> Exception:
    return internal(OperationalError("SELECT 1", None, Exception(reason)))


@pytest.mark.parametrize(
    "error",
    [
        gone("server closed the connection unexpectedly"),
        internal(PendingRollbackError("Can't reconnect until invalid transaction is rolled back.")),
    ],
)
def test_calls_are_tried_again_and_that_is_said_once(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    storage = patient(Away(error, 3), 60.0)
    assert storage.get_all_studies() == []
    assert storage.get_all_studies() == []
    assert [re.sub(r"\(.*\)", "(…)", message) for message in caplog.messages] == [
        "the storage does not answer (…): trying again for 60 s", "the storage answers again",
    ]  # fmt: skip


def test_a_server_that_stays_away_is_told_in_time() -> None:
    storage = patient(Away(gone("connection refused"), 10**6), 0.3)
    with pytest.raises(
        SettingsError, match=r"^`storage` must answer, but has not for 0\.3 s \(.*connection refused.*\); start"
    ):
        storage.get_all_studies()


@pytest.mark.parametrize("reason", ["database or disk is full", "attempt to write a readonly database"])
def test_what_does_not_pass_is_told_at_once(reason: str) -> None:
    storage = patient(Away(gone(reason), 10**6), 600.0)
    with pytest.raises(
        SettingsError, match=rf"^`storage` must keep what trials report, but does not \(.*{reason}.*\); mend it"
    ):
        storage.get_all_studies()


def test_errors_of_optuna_are_passed_on() -> None:
    storage = patient(InMemoryStorage())
    with pytest.raises(KeyError):
        storage.get_study_id_from_name("nosuch")
    assert patient(Away(KeyError("x"), 1))._inner.calls == 1


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///", "sqlite:///:memory:"])
def test_sqlite_in_memory_is_memory(url: str) -> None:
    assert isinstance(make_storage(url), InMemoryStorage)


def test_a_worker_that_starts_while_its_server_restarts_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, database = [], module._database

    def starting(url: str, *, create: bool) -> Any:
        made.append(url)
        if len(made) < 3:
            raise OperationalError("connect", None, Exception("the database system is starting up"))
        return database(f"sqlite:///{tmp_path}/a.db", create=create)

    monkeypatch.setattr(module, "_database", starting)
    assert make_storage("postgresql://host/db").get_all_studies() == []
    assert len(made) == 3


@pytest.mark.parametrize(
    "server", [pytest.param(each, marks=getattr(pytest.mark, each)) for each in ("postgres", "mysql")]
)
def test_a_database_that_restarts(
    server: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    """A connection that breaks in use is a line at most; SQLAlchemy's pool would log a page."""
    database = request.getfixturevalue(server)
    study = open_study("mine", database.database("restarts"), {})
    connection = study._storage._inner._backend.engine.raw_connection()  # type: ignore[attr-defined]
    connection.cursor().execute("SELECT 1")
    database.restart()
    connection.close()
    study.set_user_attr("x", 1)
    assert study.user_attrs["x"] == 1
    assert not [message for message in caplog.messages if not message.startswith("the storage")]
