"""What Optuna's dashboard shows beside the numbers: a rank map and a note of each trial, and the study's note.

Attached while the search runs, through `optuna.artifacts` and `optuna_dashboard.save_note`, so that a plain `optuna-dashboard
URL --artifact-dir FOLDER` shows them. Without optuna-dashboard, or with trials in memory, nothing is attached.
"""

from __future__ import annotations

import importlib
import logging
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import optuna
from optuna.artifacts import FileSystemArtifactStore, get_all_artifact_meta, upload_artifact

from rankscope.allocation import RankAllocation
from rankscope.errors import TrainingError, one_line
from rankscope.files import digest
from rankscope.maps import ranks_png
from rankscope.searching.confirmation import Finalist
from rankscope.searching.storage import RANKS_KEY, SAMPLER, STUDY_KEY, TRIAL_KEY, UNIFORM, Trial
from rankscope.targets import TargetModule
from rankscope.units import Interval

if TYPE_CHECKING:
    from rankscope.searching.runner import SearchResult

logger = logging.getLogger(__name__)

RECOMMENDED_KEY = "recommended_trial"  # study attribute: the number; finished trials take no attributes any more
NOTE_KEY = "note_digest"  # study attribute: of the study's note as we wrote it; a user's own is left alone
NOTE = Path(__file__).with_name("note.md").read_text(encoding="utf-8")  # of a study, for `str.format`
EXTRA = "pip install 'rankscope[dashboard]'"


def artifact_folder(storage: object) -> Path | None:
    """Where pictures go by default: `artifacts` beside the file of an SQLite database or a journal; None for other storages.

    >>> artifact_folder("sqlite:///out/search.db"), artifact_folder("journal:out/search.log"), artifact_folder(None)
    (PosixPath('out/artifacts'), PosixPath('out/artifacts'), None)
    """
    scheme, _, file = str(getattr(storage, "url", storage)).partition(":")
    file = file.removeprefix("//").partition("?")[0]
    if scheme == "sqlite":
        file = file.removeprefix("/")
    return Path(file).parent / "artifacts" if scheme in ("sqlite", "journal") and file not in ("", ":memory:") else None


def picture_name(number: int) -> str:
    """The file name under which a trial's rank map is attached."""
    return f"ranks of trial {number}.png"


class _NoNotes:
    """A storage in which nobody has written a note.

    `save_note` reads the notes of all trials twice, to number the new one: .1 s at 5,000. A trial that has just ended has none.
    """

    def __init__(self, storage: optuna.storages.BaseStorage) -> None:
        self._storage = storage

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        return {}


class Attachments:
    """Attaches to one study. What goes wrong is warned of once, and never ends a search."""

    def __init__(self, study: optuna.Study, targets: tuple[TargetModule, ...], folder: Path | None) -> None:
        """Without a `folder` there are notes only."""
        self.study, self.targets, self.folder = study, targets, folder
        self._dashboard: Any = None
        self._warned = False
        if isinstance(study._storage, optuna.storages.InMemoryStorage):
            return
        try:
            self._dashboard = importlib.import_module("optuna_dashboard")
        except ImportError:
            logger.info("without optuna-dashboard, trials get no notes and pictures; run %s", EXTRA)
        with self._unharmed("the study has no note"):
            self._note_study(study_note(study, len(targets)))

    @contextmanager
    def attached(self, running: optuna.Trial) -> Iterator[None]:
        """Attach to a trial at the end of the block, be it completed, pruned or failed; then it takes no attributes any more."""
        try:
            yield
        except (optuna.TrialPruned, TrainingError) as error:
            self._attach(running, one_line(error))
            raise
        self._attach(running, "")

    def _attach(self, running: optuna.Trial, ended: str) -> None:
        with self._unharmed(f"trial {running.number} has no picture or note"):
            known = running.user_attrs
            if self._dashboard is None or RANKS_KEY not in known:
                return  # it failed before it had ranks
            allocation = RankAllocation(self.targets, tuple(known[RANKS_KEY]))
            origin = known.get("origin", SAMPLER)
            title = f"trial {running.number}, {origin}: {allocation.parameters:,} parameters"
            picture = self._upload(running, picture_name(running.number), allocation, title)
            if TRIAL_KEY in known:
                trial = Trial.from_row({**known, **known[TRIAL_KEY], "trial": running.number}, self.targets)
                note = trial_note(trial, self.study)
            else:
                note = f"**{origin}**, {allocation.parameters:,} adapter parameters: {ended}"
            first = SimpleNamespace(
                study=self.study, storage=_NoNotes(self.study._storage), _trial_id=running._trial_id
            )
            self._dashboard.save_note(first, f"{note}\n\n{picture}".rstrip())

    def finish(self, result: SearchResult) -> None:
        """Say in the notes of the study and of its finalists what is recommended, and what fresh seeds gave."""
        with self._unharmed("the study's note does not tell the recommendation"):
            if self._dashboard is None or not result.trials:
                return
            best, before = result.best_trial, self.study.user_attrs.get(RECOMMENDED_KEY)
            self.study.set_user_attr(RECOMMENDED_KEY, best.number)
            fresh = {each.trial.number: each for each in result.finalists}
            ids = {trial.number: trial._trial_id for trial in self.study.get_trials(deepcopy=False)}
            for number in ids.keys() & {best.number, before, *fresh}:
                # `save_note` asks a trial for these three only; Optuna gives no `Trial` of one that is finished.
                finished = SimpleNamespace(study=self.study, storage=self.study._storage, _trial_id=ids[number])
                note = self._dashboard.get_note(finished)
                said = with_verdict(note, fresh.get(number), recommended=number == best.number)
                if said != note:
                    self._dashboard.save_note(finished, said)
            name = f"recommended ranks, trial {best.number}.png"
            held = {each.filename: each.artifact_id for each in get_all_artifact_meta(self.study)}
            title = f"recommended, {best.name}: {best.allocation.parameters:,} parameters"
            picture = self._shown(self.study, name, held.get(name)) or self._upload(
                self.study, name, best.allocation, title
            )
            verdict = f"## ★ Recommended: trial {best.number}\n{result.recommendation.reason}."
            told = [verdict, picture, finalists_table(result), study_note(self.study, len(self.targets))]
            self._note_study("\n\n".join(filter(None, told)))

    def _note_study(self, note: str) -> None:
        """Write the study's note, unless someone has edited it."""
        if self._dashboard is None:
            return
        held = self._dashboard.get_note(self.study)
        if held != note and (not held or digest(held) == self.study.user_attrs.get(NOTE_KEY)):
            self.study.set_user_attr(NOTE_KEY, digest(note))
            self._dashboard.save_note(self.study, note)

    def _upload(self, to: optuna.Trial | optuna.Study, name: str, allocation: RankAllocation, title: str) -> str:
        """Attach a rank map; returns the Markdown that shows it, since a page shows an artifact as small as a stamp."""
        if self.folder is None:
            return ""
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / name
            file.write_bytes(ranks_png(self.targets, allocation.ranks, titles=[title]))
            store = FileSystemArtifactStore(self.folder)
            return self._shown(to, name, upload_artifact(artifact_store=store, file_path=str(file), study_or_trial=to))

    def _shown(self, on: optuna.Trial | optuna.Study, name: str, artifact: str | None) -> str:
        """The Markdown that shows an artifact; nothing if there is none."""
        path = artifact and importlib.import_module("optuna_dashboard.artifact").get_artifact_path(on, artifact)
        return f"![{name}]({path})" if path else ""

    @contextmanager
    def _unharmed(self, problem: str) -> Iterator[None]:
        """Pictures are a courtesy: whatever fails here, from a full disk to a font, the search goes on."""
        try:
            yield
        except Exception as error:
            level = logging.DEBUG if self._warned else logging.WARNING
            logger.log(level, "%s in the dashboard: %s", problem, one_line(error))
            self._warned = True


