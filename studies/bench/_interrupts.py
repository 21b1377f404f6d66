"""Ctrl-C in each command that runs long, once and twice: how soon it is heard, and whether what is said then is true.

A case is one command on one output folder: it is interrupted once, then twice in a row, at each of its moments, and then left to
its end. As in a terminal, the signal goes to all its processes. What was finished before an interrupt must still be there, as it
was, when the command has come to its end.
"""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import rankscope as rs

HEARD, ENDED = 5.0, 2.0  # seconds until the first Ctrl-C is heard, and until the second ends the command
LONGEST = 300.0  # seconds that a command has to get to its moment, or to its end
TASK = """
from pathlib import Path
from rankscope.tasks import DigitsShift

class Marked(DigitsShift):
    def train_batches(self, seed):
        for _ in range(100):
            yield from super().train_batches(seed)

    def loss(self, model, batch):
        if any("lora_" in name for name, _ in model.named_parameters()):
            phase = "training"
        else:
            phase = "warming" if model.classifier.weight.requires_grad else "profiling"
        Path(f"{phase}.now").touch()
        return super().loss(model, batch)

def make():
    return Marked()
"""
STUDY = """
name: faults
task: task.py:make
budget: {uniform_rank: 1}
profile: {head_steps: 5, n_batches: 12}
training: {steps: 150, learning_rate: 0.01}
search: {n_trials: 10, confirm_fraction: 0.5, grace_seconds: 5}
compare: {methods: [uniform], n_seeds: 5, n_tuning_seeds: 1}
plan: {lowest: 1, highest: 2, n_seeds: 2, max_seeds: 2, n_tuning_seeds: 1, ceiling: false}
"""
COMPLETE = """
SELECT study_name, number, value, datetime_complete
FROM trials JOIN studies USING (study_id) JOIN trial_values USING (trial_id) WHERE state = 'COMPLETE'
"""
Finished = dict[Any, Any]  # work that is done, by name: what would change if it were done again


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A command, and the moments at which it is interrupted: a phase of the task's loss, or "runs" or a study's trials."""

    words: tuple[str, ...]
    moments: dict[str, str]  # what a row calls it, and the phase or kind of work

    @property
    def name(self) -> str:
        """As a row calls it: without what is set."""
        return " ".join(word for word in self.words if "=" not in word and word != "--set")

    @property
    def out(self) -> str:
        """Its output folder."""
        return self.name.replace(" --", "-").replace(" ", "-")


LONG_PROFILE = ("--set", "profile.head_steps=150", "--set", "profile.n_batches=150")
CASES = (
    Case(words=("profile", *LONG_PROFILE), moments={"warming up the head": "warming", "between batches": "profiling"}),
    Case(words=("profile", "--keep-partial", *LONG_PROFILE), moments={"between batches": "profiling"}),
    Case(words=("allocate", *LONG_PROFILE), moments={"profiling": "profiling"}),
    Case(words=("train", "--set", "training.steps=250"), moments={"training": "training"}),
    Case(words=("train", "--seeds", "3", "--jobs", "2", "--set", "training.steps=250"), moments={"training": "training"}),
    Case(words=("shrink", "--batches", "200"), moments={"weighing": "training"}),
    Case(words=("compare", "--jobs", "1"), moments={"between runs": "runs"}),
    Case(words=("compare", "--jobs", "2"), moments={"between runs": "runs"}),
    Case(words=("budget",), moments={"between runs": "runs"}),
    Case(words=("search",), moments={"searching": "faults", "confirming": "faults-confirming"}),
    Case(words=("worker",), moments={"searching": "faults"}),
    Case(words=("worker", "--jobs", "2"), moments={"searching": "faults"}),
)  # fmt: skip


def interrupted(folder: Path, *, quick: bool) -> Iterator[dict[str, Any]]:
    """A row for each interrupt; see the module."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would ours
    (folder / "task.py").write_text(TASK)
    (folder / "faults.yaml").write_text(STUDY)
    targets = rs.find_targets(rs.load_task("digits-shift").build_model())
    rs.RankAllocation(targets, (1,) * 36, strategy="uniform").to_json(folder / "allocation.json")
    for case in CASES[:1] if quick else CASES:
        rows, finished = [], []
        for when, kind in case.moments.items():
            for times in (1, 2):
                rows.append(_interrupt(folder, case, f"`{case.name}`, {when}", kind, times))
                finished.append(_finished(folder / case.out))
        log = folder / f"{case.out}.log"
        with log.open("w") as file:
            end = subprocess.run(_command(case), cwd=folder, stdout=file, stderr=file, check=False, timeout=LONGEST)
        final = _finished(folder / case.out)
        for row, before in zip(rows, finished, strict=True):
            row["doubled"] = sum(key in final and final[key] != value for key, value in before.items())
            row["lost"] += len(before.keys() - final.keys()) + bool(end.returncode)
            row["message"] += f"; then: {log.read_text()[-500:]}" if end.returncode else ""
        yield from rows


