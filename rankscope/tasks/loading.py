"""`load_task`: a task by ready name, by a mapping for the generic ones, or from a user's file."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

from rankscope.exceptions import TaskError, shown
from rankscope.tasks.pretrained import check_source, looks_like_path
from rankscope.tasks.protocol import Task, check_task
from rankscope.tasks.ready import READY
from rankscope.user_code import user_function


def load_task(spec: str | Mapping[str, Any], *, base_dir: str | Path | None = None) -> Task:
    """Loads a task.

    Args:
        spec: A ready task's name (`"digits-shift"`, `"supersense"`, `"sentiment"`, `"word-order"`, `"glosses"`); a mapping
            `{"name": ready name, **options}`; a mapping `{"type": "sequence-classification" | "causal-lm", "model": …,
            "data": …, **options}` (see `TextClassification` and `CausalLM`); or `"path/to/file.py:factory"`.
        base_dir: What relative paths to files start from; default: the working directory.

    Raises:
        TaskError: There is no such task, or it cannot be built.

    >>> load_task("digits-shift").metric
    'accuracy'
    """
    base = Path(base_dir or ".")
    if isinstance(spec, str):
        if ".py:" in spec:
            return _from_file(spec, base)
        spec = {"name": spec}
    if not isinstance(spec, Mapping):
        raise TaskError(
            f"`task` must be a name, a mapping of options, or `path/to/file.py:factory`, but got {shown(spec)}."
        )
    options = {str(key): value for key, value in spec.items()}
    if "type" in options:
        kind = options.pop("type")
        factory = _generic(kind)
        options |= _resolved(options, base)
        task = _build(factory, options, what=f"task type {kind!r}")
        check_source(options["model"], base=base)
        return task
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in READY:
        close = difflib.get_close_matches(str(name), READY, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]!r}?" if close else 'a task of your own is "path/to/file.py:factory".'
        raise TaskError(f"`task` must be one of {', '.join(READY)}, but got {shown(name)}; {hint}")
    return _build(READY[name], options, what=f"task {name!r}")


def _generic(kind: Any) -> Callable[..., Any]:
    from rankscope.tasks.language import CausalLM
    from rankscope.tasks.text import TextClassification

    kinds: dict[str, Callable[..., Any]] = {"sequence-classification": TextClassification, "causal-lm": CausalLM}
    if not isinstance(kind, str) or kind not in kinds:
        raise TaskError(f"`task.type` must be one of {', '.join(kinds)}, but got {shown(kind)}.")
    return kinds[kind]


def _resolved(options: Mapping[str, Any], base: Path) -> dict[str, str]:
    """Model and data as paths that start from the base folder, where they are paths; else as they are (hub ids).

    Raises:
        TaskError: A relative path leads to something from the working directory only.
    """
    given = {key: options[key] for key in ("model", "data") if isinstance(options.get(key), str) and options[key]}
    for key, value in given.items():
        path = base / os.path.expanduser(value)  # which leaves an unknown user as it is
        if os.path.exists(path) or looks_like_path(value):
            given[key] = str(path)
        elif os.path.exists(value):
            raise TaskError(
                f"`{key}` must be found from the study file's folder ({base}), but `{value}` is there from the working "
                "directory only; correct the path."
            )
        elif key == "data" and path.suffix:
            given[key] = str(path)
    return given


def _build(factory: Callable[..., Any], options: Mapping[str, Any], *, what: str) -> Task:
    known = list(inspect.signature(factory).parameters)
    if unknown := [key for key in options if key not in known]:
        close = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.4)
        hint = f"did you mean `{close[0]}`?" if close else f"it takes {', '.join(known) or 'none'}."
        raise TaskError(f"{what} takes no option `{unknown[0]}`; {hint}")
    required = [name for name, p in inspect.signature(factory).parameters.items() if p.default is p.empty]
    if missing := [name for name in required if name not in options]:
        raise TaskError(f"{what} needs the option `{missing[0]}`; add it.")
    made: Any = factory
    hints = get_type_hints(made.__init__ if isinstance(factory, type) else factory)
    for name, value in options.items():
        kinds = get_args(hints[name]) or (hints[name],)
        if not any(isinstance(value, kind) for kind in kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join(_KINDS[kind] for kind in kinds if kind in _KINDS)
            raise TaskError(f"`{name}` of {what} must be {wanted}, but got {shown(value)}.")
    return check_task(factory(**options))


_KINDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


def _from_file(spec: str, base: Path) -> Task:
    with user_function(spec, base, gives="a task", error=TaskError) as factory:
        return check_task(factory())
