"""What a search attaches for Optuna's dashboard, as a plain `optuna-dashboard` reads it, and that attaching changes no result."""

import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import torch
from optuna.artifacts import get_all_artifact_meta
from optuna_dashboard import get_note, save_note

import rankscope as rs
from rankscope.maps import ranks_png
from rankscope.searching import attachments
from rankscope.searching.attachments import NOTE_KEY, RECOMMENDED_KEY, finalists_table, study_note
from rankscope.tasks import Task

SHORT = rs.TrainingSettings(steps=2, learning_rate=0.01)
Search = Callable[..., rs.SearchResult]
optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.fixture(scope="module")
def run(digits: Task, digits_profile: rs.Profile, digits_budget: rs.ParameterBudget) -> Search:
    def search(folder: Path | None, task: Task = digits, **settings: object) -> rs.SearchResult:
        storage = {"storage": f"sqlite:///{folder}/a.db"} if folder else {}
        given = {"n_trials": 4, "confirm_fraction": 0.0, "training": SHORT, "study_name": "s", **storage, **settings}
        return rs.search(task, budget=digits_budget, profile=digits_profile, **given)  # type: ignore[arg-type]

    return search


@pytest.fixture(scope="module")
def confirmed(run: Search, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, rs.SearchResult]:
    folder = tmp_path_factory.mktemp("confirmed")
    return folder, run(folder, n_trials=10, confirm_fraction=0.5)


def note_of(study: optuna.Study, number: int) -> str:
    return get_note(trial_of(study, number))


def trial_of(study: optuna.Study, number: int) -> optuna.Trial:
    """A finished trial, as far as the dashboard's functions ask."""
    trial = study.get_trials()[number]
    return SimpleNamespace(study=study, storage=study._storage, _trial_id=trial._trial_id)  # type: ignore[return-value]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_each_trial_has_its_map_and_a_note(confirmed: tuple[Path, rs.SearchResult]) -> None:
    folder, result = confirmed
    study = result.study
    assert len(result.trials) == 5
    for trial, frozen in zip(result.trials, study.get_trials(), strict=True):
        (artifact,) = get_all_artifact_meta(frozen, storage=study._storage)
        assert (artifact.filename, artifact.mimetype) == (f"ranks of trial {trial.number}.png", "image/png")
        title = f"trial {trial.number}, {trial.origin}: {trial.allocation.parameters:,} parameters"
        drawn = ranks_png(result.targets, trial.allocation.ranks, titles=[title])
        assert (folder / "artifacts" / artifact.artifact_id).read_bytes() == drawn
        note = note_of(study, trial.number)
        assert f"**{trial.origin}**, {trial.allocation.parameters:,} adapter parameters: validation accuracy " in note
        assert note.endswith(f"\n\n![{artifact.filename}](/artifacts/1/{frozen._trial_id}/{artifact.artifact_id})")


def test_the_recommendation_is_marked_and_confirming_runs_are_shown(confirmed: tuple[Path, rs.SearchResult]) -> None:
    _, result = confirmed
    study, best = result.study, result.best_trial.number
    assert study.user_attrs[RECOMMENDED_KEY] == best
    marked = [number for number in range(5) if note_of(study, number).startswith("> ★ **recommended**")]
    assert marked == [best]
    told = [number for number in range(5) if re.match(r"> .*on fresh seeds 500: 0\.\d+", note_of(study, number))]
    assert told == sorted(each.trial.number for each in result.finalists)
    note = get_note(study)
    assert note.startswith(f"## ★ Recommended: trial {best}\n{result.recommendation.reason}.\n\n![recommended ranks, ")
    assert note.endswith(f"{finalists_table(result)}\n\n{study_note(study, 36)}")
    rows = [line.split(" | ") for line in finalists_table(result).splitlines() if re.match(r"\| (★ )?\d", line)]
    assert [int(row[0].strip("|★ ")) for row in rows] == [each.trial.number for each in result.finalists]
    assert [float(row[2]) for row in rows] == pytest.approx(
        [each.metrics_by_seed["500"] for each in result.finalists], rel=1e-3
    )
    assert [row[0].startswith("| ★") for row in rows] == [each.trial.number == best for each in result.finalists]


