"""What a search found, for people and for machines: the table of finalists, the verdict on them, the cost, JSON."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from optuna.trial import TrialState
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from rankscope.allocation import RankAllocation
from rankscope.budget import ParameterBudget
from rankscope.distributed import require_one_process
from rankscope.errors import FileError
from rankscope.files import FORMAT, digest, require_same
from rankscope.profiling import Profile, read_profile
from rankscope.searching import START_TRIALS, Finalist, Interval, SearchResult, Trial
from rankscope.settings import BudgetSettings, StudySettings, read_study
from rankscope.strategies import NEEDS_PROFILE, allocate
from rankscope.targets import TargetModule, find_targets, fingerprint_targets
from rankscope.tasks import Task, fingerprint_task, load_task, profile_task
from rankscope.training import TrainingConfig

NARROWEST = 12  # cells of a table's first column, whose texts wrap

stdout = Console(highlight=False, markup=False)  # names and paths may hold brackets
stderr = Console(stderr=True, highlight=False, markup=False)


@contextmanager
def progress() -> Iterator[Progress]:
    """A progress bar on stderr; silent where stderr is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        yield bar


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout: columns after the first are aligned right and keep their width; the title is not wrapped.

    On a terminal too narrow for that, the table is wider than the terminal: no figure is cut.
    """
    widths = [max(cell_len(text) for text in column) for column in zip(header, *rows, strict=True)]
    widths[0] = min(widths[0], NARROWEST)
    needed = sum(widths) + 3 * len(widths) + 1
    table = Table(width=needed if needed > stdout.width else None)
    for index, (name, width) in enumerate(zip(header, widths, strict=True)):
        justify: Literal["left", "right"] = "left" if index == 0 else "right"
        table.add_column(name, justify=justify, no_wrap=index > 0, overflow="fold", min_width=width)
    for row in rows:
        table.add_row(*row)
    stdout.print(title, style="bold", soft_wrap=True)
    stdout.print(table, crop=False)


def print_json(value: Any) -> None:
    """One JSON object on stdout; what is not finite becomes null, since JSON has no word for it."""
    stdout.print_json(json.dumps(_finite(value), allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_line(text: str) -> None:
    """A line on stdout, not wrapped."""
    stdout.print(text, soft_wrap=True)


def print_files(paths: Sequence[Any]) -> None:
    """Which files were written."""
    print_line("wrote " + ", ".join(str(path) for path in paths))


FIRST_REPORTED_SEED = 1000  # seeds of reported runs stay apart from those of search and tuning


def quiet_libraries() -> None:
    """Keeps other libraries' load reports and advice out of the terminal; torch's thread count is left to the user."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # peft asks transformers for an attribute of an old name, in this process and in workers.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers.modeling_utils")
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning:transformers.modeling_utils")
    import optuna
    import transformers

    optuna.logging.set_verbosity(optuna.logging.ERROR)  # a failed trial gets our one line, not its page
    warnings.filterwarnings(
        "ignore", category=optuna.exceptions.ExperimentalWarning
    )  # samplers and pruners asked for by name
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _require_writable(folder: Path) -> None:
    """Checks before any work that results can be written there.

    Raises:
        FileError: They cannot.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise FileError(f"`--out` must be a folder that can be written to, but `{nearest}` is not; choose another.")


def _default_out(study: StudySettings) -> Path:
    return Path("out") / study.name


@dataclass
class Session:
    """One command's view of a study.

    Attributes:
        path: The study file.
        flags: What the command line overrides, by dotted key.
        study: The file's content, with the flags.
        out: The output folder.
    """

    path: Path
    flags: Mapping[str, Any]
    study: StudySettings
    out: Path

    @classmethod
    def open(cls, path: Path, out: Path | None, overrides: Mapping[str, Any]) -> Session:
        """Reads the study file with the flags that override it.

        Raises:
            RankscopeError: torchrun started several copies of this process, or the file or a flag cannot be used.
        """
        require_one_process("a command")
        flags = {key: value for key, value in overrides.items() if value is not None}
        study = read_study(path, flags)
        quiet_libraries()
        out = out or _default_out(study)
        _require_writable(out)
        return cls(path, flags, study, out)

    @property
    def arguments(self) -> str:
        """Study and output folder as the command line takes them, for messages."""
        return f"{self.path}" if self.out == _default_out(self.study) else f"{self.path} --out {self.out}"

    @cached_property
    def task(self) -> Task:
        """The study's task."""
        return load_task(self.study.task, base_dir=self.study.base_dir)

    @cached_property
    def _found(self) -> tuple[tuple[TargetModule, ...], dict[str, Any]]:
        """Target modules and fingerprints, from one build of the model, which is gone afterwards."""
        model = self.task.build_model()
        targets = find_targets(model, self.study.targets)
        facts = {"format": FORMAT, **fingerprint_task(self.task, model), "targets": fingerprint_targets(targets)}
        return targets, facts

    @property
    def targets(self) -> tuple[TargetModule, ...]:
        """The target modules of the task's model."""
        return self._found[0]

    @property
    def facts(self) -> dict[str, Any]:
        """What every result of the study depends on: fingerprints of task, code, data, weights and targets."""
        return self._found[1]

    @cached_property
    def budget(self) -> ParameterBudget:
        """The study's budget."""
        return self._limit(self.study.budget)

    def _limit(self, settings: BudgetSettings) -> ParameterBudget:
        if settings.uniform_rank is not None:
            return ParameterBudget.uniform(self.targets, settings.uniform_rank)
        return ParameterBudget(settings.parameters or 0)

    def training_config(self) -> TrainingConfig:
        """The schedule at the first learning rate."""
        training = self.study.training
        return TrainingConfig(**training.at(training.learning_rates[0]).model_dump())

    @property
    def storage(self) -> str:
        """Where the search's trials lie, as Optuna takes it."""
        return self.study.search.storage or f"sqlite:///{self.out / 'search.db'}"

    @property
    def has_search(self) -> bool:
        """Whether a search can have been made: its database is there, or lies where the study says."""
        return self.study.search.storage is not None or (self.out / "search.db").exists()

    @property
    def profile_path(self) -> Path:
        """Where the profile lies."""
        return self.out / "profile.parquet"

    @property
    def allocation_path(self) -> Path:
        """Where the allocation lies."""
        return self.out / "allocation.json"

    def take_profile(self, *, keep_partial: bool = False) -> Profile:
        """Profiles the task's model and writes `profile.parquet`."""
        section = self.study.profile
        with progress() as bar:
            line = bar.add_task("profiling", total=None)
            taken = profile_task(
                self.task,
                targets=self.targets,
                n_batches=section.n_batches,
                head_steps=section.head_steps,
                budget=self.budget,
                sketch_size=section.sketch_size,
                tolerance=section.tolerance,
                keep_directions=section.keep_directions,
                keep_partial=keep_partial,
                seed=self.study.seed,
                on_start=lambda n: bar.update(line, total=n),
                on_batch=lambda _index, _loss: bar.advance(line),
            )
        made = {"study": self.study.name, "made_from": self._profile_terms(self.flags), "flags": dict(self.flags)}
        taken = replace(taken, metadata={**taken.metadata, **made})
        taken.to_parquet(self.profile_path)
        return taken

    def profile_at_hand(self) -> Profile:
        """The profile in the output folder, or a new one where there is none.

        Raises:
            FileError: The one that is there was made from something else.
        """
        if not self.profile_path.exists():
            stderr.print(f"no profile in {self.out} yet: taking one", soft_wrap=True)
            return self.take_profile()
        found = read_profile(self.profile_path)
        require_same(
            found.metadata.get("made_from", {}),
            self._profile_terms(found.metadata.get("flags", {})),
            what=f"`{self.profile_path}`",
            remedy=f"run `rankscope profile {self.arguments}` again, or use another --out.",
        )
        found.require(self.targets)
        return found

    def _profile_terms(self, flags: Mapping[str, Any]) -> dict[str, Any]:
        """What a profile of this study depends on, if it is taken with these flags."""
        study = read_study(self.path, flags)
        return {**self.facts, "profile": study.profile.terms(), "seed": study.seed}

    def allocation_terms(self, made_by: Mapping[str, Any]) -> dict[str, Any]:
        """What an allocation of this study depends on.

        Args:
            made_by: `command` (`allocate` or `search`), its `flags`, and `strategy` where `allocate` was given one.
        """
        study = read_study(self.path, made_by["flags"])
        section = study.allocation
        terms = {
            **self.facts, "budget": self._limit(study.budget).limit, "seed": study.seed,
            "min_rank": section.min_rank, "max_rank": section.max_rank,
        }  # fmt: skip
        if made_by["command"] == "search":
            return terms | {
                "training": study.training.terms(), "search": study.search.terms(),
                "profile": self._profile_fingerprint(),
            }  # fmt: skip
        name = made_by["strategy"] or section.strategy
        options = section.options if name == section.strategy else {}
        profile = self._profile_fingerprint() if name in NEEDS_PROFILE else None
        return terms | {"strategy": name, "options": options, "profile": profile}

    def _profile_fingerprint(self) -> str:
        """Of the profile that this study asks for, with the flags of the one that is there."""
        taken_with = read_profile(self.profile_path).metadata.get("flags", {}) if self.profile_path.exists() else {}
        return digest(self._profile_terms(taken_with))

    def one_shot(self, strategy: str | None = None) -> RankAllocation:
        """The study's one-shot allocation, or that of another strategy."""
        section = self.study.allocation
        name = strategy or section.strategy
        return allocate(
            name,
            targets=self.targets,
            budget=self.budget,
            profile=self.profile_at_hand() if name in NEEDS_PROFILE else None,
            seed=self.study.seed,
            min_rank=section.min_rank,
            max_rank=section.max_rank,
            **(section.options if name == section.strategy else {}),
        )


