"""`plan_budget`: how few adapter parameters a task needs, and how many times fewer than uniform LoRA."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t

from rankscope.allocation import RankAllocation
from rankscope.budget import ParameterBudget
from rankscope.comparison.runner import (
    REFERENCE,
    REPORTED,
    UNLIMITED,
    Contender,
    RunResult,
    RunSpec,
    find_methods,
    make_grid,
    run_tuned,
    seeds_that_tune,
)
from rankscope.comparison.statistics import (
    Floats,
    bootstrap_interval,
    monotone,
    needed_budget,
    paired_difference,
    resampled_means,
)
from rankscope.comparison.summary import times
from rankscope.distributed import led_by_first
from rankscope.errors import SettingsError, checked
from rankscope.files import AnyPath
from rankscope.profiling import Profile
from rankscope.searching import CONFIDENCE, FEWEST_PAIRS, t_interval
from rankscope.settings import AllocationSettings, PlanSettings, TrainingSettings
from rankscope.targets import TargetModule, find_targets
from rankscope.tasks import Task, load_task, profile_task
from rankscope.units import Interval, Unit, unit_of

Cell = tuple[str, int]  # a method at a budget; full fine-tuning and the head alone have none: 0
Scores = Mapping[Cell, Sequence[float]]  # validation by seed: the first seeds of the plan, as many as were trained
FULL, HEAD = ("full", 0), ("head", 0)
STRIDE = 16.0  # between the first budgets, before the crossing is bisected


def budget_grid(
    targets: Sequence[TargetModule], settings: PlanSettings, allocation: AllocationSettings | None = None
) -> tuple[int, ...]:
    """Budgets in even steps from `lowest` to `highest` that the model and the bounds on ranks admit, and the reference's.

    >>> targets = [TargetModule(name="fc1", in_features=64, out_features=64)]
    >>> budget_grid(targets, PlanSettings(lowest=0.5, highest=16, step=4))
    (128, 256, 1024, 2048)
    """
    one = ParameterBudget.uniform(targets, 1).limit
    bounds = allocation or AllocationSettings()
    lowest, highest = bounds.min_rank, bounds.max_rank or math.inf
    least = lowest * one or min(target.rank_cost for target in targets)
    most = sum(target.rank_cost * int(min(target.full_rank, highest)) for target in targets)
    ends = (
        f"`min_rank` {lowest}" if lowest else "one rank of the cheapest module",
        (f"`max_rank` {highest}" if bounds.max_rank else "full rank"),
    )
    between = f"between {least:,} parameters ({ends[0]}) and {most:,} ({ends[1]})"
    n = math.floor(math.log(settings.highest / settings.lowest, settings.step) + 1e-9)
    factors = [*(settings.lowest * settings.step**power for power in range(n + 1)), settings.highest]
    grid = {min(max(round(factor * one), least), most) for factor in factors}
    if len(grid) < 2:
        raise SettingsError(f"`lowest` and `highest` must leave two budgets {between}; move them apart.")
    if isinstance(settings.reference, int):
        if not least <= settings.reference <= most:
            raise SettingsError(f"`reference` must lie {between}, but got {settings.reference:,}; choose one of these.")
        grid.add(settings.reference)
    return tuple(sorted(grid))


@dataclass(frozen=True, kw_only=True)
class Assessment:
    """What validation scores say so far, and what to measure next. Pure: nothing is trained here."""

    grid: tuple[int, ...]
    placed: str  # the method whose budget is planned
    scores: Scores
    settings: PlanSettings

    def measured(self, method: str) -> list[int]:
        """The budgets at which a method was trained, ascending."""
        return [budget for budget in self.grid if (method, budget) in self.scores]

    @cached_property
    def reference(self) -> Cell:
        """What budgets are held against: full fine-tuning, uniform at a budget, or uniform at its best one so far."""
        asked = self.settings.reference
        if asked == "full":
            return FULL
        if isinstance(asked, int):
            return (REFERENCE, asked)
        cells = [(REFERENCE, budget) for budget in self.measured(REFERENCE)]
        return max(cells, key=lambda cell: fmean(self.scores[cell]))

    @cached_property
    def margin(self) -> float:
        """What may be lost: as given, or one seed's standard deviation at the reference."""
        return stdev(self.scores[self.reference]) if self.settings.margin is None else self.settings.margin

    @property
    def level(self) -> float:
        """What is enough: the reference's mean less the margin."""
        return fmean(self.scores[self.reference]) - self.margin

    def difference(self, cell: Cell, other: Cell) -> Interval:
        """The paired difference of two cells on the seeds that both have."""
        n = min(len(self.scores[cell]), len(self.scores[other]))
        return paired_difference(self.scores[cell][:n], self.scores[other][:n])

    def enough(self, cell: Cell) -> bool | None:
        """Whether the cell is not worse than the reference by more than the margin; None while that is open."""
        mean, low, high = self.difference(cell, self.reference)
        if math.isnan(low) and len(self.scores[cell]) >= FEWEST_PAIRS:  # the same on every seed
            low = high = mean
        return True if low > -self.margin else False if high < -self.margin else None

    @cached_property
    def noise(self) -> float:
        """Standard deviation of one seed's difference to the reference: the median over cells."""
        deviations = []
        for cell in self.scores.keys() - {self.reference, HEAD}:
            pairs = zip(self.scores[cell], self.scores[self.reference], strict=False)
            deviations.append(stdev([ours - theirs for ours, theirs in pairs]))
        return float(np.median(deviations))

    def half_width(self, n: int) -> float:
        """What half an interval of a difference to the reference comes to with `n` seeds."""
        return self.noise * float(t.ppf(0.5 + CONFIDENCE / 2, n - 1)) / math.sqrt(n)

    def require_margin(self) -> None:
        """Raise a SettingsError if all seeds together could not tell a difference of the margin."""
        most = self.settings.max_seeds
        if self.settings.margin is None or self.half_width(most) <= self.margin:
            return
        needed = next((n for n in range(most, 10_000) if self.half_width(n) <= self.margin), 10_000)
        raise SettingsError(
            f"`margin` must be at least {self.half_width(most):.2g}, the noise of {most} seeds, but got {self.margin:g}; raise "
            f"it, or set `max_seeds` to {needed:,}."
        )

    def smallest(self, method: str) -> int | None:
        """The smallest measured budget at which the method is shown to be enough."""
        return next((budget for budget in self.measured(method) if self.enough((method, budget))), None)

    def next_step(self, method: str) -> tuple[Cell, int] | None:
        """The cell to train next, and on how many seeds; None where more would not change the answer.

        First the crossing of the margin is bisected on the monotone curve; then the smallest budget is sought that could be
        shown to be enough with all seeds, and gets them.
        """
        budgets, settings = self.measured(method), self.settings
        means = np.array([fmean(self.scores[method, budget]) for budget in budgets])
        good = np.flatnonzero(monotone(means[None])[0] >= self.level)
        places = [self.grid.index(budget) for budget in budgets]
        if good.size and good[0] > 0:
            low, high = places[good[0] - 1], places[good[0]]
            if high - low > 1:
                return (method, self.grid[(low + high) // 2]), settings.n_seeds
        spare = self.half_width(settings.max_seeds) - self.margin
        for place in range(places[good[0]] if good.size else len(self.grid), len(self.grid)):
            cell = (method, self.grid[place])
            if cell not in self.scores:
                return cell, settings.n_seeds
            if self.enough(cell):
                return None
            fewest = min(len(self.scores[cell]), len(self.scores[self.reference]))
            if fewest < settings.max_seeds and self.difference(cell, self.reference).mean > spare:
                return cell, min(2 * fewest, settings.max_seeds)
        return None

    def saved(self) -> Interval:
        """How many times the parameters uniform needs to come within the margin, with its bootstrap interval over seeds."""
        cells = [(method, budget) for method in (REFERENCE, self.placed) for budget in self.measured(method)]
        cells += [self.reference] * (self.reference not in cells)
        most = max(len(self.scores[cell]) for cell in cells)
        table = np.full((len(cells), most), np.nan)
        for row, cell in zip(table, cells, strict=True):
            row[: len(self.scores[cell])] = self.scores[cell]
        means = resampled_means(table)
        levels = means[:, cells.index(self.reference)] - self.margin
        uniform, placed = (self._needed(method, cells, means, levels) for method in (REFERENCE, self.placed))
        neither = np.isinf(uniform) & np.isinf(placed)
        factors = np.divide(uniform, placed, out=np.ones_like(uniform), where=~neither)
        return bootstrap_interval(factors, min(len(self.scores[cell]) for cell in cells))

    def _needed(self, method: str, cells: Sequence[Cell], means: Floats, levels: Floats) -> Floats:
        mine = [place for place, cell in enumerate(cells) if cell[0] == method and cell[1]]
        budgets = np.array([cells[place][1] for place in mine], dtype=float)
        return needed_budget(levels, budgets, monotone(means[:, mine]))


def explore(
    grid: Sequence[int], settings: PlanSettings, measure: Callable[[Sequence[Cell], int], Scores], *, head: bool = True
) -> Assessment:
    """Measure cells, each on so many seeds, until more would not change the answer; `head`: the head alone is one.

    `measure` returns all scores so far.
    """
    stride = max(1, round(math.log(STRIDE, settings.step)))
    first = sorted({*grid[::stride], grid[-1]} | {each for each in grid if each == settings.reference})
    cells = [(method, budget) for budget in first for method in (REFERENCE, settings.strategy)]
    bounds = [FULL] * (settings.ceiling or settings.reference == "full") + [HEAD] * head
    scores = measure([*cells, *bounds], settings.n_seeds)
    while True:
        found = Assessment(grid=tuple(grid), placed=settings.strategy, scores=scores, settings=settings)
        found.require_margin()
        steps = [step for method in (settings.strategy, REFERENCE) if (step := found.next_step(method))]
        if not steps:
            return found
        for cell, n in steps:
            scores = measure([cell, found.reference], n)


@dataclass(frozen=True, kw_only=True)
class BudgetPlan:
    """How few parameters are enough, by validation; the test split only reports."""

    task: Task
    assessment: Assessment
    runs: Mapping[Cell, Sequence[RunResult]]  # that were reported, in the order of the seeds
    tuning: Sequence[RunResult]
    rates: tuple[float, ...]  # from which each cell's was chosen
    allocation: RankAllocation | None  # at the recommended budget

    @property
    def budget(self) -> int | None:
        """The smallest placed budget that is shown to be enough; None if none is."""
        return self.assessment.smallest(self.assessment.placed)

    @cached_property
    def saved(self) -> Interval:
        """How many times the parameters uniform needs to come within the margin of the reference."""
        return self.assessment.saved()

    def table(self) -> pd.DataFrame:
        """One row for each method and budget. `low` and `high`: the 95 % interval of the mean on validation."""
        rows = []
        for cell in sorted(self.runs, key=lambda cell: (cell in (FULL, HEAD), cell[0] != REFERENCE, cell)):
            runs, scores = self.runs[cell], self.assessment.scores[cell]
            mean, low, high = t_interval(fmean(scores), stdev(scores) ** 2, len(scores), freedom=len(scores) - 1)
            row = {"method": cell[0], "budget": cell[1], "parameters": max(run.parameters for run in runs)}
            row |= {
                "learning_rate": runs[0].learning_rate,
                "seeds": len(runs),
                "validation": mean,
                "low": low,
                "high": high,
            }
            difference = self.assessment.difference(cell, self.assessment.reference)
            ends = ("difference", "difference_low", "difference_high")
            row |= dict(zip(ends, difference, strict=True)) | {"enough": self.assessment.enough(cell)}
            rows.append(row | {"test": fmean(run.test or 0.0 for run in runs)})
        return pd.DataFrame(rows)

    def all_runs(self) -> pd.DataFrame:
        """All runs in the columns of a comparison."""
        return pd.DataFrame([run.to_row() for run in chain(self.tuning, *self.runs.values())])

    @cached_property
    def unit(self) -> Unit:
        """How the metric is shown."""
        return unit_of([score for scores in self.assessment.scores.values() for score in scores])

    def _points(self, difference: Interval) -> str:
        return f"{difference.text(self.unit)}{self.unit.points}"

    def answers(self) -> dict[str, str]:
        """The plan in words: what is enough, what it saves, whether capacity limits the task, what the next budget loses."""
        found, placed, budget = self.assessment, self.assessment.placed, self.budget
        cell, reference = (placed, budget or 0), found.reference
        about = f"{_named(reference)}, {self.unit.value(fmean(found.scores[reference]))} on validation"
        margin = f"a margin of {self.unit.distance(found.margin)}"
        answers = {"reference": f"{about}; {margin}" + " (one seed's deviation)" * (found.settings.margin is None)}
        if budget is None:
            most = max(found.measured(placed))
            answers["enough"] = (
                f"no budget up to {most:,} parameters is shown to be enough for {placed}; raise `plan.max_seeds`, "
                "`plan.margin` or `plan.highest`"
            )
            return answers | {"capacity": self._capacity()}
        answers["enough"] = f"{_named(cell)}: {self._points(found.difference(cell, reference))} to the reference"
        uniform = found.smallest(REFERENCE)
        needs = f"{uniform:,} parameters" if uniform else f"more than {max(found.measured(REFERENCE)):,} parameters"
        answers["saved"] = f"uniform needs {needs}; by the curves {times(self.saved)} as many"
        if uniform == budget:
            answers["saved"] = "nothing on this grid: uniform needs no more"
        answers["capacity"] = self._capacity()
        answers["below"] = "it is the least budget of the grid"
        if smaller := [(placed, each) for each in found.measured(placed) if each < budget]:
            change = found.difference(smaller[-1], cell)
            answers["below"] = f"at {smaller[-1][1]:,} parameters: {self._points(change)} to the recommended budget"
        ours, theirs = ([run.test or 0.0 for run in self.runs[each]] for each in (cell, reference))
        n = min(len(ours), len(theirs))
        points = self._points(paired_difference(ours[:n], theirs[:n]))
        answers["test"] = f"{self.unit.value(fmean(ours))}, {points} to the reference, {n} seeds"
        if edges := self._at_edge():
            answers["rates"] = f"the best rate is at the end of its grid at {edges}: widen `training.learning_rate`"
        return answers

    def _capacity(self) -> str:
        """Whether the largest placed budget is better than the smallest."""
        placed, budgets = self.assessment.placed, self.assessment.measured(self.assessment.placed)
        gain = self.assessment.difference((placed, budgets[-1]), (placed, budgets[0]))
        gains = f"{self._points(gain)} from {budgets[0]:,} to {budgets[-1]:,} parameters"
        if gain.high < self.assessment.margin:
            return f"does not limit the task: {gains}"
        return f"limits the task: {gains}" if gain.low > 0 else f"cannot be told from these seeds: {gains}"

    def _at_edge(self) -> str:
        """The cells whose rate is the largest or the smallest of several."""
        ends = (min(self.rates), max(self.rates)) if len(self.rates) > 2 else ()
        return ", ".join(_named(cell) for cell, runs in self.runs.items() if cell[1] and runs[0].learning_rate in ends)


def _named(cell: Cell) -> str:
    return (
        f"{cell[0]} at {cell[1]:,} parameters" if cell[1] else {"full": "full fine-tuning", "head": "the head"}[cell[0]]
    )


@checked
@led_by_first
def plan_budget(
    task: Task | str | Mapping[str, Any],
    *,
    targets: Sequence[TargetModule] | None = None,
    profile: Profile | None = None,
    seeds: Sequence[int] | None = None,
    training: TrainingSettings | Mapping[str, Any] | None = None,
    settings: PlanSettings | Mapping[str, Any] | None = None,
    towers: Mapping[str, Any] | None = None,
    allocation: AllocationSettings | Mapping[str, Any] | None = None,
    kept_in: AnyPath | None = None,
    on_run: Callable[[int, int], object] = lambda done, total: None,
    **overrides: Any,
) -> BudgetPlan:
    """Find how few adapter parameters a task needs: accuracy against parameters, for uniform and for placed ranks.

    The first budgets lie far apart; the crossing of the margin is bisected on both curves, and seeds are added where the
    decision is open. Every cell has its own learning rate. Validation decides; the test split only reports.

    Args:
        task: Where model, data, loss and metric come from, or what `load_task` takes.
        targets: Default: the profile's, or all that are found.
        profile: Default: taken over an epoch of the training batches.
        seeds: Of the reported runs, `max_seeds` or more; default: from 0.
        training: Every cell is tuned over its learning rates (full fine-tuning over a thirtieth of them).
        settings: The grid, the reference and the margin; `overrides` are values of it.
        towers: Bounds on towers at every budget, as `ParameterBudget` takes them.
        allocation: Bounds on ranks at every budget, and options of its strategy.
        kept_in: Folder that keeps every run, shared with `compare`.
        on_run: Called with the number of runs done, and of runs known to be needed so far.
        **overrides: See `settings`.

    >>> import rankscope as rs
    >>> short = TrainingSettings(steps=2, learning_rate=0.01)
    >>> plan = plan_budget("digits-shift", training=short, n_seeds=2, max_seeds=2, lowest=1, highest=2, ceiling=False)
    >>> plan.table()[["method", "budget"]].to_records(index=False).tolist()[:3]
    [('uniform', 6912), ('uniform', 13824), ('one-shot', 6912)]
    """
    task, settings, training = load_task(task), PlanSettings.of(settings, **overrides), TrainingSettings.of(training)
    seeds = list(range(settings.max_seeds) if seeds is None else seeds)
    bounds = AllocationSettings.of(allocation)
    contenders = _contenders(settings, seeds, bounds)
    if profile is None and contenders[settings.strategy].needs_profile:
        profile = profile_task(task, targets=targets)
    if targets is None:
        targets = find_targets(task.build_model()) if profile is None else profile.targets
    grid = budget_grid(targets, settings, bounds)
    cells = _Cells(task, contenders, targets, profile, training, settings, seeds, kept_in, on_run, towers)
    found = explore(grid, settings, cells.train, head=bool(getattr(task, "head_modules", ())))
    budget = found.smallest(settings.strategy)
    method = cells.specs[settings.strategy, budget].method if budget else None
    allocation = getattr(method, "allocation", None)
    rates = training.learning_rates
    return BudgetPlan(
        task=task, assessment=found, runs=cells.runs, tuning=cells.tuning, rates=rates, allocation=allocation
    )


def _contenders(settings: PlanSettings, seeds: Sequence[int], allocation: AllocationSettings) -> dict[str, Contender]:
    """Uniform, what places ranks, and the bounds; raises a SettingsError where they cannot be planned."""
    if len(set(seeds)) < settings.max_seeds:
        raise SettingsError(f"`seeds` must hold `max_seeds` = {settings.max_seeds} seeds, but holds {len(set(seeds))}.")
    seeds_that_tune(settings.n_tuning_seeds, seeds)
    if settings.strategy in (REFERENCE, "random", *UNLIMITED):
        raise SettingsError(f"`strategy` must place ranks, but got {settings.strategy!r}; take `one-shot`.")
    found = find_methods([REFERENCE, settings.strategy, *UNLIMITED], seed=min(seeds), allocation=allocation)
    return {each.name: each for each in found}


@dataclass
class _Cells:
    """The cells trained so far, each with the rate that was tuned for it."""

    task: Task
    contenders: Mapping[str, Contender]
    targets: Sequence[TargetModule]
    profile: Profile | None
    training: TrainingSettings
    settings: PlanSettings
    seeds: Sequence[int]
    kept_in: AnyPath | None
    on_run: Callable[[int, int], object]
    towers: Mapping[str, Any] | None
    specs: dict[Cell, RunSpec] = field(default_factory=dict)
    runs: dict[Cell, list[RunResult]] = field(default_factory=dict)
    tuning: list[RunResult] = field(default_factory=list)
    n_done: int = 0

    def train(self, cells: Sequence[Cell], n: int) -> Scores:
        """Train these cells on the first `n` seeds: new ones are tuned, others go on from the seeds they have.

        Returns the validation metrics of all cells by seed.
        """
        for have in sorted({len(self.runs.get(cell, ())) for cell in cells}):
            mine = [cell for cell in dict.fromkeys(cells) if len(self.runs.get(cell, ())) == have]
            if have < n:
                self._train(mine, self.seeds[have:n])
        return {cell: [run.validation for run in runs] for cell, runs in self.runs.items()}

    def _train(self, cells: Sequence[Cell], seeds: Sequence[int]) -> None:
        grids = [[self.specs[cell]] if cell in self.specs else self._grid(cell) for cell in cells]
        tuning_seeds, before = seeds_that_tune(self.settings.n_tuning_seeds, seeds), self.n_done

        def done(number: int, total: int) -> None:
            self.n_done = before + number
            self.on_run(self.n_done, before + total)

        settings = self.settings
        run = partial(run_tuned, n_jobs=settings.n_jobs, backend=settings.backend, kept_in=self.kept_in, on_run=done)
        found = run(self.task, grids, seeds=seeds, tuning_seeds=tuning_seeds)
        for cell, grid, runs in zip(cells, grids, found, strict=True):
            reported = [each for each in runs if each.role == REPORTED]
            chosen = (reported[0].variant, reported[0].learning_rate)
            self.specs[cell] = next(
                spec for spec in grid if (spec.method.variant, spec.training.peak_learning_rate) == chosen
            )
            self.runs.setdefault(cell, []).extend(reported)
            self.tuning += runs[: -len(reported)]

    def _grid(self, cell: Cell) -> list[RunSpec]:
        name, limit = cell
        one = sum(target.rank_cost for target in self.targets)
        budget = ParameterBudget(limit or one, towers=self.towers or {})
        variants = self.contenders[name].make(self.targets, budget, self.profile)
        labels = {"name": name, "budget": limit, "factor": (limit or one) / one}
        return make_grid(variants, self.training, **labels)
