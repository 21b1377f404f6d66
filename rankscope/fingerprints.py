"""Fingerprints: what a kept result depends on, in one comparison for every kind of file and database.

Nothing that was kept is reused unless task, data, weights, settings and `FORMAT` are those it was made from.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path, PurePath
from types import CodeType
from typing import Any

from rankscope.exceptions import FileFormatError, RankscopeError
from rankscope.user_code import USER_MODULE

_HASH = re.compile(r"[0-9a-f]{16}")
FORMAT = 2  # of every kept result; raise it where the same settings give other results than before


def require_same(
    kept: Mapping[str, Any],
    wanted: Mapping[str, Any],
    *,
    what: str,
    remedy: str,
    holds: str = "is",
    error: type[RankscopeError] = FileFormatError,
) -> None:
    """Checks that a kept result depends on the same as the one that is wanted.

    Args:
        kept: What the result was made from, as plain values; empty where it does not say.
        wanted: What it would be made from now.
        what: Names the result, as in "`out/profile.parquet`".
        remedy: What to do about a difference.
        holds: The verb, as in "but its trials are about …".
        error: What is raised.

    Raises:
        RankscopeError: Of the type `error`: the first key that differs is named, with both values.

    >>> require_same({"task": {"batch_size": 8}}, {"task": {"batch_size": 4}}, what="`a`", remedy="make it again.")
    Traceback (most recent call last):
    ...
    rankscope.exceptions.FileFormatError: `a` must be about task batch_size 4, but is about 8; make it again.
    """
    if not (isinstance(kept, Mapping) and kept):
        raise error(f"{what} must say what it was made from, but does not: an older rankscope wrote it; {remedy}")
    if found := _first_difference(kept, json.loads(json.dumps(wanted))):
        key, theirs, ours = found
        if isinstance(theirs, str) and isinstance(ours, str) and _HASH.fullmatch(theirs):
            raise error(
                f"{what} must be about the present {key} ({ours}), but {holds} about another ({theirs}); {remedy}"
            )
        raise error(f"{what} must be about {key} {ours!r}, but {holds} about {theirs!r}; {remedy}")


def _first_difference(kept: Any, wanted: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first key whose values differ, and both values; a key that is missing counts as None."""
    if not (isinstance(kept, Mapping) and isinstance(wanted, Mapping)):
        return None if kept == wanted else (key, kept, wanted)
    pairs = ((name, kept.get(name), wanted.get(name)) for name in dict.fromkeys([*wanted, *kept]))
    found = (_first_difference(ours, theirs, f"{key} {name}".lstrip()) for name, ours, theirs in pairs)
    return next((each for each in found if each), None)


def digest(value: Any) -> str:
    """A short hash of a value's content: equal for equal content in any process, wherever it lies.

    Plain values and containers, paths, arrays, tensors, modules (class and weights) and tables are hashed as they are;
    dataclasses by the fields that are not at their defaults, so that a field added later changes nothing; functions by
    their source; other objects by class, source and state.

    >>> digest({"a": [1, 2.0]}) == digest({"a": (1, 2.0)}), digest("1") == digest(1)
    (True, False)
    """
    content = hashlib.sha256()
    _feed(content.update, value, ())
    return content.hexdigest()[:16]


def digest_source(*functions: Any) -> str:
    """A short hash of the source of functions: of a study's `path.py:name`, the whole file; of others, their own lines.

    Lines around a function are left out, since a script that defines a task also says how many trials to make. rankscope's
    own functions are left out too: `FORMAT` speaks for them.
    """
    found = ((getattr(each, "__module__", ""), getattr(inspect.unwrap(each), "__code__", None)) for each in functions)
    own = str(Path(__file__).parent / "_")[:-1]
    return digest([_source(module, code) for module, code in found if code and not code.co_filename.startswith(own)])


def _source(module: str | None, code: CodeType) -> Any:
    file = Path(code.co_filename)
    if (module or "").startswith(USER_MODULE) and file.is_file():
        return file.read_bytes()
    try:
        return inspect.getsource(code)
    except OSError:  # typed in, without a file
        return [code.co_code, code.co_names]


def _feed(update: Callable[[Any], None], value: Any, inside: tuple[int, ...]) -> None:
    """Hashes a value; `inside` are the ids of the objects that hold it, since objects may hold each other."""
    torch, numpy, pandas = (sys.modules.get(name) for name in ("torch", "numpy", "pandas"))
    if numpy and isinstance(value, numpy.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | PurePath):
        text = (
            value if isinstance(value, bytes) else repr(str(value) if isinstance(value, PurePath) else value).encode()
        )
        update(f"{len(text)}{'b' if isinstance(value, bytes) else ':'}".encode() + text)
    elif id(value) in inside:
        update(b"cycle")
    elif numpy and isinstance(value, numpy.ndarray) and value.dtype != object:
        update(repr((value.dtype.str, value.shape)).encode())
        update(memoryview(numpy.ascontiguousarray(value)).cast("B") if value.size else b"")
    elif torch and isinstance(value, torch.Tensor):
        _feed_tensor(update, value, inside)
    else:
        parts = _parts(value, torch, pandas)
        kind = (
            "list"
            if isinstance(value, list | tuple)
            else "dict"
            if isinstance(value, Mapping)
            else type(value).__qualname__
        )
        update(f"{kind}[{len(parts)}".encode())
        for part in parts:
            _feed(update, part, (*inside, id(value)))


def _parts(value: Any, torch: Any, pandas: Any) -> list[Any]:
    """What an object that is no plain value consists of."""
    if isinstance(value, Mapping):
        return [part for key in sorted(value, key=repr) for part in (key, value[key])]
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, set | frozenset):
        return sorted(digest(each) for each in value)
    if pandas and isinstance(value, pandas.DataFrame | pandas.Series | pandas.Index):
        return [value.to_numpy().tolist(), list(getattr(value, "columns", ()))]
    if torch and isinstance(value, torch.nn.Module):
        return [value.state_dict(), _settings(getattr(value, "config", None))]
    if is_dataclass(value) and not isinstance(value, type):
        own = ((field, getattr(value, field.name)) for field in fields(value))
        return [part for field, each in own if not _is_default(field, each) for part in (field.name, each)]
    if inspect.isroutine(value) or isinstance(value, type):
        return [
            value.__qualname__,
            digest_source(*vars(value).values()) if isinstance(value, type) else digest_source(value),
        ]
    try:
        state = value.__getstate__()
    except TypeError:  # what cannot be pickled (locks, generators) has no content that could be told
        state = None
    return [digest_source(*vars(type(value)).values()), state]


def _feed_tensor(update: Callable[[Any], None], value: Any, inside: tuple[int, ...]) -> None:
    """Hashes a tensor's shape and bytes; of a quantised one, those of the tensors that it holds; of a meta tensor, its shape."""
    update(repr((str(value.dtype), tuple(value.shape))).encode())
    if hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            _feed(update, getattr(value, name), (*inside, id(value)))
    elif not value.is_meta and value.numel():
        flat = value.detach().cpu().contiguous().reshape(-1)
        update(memoryview(flat.view(sys.modules["torch"].uint8).numpy()))


def _settings(config: Any) -> Any:
    """A model's configuration, without where it was loaded from."""
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        return config
    return {
        key: _settings(each)
        for key, each in config.items()
        if not str(key).startswith("_") and key != "transformers_version"
    }


def _is_default(field: Any, value: Any) -> bool:
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    if type(default) is not type(value):
        return False
    return default == value if isinstance(value, str | int | float) else digest(default) == digest(value)
