"""The dashboard on real searches, asked over WSGI: each trial's picture and note, and what is never touched."""

import io
import json
import re
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import optuna
import pytest
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

import rankscope as rs
from rankscope.cli.dashboard import draw_trial, make_app, open_server
from rankscope.errors import SettingsError
from rankscope.searching import study_note, trial_note
from rankscope.searching.storage import ONE_SHOT, POSTERIOR_MEAN, SAMPLER, UNIFORM
from rankscope.tasks import Task

Ask = Callable[..., tuple[int, Any]]
optuna.logging.set_verbosity(optuna.logging.WARNING)


def rdb(folder: Path) -> BaseStorage:
    return RDBStorage(f"sqlite:///{folder}/search.db")


def journal(folder: Path) -> BaseStorage:
    return JournalStorage(JournalFileBackend(str(folder / "search.log")))


Search = Callable[[BaseStorage, int], rs.SearchResult]


@pytest.fixture(scope="module")
def search(digits: Task, digits_profile: rs.Profile, digits_budget: rs.ParameterBudget) -> Search:
    def run(storage: BaseStorage, n_trials: int) -> rs.SearchResult:
        short = rs.TrainingSettings(steps=2, learning_rate=0.01)
        return rs.search(digits, budget=digits_budget, profile=digits_profile, n_trials=n_trials, confirm_fraction=0.0,
                         training=short, storage=storage, study_name="short")  # fmt: skip

    return run


@pytest.fixture(scope="module", params=[rdb, journal])
def searched(
    request: pytest.FixtureRequest, search: Search, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Callable[[Path], BaseStorage]]:
    """A folder with a search of three trials, and what opens it."""
    folder = tmp_path_factory.mktemp("search")
    search(request.param(folder), 3)
    return folder, request.param


@pytest.fixture
def storage(searched: tuple[Path, Callable[[Path], BaseStorage]], tmp_path: Path) -> BaseStorage:
    """A copy of the search, to change."""
    folder, opener = searched
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return opener(tmp_path)


@pytest.fixture
def result(storage: BaseStorage, digits_profile: rs.Profile) -> rs.SearchResult:
    study = optuna.load_study(study_name="short", storage=storage)
    return rs.SearchResult(study, digits_profile.targets, "accuracy")


@pytest.fixture
def opened(result: rs.SearchResult, storage: BaseStorage, tmp_path: Path) -> Callable[[], Ask]:
    def open_app() -> Ask:
        app = make_app(result.study, storage, result.targets, folder=tmp_path / "artifacts")

        def ask(path: str, method: str = "GET", body: Any = None) -> tuple[int, Any]:
            """Status and answer; JSON is parsed."""
            sent = json.dumps(body).encode() if body is not None else b""
            environ: dict[str, Any] = {"PATH_INFO": path, "REQUEST_METHOD": method, "CONTENT_TYPE": "application/json",
                                       "CONTENT_LENGTH": str(len(sent)), "wsgi.input": io.BytesIO(sent)}  # fmt: skip
            setup_testing_defaults(environ)
            statuses: list[str] = []
            answer = b"".join(app(environ, lambda status, *_rest: statuses.append(status)))
            return int(statuses[0].split()[0]), json.loads(answer) if answer.startswith(b"{") else answer

        return ask

    return open_app


def system_attributes(storage: BaseStorage) -> dict[str, Any]:
    return dict(storage.get_study_system_attrs(storage.get_study_id_from_name("short")))


def study_path(storage: BaseStorage) -> str:
    return f"/api/studies/{storage.get_study_id_from_name('short')}"


def picture_path(storage: BaseStorage, trial: dict[str, Any]) -> str:
    study_id = storage.get_study_id_from_name("short")
    return f"/artifacts/{study_id}/{trial['trial_id']}/{trial['artifacts'][0]['artifact_id']}"


