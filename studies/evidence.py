"""Run the second round of comparisons in pieces that fit the time at hand.

    python studies/evidence.py digits-shift              # all methods, about an hour on two cores
    python studies/evidence.py --hours 3                 # all tasks, as far as three hours go; the next call resumes
    python studies/evidence.py sentiment --jobs 8        # on a GPU, which eight processes share
    python studies/evidence.py --list                    # the pieces that are left

A piece is one `rankscope compare` on a study of studies/compare/budgets: with its first two methods, then three, and so on.
Every task's first piece comes before any task's second. Results go to studies/results/budgets/TASK. `runs.tar.gz` there holds the
profile and every finished run; commit it with `comparison.parquet`, and another clone resumes from it. After a change of a study,
delete its `comparison.parquet`.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from itertools import count, takewhile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

from rankscope.cli import app
from rankscope.comparison import find_methods, read_comparison
from rankscope.files import replacing
from rankscope.settings import read_study

STUDIES = Path(__file__).parent / "compare" / "budgets"
RESULTS = Path(__file__).parent / "results" / "budgets"
TASKS = (
    "digits-shift",
    "dinov2-digits",
    "sentiment",
    "supersense",
    "word-order",
    "glosses",
    "emoji-scenes",
    "digit-scenes",
)
PACKED = "runs.tar.gz"


def pieces(tasks: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every task with its first two methods, then every task with its first three, and so on."""
    methods = {task: read_study(STUDIES / f"{task}.yaml").compare.methods for task in tasks}
    for n in takewhile(lambda n: n <= max(map(len, methods.values())), count(2)):
        yield from ((task, methods[task][:n]) for task in tasks if n <= len(methods[task]))


def is_done(task: str, methods: Sequence[str]) -> bool:
    """Whether the task's comparison holds these methods."""
    path = RESULTS / task / "comparison.parquet"
    return path.exists() and {each.name for each in find_methods(methods)} <= set(read_comparison(path)["method"])


def run(task: str, methods: Sequence[str], jobs: int) -> None:
    """Compare; what was finished is kept and packed, also after an interruption."""
    folder = RESULTS / task
    unpack(folder)
    command = ["compare", str(STUDIES / f"{task}.yaml"), "--out", str(folder), "--jobs", str(jobs)]
    print(f"{time.strftime('%H:%M:%S')} {task}: {', '.join(methods)}", flush=True)
    try:  # in this process, so that its workers go on from piece to piece
        status = app([*command, *(word for method in methods for word in ("--methods", method))], standalone_mode=False)
    finally:
        pack(folder)
    if status:
        sys.exit(status)


def pack(folder: Path) -> None:
    """Write `runs.tar.gz`: the profile, and all finished runs with their decisions."""
    files = [path for path in [folder / "profile.parquet", *sorted((folder / "runs").glob("*"))] if path.exists()]
    if not files:
        return
    with replacing(folder / PACKED) as temporary, tarfile.open(temporary, "w:gz") as archive:
        for path in files:
            archive.add(path, arcname=str(path.relative_to(folder)))


def unpack(folder: Path) -> None:
    """Restore what another clone packed, except files that are here."""
    if not (folder / PACKED).exists():
        return
    with tarfile.open(folder / PACKED) as archive:
        missing = [member for member in archive.getmembers() if not (folder / member.name).exists()]
        archive.extractall(folder, members=missing, filter="data")


def main() -> None:
    """Run the pieces that are left, in order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"default: {', '.join(TASKS)}")
    parser.add_argument("--hours", type=float, help="stop after so long; the next call resumes")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time; default: 2")
    parser.add_argument("--list", action="store_true", help="print the pieces that are left")
    given = parser.parse_args()
    if unknown := set(given.tasks) - set(TASKS):
        parser.error(f"TASK must be one of {', '.join(TASKS)}, but got {', '.join(sorted(unknown))}")
    if given.hours is not None:
        signal.signal(signal.SIGALRM, signal.default_int_handler)  # as Ctrl-C does, whatever SIGINT is set to
        signal.setitimer(signal.ITIMER_REAL, 3600 * given.hours)
    for task, methods in pieces(given.tasks or TASKS):
        if is_done(task, methods):
            continue
        if given.list:
            print(f"{task}: {', '.join(methods)}")
        else:
            run(task, methods, given.jobs)


if __name__ == "__main__":
    main()