def _command(case: Case) -> list[str]:
    name, *flags = case.words
    words = [sys.executable, "-m", "rankscope", name]
    if name == "shrink":
        return [*words, "train/adapter", "--parameters", "1728", "--study", "faults.yaml", "--out", case.out, *flags]
    given = ["--allocation", "allocation.json"] if name == "train" else []
    return [*words, "faults.yaml", "--out", case.out, *given, *flags]


def _interrupt(folder: Path, case: Case, name: str, kind: str, times: int) -> dict[str, Any]:
    """One start, interrupted so many times at its moment."""
    (folder / f"{kind}.now").unlink(missing_ok=True)
    time.sleep(1.1)  # what is a second old counts as new: clocks of file systems
    before, started = _work(folder, case, kind), time.time()
    process = subprocess.Popen(
        _command(case), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    lines: list[tuple[float, str]] = []
    assert process.stdout is not None
    reader = Thread(target=lambda: lines.extend((time.monotonic(), line.rstrip()) for line in process.stdout or ()))
    reader.start()
    while _work(folder, case, kind) <= before and process.poll() is None and time.time() < started + LONGEST:
        time.sleep(0.02)
    time.sleep(0.3)
    signals = []
    for _ in range(times):
        time.sleep(0.3 * len(signals))
        os.killpg(process.pid, signal.SIGINT)
        signals.append(time.monotonic())
    try:
        process.wait(60)
        reader.join(10)  # until the last of its processes has ended
    finally:
        ended = time.monotonic()
        if reader.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
    said = [(at, line) for at, line in lines if re.match("(rankscope: )?interrupted[;:]", line)]
    pages = [line for _, line in lines if re.match(r"Traceback|Exception|Process |\S*Error|.*Warning|/", line)]
    keeps = (
        "--keep-partial" in case.words
    )  # which is what was asked for, unless a second Ctrl-C comes before it is done
    status = {(True, 1): [0], (True, 2): [0, 130, -signal.SIGINT]}.get((keeps, times), [130, -signal.SIGINT])
    wrong = [f"not true: {each}" for _, line in said if (each := _untrue(line, folder / case.out, started))]
    wrong += [f"status {process.returncode}"] * (process.returncode not in status) + pages[:1]
    wrong += ["nothing is said"] * (not said and times == 1)
    return {
        "case": f"Ctrl-C {'once' if times == 1 else 'twice'}: {name}", "tries": 1, "lost": int(bool(wrong)), "doubled": 0,
        "seconds": said[0][0] - signals[0] if said else None, "ended": ended - signals[-1], "status": process.returncode,
        "message": "; ".join([*(line for _, line in said), *wrong]),
    }  # fmt: skip


def _work(folder: Path, case: Case, kind: str) -> int:
    """How much of this kind is done."""
    if kind in ("warming", "profiling", "training"):
        return int((folder / f"{kind}.now").exists())
    return sum(key[0] == kind for key in _finished(folder / case.out))


def _finished(out: Path) -> Finished:
    """The runs and trials that an output folder keeps as finished."""
    found: Finished = {("runs", path.name): path.stat().st_mtime_ns for path in out.glob("runs/*.json")}
    if (out / "search.db").exists():
        with (
            suppress(sqlite3.OperationalError),
            closing(sqlite3.connect(f"file:{out}/search.db?mode=ro", uri=True)) as kept,
        ):
            for study, number, *told in kept.execute(COMPLETE):  # not by Optuna, which would make the tables
                found[study, number] = told
    return found


def _untrue(line: str, out: Path, started: float) -> str:
    """What of a last line is not so: which files of the output folder are new, or how many batches a profile holds."""
    if batches := re.search(r"the profile holds the (\d+) batches", line):
        held = rs.read_profile(out / "profile.parquet").metadata["batches"]
        return "" if held == int(batches[1]) else f"it holds {held}"
    new = {
        path.relative_to(out).parts[0]
        for path in out.rglob("*")
        if path.is_file() and path.stat().st_mtime >= started and not path.relative_to(out).parts[0].startswith(".")
    }
    kept = re.search(r"kept in [^:]+: ([^;]+?)(;|\.$)", line)
    told = set(re.sub(r"/ \(\d+ files?\)", "", kept[1]).split(", ")) if kept else set()
    return "" if told == new or "files are written whole or not at all" in line else f"new are {sorted(new)}"
