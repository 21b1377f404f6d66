"""Cells of a comparison, each one fine-tuning run: in parallel, and never twice where their results are kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from rankscope.allocation import RankAllocation
from rankscope.comparison.machine import one_thread, peak_memory, reset_peak_memory, source_revision
from rankscope.control.decisions import count_moved, write_decisions
from rankscope.devices import one_gpu_each
from rankscope.exceptions import FileFormatError, TaskError
from rankscope.files import read_json, read_parquet, write_json
from rankscope.fingerprints import FORMAT, digest, require_same
from rankscope.tasks import Task, evaluate, fingerprint_task
from rankscope.training import Lora, Method, TrainingConfig, save_adapter, train
from rankscope.user_code import user_errors


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run to be done.

    Attributes:
        method: What is trained.
        config: The schedule.
        seed: Of the run.
        with_test: Whether the test split is read.
        save_to: Folder for the adapter; None: it is not saved.
    """

    method: Method
    config: TrainingConfig
    seed: int
    with_test: bool = True
    save_to: str | os.PathLike[str] | None = None

    def made_from(self, task: Mapping[str, Any]) -> dict[str, Any]:
        """What the run's results depend on, given the task's fingerprints: they tell it from all others of a folder."""
        return {
            "format": FORMAT, **task, "method": digest(self.method), "training": asdict(self.config), "seed": self.seed,
            "with_test": self.with_test,
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One fine-tuning run.

    Attributes:
        method: Its name.
        variant: Which of the method's; empty where there is one only.
        seed: Of the run.
        learning_rate: Its peak.
        steps: Optimizer steps.
        validation: The task's metric at the end.
        test: The task's metric on the test split; None where it was not read.
        parameters: Adapter parameters at the end; without adapters, all that is trained outside the head.
        ranks: At the end, by module; None where the method has none.
        n_moved: Ranks that a controller moved.
        wall_seconds: Time of the run, its validation included.
        peak_memory: Bytes: of the device where it is a GPU, else of the process; None where the system does not tell.
        revision: Of rankscope's sources.
        decisions: The controller's, one row each; None without one.
    """

    method: str
    variant: str
    seed: int
    learning_rate: float
    steps: int
    validation: float
    test: float | None
    parameters: int
    ranks: dict[str, int] | None
    n_moved: int
    wall_seconds: float
    peak_memory: int | None
    revision: str
    decisions: pd.DataFrame | None = None


def run_cell(task: Task, cell: Cell) -> Run:
    """Trains once and reads the metric on the validation and, if asked, the test split; may save the adapter."""
    measured = reset_peak_memory()
    with one_thread():
        model, result = train(task, cell.method, cell.config, seed=cell.seed)
        test = evaluate(task, model, "test")[task.metric] if cell.with_test else None
    if cell.save_to is not None:
        save_adapter(model, task, cell.save_to)
    return Run(
        method=cell.method.name,
        variant=cell.method.variant,
        seed=cell.seed,
        learning_rate=cell.config.learning_rate,
        steps=cell.config.steps,
        validation=result.metrics[task.metric],
        test=test,
        parameters=result.parameters,
        ranks=None if result.allocation is None else dict(result.allocation.ranks),
        n_moved=0 if result.decisions is None else count_moved(result.decisions),
        wall_seconds=result.wall_seconds,
        peak_memory=peak_memory() if measured else None,
        revision=source_revision(),
        decisions=result.decisions,
    )


def run_all(
    task: Task,
    cells: Sequence[Cell],
    *,
    n_jobs: int = 1,
    kept_in: str | os.PathLike[str] | None = None,
    on_done: Callable[[int], object] = lambda n: None,
) -> list[Run]:
    """Runs all cells, in order of the cells.

    Args:
        task: Where model, data, loss and metric come from.
        cells: The runs.
        n_jobs: Processes; each uses one torch thread unless OMP_NUM_THREADS says more, and where there are several GPUs, one
            of them.
        kept_in: Folder with one file a run; what is in it and depends on the same is read instead of run, unless it is to be
            saved.
        on_done: Called with the number of runs done.
    """
    from joblib import Parallel, delayed

    kept = [None] * len(cells) if kept_in is None else _kept(task, cells, Path(kept_in))
    known = [
        None if file is None or cell.save_to is not None else file.read()
        for file, cell in zip(kept, cells, strict=True)
    ]
    todo = [(cell, file) for cell, file, run in zip(cells, kept, known, strict=True) if run is None]
    with one_gpu_each(n_jobs):
        fresh: Iterator[Run] = Parallel(n_jobs=n_jobs, return_as="generator")(
            delayed(_run_and_keep)(task, *each) for each in todo
        )
    runs = []
    for run in known:
        runs.append(next(fresh) if run is None else run)
        on_done(len(runs))
    return runs


def as_method(candidate: RankAllocation | Method) -> Method:
    """The candidate; of an allocation, LoRA of its ranks."""
    return Lora(candidate) if isinstance(candidate, RankAllocation) else candidate


@dataclass(frozen=True, slots=True)
class _File:
    """Where one run is kept, under a name that stands for all that it depends on."""

    stem: Path
    made_from: Mapping[str, Any]

    def read(self) -> Run | None:
        """The run; None where it is not kept.

        Raises:
            FileFormatError: The file is no run, or another's.
        """
        path = self.stem.with_suffix(".json")
        if not path.exists():
            return None
        row = read_json(path, what="a run")
        remedy = "delete it, and it is done again."
        require_same(row.pop("made_from", {}), self.made_from, what=f"`{path}`", remedy=remedy)
        if set(row) != {field.name for field in fields(Run)} - {"decisions"}:
            raise FileFormatError(f"`{path}` must hold a run, but its keys are others; {remedy}")
        decisions = self.stem.with_suffix(".parquet")
        return Run(
            **row, decisions=read_parquet(decisions, what="decisions").to_pandas() if decisions.exists() else None
        )

    def write(self, run: Run) -> None:
        """Keeps the run."""
        if run.decisions is not None:
            write_decisions(run.decisions, self.stem.with_suffix(".parquet"))
        row = {name: value for name, value in asdict(run).items() if name != "decisions"}
        write_json(self.stem.with_suffix(".json"), {**row, "made_from": self.made_from})


def _kept(task: Task, cells: Sequence[Cell], folder: Path) -> list[_File | None]:
    """Where each cell's run is kept."""
    about = fingerprint_task(task)
    terms = [cell.made_from(about) for cell in cells]
    return [_File(folder / digest(each), each) for each in terms]


def _run_and_keep(task: Task, cell: Cell, file: _File | None) -> Run:
    with user_errors("the study's own code", TaskError):  # where a worker's traceback still is
        run = run_cell(task, cell)
    if file is not None:
        file.write(run)
    return run
