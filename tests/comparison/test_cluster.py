"""Runs on a real Dask cluster of two worker processes of this machine."""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import rankscope as rs
from rankscope.comparison import run_all
from rankscope.comparison.cluster import _check
from rankscope.comparison.runner import RunResult, RunSpec
from rankscope.errors import SettingsError, TrainingError
from rankscope.tasks import DigitsShift, Task
from rankscope.training import HeadOnly

dask, distributed = pytest.importorskip("dask"), pytest.importorskip("distributed")
pytestmark = pytest.mark.slow


class Marked(DigitsShift):
    """Each training leaves a line in a file when it begins; some kill their worker."""

    def __init__(self, log: str, *, kills: int = 0) -> None:
        super().__init__(batch_size=4)
        self.log, self.kills = Path(log), kills

    def train_batches(self, seed: int) -> Any:
        with self.log.open("a") as file:
            file.write(f"{seed} {os.getpid()}\n")
        if (
            seed == 1
            and len([line for line in self.log.read_text().split("\n") if line.startswith("1 ")]) <= self.kills
        ):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().train_batches(seed)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    made = distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, processes=True)
    yield made
    made.close()


def backend_of(cluster: Any) -> str:
    return cluster.scheduler_address.replace("tcp://", "dask://")


def specs(n: int) -> list[RunSpec]:
    return [
        RunSpec(method=HeadOnly(), training=rs.TrainingSettings(steps=2, learning_rate=0.01), seed=seed)
        for seed in range(n)
    ]


def figures(runs: list[RunResult]) -> list[Any]:
    return [(run.seed, run.validation, run.test, run.parameters) for run in runs]


def test_a_lost_workers_runs_are_done_again(cluster: Any, tmp_path: Path) -> None:
    """One worker is killed from within, another from outside; nothing is lost, and no kept run is done twice."""
    task, done = Marked(str(tmp_path / "log"), kills=1), list[int]()

    def count(n: int) -> None:
        done.append(n)
        if n == 3:
            (pid, *_) = distributed.Client(cluster).run(os.getpid).values()
            os.kill(pid, signal.SIGKILL)

    found = run_all(task, specs(8), backend=backend_of(cluster), kept_in=tmp_path / "runs", on_done=count)
    assert done == list(range(1, 9))
    assert figures(found) == figures(run_all(DigitsShift(batch_size=4), specs(8)))
    assert len(list((tmp_path / "runs").glob("*.json"))) == 8
    begun = begun_on_workers(tmp_path)
    seeds = [seed for seed, _ in begun]
    assert seeds.count("1") in (2, 3)  # the second kill may have met it as well
    assert len(seeds) <= 8 + 2  # what a killed worker was at, and no more

    again = run_all(task, specs(8), backend=backend_of(cluster), kept_in=tmp_path / "runs")
    assert (figures(again), begun_on_workers(tmp_path)) == (figures(found), begun)


def begun_on_workers(folder: Path) -> list[list[str]]:
    """Seed and process of each training; this process only reads batches for the fingerprint."""
    lines = [line.split() for line in (folder / "log").read_text().splitlines()]
    return [line for line in lines if line[1] != str(os.getpid())]


def test_a_run_that_kills_every_worker_is_given_up(tmp_path: Path) -> None:
    options: Any = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None, "processes": True}
    with dask.config.set({"distributed.scheduler.allowed-failures": 1}), distributed.LocalCluster(**options) as cluster:
        task, backend = Marked(str(tmp_path / "log"), kills=99), backend_of(cluster)
        message = (
            rf"^a run must end on a worker of `{backend}`, but 2 workers died with one; look at their logs: memory\?$"
        )
        with pytest.raises(TrainingError, match=message):
            run_all(task, specs(3), backend=backend, kept_in=tmp_path / "runs")
    assert [line[0] for line in begun_on_workers(tmp_path)].count("1") == 2


def test_unfit_clusters_are_refused(digits: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankscope.comparison.cluster._SECONDS", 1)
    with pytest.raises(SettingsError, match="^`dask://127.0.0.1:9` must be a Dask scheduler that answers, but is not"):
        run_all(digits, specs(1), backend="dask://127.0.0.1:9")
    for options, message in (
        ({"n_workers": 0}, "must have workers, but has none; start some with `dask worker --nthreads 1`."),
        ({"n_workers": 1, "threads_per_worker": 3}, "must do one run at a time, but"),
    ):
        with (
            distributed.LocalCluster(**options, processes=False, dashboard_address=None) as cluster,
            distributed.Client(cluster) as client,
            pytest.raises(SettingsError, match=re.escape(message)),
        ):
            _check(client, "dask://HOST:1", None)

    class Elsewhere:
        """A cluster whose second worker has another disk: what its client would say."""

        def wait_for_workers(self, n: int, timeout: float) -> None: ...

        def nthreads(self) -> dict[str, int]:
            return {"tcp://a:1": 1, "tcp://b:1": 1}

        def run(self, function: Any, path: str) -> dict[str, bool]:
            return {"tcp://a:1": function(path), "tcp://b:1": False}

    message = f"`{tmp_path}` must be on a file system that all workers share, but tcp://b:1 does not see it; choose another --out."
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
        _check(Elsewhere(), "dask://HOST:1", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("backend", ["ray", "dask://", "dask://host", "dask://user:secret@host:1", "threads"])
def test_other_backends_are_refused(backend: str) -> None:
    with pytest.raises(SettingsError, match="^`backend`: must be loky or dask://HOST:PORT"):
        rs.CompareSettings(backend=backend)
