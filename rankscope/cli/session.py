"""What the commands share: a study with its task, targets, budget and files, and how they print."""

from __future__ import annotations

import json
import math
import os
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import optuna
import transformers
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from rankscope.allocation import RankAllocation
from rankscope.budget import ParameterBudget
from rankscope.cli import arguments_of
from rankscope.errors import SettingsError
from rankscope.files import FORMAT, digest, digest_source, require_same
from rankscope.plotting import save_plot
from rankscope.plugins import user_function
from rankscope.profiling import Profile, read_profile
from rankscope.settings import Settings, StudySettings, read_study
from rankscope.strategies import allocate, needs_profile
from rankscope.targets import TargetModule, find_targets, fingerprint_targets
from rankscope.tasks import Outline, Task, fingerprint_task, load_task, outline_task, profile_task
from rankscope.training import watching

ALLOCATION = "allocation.json"
NARROWEST = 12  # cells of a table's first column, whose texts wrap
EVERY = 60.0  # seconds between lines of progress where stderr is no terminal

stdout = Console(highlight=False, markup=False)  # names and paths may hold brackets
stderr = Console(stderr=True, highlight=False, markup=False)


@dataclass
class Session:
    """One command's view of a study. Whether the output folder can be written to is checked before, in `rankscope.cli`."""

    path: Path  # the study file
    flags: Mapping[str, Any]  # what the command line overrides, by dotted key
    study: StudySettings  # the file's settings, with the flags
    out: Path
    dry_run: bool = False  # load the model's configuration only, and no data

    def __post_init__(self) -> None:
        quiet_libraries()
        self.profile_path, self.allocation_path = self.out / "profile.parquet", self.out / ALLOCATION

    @property
    def arguments(self) -> str:
        """Study and output folder as the command line takes them, for messages."""
        return arguments_of(self.path, self.out, self.study.name)

    @cached_property
    def task(self) -> Task:
        """The study's task."""
        with progress("loading model and data"):
            return load_task(self.study.task, base_dir=self.study.base_dir)

    @cached_property
    def outline(self) -> Outline:
        """The study's task in outline."""
        return outline_task(self.study.task, base_dir=self.study.base_dir)

    @cached_property
    def _found(self) -> tuple[tuple[TargetModule, ...], dict[str, Any]]:
        """Target modules and fingerprints, from one build of the model, gone afterwards; of a dry run no fingerprints."""
        if self.dry_run:
            return find_targets(self.outline.model, self.study.targets), {}
        with progress("loading model and data"):
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
        return ParameterBudget.from_settings(self.study.budget, self.targets)

    @property
    def study_name(self) -> str:
        """The name of the search's Optuna study."""
        return self.study.search.study_name or self.study.name

    @property
    def storage(self) -> str:
        """Where the search's trials are kept, as Optuna takes it."""
        return self.study.search.storage or f"sqlite:///{self.out / 'search.db'}"

    @property
    def artifacts(self) -> Path:
        """The folder of the search's pictures, and of what users upload in the dashboard."""
        given = self.study.search.artifacts
        return self.out / "artifacts" if given is None else self.study.base_dir / given

    @property
    def has_search(self) -> bool:
        """Whether there can be a search: its database is in the output folder, or where the study says."""
        return self.study.search.storage is not None or (self.out / "search.db").exists()

    def draw(self, **plots: Callable[..., object]) -> list[Path]:
        """Write what each plot draws as `NAME.png` into the output folder, under the study's name."""
        return [save_plot(plot, self.out / f"{name}.png", self.study.name) for name, plot in plots.items()]

    def provenance(self, command: str) -> dict[str, Any]:
        """How this command makes an output, and what the output depends on; kept in the output's file."""
        flags = {key: value for key, value in self.flags.items() if key != "search.storage"}  # it may hold a password
        if isinstance(section := flags.get("search"), Mapping):
            flags["search"] = {key: value for key, value in section.items() if key != "storage"}
        made_by = {"command": command, "flags": flags}
        return {"study": self.study.name, "made_by": made_by, "made_from": self._terms(command, self.flags)}

    def require_present(self, kept: Mapping[str, Any], path: Path, *, command: str, remedy: str) -> None:
        """Raise a FileError if the output at `path`, made as `kept` says, would be another from the study as it is now."""
        made_by = kept.get("made_by") or {}
        terms = self._terms(made_by.get("command", command), made_by.get("flags", {}))
        require_same(self._filled(kept), terms, what=f"`{path}`", remedy=remedy)

    def _filled(self, kept: Mapping[str, Any]) -> dict[str, Any]:
        """What an output was made from; settings that came later have their defaults, so that it stays good."""
        sections = {key: each for key, each in dict(self.study).items() if isinstance(each, Settings)}
        return {
            key: sections[key].filled(value) if key in sections and isinstance(value, Mapping) else value
            for key, value in dict(kept.get("made_from", {})).items()
        }

    def _terms(self, command: str, flags: Mapping[str, Any]) -> dict[str, Any]:
        """What an output depends on, if `command` makes it with `flags`."""
        study = read_study(self.path, flags)
        allocation, terms = study.allocation, {**self.facts, "seed": study.seed}
        if command == "profile":
            return terms | {"profile": study.profile.terms()}
        terms |= ParameterBudget.from_settings(study.budget, self.targets).terms()
        terms |= {"min_rank": allocation.min_rank, "max_rank": allocation.max_rank}
        if command == "search":
            terms |= {"training": study.training.terms(), "search": study.search.terms()}
        else:
            terms |= {"strategy": allocation.strategy, "options": allocation.options}
        if command != "search" and ":" in allocation.strategy:
            spec, base = allocation.strategy, self.study.base_dir
            with user_function(spec, base, gives="scores or gains", error=SettingsError) as function:
                terms["strategy's code"] = digest_source(function)
        if command == "search" or needs_profile(allocation.strategy):
            kept = self._stored_profile.metadata if self._stored_profile else {}
            now = self._terms("profile", (kept.get("made_by") or {}).get("flags", {}))
            terms["profile"] = digest(kept["made_from"] if self._filled(kept) == now else now)
        return terms

    @cached_property
    def _stored_profile(self) -> Profile | None:
        return read_profile(self.profile_path) if self.profile_path.exists() else None

    @cached_property
    def profile(self) -> Profile:
        """The profile in the output folder, or a new one if there is none; FileError where it was made from something else."""
        found = self._stored_profile
        if found is None:
            stderr.print(f"no profile in {self.out} yet: taking one", soft_wrap=True)
            return self.take_profile()
        remedy = f"run `rankscope profile {self.arguments}` again, or use another --out."
        self.require_present(found.metadata, self.profile_path, command="profile", remedy=remedy)
        found.require(self.targets)
        return found

    def take_profile(self) -> Profile:
        """Profile the task's model, and write `profile.parquet`."""
        self.one_shot("uniform")  # whose bounds and budget no allocation fits is told now, not after the profile
        warms, total = getattr(self.task, "head_modules", ()) and self.study.profile.head_steps, 0

        def begin(n_batches: int) -> None:
            nonlocal total
            total = n_batches
            update(0, total, "warming up the head" if warms else "profiling")

        with progress("profiling") as update:
            taken = profile_task(
                self.task,
                targets=self.targets,
                budget=self.budget,
                **dict(self.study.profile),
                seed=self.study.seed,
                on_start=begin,
                on_batch=lambda index, _loss: update(index + 1, total),
            )
        taken = replace(taken, metadata={**taken.metadata, **self.provenance("profile")})
        taken.to_parquet(self.profile_path)
        self._stored_profile = taken
        return taken

    def one_shot(self, strategy: str | None = None) -> RankAllocation:
        """The study's one-shot allocation, or that of another strategy."""
        section = self.study.allocation
        name = strategy or section.strategy
        own = name.partition(":")[0].endswith(".py")  # a file, from the study's folder on
        return allocate(
            str(self.study.base_dir.absolute() / name) if own else name,
            targets=self.targets,
            budget=self.budget,
            profile=self.profile if needs_profile(name) else None,
            seed=self.study.seed,
            min_rank=section.min_rank,
            max_rank=section.max_rank,
            **(section.options if name == section.strategy else {}),
        )


