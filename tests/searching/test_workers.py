"""Real processes on one study: `n_trials` trainings, none twice, and one recommendation, whatever the storage."""

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from rankscope.searching.claims import JOB_KEY, LOST_KEY
from rankscope.searching.storage import TRIAL_KEY, make_storage
from tests.searching import fleet
from tests.searching.servers import Postgres, grpc_proxy

KINDS = ["sqlite", "journal", "grpc", pytest.param("postgresql", marks=pytest.mark.postgres)]


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The storage of a kind, which nobody has opened yet."""
    with ExitStack() as stack:
        if request.param == "postgresql":
            yield request.getfixturevalue("postgres").database(f"s{time.time_ns()}")
        elif request.param == "grpc":
            yield stack.enter_context(grpc_proxy(f"sqlite:///{tmp_path}/proxied.db"))
        else:
            yield f"{request.param}:{'///' if request.param == 'sqlite' else ''}{tmp_path}/kept"


def check_whole(found: fleet.Fleet, storage: str, n_trials: int, n_confirming: int, lost: int = 0) -> None:
    """So many trials and confirming runs, each trained once, and one recommendation."""
    assert found.errors == []
    assert {result["recommendation"] for result in found.results} == {found.results[0]["recommendation"]}
    assert all(result == found.results[0] for result in found.results)
    assert (found.results[0]["trials"], found.results[0]["confirming_runs"]) == (n_trials, n_confirming)
    opened = make_storage(storage)
    search, confirming = (optuna.load_study(study_name=name, storage=opened) for name in ("many", "many-confirming"))
    complete = search.get_trials(states=(TrialState.COMPLETE,))
    rows = [trial.user_attrs[TRIAL_KEY] for trial in complete]
    assert [row["origin"] for row in rows].count("uniform") == 1
    assert [row["origin"] for row in rows].count("one-shot") == 1
    assert not [trial for trial in search.get_trials() if trial.state in (TrialState.RUNNING, TrialState.WAITING)]
    runs = [t.user_attrs[JOB_KEY] for t in confirming.get_trials(states=(TrialState.COMPLETE,))]
    assert len(runs) == len(set(runs)) == n_confirming + 1  # and the recommendation
    trained = sum(row["reused"] is None for row in rows) + n_confirming
    ended = [trial for study in (search, confirming) for trial in study.get_trials() if LOST_KEY in trial.user_attrs]
    assert len(ended) <= lost
    assert trained <= len(found.trained) <= trained + len(ended)
    if not lost:
        assert found.doubles() == []


@pytest.mark.parametrize("url", KINDS, indirect=True)
def test_workers_share_a_study(url: str, tmp_path: Path) -> None:
    """They start at once, on a storage without tables."""
    workers = fleet.start(3, tmp_path, url, n_trials=20, study_name="many")
    found = fleet.finish(workers, tmp_path)
    assert len(found.results) == 3
    assert len({line["pid"] for line in found.trained}) > 1
    check_whole(found, url, 15, 5)


def test_one_that_comes_late_helps_and_one_that_is_too_late_reads(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/kept"
    first = fleet.start(1, tmp_path, url, n_trials=20, study_name="many", seconds=0.05)
    time.sleep(1.0)
    second = fleet.start(1, tmp_path, url, n_trials=20, study_name="many")
    fleet.finish([*first, *second], tmp_path)
    third = fleet.start(1, tmp_path, url, n_trials=20, study_name="many")
    found = fleet.finish(third, tmp_path)
    assert len(found.results) == 3
    assert third[0].pid not in {line["pid"] for line in found.trained}
    check_whole(found, url, 15, 5)


@pytest.mark.slow
@pytest.mark.parametrize("url", ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)], indirect=True)
def test_workers_that_are_killed_lose_nothing(url: str, tmp_path: Path) -> None:
    """At random moments, also while they confirm; one comes for each that is killed."""
    rng, options = random.Random(), {"n_trials": 60, "study_name": "many", "grace_seconds": 2.0, "seconds": 0.05}
    workers, kills = fleet.start(4, tmp_path, url, **options), 0
    while any(worker.is_alive() for worker in workers):
        time.sleep(rng.uniform(0.3, 1.0))
        alive = [worker for worker in workers if worker.is_alive()]
        if alive and kills < 25:
            os.kill(rng.choice(alive).pid, signal.SIGKILL)
            kills += 1
            workers += fleet.start(1, tmp_path, url, **options)
    found = fleet.finish(workers, tmp_path)
    assert kills >= 10
    check_whole(found, url, 45, 15, lost=kills)


@pytest.mark.slow
@pytest.mark.postgres
def test_a_database_that_restarts_three_times(postgres: Postgres, tmp_path: Path) -> None:
    url = postgres.database(f"s{time.time_ns()}")
    options = {"n_trials": 60, "study_name": "many", "grace_seconds": 10.0, "seconds": 0.1}
    workers = fleet.start(4, tmp_path, url, **options)
    for _ in range(3):
        time.sleep(2.0)
        postgres.restart(away=2.0)
    found = fleet.finish(workers, tmp_path)
    assert len(found.results) == 4
    check_whole(found, url, 45, 15, lost=12)
