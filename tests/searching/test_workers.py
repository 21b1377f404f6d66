"""Real processes on one study: `n_trials` trainings, none twice, and one recommendation, whatever the storage."""

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
from optuna.trial import TrialState

import rankscope as rs
from rankscope.searching.claims import JOB_KEY, LOST_KEY
from rankscope.searching.storage import TRIAL_KEY, make_storage
from tests.searching import fleet
from tests.searching.servers import grpc_proxy

SERVERS = {"postgresql": "postgres", "mysql": "mysql"}  # fixtures of database servers, which are their markers, too
ON_SERVERS = [pytest.param(kind, marks=getattr(pytest.mark, name)) for kind, name in SERVERS.items()]


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The storage of a kind, which nobody has opened yet."""
    with ExitStack() as stack:
        if request.param in SERVERS:
            yield request.getfixturevalue(SERVERS[request.param]).database(f"s{time.time_ns()}")
        elif request.param == "grpc":
            yield stack.enter_context(grpc_proxy(f"sqlite:///{tmp_path}/proxied.db"))
        else:
            yield f"{request.param}:{'///' if request.param == 'sqlite' else ''}{tmp_path}/kept"


def check_whole(found: fleet.Fleet, storage: str, n_trials: int, n_confirming: int, lost: int = 0) -> None:
    """So many trials and confirming runs, each trained once, and one recommendation."""
    assert not found.errors, "\n".join(found.errors)
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


@pytest.mark.parametrize("url", ["sqlite", "journal", "grpc", *ON_SERVERS], indirect=True)
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
@pytest.mark.parametrize("url", ["sqlite", *ON_SERVERS], indirect=True)
def test_workers_that_are_killed_lose_nothing(url: str, tmp_path: Path) -> None:
    """At random moments of searching and confirming, and while they write outputs; one comes for each, on two host names."""
    rng, n_trials, kills, at_work = random.Random(), 120, 50, 35
    options: Any = {"n_trials": n_trials, "study_name": "many", "grace_seconds": 4.0, "outputs": tmp_path / "out"}
    workers, killed = fleet.start(4, tmp_path, url, **options), {"at work": 0, "writing": 0}
    while (alive := [worker for worker in workers if worker.is_alive()]) or sum(killed.values()) < kills:
        time.sleep(rng.uniform(0.0, 0.2))
        writers = [worker for worker in alive if (tmp_path / f"{worker.name}.writing").exists()]
        others = [worker for worker in alive if worker not in writers]
        victims: list[Any] = []
        if others and len(fleet.trained(tmp_path)) > 0.9 * n_trials * killed["at work"] / at_work:
            victims = others
        elif sum(killed.values()) < kills:
            victims = writers
        if victims:
            os.kill(rng.choice(victims).pid, signal.SIGKILL)
            killed["writing" if victims is writers else "at work"] += 1
        if victims or not alive:  # the writers were too quick
            workers += fleet.start(1, tmp_path, url, **options)
    found = fleet.finish(workers, tmp_path)
    assert killed["at work"] >= 25
    assert killed["writing"] >= 5
    check_whole(found, url, 90, 30, lost=killed["at work"])
    studies = [optuna.load_study(study_name=name, storage=make_storage(url)) for name in ("many", "many-confirming")]
    assert all(any(LOST_KEY in trial.user_attrs for trial in study.get_trials()) for study in studies)
    kept = rs.RankAllocation.from_json(tmp_path / "out" / "allocation.json")
    assert list(kept.vector) == found.results[0]["ranks"]
    assert len(pd.read_parquet(tmp_path / "out" / "trials.parquet")) == found.results[0]["trials"]


@pytest.mark.slow
@pytest.mark.parametrize("server", [pytest.param(name, marks=getattr(pytest.mark, name)) for name in SERVERS.values()])
def test_a_database_that_restarts_three_times(server: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    database = request.getfixturevalue(server)
    url = database.database(f"s{time.time_ns()}")
    options = {"n_trials": 60, "study_name": "many", "grace_seconds": 10.0, "seconds": 0.1}
    workers = fleet.start(4, tmp_path, url, **options)
    for _ in range(3):
        time.sleep(2.0)
        database.restart(away=2.0)
    found = fleet.finish(workers, tmp_path)
    check_whole(found, url, 45, 15, lost=12)
    assert len(found.results) == 4