def quiet_libraries() -> None:
    """Keep other libraries' load reports and advice out of the terminal; torch's thread count is left to the user."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # peft asks transformers for an attribute of an old name, in this process and in workers.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers.modeling_utils")
    # What a second Ctrl-C leaves is cleaned up by multiprocessing's resource tracker, which warns of it.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning:transformers.modeling_utils,ignore:resource_tracker")
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)  # of samplers asked for by name
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # a failed trial gets our one line, not its page
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@dataclass
class _Told:
    """What a command is at."""

    what: str
    done: int = 0
    total: int | None = None
    detail: str = ""

    def __str__(self) -> str:
        counted = "" if self.total is None else f": {self.done:,} of {self.total:,}"
        return f"{self.what}{counted}{f', {self.detail}' if self.detail else ''}"


_shown: list[_Told] = []  # the phase that is shown, if there is one


@contextmanager
def progress(description: str) -> Iterator[Any]:
    """What is going on, on stderr: a bar on a terminal, else a line a minute. Yields a function of what is done and the total.

    Inside, trainings of this process tell their steps. A phase inside another takes its line until it ends.
    """
    if _shown:
        told = _shown[-1]
        outer = told.what, told.done, told.total, told.detail
        told.what, told.done, told.total, told.detail = description, 0, None, ""
        try:
            yield _updating(told)
        finally:
            told.what, told.done, told.total, told.detail = outer
        return
    told = _Told(description)
    _shown.append(told)
    try:
        with _bar(told) if stderr.is_terminal else _lines(told), watching(_stepping(told)):
            yield _updating(told)
    finally:
        _shown.clear()


def _updating(told: _Told) -> Callable[..., None]:
    def update(done: int, total: int | None, what: str = told.what) -> None:
        told.done, told.total, told.what, told.detail = done, total, what, ""

    return update


def _stepping(told: _Told) -> Callable[[str, int, int], None]:
    def step(phase: str, done: int, total: int) -> None:
        told.detail = f"{phase} {done:,} of {total:,}"

    return step


@contextmanager
def _bar(told: _Told) -> Iterator[None]:
    """A bar that follows what is told, ten times a second."""

    class Following(Progress):
        def get_renderables(self) -> Iterable[Any]:
            for line in self.tasks:
                self.update(line.id, completed=told.done, total=told.total, description=told.what, detail=told.detail)
            return super().get_renderables()

    texts = TextColumn("{task.description}"), TextColumn("{task.fields[detail]}")
    columns = texts[0], BarColumn(bar_width=20), MofNCompleteColumn(), texts[1], TimeElapsedColumn()
    with Following(*columns, console=stderr, transient=True) as bar:
        bar.add_task(told.what, total=None, detail="")
        yield


@contextmanager
def _lines(told: _Told) -> Iterator[None]:
    """A line a minute, as long as it goes on."""
    ended, started = threading.Event(), time.monotonic()

    def tell() -> None:
        while not ended.wait(EVERY):
            minutes = (time.monotonic() - started) / 60
            stderr.print(f"{told} ({minutes:.0f} min)", soft_wrap=True)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()


def print_table(title: str, columns: Mapping[str, str], rows: Iterable[Mapping[Any, Any]]) -> None:
    """A table on stdout. `columns` are headers with the format of a row's values, as in `{"parameters": "{parameters:,}"}`.

    Names in the first column are shortened in their middle, and texts there wrap. On a terminal that is too narrow even so, the
    table is wider than the terminal: no figure is cut.
    """
    texts = [[text.format(**row) for text in columns.values()] for row in rows]
    widths = [_widest(column) for column in zip(columns, *texts, strict=True)]
    room = max(stdout.width - sum(widths[1:]) - 3 * len(widths) - 1, NARROWEST)
    for row in texts:
        row[0] = shortened(row[0], room)
    widths[0] = _widest([next(iter(columns)), *(row[0] for row in texts)])
    widths[0] = min(widths[0], NARROWEST)
    needed = sum(widths) + 3 * len(widths) + 1
    table = Table(width=needed if needed > stdout.width else None)
    for index, (name, width) in enumerate(zip(columns, widths, strict=True)):
        justify: Literal["left", "right"] = "right" if index else "left"
        table.add_column(name, justify=justify, no_wrap=index > 0, overflow="fold", min_width=width)
    for row in texts:
        table.add_row(*row)
    stdout.print(title, style="bold", soft_wrap=True)
    stdout.print(table, crop=False)


def _widest(texts: Iterable[str]) -> int:
    """Cells of the longest line."""
    return max(cell_len(line) for text in texts for line in text.split("\n"))


def shortened(name: str, most: int) -> str:
    """A module's dotted name in `most` letters if that can be: without other parts than numbers of blocks and the last one.

    >>> shortened("vit.encoder.layer.11.attention.attention.query", 30)
    'vit.encoder.layer.11…query'
    >>> shortened("vit.encoder.layer.11.attention.attention.query", 20)
    'vit.encoder…11…query'
    """
    if " " in name:
        return name
    parts = name.split(".")
    inner = [place for place, part in enumerate(parts[:-1]) if not part.isdigit()]
    for place in sorted(inner, key=lambda each: (each == 0, abs(each - len(parts) + 2))):  # the first part goes last
        if len(text := _joined(parts)) <= most:
            return text
        parts[place] = ""
    return _joined(parts)


def _joined(parts: Sequence[str]) -> str:
    """Parts by dots; what is left out, in one row or more, is an ellipsis."""
    return re.sub(r"\.*…[.…]*", "…", ".".join(part or "…" for part in parts))


def print_json(values: Mapping[str, Any], files: Sequence[Path] | None = None) -> None:
    """One JSON object on stdout, with the files that were written; what is not finite becomes null."""
    listed = {} if files is None else {"files": [str(file) for file in files]}
    stdout.print_json(json.dumps(finite({**values, **listed}), allow_nan=False))


def finite(value: Any) -> Any:
    """The value as JSON has it: what is not finite becomes null."""
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_line(text: str) -> None:
    """A line on stdout, not wrapped."""
    stdout.print(text, soft_wrap=True)


def print_files(paths: Sequence[Path]) -> None:
    """The files that were written."""
    print_line("wrote " + ", ".join(str(path) for path in paths))