def test_each_trial_has_its_picture_and_the_study_its_note(result, opened, storage: BaseStorage) -> None:
    ask = opened()
    status, study = ask(study_path(storage))
    assert status == 200
    assert study["note"]["body"].startswith("## ★ Recommended: trial ")
    assert study["note"]["body"].endswith(study_note(result.study, 36))
    for shown, trial in zip(study["trials"], result.trials, strict=True):
        assert [(a["filename"], a["mimetype"]) for a in shown["artifacts"]] == [
            (f"ranks of trial {trial.number}.png", "image/png")
        ]
        path = picture_path(storage, shown)
        assert ask(path) == (200, draw_trial(trial))
        assert trial_note(trial, result.study) in shown["note"]["body"]
        starred = shown["note"]["body"].startswith("> ★ **recommended**")
        assert starred == (trial.number == result.study.user_attrs["recommended_trial"])


def test_a_picture_is_the_plot_of_the_trial_s_ranks(digits_profile: rs.Profile) -> None:
    targets = digits_profile.targets
    made = []
    for ranks in ((1,) * 36, (2,) + (0,) * 35):
        allocation = rs.RankAllocation(targets, ranks, strategy="sampler")
        trial = rs.searching.Trial(number=7, origin="sampler", allocation=allocation, learning_rate=0.01, metric=0.5, loss=1.0,
                                   metrics_by_seed={"0": 0.5}, difference=None, wall_seconds=1.0, reused=None)  # fmt: skip
        made.append(draw_trial(trial))
        assert made[-1].startswith(b"\x89PNG")
        assert made[-1] == draw_trial(trial)
    assert made[0] != made[1]


def test_only_completed_trials_of_rankscope_have_one(result, opened, storage: BaseStorage) -> None:
    study = result.study
    study.add_trial(optuna.create_trial(value=0.9, user_attrs={"mine": 1}))
    study.add_trial(optuna.create_trial(value=0.9, user_attrs={"ranks": [1] * 36}))  # one that only looks like it
    study.tell(study.ask(), state=optuna.trial.TrialState.FAIL)
    study.ask()
    shown = opened()(study_path(storage))[1]["trials"]
    assert [len(trial["artifacts"]) for trial in shown] == [1, 1, 1, 0, 0, 0, 0]
    assert [bool(trial["note"]["body"]) for trial in shown] == [True, True, True, False, False, False, False]


