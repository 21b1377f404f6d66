"""`compare`: methods by name at equal budgets, each tuned alike, and every run as one row of a table."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from rankscope.allocation import RankAllocation
from rankscope.budget import ParameterBudget
from rankscope.comparison.methods import RATE_FACTORS, SEARCHED, UNLIMITED, Terms, make_methods, need_profile
from rankscope.comparison.repeats import Repeats, Variants, repeat_all
from rankscope.comparison.runs import Run
from rankscope.control import ControllerConfig
from rankscope.exceptions import ComparisonError, FileFormatError
from rankscope.files import parse_json, read_parquet, replacing
from rankscope.fingerprints import FORMAT
from rankscope.profiling import Profile
from rankscope.targets import TargetModule, find_targets, fingerprint_targets
from rankscope.tasks import Task, fingerprint_task, profile_task
from rankscope.training import TrainingConfig

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


def read_comparison(path: str | os.PathLike[str]) -> pd.DataFrame:
    """The runs of `comparison.parquet`; of schema 1, which names no study, the task's name is the study's.

    Raises:
        FileFormatError: The file is missing, cannot be read, has another schema, lacks columns, or cannot be reported.
    """
    table = read_parquet(path, what="a comparison", schema=_COLUMNS)
    schemas = set(table.column("schema").to_pylist())
    if not schemas <= {1, SCHEMA}:
        raise FileFormatError(f"`{path}` must hold a comparison of schema {SCHEMA}, but holds another; compare again.")
    runs: pd.DataFrame = table.to_pandas().drop(columns="schema")
    if "study" not in runs:
        runs.insert(0, "study", runs["task"])
    if problem := _problem(runs):
        raise FileFormatError(f"`{path}` must hold a comparison, but {problem}; compare again.")
    return runs


def _problem(runs: pd.DataFrame) -> str | None:
    """What keeps runs from being reported, in words; None where nothing does."""
    reported = runs[runs["role"] == REPORTED]
    if reported.empty:
        return "holds no reported run"
    if not runs["study"].map(lambda name: isinstance(name, str)).all():
        return "its column `study` holds no text"
    if not np.isfinite(reported[["factor", "learning_rate", "validation", "test"]].to_numpy()).all():
        return "a reported run lacks its factor, learning rate or metric"
    if not reported["ranks"].map(_is_ranks).all():
        return "its column `ranks` holds no JSON of ranks"
    if reported.duplicated(["study", "factor", "method", "seed"]).any():
        return "holds a run twice"
    uniform = reported[(reported["method"] == REFERENCE) & (reported["factor"] == 1.0)]
    if set(reported["study"]) != set(uniform["study"]):
        return f"holds no run of `{REFERENCE}` at the study's budget"
    seeds = reported.groupby(["study", "factor", "method"])["seed"].agg(frozenset)
    if seeds.groupby(level=["study", "factor"]).nunique().max() > 1:
        return "its methods were trained on different seeds"
    return None


def _is_ranks(text: str) -> bool:
    try:
        found = parse_json(text, where="`ranks`", what="ranks")
    except FileFormatError:
        return False
    return found is None or (isinstance(found, dict) and all(type(rank) is int for rank in found.values()))


def compare(
    task: Task,
    methods: Sequence[str] = DEFAULT_METHODS,
    *,
    budget: ParameterBudget,
    targets: Sequence[TargetModule] | None = None,
    profile: Profile | None = None,
    searched: RankAllocation | None = None,
    search_steps: int = 0,
    controller: ControllerConfig | None = None,
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
        ComparisonError: A method that is not known, lacks a search, or ends above the budget; seeds that overlap; budgets
            without 1.

    >>> import rankscope as rs
    >>> task = rs.load_task("digits-shift")
    >>> short = rs.TrainingConfig(steps=2, learning_rate=0.01)
    >>> found = compare(task, ["uniform", "head"], budget=rs.ParameterBudget(6912), training=short, seeds=range(2))
    >>> found.runs.groupby("method", sort=False).size().to_dict()
    {'uniform': 2, 'head': 2}
    """
    training = training or TrainingConfig()
    rates = list(learning_rates or [training.learning_rate])
    names = list(dict.fromkeys([REFERENCE, *methods]))
    check_terms(seeds, tuning_seeds, budgets)
    if profile is None and need_profile(names):
        profile = profile_task(task, targets=targets, budget=budget)
    if targets is None:
        targets = find_targets(task.build_model()) if profile is None else profile.targets
    terms = Terms(
        targets=tuple(targets), budget=budget, profile=profile, searched=searched, seed=min(seeds),
        controller=controller or ControllerConfig(), base_dir=base_dir,
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
        "budget": budget.limit, "training": asdict(training), "learning_rates": rates, "seeds": list(seeds),
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
        ComparisonError: There are no seeds, seeds that tune are reported too, or the budget itself is not compared.
    """
    if 1.0 not in budgets:
        held = ", ".join(f"{factor:g}" for factor in budgets) or "none"
        raise ComparisonError(
            f"`budgets` must hold the factor 1, the study's own budget, but holds {held}; add 1, or change `budget`."
        )
    if not seeds:
        raise ComparisonError("`seeds` must hold at least one seed, but is empty.")
    if shared := set(seeds) & set(tuning_seeds):
        raise ComparisonError(f"`tuning_seeds` must be none of `seeds`, but share {min(shared)}; take others.")


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
