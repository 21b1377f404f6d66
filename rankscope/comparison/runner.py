"""`compare`: methods by name at equal budgets, each tuned alike, and every run as one row of a table."""

from __future__ import annotations

import difflib
import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import rankscope
from rankscope.allocation import RankAllocation
from rankscope.budget import ParameterBudget
from rankscope.control import count_moved, write_decisions
from rankscope.distributed import best_device, one_gpu_each
from rankscope.errors import FileError, SettingsError, TaskError
from rankscope.files import FORMAT, digest, read_json, read_parquet, replacing, require_same, write_json
from rankscope.plugins import user_errors, user_function
from rankscope.profiling import Profile
from rankscope.settings import ControllerSettings
from rankscope.strategies import NEEDS_PROFILE, STRATEGIES, allocate
from rankscope.targets import TargetModule, find_targets, fingerprint_targets
from rankscope.tasks import Task, evaluate, fingerprint_task, profile_task
from rankscope.training import AdaLora, Eva, FullFineTuning, HeadOnly, Lora, Method, TrainingConfig, save_adapter, train

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


@contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread inside, or what OMP_NUM_THREADS says, so that a run's figures do not depend on the number of jobs."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def reset_peak_memory() -> bool:
    """Starts measuring the peak anew; whether the system offers it."""
    device = best_device().type
    if device == "cuda":
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)
        return True
    try:
        _CLEAR.write_text("5")  # the resident set's high-water mark; see proc(5)
    except OSError:  # not Linux, or a container that forbids it
        return False
    return device == "cpu"


def peak_memory() -> int:
    """Bytes at the peak since `reset_peak_memory`: of all GPUs, else of this process."""
    if best_device().type == "cuda":
        return sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
    return 1024 * int(lines["VmHWM"].split()[0])