FEW_TRIALS = 30  # measured on synthetic landscapes: below, nothing beats a good one-shot


def print_search(result: SearchResult, *, modelled: bool) -> None:
    """The table of finalists (without a confirmation, of the start points and the recommended trial), and what to make of it.

    Args:
        result: Of the search.
        modelled: Whether the sampler has a performance model to report on.
    """
    best = result.best_trial
    if result.finalists:
        seeds = len(result.finalists[0].metrics_by_seed)
        rows = [_trial_row(f.trial, best, f.metric, f.difference, f.interval) for f in result.finalists]
        title = f"{len(result.trials)} trials; finalists on {seeds} fresh seeds, 95 % interval; * recommended"
    else:
        shown = {t.number: t for t in [*starts_of(result), best]}
        rows = [_trial_row(t, best, t.metric, t.difference) for t in shown.values()]
        title = f"{len(result.trials)} trials, validation split; * best observed, not confirmed"
    header = ("strategy", "parameters", "rate", result.metric_name, "difference to uniform")
    print_table(f"{result.study.study_name}: {title}", header, rows)
    print_line(_verdict(result))
    print_line(_cost_line(result))
    for agreement in result.agreements:
        print_line(f"fidelity: {agreement}")
    if modelled:
        print_line(f"performance model: {_model_line(result)}")


