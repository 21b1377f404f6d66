"""`rankscope dashboard`: Optuna's dashboard on a study's search, on this machine.

Searches attach notes and pictures themselves (`rankscope.searching.attachments`). What is missing is added here.
"""

from __future__ import annotations

import importlib
import json
import logging
import uuid
import webbrowser
from collections.abc import Callable, Iterable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from socketserver import ThreadingMixIn
from threading import Lock
from typing import Any, BinaryIO
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import optuna
from optuna.artifacts import FileSystemArtifactStore, get_all_artifact_meta
from optuna.storages import BaseStorage

from rankscope.cli.session import Session, print_json, print_line
from rankscope.errors import SettingsError
from rankscope.maps import ranks_png
from rankscope.profiling import read_profile
from rankscope.searching import STUDY_KEY, Trial, load_study, picture_name, read_trials, study_note, trial_note
from rankscope.targets import TargetModule, fingerprint_targets

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"  # whoever reaches the dashboard may delete the study: this machine only
WSGIApplication = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class RankPictures(FileSystemArtifactStore):
    """A folder of artifacts, with pictures drawn for the trials that have none in it: of a search elsewhere, or of long ago.

    Optuna lets nothing be added to a finished trial, so such a picture is listed by an attribute of the study, as are notes.
    """

    def __init__(
        self, study: optuna.Study, storage: BaseStorage, targets: tuple[TargetModule, ...], folder: Path
    ) -> None:
        super().__init__(folder)
        self._study, self._storage, self._targets, self._folder = study, storage, targets, folder
        self._numbers: set[int] = set()  # of trials that are listed
        self._trials: dict[str, Trial] = {}
        self._drawn: dict[str, bytes] = {}
        self._listing, self._drawing = Lock(), Lock()  # the server has a thread a request

    def list_new(self) -> None:
        """List the pictures of trials that completed since the last call; trials that rankscope did not make have none."""
        with self._listing:
            study_id = self._storage.get_study_id_from_name(self._study.study_name)
            listed = self._storage.get_study_system_attrs(study_id)
            frozen = {trial.number: trial for trial in self._study.get_trials(deepcopy=False)}
            for trial in read_trials(self._study, self._targets, skip_foreign=True):
                if trial.number in self._numbers:
                    continue
                self._numbers.add(trial.number)
                attached = get_all_artifact_meta(frozen[trial.number], storage=self._storage)
                found = [each.artifact_id for each in attached if each.filename == picture_name(trial.number)]
                if found:  # drawn again if its file is on another machine
                    self._trials |= dict.fromkeys(found, trial)
                    continue
                # The same in every process, so that two dashboards on one study list a picture once.
                artifact = str(uuid.uuid5(uuid.NAMESPACE_URL, f"rankscope:{self._study.study_name}:{trial.number}"))
                self._trials[artifact] = trial
                for key, value in self._attributes(artifact, trial, study_id).items():
                    if key not in listed:  # a user may have edited the note
                        self._storage.set_study_system_attr(study_id, key, value)

    def _attributes(self, artifact: str, trial: Trial, study_id: int) -> dict[str, Any]:
        """What lists the trial's picture and note."""
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(study_id, trial.number)
        name = picture_name(trial.number)
        picture = {"artifact_id": artifact, "filename": name, "mimetype": "image/png", "encoding": None}
        # The page shows an artifact as small as a stamp, and what the note holds at full size.
        note = f"{trial_note(trial, self._study)}\n\n![{name}](/artifacts/{study_id}/{trial_id}/{artifact})"
        texts = {f"dashboard:{trial_id}:note_str:0": note, f"dashboard:{trial_id}:note_ver": 1}
        return {f"dashboard:artifacts:{trial_id}:{artifact}": json.dumps(picture), **texts}

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """A file of the folder, or a picture, drawn at its first look."""
        if artifact_id not in self._trials or (self._folder / artifact_id).is_file():
            return super().open_reader(artifact_id)
        with self._drawing:
            if artifact_id not in self._drawn:
                self._drawn[artifact_id] = draw_trial(self._trials[artifact_id])
        return BytesIO(self._drawn[artifact_id])

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Keep what a user uploads."""
        self._folder.mkdir(parents=True, exist_ok=True)
        super().write(artifact_id, content_body)

    def remove(self, artifact_id: str) -> None:
        """Delete a file of the folder; a drawn picture has none."""
        if artifact_id not in self._trials or (self._folder / artifact_id).is_file():
            super().remove(artifact_id)


def draw_trial(trial: Trial) -> bytes:
    """A trial's ranks as a map, in PNG."""
    title = f"trial {trial.number}, {trial.origin}: {trial.allocation.parameters:,} parameters"
    return ranks_png(trial.allocation.targets, trial.allocation.ranks, titles=[title])