def test_a_resumed_search_leaves_one_mark_and_one_picture(
    run: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(tmp_path, n_trials=3)
    number = first.best_trial.number
    other = next(trial for trial in first.trials if trial.number != number)
    reason = first.recommendation._replace(trial=other)
    monkeypatch.setattr(rs.SearchResult, "recommendation", property(lambda self: reason))
    study = run(tmp_path, n_trials=4).study
    marked = [each for each in range(4) if note_of(study, each).startswith("> ★ **recommended**")]
    assert marked == [other.number]
    run(tmp_path, n_trials=4)
    names = {each.filename for each in get_all_artifact_meta(study)}
    assert names == {f"recommended ranks, trial {each}.png" for each in (number, other.number)}


def test_pruned_and_failed_trials_say_why(digits: Task, run: Search, tmp_path: Path) -> None:
    class Diverging(type(digits)):  # type: ignore[misc]
        """The third training's loss is not a number."""

        def build_model(self) -> torch.nn.Module:
            self.built = getattr(self, "built", 0) + 1
            return super().build_model()

        def loss(self, model: torch.nn.Module, batch: object) -> torch.Tensor:
            return super().loss(model, batch) * (float("nan") if self.built == 4 else 1.0)

    class Last(optuna.pruners.BasePruner):
        def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
            return trial.number == 3

    task = object.__new__(Diverging)
    task.__dict__.update(vars(digits))
    study = run(
        tmp_path, task=task, pruner=Last(), training=SHORT.model_copy(update={"steps": 4, "evaluate_every": 2})
    ).study
    states = [trial.state.name for trial in study.get_trials()]
    notes = {state: note_of(study, number) for number, state in enumerate(states)}
    assert {"COMPLETE", "PRUNED", "FAIL"} == notes.keys()
    assert re.match(
        r"\*\*sampler\*\*, 6,\d{3} adapter parameters: pruned at step 2\n\n!\[ranks of trial 3", notes["PRUNED"]
    )
    assert re.match(r"\*\*sampler\*\*, 6,\d{3} adapter parameters: .*loss.*\n\n!\[ranks of trial 2", notes["FAIL"])


def test_without_the_extra_results_are_the_same(
    run: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def outcome(result: rs.SearchResult) -> list[object]:
        return [(trial.params, trial.value) for trial in result.study.get_trials()]

    with_it = outcome(run(tmp_path / "with", seed=3))
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)
    with caplog.at_level(logging.INFO, logger="rankscope"):
        result = run(tmp_path / "without", seed=3)
    assert outcome(result) == with_it
    said = [record.getMessage() for record in caplog.records if "dashboard" in record.getMessage()]
    assert said == [
        "without optuna-dashboard, trials get no notes and pictures; run pip install 'rankscope[dashboard]'"
    ]
    assert not warnings_of(caplog)
    assert not (tmp_path / "without" / "artifacts").exists()
    assert not result.study._storage.get_study_system_attrs(result.study._study_id)


def test_a_search_in_memory_attaches_nothing(run: Search, caplog: pytest.LogCaptureFixture) -> None:
    study = run(None, n_trials=2).study
    assert not study._storage.get_study_system_attrs(study._study_id)
    assert NOTE_KEY not in study.user_attrs


def test_a_failing_attachment_is_one_warning(run: Search, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    result = run(tmp_path, artifacts=tmp_path / "file" / "pictures")
    assert len(result.trials) == 4
    (said,) = warnings_of(caplog)
    assert said.startswith("trial 0 has no picture or note in the dashboard: [Errno 20] Not a directory: ")
    assert "\n" not in said


def test_what_users_write_is_kept(run: Search, tmp_path: Path) -> None:
    first = run(tmp_path, n_trials=3)
    best = first.best_trial.number
    save_note(first.study, "mine")
    for number in range(3):
        save_note(trial_of(first.study, number), f"mine, {number}")
    study = run(tmp_path, n_trials=4).study
    assert get_note(study) == "mine"
    best = study.user_attrs[RECOMMENDED_KEY]
    assert [note_of(study, number).removeprefix("> ★ **recommended**\n\n") for number in range(3)] == [
        f"mine, {number}" for number in range(3)
    ]
    assert note_of(study, best).startswith("> ★ **recommended**\n\n")


def test_another_folder_and_other_storages(run: Search, tmp_path: Path) -> None:
    run(tmp_path, n_trials=2, artifacts=tmp_path / "pictures")
    assert len(list((tmp_path / "pictures").iterdir())) == 3  # two trials, and the recommended one
    assert not (tmp_path / "artifacts").exists()
    assert (
        attachments.artifact_folder(optuna.storages.RDBStorage(f"sqlite:///{tmp_path}/a.db")) == tmp_path / "artifacts"
    )
    for storage in (
        "sqlite:///:memory:",
        "sqlite://",
        "postgresql://user:secret@host/database",
        optuna.storages.InMemoryStorage(),
    ):
        assert attachments.artifact_folder(storage) is None


def test_a_storage_without_a_folder_has_notes(run: Search, tmp_path: Path) -> None:
    journal = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / "a.log")))
    study = run(None, n_trials=2, storage=journal).study
    assert note_of(study, 0).startswith("**uniform**, 6,912 adapter parameters: validation accuracy ") or note_of(
        study, 0
    ).startswith("> ★")
    assert "![" not in note_of(study, 0)
    assert not get_all_artifact_meta(study.get_trials()[0], storage=study._storage)


def test_a_note_reads_no_other_notes(run: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`save_note` itself reads those of all trials, twice."""
    read, asked = optuna.storages.RDBStorage.get_study_system_attrs, []
    monkeypatch.setattr(
        optuna.storages.RDBStorage, "get_study_system_attrs", lambda self, study: asked.append(1) or read(self, study)
    )
    counts = []
    for n_trials in (4, 8):
        (tmp_path / str(n_trials)).mkdir()
        asked.clear()
        result = run(tmp_path / str(n_trials), n_trials=n_trials)
        assert all(note_of(result.study, trial.number) for trial in result.trials)
        counts.append(len(asked) - n_trials)  # this test reads them, too
    assert counts[0] == counts[1]
