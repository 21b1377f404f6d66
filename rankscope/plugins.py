"""Code that users bring: `path/to/file.py:function`, `package.module:function`, and entry points of installed packages."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rankscope.errors import RankscopeError, did_you_mean, one_line

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

USER_MODULE = "rankscope_user_"  # begins the names of modules from users' files


def code_of(task: Any, **names: str | Iterable[str]) -> dict[str, str]:
    """What of a study is code that it brings, with the key that names it: functions, and code that comes with a model.

    `names` are strategies and methods by key.

    >>> code_of("own.py:task", methods=("uniform", "rules.py:mine"))
    {'own.py:task': 'task', 'rules.py:mine': 'methods'}
    """
    found = {task: "task"} if isinstance(task, str) and ":" in task else {}
    for key, each in names.items():
        found |= {name: key for name in ([each] if isinstance(each, str) else each) if ":" in name}
    if isinstance(task, Mapping):
        options = task.get("model_options")
        if isinstance(options, Mapping) and options.get("trust_remote_code") is True:
            found[str(task.get("model"))] = "task.model_options.trust_remote_code"
    return found


def entry_points(kind: str) -> dict[str, EntryPoint]:
    """What installed packages offer in the group `rankscope.{kind}` (strategies, tasks or methods), by name."""
    from importlib.metadata import entry_points  # which takes 40 ms to import

    return {point.name: point for point in entry_points(group=f"rankscope.{kind}")}


def load_entry_point(point: EntryPoint, *, error: type[RankscopeError]) -> Any:
    """What an entry point names; raises `error` if it cannot be imported."""
    with user_errors(f"the entry point `{point.name}` ({point.value}) must load, but", error, everywhere=True):
        return point.load()


def check_file(spec: str, base: Path, *, error: type[RankscopeError]) -> Path | None:
    """The file that `path/to/file.py:function` names, which must exist; None if `spec` names a module."""
    place = spec.rpartition(":")[0]
    file = base / place if place.endswith(".py") else None
    if file and not os.path.isfile(file):  # where Path.is_file would raise, this says no
        start = base.resolve()
        raise error(f"`{spec}` must name a Python file, but there is no `{file}`; the path starts from {start}.")
    return file


@contextmanager
def user_function(spec: str, base: Path, *, gives: str, error: type[RankscopeError]) -> Iterator[Any]:
    """Yield the function that `spec` names; errors in its module, and inside the `with` block, become one line.

    `spec` is `path/to/file.py:function`, from the folder `base`, or `package.module:function`. Messages say what the function
    `gives`, as in "a task". No such file, module or function, and what the code raises, is raised as `error`.
    """
    place, _, name = spec.rpartition(":")
    file = check_file(spec, base, error=error)
    wanted = f"`{spec}` must give {gives}, but"
    with user_errors(wanted, error, everywhere=True), _imported(file, place) as module:
        function = getattr(module, name, None)
        if function is None:
            hint = did_you_mean(name, vars(module), "check the name.")
            raise error(f"`{file or place}` must define {name!r}, but does not; {hint}")
        if not callable(function):
            kind = type(function).__name__
            raise error(f"`{spec}` must name a function, but is {kind}; name one that gives {gives}.")
        yield function


@contextmanager
def _imported(file: Path | None, module: str) -> Iterator[ModuleType]:
    """An installed module, or a user's file as one, in `sys.modules` until the end."""
    if file is None:
        yield importlib.import_module(module)
        return
    spec = importlib.util.spec_from_file_location(f"{USER_MODULE}{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[loaded.__name__] = loaded  # dataclasses look their module up while they are made
    try:
        spec.loader.exec_module(loaded)
        yield loaded
    finally:  # joblib sends classes of modules that cannot be imported by value, as workers need
        sys.modules.pop(loaded.__name__, None)


@contextmanager
def user_errors(what: str, error: type[RankscopeError], *, everywhere: bool = False) -> Iterator[None]:
    """Raise errors of code from a user's file, `sys.exit` included, as `error`: one line with the file and line number.

    `what` begins the line. Errors that passed through no line of a user's file are left as they are, unless `everywhere`.
    """
    try:
        yield
    except RankscopeError:
        raise
    except (Exception, SystemExit) as raised:
        place = _place(raised)
        if place is None and not everywhere:
            raise
        if isinstance(raised, SystemExit):
            said = f"called sys.exit({raised})"
        else:
            reason = raised.msg if isinstance(raised, SyntaxError) else one_line(raised)
            said = f"raised {type(raised).__name__}: {reason}"
        raise error(f"{what} {said}{f' ({place})' if place else ''}; --debug shows the traceback.") from raised


def _place(raised: BaseException) -> str | None:
    """File and line of the innermost frame in a user's file; None where there is none."""
    frames = traceback.walk_tb(raised.__traceback__)
    places = [(f.f_code.co_filename, n) for f, n in frames if str(f.f_globals.get("__name__")).startswith(USER_MODULE)]
    if not places and isinstance(raised, SyntaxError):
        places = [(str(raised.filename), raised.lineno or 0)]
    return f"{Path(places[-1][0]).name}, line {places[-1][1]}" if places else None