def make_app(
    study: optuna.Study, storage: BaseStorage, targets: tuple[TargetModule, ...], *, folder: Path
) -> WSGIApplication:
    """Optuna's dashboard as a WSGI application, with rankscope's note and pictures, also of trials that complete later.

    Raises:
        SettingsError: optuna-dashboard is not installed, or the search is about other target modules.
    """
    optuna_dashboard = require_dashboard()
    about = study.user_attrs[STUDY_KEY]
    if about["model"] != fingerprint_targets(targets):
        raise SettingsError(
            f"study `{study.study_name}` must be about this study file's target modules, but was searched with others; "
            "use the `targets` and the model it was searched with, or another study name or storage."
        )
    if not optuna_dashboard.get_note(study):
        optuna_dashboard.save_note(study, study_note(study, len(targets)))
    pictures = RankPictures(study, storage, targets, folder)
    pictures.list_new()
    polled = f"/api/studies/{storage.get_study_id_from_name(study.study_name)}"
    inner: WSGIApplication = optuna_dashboard.wsgi(storage, artifact_store=pictures)

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == polled:
            with suppress(KeyError):  # the study was deleted meanwhile, as the dashboard will answer
                pictures.list_new()
        return inner(environ, start_response)

    return app


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True  # Ctrl-C waits for no browser


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)


def open_server(app: WSGIApplication, port: int) -> WSGIServer:
    """A server on this machine's loopback address (port 0: any that is free); SettingsError where it cannot listen there."""
    try:
        return make_server(HOST, port, app, server_class=_Server, handler_class=_Handler)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise SettingsError(
            f"`port` must be one to listen on, but {port} is not ({reason}); choose another, or 0 for any that is free."
        ) from None


def require_dashboard() -> Any:
    """The package optuna_dashboard; SettingsError where it is not installed."""
    try:
        return importlib.import_module("optuna_dashboard")
    except ImportError:
        raise SettingsError(
            "the dashboard needs the package optuna-dashboard, but it is not installed; "
            "run pip install 'rankscope[dashboard]'."
        ) from None


def run_dashboard(session: Session, *, port: int, open_browser: bool, as_json: bool) -> None:
    """`rankscope dashboard`."""
    require_dashboard()
    study = load_study(session.study_name, session.storage)
    name, storage = study.study_name, study._storage
    targets = _targets(session, study.user_attrs[STUDY_KEY]["model"])
    app = make_app(study, storage, targets, folder=session.artifacts)
    with open_server(app, port) as server:
        study_id = storage.get_study_id_from_name(name)
        url = f"http://{HOST}:{server.server_port}/dashboard/studies/{study_id}"
        if as_json:
            print_json({"study": name, "url": url})
        else:
            print_line(f"study `{name}`: {url} (Ctrl-C ends)")
        if open_browser:
            webbrowser.open(url)
        with suppress(KeyboardInterrupt):  # this is how one leaves
            server.serve_forever()


def _targets(session: Session, fingerprint: str) -> tuple[TargetModule, ...]:
    """The searched target modules; from the profile if it is theirs, since building a large model for them takes long."""
    if session.profile_path.exists():
        targets = read_profile(session.profile_path).targets
        if fingerprint_targets(targets) == fingerprint:
            return targets
    return session.targets