def search_summary(result: SearchResult) -> dict[str, Any]:
    """The result for `--json`."""
    found = result.recommendation
    return {
        "recommended": _finalist_summary(found) if found else _trial_summary(result.best_trial),
        "finalists": [_finalist_summary(finalist) for finalist in result.finalists],
        "unconfirmed": result.unconfirmed,
        "performance_model": asdict(result.validation) if result.validation else None,
        "trials": len(result.trials),
        "confirming_runs": result.confirming_runs,
        "steps": result.steps,
        "fidelity": [asdict(agreement) for agreement in result.agreements],
    }


def starts_of(result: SearchResult) -> list[Trial]:
    """The best trials of uniform and of one-shot, as far as the search has come."""
    origins = {trial.origin for trial in result.trials}
    return [result.best_of_origin(origin) for origin in ("uniform", "one-shot") if origin in origins]


def _cost_line(result: SearchResult) -> str:
    """What was trained, and how many optimizer steps it took."""
    ended_as = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
    states = Counter(trial.state.name for trial in result.study.get_trials(deepcopy=False, states=ended_as))
    ended = ", ".join(
        f"{states[name]} {said}" for name, said in (("PRUNED", "pruned"), ("FAIL", "failed")) if states[name]
    )
    trials = f"{sum(states.values())} trials{f' ({ended})' if ended else ''}"
    return f"cost: {trials}, {result.confirming_runs} confirming runs, {result.steps:,} steps"


def _verdict(result: SearchResult) -> str:
    """What fresh seeds say of the recommendation, in words."""
    found = result.recommendation
    if found is None:
        return f"not confirmed: {result.unconfirmed}"
    if found.trial.origin == "uniform":
        return "uniform is recommended: nothing that was tried is worth more, as far as trials and fresh seeds tell"
    if found.difference is None:
        return "uniform did not complete: whether the recommendation is better is not known"
    if found.interval is None:
        return "whether it differs from uniform is not known: an interval needs 3 fresh seeds or more, and differences that vary"
    low, high = found.interval
    if low > 0:
        return f"better than uniform: {found.difference:+.3f}, and not less than {low:+.3f}"
    return f"not told apart from uniform: {low:+.3f} to {high:+.3f}"


def _model_line(result: SearchResult) -> str:
    """What the performance model was good for, and what so many trials can give at all."""
    if result.model is None:
        return f"no proposal yet; it needs {START_TRIALS} trials whose metrics differ"
    scores = str(result.validation) if result.validation else "too few different allocations to validate it"
    if len(result.trials) < FEW_TRIALS:
        scores += f". Fewer than {FEW_TRIALS} trials seldom find more than one-shot gives"
    return scores


def _trial_row(
    trial: Trial, best: Trial, metric: float, difference: float | None, interval: tuple[float, float] | None = None
) -> tuple[str, ...]:
    low, high = interval or (math.nan, math.nan)
    shown = "-" if difference is None or trial.origin == "uniform" else Interval(difference, low, high).text()
    name = f"trial {trial.number}" if trial.origin == "sampler" else trial.origin
    return (
        f"{name} *" if trial.number == best.number else name,
        f"{trial.allocation.parameters:,}",
        f"{trial.learning_rate:g}",
        f"{metric:.3f}",
        shown,
    )


def _trial_summary(trial: Trial) -> dict[str, Any]:
    return {
        "trial": trial.number,
        "origin": trial.origin,
        "parameters": trial.allocation.parameters,
        "learning_rate": trial.learning_rate,
        "metric": trial.metric,
        "difference": trial.difference,
    }


def _finalist_summary(finalist: Finalist) -> dict[str, Any]:
    """The trial's, with what fresh seeds say in place of the trial's own difference."""
    return {
        **_trial_summary(finalist.trial),
        "confirmed": dict(finalist.metrics_by_seed),
        "difference": finalist.difference,
        "interval": finalist.interval,
    }
