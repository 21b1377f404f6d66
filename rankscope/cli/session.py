"""What the commands share below the surface: a study, its task, targets, budget and files in the output folder."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rankscope.allocation import RankAllocation
from rankscope.budget import ParameterBudget
from rankscope.cli.output import progress, stderr
from rankscope.devices import require_one_process
from rankscope.profiling import Profile, read_profile
from rankscope.strategies import NEEDS_PROFILE, allocate
from rankscope.study import Study, read_study
from rankscope.targets import TargetModule, find_targets
from rankscope.tasks import Task, load_task, profile_task

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


@dataclass
class Session:
    """One command's view of a study."""

    path: Path
    study: Study
    out: Path

    @classmethod
    def open(cls, path: Path, out: Path | None, overrides: Mapping[str, Any]) -> Session:
        """Reads the study file with the flags that override it.

        Raises:
            RankscopeError: torchrun started several copies of this process, or the file or a flag cannot be used.
        """
        require_one_process("a command")
        given = dict(overrides)
        if given.get("budget.parameters") or given.get("budget.uniform_rank"):
            budget = {key: given.pop(f"budget.{key}", None) for key in ("parameters", "uniform_rank")}
            given["budget"] = {key: value for key, value in budget.items() if value is not None}
        study = read_study(path, given)
        quiet_libraries()
        return cls(path, study, out or Path("out") / study.name)

    @cached_property
    def task(self) -> Task:
        """The study's task."""
        return load_task(self.study.task, base_dir=self.study.base_dir)

    @cached_property
    def targets(self) -> tuple[TargetModule, ...]:
        """The target modules of the task's model."""
        return find_targets(self.task.build_model(), self.study.targets)

    @cached_property
    def budget(self) -> ParameterBudget:
        """The study's budget."""
        return self.study.budget.resolve(self.targets)

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

    def take_profile(self, *, keep_partial: bool = False) -> Profile:
        """Profiles the task's model and writes `profile.parquet`."""
        section = self.study.profile
        with progress() as bar:
            line = bar.add_task("profiling", total=None)
            taken = profile_task(
                self.task,
                targets=self.targets,
                n_batches=section.batches,
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
        taken.to_parquet(self.profile_path)
        return taken

    def profile_at_hand(self) -> Profile:
        """The profile in the output folder if it fits, else a new one."""
        if self.profile_path.exists():
            found = read_profile(self.profile_path)
            found.require(self.targets)
            return found
        stderr.print(f"no profile in {self.out} yet: taking one", soft_wrap=True)
        return self.take_profile()

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
