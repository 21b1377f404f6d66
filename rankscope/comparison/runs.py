"""Cells of a comparison, each one fine-tuning run: in parallel, and never twice where their results are kept."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from rankscope.allocation import RankAllocation
from rankscope.comparison.machine import peak_memory, reset_peak_memory, source_revision
from rankscope.control.decisions import count_moved, write_decisions
from rankscope.files import read_json, replacing_folder, write_json
from rankscope.tasks import Task, evaluate
from rankscope.training import Lora, Method, TrainingConfig, train


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

    def key(self, task: Task) -> str:
        """Tells this run's results from all others of a folder: by task, method, schedule and seed."""
        terms = (task.name, identity(self.method), identity(self.config), self.seed, self.with_test)
        return hashlib.sha256(repr(terms).encode()).hexdigest()[:16]


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
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    reset_peak_memory()
    model, result = train(task, cell.method, cell.config, seed=cell.seed)
    if cell.save_to is not None:
        with replacing_folder(cell.save_to) as folder:
            model.save_pretrained(str(folder))  # type: ignore[operator]
    return Run(
        method=cell.method.name,
        variant=cell.method.variant,
        seed=cell.seed,
        learning_rate=cell.config.learning_rate,
        steps=cell.config.steps,
        validation=result.metrics[task.metric],
        test=evaluate(task, model, "test")[task.metric] if cell.with_test else None,
        parameters=result.parameters,
        ranks=None if result.allocation is None else dict(result.allocation.ranks),
        n_moved=0 if result.decisions is None else count_moved(result.decisions),
        wall_seconds=result.wall_seconds,
        peak_memory=peak_memory(),
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
        n_jobs: Processes; each uses one torch thread unless OMP_NUM_THREADS says more.
        kept_in: Folder with one file a run; what is in it is read instead of run, unless it is to be saved.
        on_done: Called with the number of runs done.
    """
    from joblib import Parallel, delayed

    folder = None if kept_in is None else Path(kept_in)
    known = [_read(folder, cell, task) for cell in cells]
    todo = [cell for cell, run in zip(cells, known, strict=True) if run is None]
    fresh: Iterator[Run] = Parallel(n_jobs=n_jobs, return_as="generator")(
        delayed(_run_and_keep)(task, cell, folder) for cell in todo
    )
    runs = []
    for run in known:
        runs.append(next(fresh) if run is None else run)
        on_done(len(runs))
    return runs


def as_method(candidate: RankAllocation | Method) -> Method:
    """The candidate; of an allocation, LoRA of its ranks."""
    return Lora(candidate) if isinstance(candidate, RankAllocation) else candidate


def identity(value: Any) -> Any:
    """A value's class and its fields that are not at their defaults, so that a field added later changes nothing."""
    if isinstance(value, RankAllocation):
        return value.fingerprint, value.strategy
    if is_dataclass(value) and not isinstance(value, type):
        differing = [(f.name, identity(getattr(value, f.name))) for f in fields(value) if not _is_default(f, value)]
        return type(value).__name__, differing
    if isinstance(value, tuple | list):
        return [identity(each) for each in value]
    return repr(value)


def _is_default(field: Any, value: Any) -> bool:
    default = field.default if field.default is not MISSING else MISSING
    if default is MISSING and field.default_factory is not MISSING:
        default = field.default_factory()
    return default is not MISSING and getattr(value, field.name) == default


def _run_and_keep(task: Task, cell: Cell, folder: Path | None) -> Run:
    run = run_cell(task, cell)
    if folder is not None:
        stem = folder / cell.key(task)
        if run.decisions is not None:
            write_decisions(run.decisions, stem.with_suffix(".parquet"))
        row = {name: value for name, value in asdict(run).items() if name != "decisions"}
        write_json(stem.with_suffix(".json"), row)
    return run


def _read(folder: Path | None, cell: Cell, task: Task) -> Run | None:
    if folder is None or cell.save_to is not None:
        return None
    stem = folder / cell.key(task)
    if not stem.with_suffix(".json").exists():
        return None
    row = read_json(stem.with_suffix(".json"), what="a run")
    decisions = stem.with_suffix(".parquet")
    return Run(**row, decisions=pd.read_parquet(decisions) if decisions.exists() else None)
