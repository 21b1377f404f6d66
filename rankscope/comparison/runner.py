"""`compare`: methods at equal parameters, each at its own best learning rate; every run is one record."""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial
from itertools import chain, islice
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
import torch

import rankscope
from rankscope.allocation import RankAllocation
from rankscope.budget import ParameterBudget
from rankscope.comparison.cluster import workers
from rankscope.control import count_moved, write_decisions
from rankscope.distributed import (
    best_device,
    by_first,
    everywhere,
    is_first,
    led_by_first,
)
from rankscope.errors import FileError, SettingsError, TaskError, checked, did_you_mean
from rankscope.files import (
    FORMAT,
    SEALED,
    AnyPath,
    digest,
    read_json,
    read_parquet,
    replacing,
    require_same,
    write_json,
)
from rankscope.lora import ia3_config, vera_config
from rankscope.maps import html_card, ranks_png
from rankscope.plugins import entry_points, load_entry_point, user_errors, user_function
from rankscope.profiling import Profile
from rankscope.searching import SearchResult
from rankscope.settings import AllocationSettings, CompareSettings, ControllerSettings, TrainingSettings
from rankscope.strategies import NEEDS_PROFILE, STRATEGIES, allocate
from rankscope.targets import TargetModule, find_targets, fingerprint_targets
from rankscope.tasks import Task, evaluate, fingerprint_task, load_task, profile_task
from rankscope.training import AdaLora, Eva, FullFineTuning, HeadOnly, Lora, Method, PeftAdapter, save_adapter, train

SCHEMA = 2
REFERENCE, CONTROLLER, SEARCHED = "uniform", "controller", "searched"
REPORTED, TUNING = "reported", "tuning"
FIRST_TUNING_SEED = 10_000
FROM_RANK_1 = ("adalora", "eva")  # give every module a rank, so that they have no variant below uniform rank 1
UNLIMITED = ("full", "head")  # shown beside the others, not at equal parameters
VERA = ("vera-16", "vera-64", "vera-256")  # by their r, at sizes of their own, as (IA)³
N_RANDOM = 3
SHOWN_MAPS = 4  # in notebooks
SCHEDULES = ((32.0, 0.7), (128.0, 0.7), (512.0, 0.7), (128.0, 0.4))  # of AdaLoRA: alpha, and when ranks settle
SHARES = (0.75,)  # of AdaLoRA's ranks: those that it keeps cost up to 1.3 times uniform's
RHOS = (2.0, 1.0)  # of EVA: its own ranks, whose parameters may exceed uniform's; uniform ranks

Variants = RankAllocation | Method | Sequence[RankAllocation | Method]
Function = Callable[..., Variants]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """One training to be done."""

    method: Method
    training: TrainingSettings
    seed: int = 0
    role: str = REPORTED  # reads the test split as well; `tuning`: validation only
    name: str = ""
    budget: int = 0  # 0: no limit
    factor: float = 1.0  # of the study's budget
    cost_steps: int = 0  # optimizer steps of the search that the method comes from
    save_to: AnyPath | None = None

    def terms(self, task: Mapping[str, Any]) -> dict[str, Any]:
        """What the run's results depend on, given the task's fingerprints."""
        own = {"method": digest(self.method), "training": self.training.terms(), "seed": self.seed}
        return {"format": FORMAT, **task, **own, "with_test": self.role == REPORTED}

    def labels(self, task: Task) -> dict[str, Any]:
        """The fields of its result that are no outcome."""
        names = {"study": task.name, "task": task.name, "metric": task.metric, "method": self.name or self.method.name}
        return names | {key: getattr(self, key) for key in ("budget", "factor", "role", "seed", "cost_steps")}


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """One training and its outcome: a row of `comparison.parquet`, and of the file that keeps the run."""

    study: str
    task: str
    metric: str
    method: str
    budget: int
    factor: float
    role: str
    variant: str
    seed: int
    learning_rate: float
    steps: int
    validation: float
    test: float | None
    parameters: int  # of the adapters at the end; without adapters, all that is trained outside the head
    n_moved: int
    wall_seconds: float
    peak_memory: int | None  # bytes, of all GPUs, else of the process
    revision: str
    ranks: dict[str, int] | None  # at the end
    cost_steps: int
    test_metrics: dict[str, float] | None = None  # all that the task evaluates on the test split
    decisions: pd.DataFrame | None = field(default=None, compare=False)  # of a controller; no column of the row

    def to_row(self) -> dict[str, Any]:
        """The plain values; ranks and test metrics as JSON."""
        plain = {key: value for key, value in vars(self).items() if key != "decisions"}
        return {**plain, "ranks": json.dumps(self.ranks), "test_metrics": json.dumps(self.test_metrics)}

    @classmethod
    def from_row(cls, row: Mapping[str, Any], decisions: pd.DataFrame | None = None) -> RunResult:
        """The run of a row."""
        held = {"ranks": json.loads(row["ranks"]), "test_metrics": json.loads(row.get("test_metrics", "null"))}
        return cls(**{**row, **held}, decisions=decisions)