def study_note(study: optuna.Study, n_targets: int) -> str:
    """How to read a search in the dashboard, in Markdown."""
    about = study.user_attrs[STUDY_KEY]
    return NOTE.format(n_targets=n_targets, **{key: about[key] for key in ("budget", "metric", "n_seeds")})


def trial_note(trial: Trial, study: optuna.Study) -> str:
    """Where a completed trial comes from and what it reached, in Markdown."""
    metric = study.user_attrs[STUDY_KEY]["metric"]
    text = f"**{trial.origin}**, {trial.allocation.parameters:,} adapter parameters: validation {metric} **{trial.metric:.4g}**"
    if trial.difference is not None:
        text += f", {trial.difference:+.4f} to uniform"
    if trial.reused is not None:
        text += f"; the same allocation as trial {trial.reused}, whose result it has"
    return f"{text}\n\nlearning rate {trial.learning_rate:g}, {trial.wall_seconds:.1f} s of training"


def with_verdict(note: str, finalist: Finalist | None, *, recommended: bool) -> str:
    r"""A trial's note with what the search's end says of it on top, in the place of what an earlier end said.

    >>> with_verdict("mine", None, recommended=True)
    '> ★ **recommended**\n\nmine'
    >>> with_verdict('> ★ **recommended**\n\nmine', None, recommended=False)
    'mine'
    """
    first, _, rest = note.partition("\n\n")
    note = rest if first.startswith("> ★") or first.startswith("> on fresh seeds") else note
    fresh = "" if finalist is None else f"on fresh seeds {_seeds(finalist)}: {_confirmed(finalist)}"
    said = " ".join(filter(None, ["★ **recommended**" * recommended, fresh]))
    return f"> {said}\n\n{note}" if said else note


def _seeds(finalist: Finalist) -> str:
    return ", ".join(finalist.metrics_by_seed)


def _confirmed(finalist: Finalist) -> str:
    """A finalist's mean over fresh seeds, and its difference to uniform."""
    if finalist.difference is None:
        return f"{finalist.metric:.4g}"
    ends = finalist.interval or (math.nan, math.nan)
    return f"{finalist.metric:.4g}, {Interval(finalist.difference, *ends).text()} to uniform"


def finalists_table(result: SearchResult) -> str:
    """Every confirming run, in Markdown: one row a finalist, one column a fresh seed; nothing without finalists."""
    if not result.finalists:
        return f"Nothing was trained again on fresh seeds: {result.unconfirmed}" if result.unconfirmed else ""
    seeds = list(result.finalists[0].metrics_by_seed)
    heads = ["trial", "origin", *(f"seed {seed}" for seed in seeds), "mean", "to uniform, 95 %", "posterior, 95 %"]
    lines = [heads, ["---", "---", *["---:"] * (len(heads) - 2)]]
    for each in result.finalists:
        ends = each.interval or (math.nan, math.nan)
        difference = "" if each.difference is None else Interval(each.difference, *ends).text()
        expected = result.posterior.get(each.trial.allocation)
        star = "★ " if each.trial.number == result.best_trial.number else ""
        metrics = [f"{each.metrics_by_seed[seed]:.4f}" for seed in seeds]
        posterior = expected.text() if expected and each.trial.origin != UNIFORM else ""
        lines.append(
            [f"{star}{each.trial.number}", each.trial.origin, *metrics, f"{each.metric:.4f}", difference, posterior]
        )
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"### Confirming runs: validation {result.metric_name} on fresh seeds\n\n{table}"
