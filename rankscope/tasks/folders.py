"""Where the ready tasks find the repository's data folder."""

from __future__ import annotations

import os
from pathlib import Path

from rankscope.exceptions import TaskError


def data_folder(name: str) -> Path:
    """A folder under the repository's `data/`, or under `$RANKSCOPE_DATA`.

    Raises:
        TaskError: It is not there, as where rankscope was installed without its repository.
    """
    root = Path(os.environ.get("RANKSCOPE_DATA") or Path(__file__).resolve().parents[2] / "data")
    if not (root / name).is_dir():
        raise TaskError(
            f"the ready tasks need the repository's data folder, but there is no `{root / name}`; "
            "set RANKSCOPE_DATA to the `data` folder of a clone."
        )
    return root / name
