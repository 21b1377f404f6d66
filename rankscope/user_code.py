"""Functions from a user's own file, as in `path/to/file.py:function`."""

from __future__ import annotations

import difflib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rankscope.exceptions import RankscopeError


@contextmanager
def user_function(spec: str, base: Path, *, gives: str, error: type[RankscopeError]) -> Iterator[Any]:
    """Yields the function that `spec` names, while its module can be imported; what it raises becomes one line.

    Args:
        spec: `path/to/file.py:function`.
        base: What relative paths start from.
        gives: What the function should give, for messages, as in "a task".
        error: What is raised.

    Raises:
        RankscopeError: Of the type `error`: no such file or function, or the code raised something.
    """
    file, _, name = spec.rpartition(":")
    path = base / file
    if path.suffix != ".py" or not os.path.isfile(path):  # where Path.is_file would raise, this says no
        raise error(
            f"`{spec}` must name a Python file, but there is no `{path}`; the path starts from {base.resolve()}."
        )
    module_spec = importlib.util.spec_from_file_location(f"rankscope_user_{path.stem}", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module.__name__] = module  # dataclasses look their module up while they are made
    try:
        module_spec.loader.exec_module(module)
        function = getattr(module, name, None)
        if function is None:
            close = difflib.get_close_matches(name, vars(module), n=1)
            hint = f"did you mean {close[0]!r}?" if close else "check the name."
            raise error(f"`{path}` must define {name!r}, but does not; {hint}")
        yield function
    except RankscopeError:
        raise
    except (
        Exception,
        SystemExit,
    ) as raised:  # a user's code may raise anything; its own message and place are what helps
        where = f"{type(raised).__name__}: {raised}"
        raise error(f"`{spec}` must give {gives}, but raised {where}; --debug shows where.") from raised
    finally:
        # Out again: joblib sends the classes of a module that cannot be imported by value, which workers need here.
        sys.modules.pop(module.__name__, None)
