"""Methods on several seeds, each at the learning rate, and in the variant, that is best for it on validation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from statistics import fmean

from rankscope.allocation import RankAllocation
from rankscope.comparison.runs import Cell, Run, as_method, run_all
from rankscope.exceptions import ComparisonError
from rankscope.tasks import Task
from rankscope.training import Method, TrainingConfig

Variants = RankAllocation | Method | Sequence[RankAllocation | Method]


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeats:
    """A method trained on several seeds at its own best learning rate.

    Attributes:
        method: The one that was chosen, where there were variants.
        learning_rate: Chosen on the validation split among the rates offered.
        runs: One a seed, in the order of the seeds.
        tuning: The runs that chose.
    """

    method: Method
    learning_rate: float
    runs: tuple[Run, ...]
    tuning: tuple[Run, ...] = ()

    @property
    def name(self) -> str:
        """Of the method."""
        return self.method.name

    @property
    def parameters(self) -> int:
        """The most adapter parameters that a run ended with."""
        return max(run.parameters for run in self.runs)

    @property
    def validation(self) -> list[float]:
        """Validation metric by seed."""
        return [run.validation for run in self.runs]

    @property
    def test(self) -> list[float]:
        """Test metric by seed; empty where it was not read."""
        return [run.test for run in self.runs if run.test is not None]


def repeat_all(
    task: Task,
    methods: Sequence[Variants],
    config: TrainingConfig,
    *,
    learning_rates: Sequence[float],
    seeds: Sequence[int],
    tuning_seeds: Sequence[int] = (0, 1),
    limits: Sequence[int | None] | None = None,
    rate_factors: Sequence[float] | None = None,
    n_jobs: int = 1,
    kept_in: str | os.PathLike[str] | None = None,
    save_first_to: str | os.PathLike[str] | None = None,
    on_run: Callable[[int, int], None] | None = None,
) -> list[Repeats]:
    """Trains every method on the same seeds, each at the learning rate that is best for it on validation.

    Args:
        task: Where model, data, loss and metric come from.
        methods: What to compare: allocations, or other methods; of a sequence of variants the best on validation is chosen
            together with its rate.
        config: The schedule.
        learning_rates: The grid; with a single rate and variant nothing is tuned.
        seeds: Seeds of the runs that are reported.
        tuning_seeds: Seeds of the runs that choose; keep them apart from `seeds`.
        limits: Of each method, the most adapter parameters: variants that end above it are not chosen. None: no limit.
        rate_factors: Of each method, a factor on the grid: full fine-tuning wants far lower rates than adapters.
        n_jobs: Processes; each uses one torch thread unless OMP_NUM_THREADS says more.
        kept_in: Folder that keeps every run; those in it are not done again.
        save_first_to: Folder for the adapter of the last method's first seed.
        on_run: Called with the number of runs done and of runs in all.

    Raises:
        ComparisonError: All variants of a method end above its limit.
        RankscopeError: A method cannot run on this task or schedule.
    """
    factors = rate_factors or [1.0] * len(methods)
    grids = [
        _grid(each, config, [factor * rate for rate in learning_rates])
        for each, factor in zip(methods, factors, strict=True)
    ]
    for cell in (cell for grid in grids for cell in grid):
        if check := getattr(cell.method, "check", None):
            check(task, cell.config)
    tuned = [cell for grid in grids if len(grid) > 1 for cell in grid]
    n_tuning = len(tuned) * len(tuning_seeds)
    total = n_tuning + len(methods) * len(seeds)

    def run(cells: list[Cell], before: int) -> list[Run]:
        return run_all(
            task, cells, n_jobs=n_jobs, kept_in=kept_in, on_done=lambda n: on_run and on_run(before + n, total)
        )

    found = iter(run([replace(cell, seed=seed) for cell in tuned for seed in tuning_seeds], 0))
    tried = [_tried(grid, found, len(tuning_seeds)) for grid in grids]
    chosen = [_best(*each) for each in zip(grids, tried, limits or [None] * len(grids), strict=True)]
    cells = [replace(terms, seed=seed, with_test=True) for terms in chosen for seed in seeds]
    if save_first_to is not None:
        cells[-len(seeds)] = replace(cells[-len(seeds)], save_to=save_first_to)
    runs = run(cells, n_tuning)
    n = len(seeds)
    return [
        Repeats(
            method=terms.method,
            learning_rate=terms.config.learning_rate,
            runs=tuple(runs[i * n : (i + 1) * n]),
            tuning=tuple(run for each in tried[i] for run in each),
        )
        for i, terms in enumerate(chosen)
    ]


def _grid(candidate: Variants, config: TrainingConfig, learning_rates: Sequence[float]) -> list[Cell]:
    """Every variant at every rate."""
    variants = candidate if isinstance(candidate, Sequence) else [candidate]
    return [
        Cell(method=as_method(variant), config=replace(config, learning_rate=rate), seed=0, with_test=False)
        for variant in variants
        for rate in learning_rates
    ]


def _tried(grid: list[Cell], runs: Iterator[Run], n: int) -> list[list[Run]]:
    """The next n runs of each cell; none of the only one."""
    return [list(islice(runs, n)) for _ in grid] if len(grid) > 1 else [[]]


def _best(grid: list[Cell], tried: list[list[Run]], limit: int | None) -> Cell:
    """The cell that is best on validation, in the mean over its runs, of those within the limit; the only one is not tried."""
    if len(grid) == 1:
        return grid[0]
    most = [max(run.parameters for run in runs) for runs in tried]
    within = [place for place in range(len(grid)) if limit is None or most[place] <= limit]
    if not within:
        raise ComparisonError(
            f"`{grid[0].method.name}` must end within {limit:,} parameters to be compared, but its variants end with "
            f"{min(most):,} or more; raise the budget, or leave it out."
        )
    return grid[max(within, key=lambda place: fmean(run.validation for run in tried[place]))]