def run_one(task: Task, spec: RunSpec, file: tuple[Path, Mapping[str, Any]] | None = None) -> RunResult:
    """Train once, with one torch thread or as many as OMP_NUM_THREADS says, so that figures do not depend on `n_jobs`.

    The run is kept in `file`: a path without suffix, and what the run depends on. Several processes share the training.
    """
    if file is not None and spec.save_to is None and (kept := _read(*file)) is not None:
        return kept  # by another process, or by a worker that died before it could tell
    return everywhere(_run, task, spec, file)


def _run(task: Task, spec: RunSpec, file: tuple[Path, Mapping[str, Any]] | None) -> RunResult:
    """Train on this process and on the others of its group; the first evaluates and writes."""
    measured, threads = _peak_memory(reset=True) is not None, torch.get_num_threads()
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    try:
        with user_errors("the study's own code", TaskError):  # where a worker's traceback still is
            model, result = train(task, spec.method, spec.training, seed=spec.seed)
            tested = by_first(lambda: evaluate(task, model, "test")) if spec.role == REPORTED else None
    finally:
        torch.set_num_threads(threads)
    if spec.save_to is not None and is_first():
        save_adapter(model, task, spec.save_to)
    run = RunResult(
        **spec.labels(task),
        variant=spec.method.variant,
        learning_rate=spec.training.peak_learning_rate,
        steps=spec.training.steps,
        validation=result.metrics[task.metric],
        test=None if tested is None else tested[task.metric],
        test_metrics=tested,
        parameters=result.parameters,
        n_moved=0 if result.decisions is None else count_moved(result.decisions),
        wall_seconds=result.wall_seconds,
        peak_memory=_peak_memory() if measured else None,
        revision=source_revision(),
        ranks=None if result.allocation is None else dict(result.allocation.ranks),
        decisions=result.decisions,
    )
    if file is not None and is_first():
        stem, terms = file
        if run.decisions is not None:
            write_decisions(run.decisions, stem.with_suffix(".parquet"))
        write_json(stem.with_suffix(".json"), {**run.to_row(), "made_from": terms}, sealed=True)
    return run


