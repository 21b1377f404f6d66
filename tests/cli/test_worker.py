"""`rankscope worker`: it helps a search and writes no outputs; several processes; what ends one is told."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.terminal import invoke

STUDY = """
name: shared
task: digits-shift
budget: {uniform_rank: 1}
profile: {head_steps: 5}
training: {steps: 3, learning_rate: 0.01}
search: {n_trials: 10, confirm_fraction: 0.5, grace_seconds: 5}
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    (tmp_path / "shared.yaml").write_text(STUDY)
    return tmp_path / "shared.yaml"


def command(study: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "rankscope", "worker", str(study), "--out", str(study.parent / "out"), *arguments]


def test_a_worker_runs_everything_and_writes_no_outputs(study: Path) -> None:
    storage = f"journal:{study.parent}/shared.log"
    status, stdout, stderr = invoke("worker", study, "--out", study.parent / "out", "--storage", storage, "--json")
    assert (status, stderr) == (0, f"no profile in {study.parent}/out yet: taking one\n")
    told = json.loads(stdout)
    assert (told["study"], told["trials"], told["confirming_runs"]) == ("shared", 5, 5)
    assert {path.name for path in (study.parent / "out").iterdir()} <= {"profile.parquet", "artifacts"}
    status, stdout, _ = invoke("search", study, "--out", study.parent / "out", "--storage", storage, "--json")
    assert status == 0
    found = json.loads(stdout)
    assert (found["trials"], found["confirming_runs"], found["reason"]) == (5, 5, told["recommendation"])


@pytest.mark.slow
def test_processes_share_the_work_and_a_signal_gives_trials_back(study: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    longer = ("--jobs", "2", "--set", "training.steps=400")
    worker = subprocess.Popen(
        command(study, *longer), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    time.sleep(45)
    worker.send_signal(signal.SIGTERM)
    _, stderr = worker.communicate(timeout=60)
    assert worker.returncode == 130
    told = stderr.splitlines()[-1]
    assert told.startswith(f"rankscope: interrupted; kept in {study.parent / 'out'}: ")
    assert told.endswith("; the same command goes on from there.")
    done = subprocess.run(command(study, "--jobs", "2", "--json", "--set", "training.steps=400"), capture_output=True, text=True, env=environment, check=True)  # fmt: skip
    assert json.loads(done.stdout)["trials"] == 5


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("times", [1, 2])
def test_a_terminals_ctrl_c_is_one_line(study: Path, times: int) -> None:
    """It reaches all processes, here while they start."""
    assert invoke("profile", study, "--out", study.parent / "out")[0] == 0
    worker = subprocess.Popen(command(study, "--jobs", "2"), stderr=subprocess.PIPE, text=True, start_new_session=True)
    children = Path(f"/proc/{worker.pid}/task/{worker.pid}/children")
    while len(children.read_text().split()) < 3:  # the two, and multiprocessing's resource tracker
        time.sleep(0.1)
    for _ in range(times):
        time.sleep(0.5)
        os.killpg(worker.pid, signal.SIGINT)
    _, stderr = worker.communicate(timeout=60)
    assert worker.returncode in (130, -signal.SIGINT)
    assert re.fullmatch("rankscope: interrupted; [^\n]*\n", stderr)


@pytest.mark.parametrize("devices", ["all", "", ","])
def test_devices_that_are_not_there(study: Path, devices: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankscope.cli.worker.visible_gpus", lambda: ())
    status, _, stderr = invoke("worker", study, "--devices", devices)
    message = f"rankscope: `--devices` must name GPUs, but got {devices!r}, and none is seen; use --jobs on CPUs.\n"
    assert (status, stderr) == (2, message)


def test_no_password_is_kept_or_told(study: Path) -> None:
    url = "postgresql://me:s3cr3t@127.0.0.1:1/a"
    status, _, stderr = invoke("profile", study, "--out", study.parent / "out", "--set", f"search.storage={url}")
    assert (status, stderr) == (0, "")
    for path in (study.parent / "out").rglob("*"):
        assert b"s3cr3t" not in path.read_bytes() if path.is_file() else True
    for arguments in (["--storage", url], ["--storage", f" {url}"], ["--set", f"search.storage: {url}"],
                      ["--set", f"search.storage=[{url}]"], ["--storage", url, "--set", f"search.storage={url}"]):  # fmt: skip
        status, stdout, stderr = invoke("search", study, "--out", study.parent / "out", *arguments)
        assert status == 2
        assert "s3cr3t" not in stdout + stderr
        assert stderr.count("\n") == 1
