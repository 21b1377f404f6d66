"""What the commands share below the surface: a study, its task, targets, budget and files in the output folder."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rankscope.allocation import RankAllocation
from rankscope.budget import ParameterBudget
from rankscope.cli.output import progress, stderr
from rankscope.devices import require_one_process
from rankscope.exceptions import FileFormatError
from rankscope.fingerprints import FORMAT, digest, require_same
from rankscope.profiling import Profile, read_profile
from rankscope.strategies import NEEDS_PROFILE, allocate
from rankscope.study import Study, given_flags, read_study
from rankscope.targets import TargetModule, find_targets, fingerprint_targets
from rankscope.tasks import Task, fingerprint_task, load_task, profile_task

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
        FileFormatError: They cannot.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise FileFormatError(
            f"`--out` must be a folder that can be written to, but `{nearest}` is not; choose another."
        )


def _default_out(study: Study) -> Path:
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
    study: Study
    out: Path

    @classmethod
    def open(cls, path: Path, out: Path | None, overrides: Mapping[str, Any]) -> Session:
        """Reads the study file with the flags that override it.

        Raises:
            RankscopeError: torchrun started several copies of this process, or the file or a flag cannot be used.
        """
        require_one_process("a command")
        flags = given_flags(overrides)
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
        made = {"study": self.study.name, "made_from": self._profile_terms(self.flags), "flags": dict(self.flags)}
        taken = replace(taken, metadata={**taken.metadata, **made})
        taken.to_parquet(self.profile_path)
        return taken

    def profile_at_hand(self) -> Profile:
        """The profile in the output folder, or a new one where there is none.

        Raises:
            FileFormatError: The one that is there was made from something else.
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
        return {**self.facts, "profile": study.profile.model_dump(), "seed": study.seed}

    def allocation_terms(self, made_by: Mapping[str, Any]) -> dict[str, Any]:
        """What an allocation of this study depends on.

        Args:
            made_by: `command` (`allocate` or `search`), its `flags`, and `strategy` where `allocate` was given one.
        """
        study = read_study(self.path, made_by["flags"])
        section = study.allocation
        terms = {
            **self.facts, "budget": study.budget.resolve(self.targets).limit, "seed": study.seed,
            "min_rank": section.min_rank, "max_rank": section.max_rank,
        }  # fmt: skip
        if made_by["command"] == "search":
            spent = {"trials", "confirm_fraction", "storage", "pruner"}  # more of the same, or the same elsewhere
            return terms | {
                "training": study.training.model_dump(), "search": study.search.model_dump(exclude=spent),
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
