"""`load_task`: a task by ready name, by a mapping for the generic ones, or from a user's file."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rankscope.exceptions import RankscopeError, TaskError
from rankscope.tasks.protocol import Task, check_task
from rankscope.tasks.ready import READY


def load_task(spec: str | Mapping[str, Any], *, base_dir: str | Path | None = None) -> Task:
    """Loads a task.

    Args:
        spec: A ready task's name (`"digits-shift"`, `"supersense"`, `"sentiment"`); a mapping `{"name": ready name,
            **options}`; a mapping `{"type": "sequence-classification" | "causal-lm", "model": …, "data": …, **options}`
            (see `TextClassification` and `CausalLM`); or `"path/to/file.py:factory"`.
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
    options = dict(spec)
    if "type" in options:
        kind = options.pop("type")
        return _build(_generic(kind), {**options, **_resolved(options, base)}, what=f"task type {kind!r}")
    name = options.pop("name", None)
    if name not in READY:
        close = difflib.get_close_matches(str(name), READY, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]!r}?" if close else 'a task of your own is "path/to/file.py:factory".'
        raise TaskError(f"`task` must be one of {', '.join(READY)}, but got {name!r}; {hint}")
    return _build(READY[name], options, what=f"task {name!r}")


def _generic(kind: str) -> Callable[..., Any]:
    from rankscope.tasks.language import CausalLM
    from rankscope.tasks.text import TextClassification

    kinds: dict[str, Callable[..., Any]] = {"sequence-classification": TextClassification, "causal-lm": CausalLM}
    if kind not in kinds:
        raise TaskError(f"`task.type` must be one of {', '.join(kinds)}, but got {kind!r}.")
    return kinds[kind]


def _resolved(options: Mapping[str, Any], base: Path) -> dict[str, str]:
    """Model and data as paths, where such files exist under the base folder; else as they are (hub ids)."""
    given = {key: options[key] for key in ("model", "data") if isinstance(options.get(key), str)}
    return {key: str(base / value) if (base / value).exists() else value for key, value in given.items()}


def _build(factory: Callable[..., Any], options: Mapping[str, Any], *, what: str) -> Task:
    known = list(inspect.signature(factory).parameters)
    if unknown := [key for key in options if key not in known]:
        close = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.4)
        hint = f"did you mean `{close[0]}`?" if close else f"it takes {', '.join(known) or 'none'}."
        raise TaskError(f"{what} takes no option `{unknown[0]}`; {hint}")
    required = [name for name, p in inspect.signature(factory).parameters.items() if p.default is p.empty]
    if missing := [name for name in required if name not in options]:
        raise TaskError(f"{what} needs the option `{missing[0]}`; add it.")
    return check_task(factory(**options))


def _from_file(spec: str, base: Path) -> Task:
    file, _, name = spec.rpartition(":")
    path = base / file
    if not path.exists():
        raise TaskError(
            f"`{spec}` must name a Python file, but there is no `{path}`; the path starts from {base.resolve()}."
        )
    module_spec = importlib.util.spec_from_file_location(f"rankscope_task_{path.stem}", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module.__name__] = module  # dataclasses look their module up while they are made
    try:
        module_spec.loader.exec_module(module)
        factory = getattr(module, name, None)
        if factory is None:
            close = difflib.get_close_matches(name, vars(module), n=1)
            hint = f"did you mean {close[0]!r}?" if close else "check the name."
            raise TaskError(f"`{path}` must define {name!r}, but does not; {hint}")
        return check_task(factory())
    except RankscopeError:
        raise
    except Exception as error:  # a user's code may raise anything; its own message and place are what helps
        where = f"{type(error).__name__}: {error}"
        raise TaskError(f"`{spec}` must give a task, but raised {where}; --debug shows where.") from error
    finally:
        # Out again: joblib sends the classes of a module that cannot be imported by value, which workers need here.
        sys.modules.pop(module.__name__, None)
