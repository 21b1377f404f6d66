"""Comparing allocations at equal terms: a learning rate tuned for each, the same seeds, paired differences on the test split."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch

from rankscope.allocation import RankAllocation
from rankscope.files import replacing_folder
from rankscope.tasks import Task, evaluate
from rankscope.training import TrainingConfig, train


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One fine-tuning run: its terms and its metric on both splits; `test` is None where it was not read."""

    seed: int
    learning_rate: float
    validation: float
    test: float | None
    wall_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeats:
    """An allocation trained on several seeds at its own best learning rate.

    Attributes:
        allocation: The ranks.
        learning_rate: Chosen on the validation split among the rates offered.
        runs: One a seed, in the order of the seeds.
    """

    allocation: RankAllocation
    learning_rate: float
    runs: tuple[Run, ...]

    @property
    def validation(self) -> list[float]:
        """Validation metric by seed."""
        return [run.validation for run in self.runs]

    @property
    def test(self) -> list[float]:
        """Test metric by seed; empty where it was not read."""
        return [run.test for run in self.runs if run.test is not None]


class Interval(NamedTuple):
    """A mean with its bootstrap confidence interval."""

    mean: float
    low: float
    high: float


def run_once(
    task: Task,
    allocation: RankAllocation,
    config: TrainingConfig,
    seed: int,
    *,
    with_test: bool = True,
    save_to: str | os.PathLike[str] | None = None,
) -> Run:
    """Trains once and reads the metric on the validation and, if asked, the test split; may save the adapter."""
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    model, result = train(task, allocation, config, seed=seed)
    if save_to is not None:
        with replacing_folder(save_to) as folder:
            model.save_pretrained(str(folder))  # type: ignore[operator]
    return Run(
        seed=seed,
        learning_rate=config.learning_rate,
        validation=result.metrics[task.metric],
        test=evaluate(task, model, "test")[task.metric] if with_test else None,
        wall_seconds=result.wall_seconds,
    )


def repeat_all(
    task: Task,
    allocations: Sequence[RankAllocation],
    config: TrainingConfig,
    *,
    learning_rates: Sequence[float],
    seeds: Sequence[int],
    tuning_seeds: Sequence[int] = (0, 1),
    n_jobs: int = 1,
    save_first_to: str | os.PathLike[str] | None = None,
    on_run: Callable[[int, int], None] | None = None,
) -> list[Repeats]:
    """Trains every allocation on the same seeds, each at the learning rate that is best for it on validation.

    Args:
        task: Where model, data, loss and metric come from.
        allocations: What to compare; budgets may differ, and are the caller's to report.
        config: The schedule.
        learning_rates: The grid; with a single rate nothing is tuned.
        seeds: Seeds of the runs that are reported.
        tuning_seeds: Seeds of the runs that choose the rate; keep them apart from `seeds`.
        n_jobs: Processes; each uses one torch thread unless OMP_NUM_THREADS says more.
        save_first_to: Folder for the adapter of the last allocation's first seed.
        on_run: Called with the number of runs done and of runs in all.
    """
    tuned = len(learning_rates) > 1
    grid = [(a, rate, seed) for a in allocations for rate in learning_rates for seed in tuning_seeds] if tuned else []
    total = len(grid) + len(allocations) * len(seeds)
    tried = _in_parallel(
        ((task, a, replace(config, learning_rate=rate), seed, False, None) for a, rate, seed in grid),
        n_jobs,
        lambda done: on_run(done, total) if on_run else None,
    )
    rates = [learning_rates[0]] * len(allocations)
    if tuned:
        scores = np.array([run.validation for run in tried]).reshape(len(allocations), len(learning_rates), -1)
        rates = [learning_rates[int(np.argmax(row.mean(axis=1)))] for row in scores]
    cells = [
        (
            task,
            a,
            replace(config, learning_rate=rate),
            seed,
            True,
            save_first_to if _is_last_first(i, j, allocations) else None,
        )
        for i, (a, rate) in enumerate(zip(allocations, rates, strict=True))
        for j, seed in enumerate(seeds)
    ]
    runs = _in_parallel(cells, n_jobs, lambda done: on_run(len(grid) + done, total) if on_run else None)
    n = len(seeds)
    return [
        Repeats(allocation=a, learning_rate=rate, runs=tuple(runs[i * n : (i + 1) * n]))
        for i, (a, rate) in enumerate(zip(allocations, rates, strict=True))
    ]


def paired_difference(
    ours: Sequence[float], theirs: Sequence[float], *, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Mean of the differences seed by seed, with a BCa bootstrap interval (Efron 1987, by scipy).

    Needs at least 3 pairs; with fewer, or where all differences are equal, the interval is the mean alone.

    >>> paired_difference([0.8, 0.9, 0.85], [0.7, 0.8, 0.75]).mean.__round__(3)
    0.1
    """
    from scipy.stats import bootstrap

    differences = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    mean = fmean(differences)
    if len(differences) < 3 or np.ptp(differences) < 1e-12:
        return Interval(mean, mean, mean)
    found = bootstrap((differences,), np.mean, confidence_level=confidence, rng=np.random.default_rng(seed))
    return Interval(mean, float(found.confidence_interval.low), float(found.confidence_interval.high))


_Cell = tuple[Task, RankAllocation, TrainingConfig, int, bool, str | os.PathLike[str] | None]


def _in_parallel(cells: Iterable[_Cell], n_jobs: int, on_done: Callable[[int], object]) -> list[Run]:
    from joblib import Parallel, delayed

    jobs = (
        delayed(run_once)(task, allocation, config, seed, with_test=with_test, save_to=save_to)
        for task, allocation, config, seed, with_test, save_to in cells
    )
    runs = []
    for run in Parallel(n_jobs=n_jobs, return_as="generator")(jobs):
        runs.append(run)
        on_done(len(runs))
    return runs


def _is_last_first(allocation: int, seed: int, allocations: Sequence[RankAllocation]) -> bool:
    return allocation == len(allocations) - 1 and seed == 0
