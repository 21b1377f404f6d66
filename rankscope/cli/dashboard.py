"""`rankscope dashboard`: Optuna's dashboard on a study's search, until Ctrl-C."""

from __future__ import annotations

import webbrowser
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rankscope.cli.output import print_json, print_line
from rankscope.cli.session import Session
from rankscope.dashboard import HOST, make_app, open_server, require_dashboard
from rankscope.profiling import read_profile
from rankscope.searching.study import STUDY_KEY, find_storage, load_study
from rankscope.targets import TargetModule, fingerprint_targets


def run_dashboard(
    path: Path, out: Path | None, overrides: Mapping[str, Any], *, port: int, open_browser: bool, as_json: bool
) -> None:
    """`rankscope dashboard`."""
    require_dashboard()
    session = Session.open(path, out, overrides)
    name, storage = session.study.name, find_storage(session.storage)
    study = load_study(name=name, storage=storage)
    targets = _targets(session, study.user_attrs[STUDY_KEY]["model"])
    app = make_app(study, storage, targets, uploads=session.out / "artifacts")
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