def test_a_search_without_the_extra_is_followed(
    search, opened, storage: BaseStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its trials have no pictures and notes of their own: the dashboard adds them."""
    ask = opened()
    assert len(ask(study_path(storage))[1]["trials"]) == 3
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "optuna_dashboard", None)
        found = search(storage, 4)
    last = found.trials[-1]
    before = system_attributes(storage)
    ask("/api/meta")
    assert system_attributes(storage) == before
    ask(study_path(storage))
    study_id = storage.get_study_id_from_name("short")
    prefix = f"dashboard:artifacts:{storage.get_trial_id_from_study_id_trial_number(study_id, last.number)}:"
    listed = [
        key.removeprefix(prefix) for key in set(system_attributes(storage)) - set(before) if key.startswith(prefix)
    ]
    path = f"/artifacts/{study_id}/{prefix.split(':')[2]}/{listed[0]}"
    assert [ask(path), len(listed)] == [(200, draw_trial(last)), 1]
    name = f"ranks of trial {last.number}.png"
    noted = system_attributes(storage)[f"dashboard:{prefix.split(':')[2]}:note_str:0"]
    assert noted == f"{trial_note(last, found.study)}\n\n![{name}]({path})"


def test_a_picture_whose_file_is_elsewhere_is_drawn(result, opened, storage: BaseStorage, tmp_path: Path) -> None:
    ask = opened()
    shutil.rmtree(tmp_path / "artifacts", ignore_errors=True)
    for shown, trial in zip(ask(study_path(storage))[1]["trials"], result.trials, strict=True):
        assert ask(picture_path(storage, shown)) == (200, draw_trial(trial))


def test_a_second_opening_changes_nothing(result, opened, storage: BaseStorage) -> None:
    opened()
    before = system_attributes(storage)
    opened()(study_path(storage))
    assert system_attributes(storage) == before


def test_what_a_user_writes_and_attaches_is_kept(result, opened, storage: BaseStorage, tmp_path: Path) -> None:
    ask, path = opened(), study_path(storage)
    held = ask(path)[1]
    first = held["trials"][0]
    for at, note, body in ((path, held["note"], "mine"), (f"{path}/{first['trial_id']}", first["note"], "good")):
        assert ask(f"{at}/note", "PUT", {"version": note["version"] + 1, "body": body})[0] == 204
    sent = {"file": "data:text/plain;base64,aGVsbG8=", "filename": "hello.txt"}
    status, uploaded = ask(path.replace("studies", "artifacts"), "POST", sent)
    assert status == 201
    assert (tmp_path / "artifacts" / uploaded["artifact_id"]).read_bytes() == b"hello"

    ask = opened()
    study = ask(path)[1]
    assert (study["note"]["body"], study["trials"][0]["note"]["body"]) == ("mine", "good")
    attached = f"{path.replace('api/studies', 'artifacts')}/{uploaded['artifact_id']}"
    assert ask(attached) == (200, b"hello")
    assert ask(f"/api{attached}", "DELETE")[0] == 204
    assert not (tmp_path / "artifacts" / uploaded["artifact_id"]).exists()


def test_a_study_can_be_deleted_with_its_pictures(result, opened, storage: BaseStorage) -> None:
    ask = opened()
    assert ask(study_path(storage), "DELETE", {"remove_associated_artifacts": True})[0] == 204
    assert optuna.get_all_study_names(storage) == []


def test_other_target_modules_are_refused(result, storage: BaseStorage, tmp_path: Path) -> None:
    message = (
        "study `short` must be about this study file's target modules, but was searched with others; "
        "use the `targets` and the model it was searched with, or another study name or storage."
    )
    before = system_attributes(storage)
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
        make_app(result.study, storage, result.targets[1:], folder=tmp_path)
    assert system_attributes(storage) == before


def test_the_note_explains_what_a_trial_shows() -> None:
    study = optuna.create_study()
    study.set_user_attr("rankscope", {"budget": 6_912, "metric": "accuracy", "n_seeds": 2, "task": "digits-shift"})
    note = study_note(study, 36)
    assert note.startswith(
        "## Which LoRA rank where\n\nEach trial fine-tunes one **allocation**: one LoRA rank for each of 36 target modules, "
        "6,912 adapter parameters in all at most. The objective is the validation accuracy, mean over training seeds "
        "(2 a trial); higher is better.\n\n**The best value observed is not the recommendation.** "
    )
    words = (
        UNIFORM,
        ONE_SHOT,
        SAMPLER,
        POSTERIOR_MEAN,
        "ranks",
        "rankscope",
        "one-shot weight",
        "learning_rate",
        "difference",
    )
    assert all(f"`{word}`" in note for word in words)


def test_the_server_listens_on_loopback_only_and_on_a_free_port() -> None:
    with open_server(lambda _environ, _start: [b""], 0) as server:
        address, port = server.socket.getsockname()
        assert (address, port) == ("127.0.0.1", server.server_port)
        message = (
            f"`port` must be one to listen on, but {port} is not (address already in use); "
            "choose another, or 0 for any that is free."
        )
        with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
            open_server(lambda _environ, _start: [b""], port)
        with socket.create_connection(("127.0.0.1", port)):
            pass


def test_a_study_can_be_deleted_in_the_dashboard(opened, storage: BaseStorage) -> None:
    ask, path = opened(), study_path(storage)
    assert ask(path, "DELETE")[0] == 204
    assert ask(path)[0] == 404