def _peak_memory(*, reset: bool = False) -> int | None:
    """Bytes at the peak, which may be reset first: of all GPUs, else of this process; None where the system does not tell."""
    device = best_device().type
    if device == "cuda":
        if not torch.cuda.is_initialized():  # in a fresh worker process: nothing is allocated, and a reset raises
            return 0
        ask = torch.cuda.reset_peak_memory_stats if reset else torch.cuda.max_memory_allocated
        return sum(ask(index) or 0 for index in range(torch.cuda.device_count()))
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")  # the resident set's high-water mark; see proc(5)
        (kilobytes,) = re.findall(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    except OSError:  # not Linux, or a container that forbids it
        return None
    return 1024 * int(kilobytes) if device == "cpu" else None


@cache
def source_revision() -> str:
    """`git describe` of rankscope's sources, or its version where they are no checkout."""
    command = ["git", "-C", str(Path(rankscope.__file__).parent), "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or f"v{rankscope.__version__}"


def run_all(
    task: Task,
    specs: Sequence[RunSpec],
    *,
    n_jobs: int = 1,
    backend: str = "loky",
    kept_in: AnyPath | None = None,
    on_done: Callable[[int], object] = lambda done: None,
) -> list[RunResult]:
    """Do all runs, `n_jobs` at a time; with several GPUs, each process uses one. `backend`: see `CompareSettings`.

    Runs that depend on the same are done once, or read if the folder `kept_in` holds them. One to be saved is always done.
    """
    kept_in = None if kept_in is None else Path(kept_in).absolute()  # workers may be elsewhere
    facts = {} if kept_in is None else fingerprint_task(task)
    terms = [spec.terms(facts) for spec in specs]
    keys = [(digest(each), spec.save_to) for spec, each in zip(specs, terms, strict=True)]
    known: dict[Any, RunResult | None] = {}  # None: to be done
    todo = []
    for spec, each, key in zip(specs, terms, keys, strict=True):
        if key in known:
            continue
        file = None if kept_in is None else (kept_in / key[0], each)
        known[key] = _read(*file) if file and spec.save_to is None else None
        if known[key] is None:
            todo.append((spec, file))
    found: list[RunResult] = []
    with workers(backend, n_jobs, kept_in) if todo else nullcontext() as start:
        # joblib warns of results that nobody reads, also of none
        fresh: Iterator[RunResult] = start(run_one, [(task, *each) for each in todo]) if start else iter(())
        for spec, key in zip(specs, keys, strict=True):
            run = known[key] = known[key] or next(fresh)
            found.append(replace(run, **spec.labels(task)))
            on_done(len(found))
    return found


def _read(stem: Path, terms: Mapping[str, Any]) -> RunResult | None:
    """A kept run; None where there is none."""
    path, decisions = stem.with_suffix(".json"), stem.with_suffix(".parquet")
    if not path.exists():
        return None
    row = read_json(path, what="a run")
    remedy = "delete it, and it is done again."
    require_same(row.pop("made_from", {}), terms, what=f"`{path}`", remedy=remedy)
    if {*row, "test_metrics"} != {each.name for each in fields(RunResult)} - {"decisions"}:  # older runs have none
        raise FileError(f"`{path}` must hold a run, but its keys are others; {remedy}")
    table = read_parquet(decisions, what="decisions").to_pandas() if decisions.exists() else None
    return RunResult.from_row(row, table)


def make_grid(variants: Variants, training: TrainingSettings, **labels: Any) -> list[RunSpec]:
    """Every variant of a method at every learning rate that suits it; `labels` are fields of `RunSpec`."""
    each = variants if isinstance(variants, Sequence) else [variants]
    methods = [Lora(variant) if isinstance(variant, RankAllocation) else variant for variant in each]
    rates = [(method, method.rate_factor * rate) for method in methods for rate in training.learning_rates]
    return [RunSpec(method=method, training=training.at(rate), **labels) for method, rate in rates]


def run_tuned(
    task: Task,
    grids: Sequence[Sequence[RunSpec]],
    *,
    seeds: Sequence[int],
    tuning_seeds: Sequence[int] = (0, 1),
    n_jobs: int = 1,
    backend: str = "loky",
    kept_in: AnyPath | None = None,
    save_first_to: AnyPath | None = None,
    on_run: Callable[[int, int], object] = lambda done, total: None,
) -> list[list[RunResult]]:
    """Train every method on the same seeds, each with the variant and learning rate that are best for it on validation.

    Each grid holds the runs to choose from for one method (`make_grid`); a single run is not tuned. Keep `tuning_seeds` apart
    from `seeds`. The adapter of the last method's first seed goes to `save_first_to`. `on_run` is called with the number of runs
    done and of runs in all. Returns the runs of each method: those that tuned, then the reported ones in the order of the seeds.
    """
    for spec in chain(*grids):
        spec.method.check(task, spec.training)
    tuned = [spec for grid in grids if len(grid) > 1 for spec in grid]
    trials = [replace(spec, seed=seed, role=TUNING) for spec in tuned for seed in tuning_seeds]
    total = len(trials) + len(grids) * len(seeds)
    run = partial(run_all, task, n_jobs=n_jobs, backend=backend, kept_in=kept_in)
    found = iter(run(trials, on_done=lambda done: on_run(done, total)))
    tried = [[list(islice(found, len(tuning_seeds))) for _ in grid] if len(grid) > 1 else [] for grid in grids]
    chosen = map(_best, grids, tried)
    specs = [replace(spec, seed=seed) for spec in chosen for seed in seeds]
    if save_first_to is not None:
        specs[-len(seeds)] = replace(specs[-len(seeds)], save_to=save_first_to)
    reported = iter(run(specs, on_done=lambda done: on_run(len(trials) + done, total)))
    return [[*chain(*runs), *islice(reported, len(seeds))] for runs in tried]


def _best(grid: Sequence[RunSpec], tried: Sequence[Sequence[RunResult]]) -> RunSpec:
    """The run with the best mean validation metric of those within the budget; the only one is not tried."""
    if not tried:
        return grid[0]
    limit, most = grid[0].budget, [max(run.parameters for run in runs) for runs in tried]
    within = [place for place, parameters in enumerate(most) if not limit or parameters <= limit]
    if not within:
        must, ends = (
            f"must end within {limit:,} parameters to be compared",
            f"its variants end with {min(most):,} or more",
        )
        raise SettingsError(f"`{grid[0].method.name}` {must}, but {ends}; raise the budget, or leave it out.")
    return grid[max(within, key=lambda place: fmean(run.validation for run in tried[place]))]


def _query_value(targets: Sequence[TargetModule]) -> list[TargetModule]:
    """Queries and values, as in LoRA's first paper."""
    return [target for target in targets if target.role in ("q_proj", "v_proj")]


def _language(targets: Sequence[TargetModule]) -> list[TargetModule]:
    """The language model of several towers, where vision-language models are usually adapted."""
    return [target for target in targets if target.tower == "language"]


def _last_blocks(targets: Sequence[TargetModule]) -> list[TargetModule]:
    """The last third of each tower's blocks."""
    blocks: dict[str, set[int]] = {target.tower: set() for target in targets}
    for target in targets:
        blocks[target.tower] |= set() if target.block is None else {target.block}
    last = {tower: sorted(found)[-math.ceil(len(found) / 3) :] for tower, found in blocks.items()}
    return [target for target in targets if target.block in last[target.tower]]


# With uniform ranks on some modules, none elsewhere: what chooses them, and what there must be.
SUBSETS = {
    "qv-only": (_query_value, "modules of the roles q_proj and v_proj"),
    "last-blocks": (_last_blocks, "modules in blocks"),
    "language-only": (_language, "modules of a tower `language`"),
}


def known_methods() -> tuple[str, ...]:
    """All names that `compare` takes, besides functions and entry points (`rankscope.methods`) of installed packages."""
    others = ("uniform-rslora", *SUBSETS, CONTROLLER, "adalora", "eva", "ia3", "vera", *VERA, *UNLIMITED)
    starts = [name for name in (*STRATEGIES, SEARCHED) if name not in ("random", REFERENCE)]
    return (*STRATEGIES, SEARCHED, *others, *(f"{CONTROLLER}-{name}" for name in starts))


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A method to be compared, which is made for each budget."""

    name: str
    source: str | Function | PeftAdapter
    seed: int = 0
    # Its bounds on ranks hold for all methods, its options for its strategy.
    allocation: AllocationSettings = field(default_factory=AllocationSettings)
    controller: ControllerSettings | None = None  # of methods under a controller
    searched: SearchResult | None = None  # whose recommendation is compared
    base_dir: Path = Path()  # from which relative paths of files start

    @property
    def needs_profile(self) -> bool:
        """Whether it cannot be made without a profile."""
        name = self.source if isinstance(self.source, str) else ""
        unknown = name not in known_methods() and not isinstance(self.source, PeftAdapter)
        return unknown or name.removeprefix(f"{CONTROLLER}-") in NEEDS_PROFILE

    @property
    def own_size(self) -> bool:
        """Whether no budget is for it."""
        return self.source in (*UNLIMITED, "ia3", *VERA) or isinstance(self.source, PeftAdapter)

    def make(self, targets: Sequence[TargetModule], budget: ParameterBudget, profile: Profile | None) -> Variants:
        """The method at one budget, in several variants where they are to be chosen from."""
        own = self.allocation
        bounds: Any = {"min_rank": own.min_rank, "max_rank": own.max_rank}

        def allocated(strategy: str) -> RankAllocation:
            if strategy != SEARCHED:
                terms = bounds | (own.options if strategy == own.strategy else {})
                return allocate(strategy, targets=targets, budget=budget, profile=profile, seed=self.seed, **terms)
            if self.searched and self.searched.best_allocation.budget in (None, budget.limit):
                return self.searched.best_allocation.renamed(SEARCHED)
            raise SettingsError("`searched` needs a search at this budget, but there is none; run `rankscope search`.")

        modules, cost = tuple(targets), sum(target.rank_cost for target in targets)
        rank = max(1, budget.limit // max(cost, 1))
        match self.source:
            case "full":
                return FullFineTuning()
            case "head":
                return HeadOnly()
            case "uniform-rslora":
                return Lora(allocated(REFERENCE), rank_stabilised=True)
            case "adalora":
                return [AdaLora(modules, rank, alpha, share, end) for alpha, end in SCHEDULES for share in SHARES]
            case "eva":
                return [Eva(modules, rank, rho) for rho in RHOS]
            case PeftAdapter():
                return self.source
            case "ia3":
                chosen = [target for target in targets if target.role in ("k_proj", "v_proj", "down_proj", "fc2")]
                grids = {"keys, values, last of MLPs": chosen, "all modules": targets}
                return [PeftAdapter(ia3_config(g), "(IA)³", name, rate_factor=20.0) for name, g in grids.items() if g]
            case str(name) if name in VERA:
                r = int(name.removeprefix("vera-"))
                return PeftAdapter(vera_config(targets, r), "VeRA", f"r {r}", rate_factor=10.0)
            case str(name) if name in SUBSETS:
                choose, needs = SUBSETS[name]
                if not (chosen := choose(targets)):
                    raise SettingsError(f"`{name}` needs {needs}, but the targets have none; leave it out.")
                if budget.towers:  # also of towers where none is chosen
                    others: Any = dict.fromkeys({t.name for t in targets} - {t.name for t in chosen}, 0)
                    return Lora(allocate(REFERENCE, targets=targets, budget=budget, max_rank=others).renamed(name))
                ranks = allocate(REFERENCE, targets=chosen, budget=budget).ranks
                return Lora(RankAllocation.from_ranks(targets, ranks, strategy=name, budget=budget.limit))
            case str(name) if name in known_methods():
                start = name.removeprefix(CONTROLLER).removeprefix("-") or REFERENCE
                moving = self.controller or ControllerSettings()
                return Lora(allocated(start), moving if name.startswith(CONTROLLER) else None)
        return self._from_function(targets=targets, budget=budget, profile=profile)

    def _from_function(self, *, budget: ParameterBudget, **terms: Any) -> Method:
        """What a user's function gives, as a method; a strategy's gains or scores are spent."""
        source, gives = self.source, "an allocation or a method"
        loaded: Any = nullcontext(source)
        if isinstance(source, str):
            loaded = user_function(source, self.base_dir, gives=gives, error=SettingsError)
        with loaded as function:
            try:
                inspect.signature(function).bind(budget=budget, **terms)
            except TypeError:  # a strategy, which takes a `Request`
                function = partial(allocate, function, seed=self.seed)
            found: Any = function(budget=budget, **terms)
        if isinstance(found, RankAllocation):
            return Lora(replace(found, strategy=self.name.rpartition(":")[2], budget=budget.limit))
        if isinstance(found, Method):
            return found
        raise SettingsError(f"`{self.name}` must give a RankAllocation or a Method, but gave a {type(found).__name__}.")


def find_methods(
    methods: Iterable[str | Function | PeftAdapter | Contender], *, seed: int = 0, **options: Any
) -> list[Contender]:
    """The methods of a comparison by name; `options` are fields of `Contender`.

    A method is a name (`known_methods()`, or of an entry point), `path/to/file.py:function`, or a function, which gets `targets`,
    `budget` and `profile` and gives a `RankAllocation` or a `rankscope.training.Method`; or a `PeftAdapter`. `random` is three
    methods, from `seed` on, and `vera` one for each of its usual ranks.
    """
    found, installed = [], entry_points("methods")
    for method in methods:
        if isinstance(method, Contender):
            found.append(method)
        elif method == "random":
            found += [
                Contender(name=f"random {n + 1}", source=method, seed=seed + n, **options) for n in range(N_RANDOM)
            ]
        elif method == "vera":
            found += [Contender(name=name, source=name) for name in VERA]
        elif isinstance(method, PeftAdapter):
            found.append(Contender(name=method.name, source=method))
        elif not isinstance(method, str) or ":" in method or method in known_methods():
            name = method if isinstance(method, str) else getattr(method, "__name__", type(method).__name__)
            found.append(Contender(name=name, source=method, seed=seed, **options))
        elif method in installed:
            found.append(Contender(name=method, source=load_entry_point(installed[method], error=SettingsError)))
        else:
            hint = did_you_mean(method, known_methods(), f"known are {', '.join(known_methods())}.")
            raise SettingsError(f"`methods` must be known or `path/to/file.py:function`, but {method!r} is not; {hint}")
    for each in found:
        own = not isinstance(each.source, str)
        if own and any(o.name == each.name and o.source is not each.source for o in found):
            raise SettingsError(f"`methods` must differ in name, but two are called `{each.name}`; rename one.")
    return found


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """All runs of a comparison."""

    runs: pd.DataFrame  # a row per run, in the columns of `RunResult`; `attrs`, also in the file: what they depend on
    decisions: Mapping[str, pd.DataFrame]  # by method: of a controller's first reported run at the study's budget
    targets: tuple[TargetModule, ...] = ()  # for maps of ranks

    def __repr__(self) -> str:
        """In one line; `runs` holds the rest."""
        studies, methods = (", ".join(dict.fromkeys(map(str, self.runs[name]))) for name in ("study", "method"))
        return f"Comparison({studies}: {methods}; {len(self.runs)} runs)"

    def _repr_html_(self) -> str:
        """What notebooks show: each method's difference to uniform, and where the ranks are at the end of its first run."""
        from rankscope.comparison.summary import allocations, at_budget, format_row, summarise

        rows = [format_row(row) for _, row in at_budget(summarise(self.runs)).iterrows()]
        over = f"{rows[0]['unit']} over uniform, 95 %".strip()
        columns = {name: name for name in ("method", "parameters", "test")} | {"points": over, "verdict": "verdict"}
        table = pd.DataFrame(rows)[list(columns)].rename(columns=columns).to_html(index=False, border=0)
        found = dict(islice(allocations(self.runs).items(), SHOWN_MAPS)) if self.runs["study"].nunique() == 1 else {}
        known = {target.name for target in self.targets}
        ranks = {name: {**dict.fromkeys(known, 0), **each} for name, each in found.items() if set(each) <= known}
        png = ranks_png(self.targets, *ranks.values(), titles=list(ranks)) if ranks and known else None
        return html_card(repr(self), png=png, table=table)

    def to_parquet(self, path: AnyPath) -> Path:
        """Write the runs atomically; returns the path."""
        with replacing(path) as temporary:
            self.runs.assign(schema=SCHEMA).to_parquet(temporary, index=False, **SEALED)
        return Path(path)


@checked
@led_by_first
def compare(
    task: Task | str | Mapping[str, Any],
    methods: str | Iterable[str | Function | PeftAdapter | Contender] | None = None,
    *,
    budget: ParameterBudget | int,
    targets: Sequence[TargetModule] | None = None,
    profile: Profile | None = None,
    seeds: Sequence[int] | None = None,
    training: TrainingSettings | Mapping[str, Any] | None = None,
    settings: CompareSettings | Mapping[str, Any] | None = None,
    kept_in: AnyPath | None = None,
    on_run: Callable[[int, int], object] = lambda done, total: None,
    **overrides: Any,
) -> Comparison:
    """Compare methods at equal parameters, steps and data order, each at its own best learning rate.

    Uniform LoRA always takes part. Learning rate and variant are chosen on validation with seeds of their own; then every
    method is trained on the same `seeds`, and the test split is read once.

    Args:
        task: Where model, data, loss and metric come from, or what `load_task` takes.
        methods: As `find_methods` takes them; default: those of the settings.
        budget: Variants that end above it are not chosen. `adalora` and `eva` need uniform rank 1 at least: at smaller ones of
            the settings' `budgets` they take no part; bounds on towers they do not know.
        targets: Default: the profile's, or all that are found.
        profile: Default: taken over an epoch of the training batches, if a method needs one.
        seeds: Of the reported runs, at least 3 for intervals and tests; default: the settings' `n_seeds`, from 0.
        training: Every method is tuned over its learning rates (full fine-tuning over a thirtieth of them).
        settings: How many seeds, and which budgets; `overrides` are values of it.
        kept_in: Folder that keeps every run, so that a comparison resumes.
        on_run: Called with the number of runs done and of runs in all.
        **overrides: See `settings`.

    >>> import rankscope as rs
    >>> task, short = rs.load_task("digits-shift"), TrainingSettings(steps=2, learning_rate=0.01)
    >>> found = compare(task, ["head"], budget=rs.ParameterBudget(6912), training=short, n_seeds=2)
    >>> found.runs.groupby("method", sort=False).size().to_dict()
    {'uniform': 2, 'head': 2}
    """
    settings, training = CompareSettings.of(settings, **overrides), TrainingSettings.of(training)
    task, budget = load_task(task), ParameterBudget.of(budget)
    methods = settings.methods if methods is None else (methods,) if isinstance(methods, str) else methods
    seeds = range(settings.n_seeds) if seeds is None else seeds
    tuning_seeds = check_terms(settings, budget, seeds)
    contenders = {each.name: each for each in find_methods([REFERENCE, *methods], seed=min(seeds))}
    if profile is None and any(each.needs_profile for each in contenders.values()):
        profile = profile_task(task, targets=targets, budget=budget)
    if targets is None:
        targets = find_targets(task.build_model()) if profile is None else profile.targets
    plan = _plan(list(contenders.values()), settings, budget, rank_1=sum(target.rank_cost for target in targets))
    grids = [make_grid(each.make(targets, at, profile), training, **labels) for each, at, labels in plan]
    run = partial(run_tuned, n_jobs=settings.n_jobs, backend=settings.backend, kept_in=kept_in, on_run=on_run)
    runs = list(chain(*run(task, grids, seeds=seeds, tuning_seeds=tuning_seeds)))
    table = pd.DataFrame([each.to_row() for each in runs])
    terms = {"targets": fingerprint_targets(targets), **budget.terms(), "training": training.terms()}
    made_from: dict[Any, Any] = {"format": FORMAT, **fingerprint_task(task), **terms, "seeds": list(seeds)}
    table.attrs = made_from
    firsts = [each for each in runs if (each.role, each.factor, each.seed) == (REPORTED, 1.0, seeds[0])]
    decisions = {each.method: each.decisions for each in firsts if each.decisions is not None}
    return Comparison(table, decisions, tuple(targets))


def _plan(
    contenders: Sequence[Contender], settings: CompareSettings, budget: ParameterBudget, *, rank_1: int
) -> Iterator[tuple[Contender, ParameterBudget, dict[str, Any]]]:
    """Every method at each factor of the budget, uniform at more of them, and at 1 those without a budget; with labels.

    `rank_1` is what uniform rank 1 uses: at smaller factors of the budget, methods that cannot do with less take no part.
    """
    for factor in sorted({*settings.budgets, *settings.uniform_budgets}):
        at = budget if factor == 1.0 else budget.at(round(factor * budget.limit))
        for each in contenders:
            limit = 0 if each.own_size else at.limit
            cost = each.searched.steps if each.searched and SEARCHED in each.name else 0
            labels = {"name": each.name, "budget": limit, "factor": factor, "cost_steps": cost}
            takes_part = factor == 1.0 or (limit and (at.limit >= rank_1 or each.source not in FROM_RANK_1))
            if each.name == REFERENCE or (factor in settings.budgets and takes_part):
                yield each, at, labels


def check_terms(settings: CompareSettings, budget: ParameterBudget, seeds: Sequence[int]) -> range:
    """The seeds that tune; raises SettingsError for budgets and seeds that cannot be compared, before anything is trained."""
    if 1.0 not in settings.budgets:
        raise SettingsError("`budgets` must hold the factor 1, the study's own budget; add it, or change `budget`.")
    for factor in (*settings.budgets, *settings.uniform_budgets):
        if not 1 <= factor * budget.limit < 2**63:
            product = f"{factor:g} times {budget.limit:,} parameters"
            raise SettingsError(f"`budgets` must leave between 1 and 2^63 parameters, but hold {product}.")
    if not seeds:
        raise SettingsError("`seeds` must hold at least one seed, but is empty.")
    return seeds_that_tune(settings.n_tuning_seeds, seeds)


def seeds_that_tune(n: int, seeds: Sequence[int]) -> range:
    """The seeds that tune; raises SettingsError if `seeds`, which are reported, hold one of them."""
    tuning_seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + n)
    if shared := set(seeds) & set(tuning_seeds):
        raise SettingsError(f"`tuning_seeds` must be none of `seeds`, but share {min(shared)}; take others.")
    return tuning_seeds
