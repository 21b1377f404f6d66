"""A search killed with SIGKILL in mid-trial goes on: no finished trial is lost or repeated."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import optuna
from optuna.trial import TrialState

STUDY = """
name: killed
task: digits-shift
budget: {uniform_rank: 1}
profile: {head_steps: 5}
training: {steps: 60, learning_rate: 0.01}
search: {n_trials: 6, confirm_fraction: 0, grace_seconds: 3}
"""


def command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "rankscope", "search", str(folder / "killed.yaml"), "--out", str(folder), "--json"]


def states(folder: Path) -> list[str]:
    """Read past Optuna, which would create the tables if the search had not yet done so."""
    try:
        with closing(sqlite3.connect(f"file:{folder}/search.db?mode=ro", uri=True)) as database:
            return [state for (state,) in database.execute("SELECT state FROM trials ORDER BY number")]
    except sqlite3.OperationalError:  # no file or no tables yet
        return []


def test_sigkill_in_mid_trial(tmp_path: Path) -> None:
    (tmp_path / "killed.yaml").write_text(STUDY)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command(tmp_path), stdout=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + 120
    while not (states(tmp_path).count("COMPLETE") >= 2 and states(tmp_path)[-1] == "RUNNING"):
        assert time.monotonic() < deadline, "the search did not get to its third trial"
        assert process.poll() is None, "the search ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()

    study = optuna.load_study(study_name="killed", storage=f"sqlite:///{tmp_path}/search.db")
    before = {t.number: t.value for t in study.get_trials(states=(TrialState.COMPLETE,))}
    assert "RUNNING" in states(tmp_path)

    done = subprocess.run(command(tmp_path), capture_output=True, text=True, env=environment, check=True)
    assert json.loads(done.stdout)["parameters"] <= 6_912
    trials = study.get_trials()
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    assert len(complete) == 6
    assert {t.number: t.value for t in complete if t.number in before} == before
    assert "RUNNING" not in states(tmp_path)
    trained = [
        (tuple(t.user_attrs["ranks"]), t.user_attrs["rankscope"]["learning_rate"])
        for t in complete
        if t.user_attrs["rankscope"]["reused"] is None
    ]
    assert len(trained) == len(set(trained))


def test_two_processes_share_a_search(tmp_path: Path) -> None:
    text = STUDY.replace("steps: 60", "steps: 20").replace(
        "n_trials: 6, confirm_fraction: 0,", "n_trials: 12, confirm_fraction: 0.5,"
    )
    (tmp_path / "killed.yaml").write_text(text)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command(tmp_path)[:3], "profile", *command(tmp_path)[4:]], capture_output=True, env=environment, check=True
    )
    workers = [subprocess.Popen(command(tmp_path), stdout=subprocess.PIPE, env=environment) for _ in range(2)]
    told = [json.loads(worker.communicate(timeout=300)[0]) for worker in workers]
    assert told[0] == told[1]
    storage = f"sqlite:///{tmp_path}/search.db"
    trials = optuna.load_study(study_name="killed", storage=storage).get_trials(states=(TrialState.COMPLETE,))
    assert len(trials) == 7
    assert [t.user_attrs["rankscope"]["origin"] for t in trials].count("uniform") == 1
    runs = optuna.load_study(study_name="killed-confirming", storage=storage).get_trials(states=(TrialState.COMPLETE,))
    assert sorted(trial.params["seed"] for trial in runs if trial.params) == [500] * 5