@cache
def source_revision() -> str:
    """`git describe` of rankscope's sources, or its version where they are no checkout."""
    folder = Path(rankscope.__file__).parent
    found = subprocess.run(
        ["git", "-C", str(folder), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or f"v{rankscope.__version__}"


N_RANDOM = 3  # draws
SCHEDULES = (
    (32.0, 0.7),
    (128.0, 0.7),
    (512.0, 0.7),
    (128.0, 0.4),
)  # of AdaLoRA: alpha, share of steps when ranks settle
RHOS = (2.0, 1.0)  # of EVA: with its own ranks, whose parameters may exceed uniform's, and with uniform ranks
SHARES = (0.75,)  # of AdaLoRA's ranks: its budget is in ranks, and those that it keeps cost up to 1.3 times uniform's
CONTROLLER = "controller"
SEARCHED = "searched"
UNLIMITED = ("full", "head")  # shown beside the others, not at equal parameters
RATE_FACTORS = {"full": 1 / 30}  # all weights want far lower rates than adapters
QUERY_VALUE = ("q_proj", "v_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a method is made for.

    Attributes:
        targets: The target modules.
        budget: In adapter parameters.
        profile: For strategies that need one.
        searched: A search's allocation at this budget; None where there was no search.
        controller: The controller's settings.
        seed: Of random draws.
        base_dir: What relative paths of a user's own methods start from.
    """

    targets: tuple[TargetModule, ...]
    budget: ParameterBudget
    profile: Profile | None = None
    searched: RankAllocation | None = None
    controller: ControllerSettings = field(default_factory=ControllerSettings)
    seed: int = 0
    base_dir: Path = Path()

    def scaled(self, factor: float) -> Terms:
        """The same at a multiple of the budget; what was searched holds for its own budget only.

        Raises:
            SettingsError: Nothing is left of the budget.
        """
        if factor == 1.0:
            return self
        if not 1 <= factor * self.budget.limit < 2**63:
            raise SettingsError(
                f"`budgets` must leave a budget between 1 and 2^63 parameters, but {factor:g} times {self.budget.limit:,} is "
                "not; change the factor."
            )
        return replace(self, budget=ParameterBudget(round(factor * self.budget.limit)), searched=None)

    @property
    def uniform_rank(self) -> int:
        """The rank that uniform LoRA has at this budget, at least 1: the budget of peers that count in ranks."""
        return max(1, self.budget.limit // sum(target.rank_cost for target in self.targets))

    def allocate(self, strategy: str, seed: int = 0) -> RankAllocation:
        """A one-shot allocation at these terms, or the searched one."""
        if strategy != SEARCHED:
            return allocate(strategy, targets=self.targets, budget=self.budget, profile=self.profile, seed=seed)
        if self.searched is None:
            raise SettingsError("`searched` needs a search at this budget, but there is none; run `rankscope search`.")
        return self.searched.renamed(SEARCHED)


def need_profile(names: Sequence[str]) -> bool:
    """Whether one of the methods cannot be made without a profile.

    Raises:
        SettingsError: One of them is not known; better said before a profile is taken.
    """
    for name in names:
        _check_known(name)
    return any(".py:" in name or name.removeprefix(f"{CONTROLLER}-") in NEEDS_PROFILE for name in names)


def known_methods() -> tuple[str, ...]:
    """All names that `make_methods` takes, besides `path/to/file.py:function`."""
    starts = [name for name in (*STRATEGIES, SEARCHED) if name not in ("random", "uniform")]
    return (*STRATEGIES, SEARCHED, *_OTHERS, *(f"{CONTROLLER}-{name}" for name in starts))


def make_methods(name: str, terms: Terms) -> dict[str, Variants]:
    """The methods of a name, by the name that each is shown under: `random` is several.

    Raises:
        SettingsError: No such method, or it needs what the terms lack.
    """
    _check_known(name)
    if ".py:" in name:
        return {name: _users(name, terms)}
    if name == "random":
        return {f"random {n + 1}": Lora(terms.allocate("random", terms.seed + n)) for n in range(N_RANDOM)}
    if name in STRATEGIES or name == SEARCHED:
        return {name: Lora(terms.allocate(name))}
    if name in _OTHERS:
        return {name: _OTHERS[name](terms)}
    return {name: Lora(terms.allocate(name.removeprefix(f"{CONTROLLER}-")), terms.controller)}


def _check_known(name: str) -> None:
    if ".py:" in name or name in known_methods():
        return
    close = difflib.get_close_matches(name, known_methods(), n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known_methods())}."
    raise SettingsError(f"`methods` must be known or `path/to/file.py:function`, but {name!r} is not; {hint}")


def _query_value(terms: Terms) -> Method:
    """Uniform over the query and value projections, as LoRA's first paper."""
    chosen = tuple(target for target in terms.targets if target.role in QUERY_VALUE)
    if not chosen:
        raise SettingsError("`qv-only` needs modules of the roles q_proj and v_proj, but the targets have none.")
    found = allocate("uniform", targets=chosen, budget=terms.budget)
    return Lora(RankAllocation.from_ranks(terms.targets, found.ranks, strategy="qv-only", budget=terms.budget.limit))


def _adalora(terms: Terms) -> list[Method]:
    return [
        AdaLora(terms.targets, terms.uniform_rank, alpha, share, settled)
        for alpha, settled in SCHEDULES
        for share in SHARES
    ]


def _users(spec: str, terms: Terms) -> Variants:
    with user_function(spec, terms.base_dir, gives="an allocation or a method", error=SettingsError) as function:
        found = function(targets=terms.targets, budget=terms.budget, profile=terms.profile)
        if isinstance(found, RankAllocation):
            return Lora(replace(found, strategy=spec.rpartition(":")[2], budget=terms.budget.limit))
        if not all(hasattr(found, name) for name in ("name", "variant", "adapt", "follow")):
            raise SettingsError(f"`{spec}` must give a RankAllocation or a Method, but gave a {type(found).__name__}.")
        own: Method = found
        return own


_OTHERS: Mapping[str, Callable[[Terms], Variants]] = {
    "uniform-rslora": lambda terms: Lora(terms.allocate("uniform"), rank_stabilised=True),
    "qv-only": _query_value,
    CONTROLLER: lambda terms: Lora(terms.allocate("uniform"), terms.controller),
    "adalora": _adalora,
    "eva": lambda terms: [Eva(terms.targets, terms.uniform_rank, rho) for rho in RHOS],
    "full": lambda terms: FullFineTuning(),
    "head": lambda terms: HeadOnly(),
}


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
            "format": FORMAT, **task, "method": digest(self.method), "training": self.config.terms(), "seed": self.seed,
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
        learning_rate=cell.config.peak_learning_rate,
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
            FileError: The file is no run, or another's.
        """
        path = self.stem.with_suffix(".json")
        if not path.exists():
            return None
        row = read_json(path, what="a run")
        remedy = "delete it, and it is done again."
        require_same(row.pop("made_from", {}), self.made_from, what=f"`{path}`", remedy=remedy)
        if set(row) != {field.name for field in fields(Run)} - {"decisions"}:
            raise FileError(f"`{path}` must hold a run, but its keys are others; {remedy}")
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
        SettingsError: All variants of a method end above its limit.
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
            learning_rate=terms.config.peak_learning_rate,
            runs=tuple(runs[i * n : (i + 1) * n]),
            tuning=tuple(run for each in tried[i] for run in each),
        )
        for i, terms in enumerate(chosen)
    ]


def _grid(candidate: Variants, config: TrainingConfig, learning_rates: Sequence[float]) -> list[Cell]:
    """Every variant at every rate."""
    variants = candidate if isinstance(candidate, Sequence) else [candidate]
    return [
        Cell(method=as_method(variant), config=config.at(rate), seed=0, with_test=False)
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
        raise SettingsError(
            f"`{grid[0].method.name}` must end within {limit:,} parameters to be compared, but its variants end with "
            f"{min(most):,} or more; raise the budget, or leave it out."
        )
    return grid[max(within, key=lambda place: fmean(run.validation for run in tried[place]))]


SCHEMA = 2
REFERENCE = "uniform"
DEFAULT_METHODS = ("uniform", "one-shot", "random", "controller", "adalora", "eva")
REPORTED, TUNING = "reported", "tuning"
_METADATA = b"rankscope"
_COLUMNS = pa.schema(
    [
        *(
            pa.field(name, pa.string(), False)
            for name in ("task", "metric", "method", "variant", "role", "revision", "ranks")
        ),
        *(
            pa.field(name, pa.int64(), False)
            for name in ("budget", "seed", "steps", "parameters", "n_moved", "cost_steps")
        ),
        *(pa.field(name, pa.float64(), False) for name in ("factor", "learning_rate", "validation", "wall_seconds")),
        pa.field("test", pa.float64()),
        pa.field("peak_memory", pa.int64()),
        pa.field("schema", pa.int64(), False),
    ]
)


@dataclass(frozen=True, eq=False)
class Comparison:
    """All runs of a comparison.

    Attributes:
        runs: One row a run: `study`, `task`, `metric`, `method`, `variant`, `budget` (parameters; 0: unlimited), `factor` (of the
            study's budget), `role` (`reported` or `tuning`), `seed`, `learning_rate`, `steps`, `parameters`, `validation`,
            `test`, `ranks` (JSON), `n_moved`, `wall_seconds`, `peak_memory`, `revision`, `cost_steps` (of a search, in
            optimizer steps).
        decisions: Of the first reported run of each controlled method, by its name, at the study's budget.
        made_from: What the runs depend on: fingerprints of task, data and weights, budget, schedule, seeds.
    """

    runs: pd.DataFrame
    decisions: Mapping[str, pd.DataFrame]
    made_from: Mapping[str, Any] = field(default_factory=dict)

    def to_parquet(self, path: str | os.PathLike[str]) -> Path:
        """Writes the runs, and in the file's metadata what they depend on, atomically; returns the path."""
        table = pa.Table.from_pandas(self.runs.assign(schema=SCHEMA), preserve_index=False)
        metadata = {**(table.schema.metadata or {}), _METADATA: json.dumps(dict(self.made_from)).encode()}
        with replacing(path) as temporary:
            pq.write_table(table.replace_schema_metadata(metadata), temporary)
        return Path(path)


def compare(
    task: Task,
    methods: Sequence[str] = DEFAULT_METHODS,
    *,
    budget: ParameterBudget,
    targets: Sequence[TargetModule] | None = None,
    profile: Profile | None = None,
    searched: RankAllocation | None = None,
    search_steps: int = 0,
    controller: ControllerSettings | None = None,
    training: TrainingConfig | None = None,
    learning_rates: Sequence[float] | None = None,
    seeds: Sequence[int] = range(5),
    tuning_seeds: Sequence[int] = (10_000, 10_001),
    budgets: Sequence[float] = (1.0,),
    uniform_budgets: Sequence[float] = (),
    n_jobs: int = 1,
    kept_in: str | os.PathLike[str] | None = None,
    study: str | None = None,
    base_dir: Path = Path(),
    on_run: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Compares methods at equal parameters, steps and data order, each at its own best learning rate.

    Uniform LoRA always takes part. Rate, and variant where a method has several, are chosen on validation with
    `tuning_seeds`; then every method is trained on the same `seeds`, and the test split is read once.

    Args:
        task: Where model, data, loss and metric come from.
        methods: Names (`rankscope.comparison.known_methods()`), or `path/to/file.py:function`, which gets `targets`, `budget` and
            `profile` and gives a `RankAllocation` or a `rankscope.training.Method`.
        budget: In adapter parameters. Variants that end above it are not chosen, and a method that has no other is refused.
        targets: The target modules; default: the profile's, or all that are found.
        profile: For methods that need one; default: taken over an epoch of the training batches, where a method does.
        searched: What a search recommends at this budget.
        search_steps: Optimizer steps that the search took, shown as its cost.
        controller: Settings of the controller's methods.
        training: The schedule.
        learning_rates: One grid for all methods (a thirtieth of it for full fine-tuning); default: the schedule's rate alone.
        seeds: Of the runs that are reported; at least 3 for intervals and tests.
        tuning_seeds: Of the runs that choose; none of `seeds`.
        budgets: Factors of the budget at which all methods are compared; 1, the budget itself, among them.
        uniform_budgets: Further factors for uniform alone: how much it must grow to match the others.
        n_jobs: Processes.
        kept_in: Folder that keeps every run; those in it are not done again, unless something that they depend on changed.
        study: The name that results show; default: the task's.
        base_dir: What relative paths of a user's own methods start from.
        on_run: Called with the number of runs done and of runs in all.

    Raises:
        SettingsError: A method that is not known, lacks a search, or ends above the budget; seeds that overlap; budgets
            without 1.

    >>> import rankscope as rs
    >>> task = rs.load_task("digits-shift")
    >>> short = rs.TrainingConfig(steps=2, learning_rate=0.01)
    >>> found = compare(task, ["uniform", "head"], budget=rs.ParameterBudget(6912), training=short, seeds=range(2))
    >>> found.runs.groupby("method", sort=False).size().to_dict()
    {'uniform': 2, 'head': 2}
    """
    training = training or TrainingConfig()
    rates = list(learning_rates or training.learning_rates)
    names = list(dict.fromkeys([REFERENCE, *methods]))
    check_terms(seeds, tuning_seeds, budgets)
    if profile is None and need_profile(names):
        profile = profile_task(task, targets=targets, budget=budget)
    if targets is None:
        targets = find_targets(task.build_model()) if profile is None else profile.targets
    terms = Terms(
        targets=tuple(targets), budget=budget, profile=profile, searched=searched, seed=min(seeds),
        controller=controller or ControllerSettings(), base_dir=base_dir,
    )  # fmt: skip
    entries = _entries(names, terms, budgets, uniform_budgets)
    repeats = repeat_all(
        task,
        [entry.variants for entry in entries],
        training,
        learning_rates=rates,
        seeds=seeds,
        tuning_seeds=tuning_seeds,
        limits=[entry.limit for entry in entries],
        rate_factors=[RATE_FACTORS.get(entry.name, 1.0) for entry in entries],
        n_jobs=n_jobs,
        kept_in=kept_in,
        on_run=on_run,
    )
    rows = [
        {"study": study or task.name, **_row(task, entry, run, role, search_steps)}
        for entry, found in zip(entries, repeats, strict=True)
        for role, runs in ((TUNING, found.tuning), (REPORTED, found.runs))
        for run in runs
    ]
    made_from = {
        "format": FORMAT, **fingerprint_task(task), "study": study or task.name, "targets": fingerprint_targets(targets),
        "budget": budget.limit, "training": training.terms(), "learning_rates": rates, "seeds": list(seeds),
    }  # fmt: skip
    return Comparison(pd.DataFrame(rows), _first_decisions(entries, repeats), made_from)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """A method at one budget."""

    name: str
    variants: Variants
    factor: float
    limit: int | None


def _entries(
    names: Sequence[str], terms: Terms, budgets: Sequence[float], uniform_budgets: Sequence[float]
) -> list[_Entry]:
    found = []
    for factor in sorted({*budgets, *uniform_budgets}):
        at = terms.scaled(factor)
        for name in names if factor in budgets else [REFERENCE]:
            unlimited = name in UNLIMITED
            if unlimited and factor != 1.0:
                continue
            found += [
                _Entry(name=shown, variants=variants, factor=factor, limit=None if unlimited else at.budget.limit)
                for shown, variants in make_methods(name, at).items()
            ]
    return found


def check_terms(seeds: Sequence[int], tuning_seeds: Sequence[int], budgets: Sequence[float]) -> None:
    """Checks what a comparison is asked for, before anything is trained.

    Raises:
        SettingsError: There are no seeds, seeds that tune are reported too, or the budget itself is not compared.
    """
    if 1.0 not in budgets:
        held = ", ".join(f"{factor:g}" for factor in budgets) or "none"
        raise SettingsError(
            f"`budgets` must hold the factor 1, the study's own budget, but holds {held}; add 1, or change `budget`."
        )
    if not seeds:
        raise SettingsError("`seeds` must hold at least one seed, but is empty.")
    if shared := set(seeds) & set(tuning_seeds):
        raise SettingsError(f"`tuning_seeds` must be none of `seeds`, but share {min(shared)}; take others.")


def _row(task: Task, entry: _Entry, run: Run, role: str, search_steps: int) -> dict[str, Any]:
    values = {key: value for key, value in asdict(run).items() if key not in ("method", "decisions", "ranks")}
    return {
        "task": task.name,
        "metric": task.metric,
        "method": entry.name,
        "budget": entry.limit or 0,
        "factor": entry.factor,
        "role": role,
        **values,
        "ranks": json.dumps(run.ranks),
        "cost_steps": search_steps if SEARCHED in entry.name else 0,
    }


def _first_decisions(entries: Sequence[_Entry], repeats: Sequence[Repeats]) -> dict[str, pd.DataFrame]:
    found = {}
    for entry, each in zip(entries, repeats, strict=True):
        decisions = each.runs[0].decisions
        if decisions is not None and entry.factor == 1.0:
            found[entry.name] = decisions
    return found
