"""Writing files so that no reader ever sees half of one, and reading JSON with errors that teach."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rankscope.exceptions import FileFormatError


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is renamed to `path`, on error it is removed.

    Parent folders are created. The rename is atomic on one file system, so a reader sees the old file or the
    new one, never a part.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp makes private files; the result should be an ordinary one
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; on success it takes the place of `path`, on error it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as temporary:
        fresh, old = Path(temporary) / "new", Path(temporary) / "old"
        fresh.mkdir()
        yield fresh
        if path.exists():
            path.rename(old)
        fresh.rename(path)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str], *, what: str) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        path: The file.
        what: What the file should hold, for the error message, as in "an allocation".

    Raises:
        FileFormatError: The file is missing, cannot be read, is not JSON, or does not hold an object.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileFormatError(f"`{path}` must hold {what}, but there is no such file; check the path.") from None
    except OSError as error:
        raise FileFormatError(
            f"`{path}` must hold {what}, but cannot be read ({error.strerror}); check the path."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FileFormatError(
            f"`{path}` must hold {what} as JSON, but it cannot be parsed ({error}); it may be truncated: write it again."
        ) from None
    if not isinstance(value, dict):
        raise FileFormatError(f"`{path}` must hold {what} as a JSON object, but holds a {type(value).__name__}.")
    return value
