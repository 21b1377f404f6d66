"""Code that users bring: `path/to/file.py:function`, `package.module:function`, and entry points of installed packages."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rankscope.errors import RankscopeError, did_you_mean, one_line

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

USER_MODULE = "rankscope_user_"  # begins the names of modules from users' files


def entry_points(kind: str) -> dict[str, EntryPoint]:
    """What installed packages offer in the group `rankscope.{kind}` (strategies, tasks or methods), by name."""
    from importlib.metadata import entry_points  # which takes 40 ms to import

    return {point.name: point for point in entry_points(group=f"rankscope.{kind}")}


def load_entry_point(point: EntryPoint, *, error: type[RankscopeError]) -> Any:
    """What an entry point names; raises `error` if it cannot be imported."""
    with user_errors(f"the entry point `{point.name}` ({point.value}) must load, but", error, everywhere=True):
        return point.load()


@contextmanager
def user_function(spec: str, base: Path, *, gives: str, error: type[RankscopeError]) -> Iterator[Any]:
    """Yield the function that `spec` names; errors in its module, and inside the `with` block, become one line.

    Args:
        spec: `path/to/file.py:function` or `package.module:function`.
        base: What relative paths start from.
        gives: What the function should give, for messages, as in "a task".
        error: What is raised: no such file, module or function, or the code raised something.
    """
    place, _, name = spec.rpartition(":")
    path = base / place
    is_file = place.endswith(".py")
    if is_file and not os.path.isfile(path):  # where Path.is_file would raise, this says no
        raise error(
            f"`{spec}` must name a Python file, but there is no `{path}`; the path starts from {base.resolve()}."
        )
    with ExitStack() as stack:
        stack.enter_context(user_errors(f"`{spec}` must give {gives}, but", error, everywhere=True))
        module = stack.enter_context(_imported(path)) if is_file else importlib.import_module(place)
        function = getattr(module, name, None)
        if function is None:
            hint = did_you_mean(name, vars(module), "check the name.")
            raise error(f"`{path if is_file else place}` must define {name!r}, but does not; {hint}")
        if not callable(function):
            raise error(
                f"`{spec}` must name a function, but is {type(function).__name__}; name one that gives {gives}."
            )
        yield function


@contextmanager
def _imported(path: Path) -> Iterator[ModuleType]:
    """A user's file as a module, in `sys.modules` until the end."""
    module_spec = importlib.util.spec_from_file_location(f"{USER_MODULE}{path.stem}", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module.__name__] = module  # dataclasses look their module up while they are made
    try:
        module_spec.loader.exec_module(module)
        yield module
    finally:  # joblib sends classes of modules that cannot be imported by value, as workers need
        sys.modules.pop(module.__name__, None)


@contextmanager
def user_errors(what: str, error: type[RankscopeError], *, everywhere: bool = False) -> Iterator[None]:
    """Turn errors of code from a user's file, `sys.exit` included, into one line with the file and line number.

    Args:
        what: How the line begins.
        error: What is raised.
        everywhere: Also for errors that passed through no line of a user's file; else they are left as they are.
    """
    try:
        yield
    except RankscopeError:
        raise
    except (Exception, SystemExit) as raised:
        place = _place(raised)
        if place is None and not everywhere:
            raise
        said = f"called sys.exit({raised})" if isinstance(raised, SystemExit) else f"raised {type(raised).__name__}"
        reason = raised.msg if isinstance(raised, SyntaxError) else one_line(raised)
        said += "" if isinstance(raised, SystemExit) else f": {reason}"
        raise error(f"{what} {said}{f' ({place})' if place else ''}; --debug shows the traceback.") from raised


def _place(raised: BaseException) -> str | None:
    """File and line of the innermost frame in a user's file; None where there is none."""
    frames = traceback.walk_tb(raised.__traceback__)
    places = [(f.f_code.co_filename, n) for f, n in frames if str(f.f_globals.get("__name__")).startswith(USER_MODULE)]
    if not places and isinstance(raised, SyntaxError):
        places = [(str(raised.filename), raised.lineno or 0)]
    return f"{Path(places[-1][0]).name}, line {places[-1][1]}" if places else None
