"""Fingerprints: what a kept result depends on, in one comparison for every kind of file and database.

Nothing that was kept is reused unless task, data, weights, settings and `FORMAT` are those it was made from.
"""

from __future__ import annotations

import codecs
import errno
import hashlib
import inspect
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path, PurePath
from types import CodeType
from typing import TYPE_CHECKING, Any

import yaml

from rankscope.errors import FileError, RankscopeError, one_line, shown
from rankscope.plugins import USER_MODULE

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor


_MOST_YAML = 2**21  # bytes, and characters with aliases written out: PyYAML reads some 100 kB a second


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is renamed to `path`, on error it is removed.

    Parent folders are created, and links are followed. The rename is atomic on one file system, so a reader sees the old file
    or the new one, never a part; the content is on the disk before the name is.

    Raises:
        OSError: `path` is a folder or a read-only file, or nothing can be written there.
    """
    path = Path(os.path.realpath(path))
    _require_replaceable(path, folder=False)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem[:50]}-", suffix=path.suffix[:50])
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp makes private files; the result should be an ordinary one
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; on success it takes the place of `path`, on error it is removed.

    POSIX cannot exchange two folders in one step: the old one is moved aside first, and back if the new one cannot take its
    place. A crash between the two leaves both in a hidden folder beside `path`.

    Raises:
        OSError: `path` is a file or a read-only folder, or nothing can be written there.
    """
    path = Path(os.path.realpath(path))
    _require_replaceable(path, folder=True)
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name[:50]}-"))
    fresh, old = aside / "new", aside / "old"
    try:
        fresh.mkdir()
        yield fresh
        for folder, _, names in os.walk(fresh):
            for name in names:
                _sync(Path(folder) / name)
        if path.exists():
            path.rename(old)
        try:
            fresh.rename(path)
        except BaseException:
            if old.exists():
                old.rename(path)
            raise
        _sync(path.parent)
    finally:
        if path.exists() or not old.exists():  # else `aside` holds the only copy of what was there
            shutil.rmtree(aside, ignore_errors=True)


def _require_replaceable(path: Path, *, folder: bool) -> None:
    """Checks before the work is done what would fail after it, and makes the parent folders."""
    if path.exists():
        if path.is_dir() is not folder:
            code = errno.ENOTDIR if folder else errno.EISDIR
            raise OSError(code, os.strerror(code), str(path))
        if not os.access(path, os.W_OK):  # a rename would replace it all the same
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def remove_others(folder: Path, names: Iterable[str], kept: Collection[Path]) -> None:
    """Removes files that an earlier result left in a folder and the present one does not have.

    Args:
        folder: Where results are written.
        names: Of all files that such a result may have; `*` stands for any characters.
        kept: The present result's files.
    """
    for path in (found for name in names for found in folder.glob(name)):
        if path not in kept:
            path.unlink()


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


# --- reading -----------------------------------------------------------------------------------------------------


def read_json(path: str | os.PathLike[str], *, what: str) -> dict[str, Any]:
    """Reads a JSON object: UTF-8, or what its first bytes say.

    Args:
        path: The file.
        what: What the file should hold, for the error message, as in "an allocation".

    Raises:
        FileError: The file is missing, cannot be read, is not JSON, names a key twice, or does not hold an object.
    """
    value = parse_json(_read_bytes(path, what=what), where=f"`{path}`", what=what)
    if not isinstance(value, dict):
        raise FileError(f"`{path}` must hold {what} as a JSON object, but holds a {type(value).__name__}.")
    return value


def read_text(path: str | os.PathLike[str], *, what: str) -> str:
    """Reads a text of UTF-8, or of UTF-16 with its mark; line ends stay as they are.

    Raises:
        FileError: The file is missing, cannot be read, or is no such text.
    """
    data = _read_bytes(path, what=what, most=2**34)
    encoding = "utf-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise FileError(
            f"`{path}` must hold {what} as text, but cannot be read ({one_line(error)}); save it as UTF-8."
        ) from None


def parse_json(text: str | bytes, *, where: str, what: str) -> Any:
    """Parses JSON of any kind, as of a file's metadata or one of its lines.

    Args:
        text: The JSON.
        where: Where it stands, as in "`data.jsonl`, line 7".
        what: What it should hold, as in "an example".

    Raises:
        FileError: It is not JSON, or names a key twice.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode(json.detect_encoding(text))
        value = json.loads(text, object_pairs_hook=_once)
        if "\\ud" in text.lower():  # an escaped half of a character can be written nowhere
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError as error:
        reason = one_line(error)
    else:
        return value
    raise FileError(
        f"{where} must hold {what} as JSON, but it cannot be parsed ({reason}); it may be truncated: write it again."
    )


def read_yaml(path: str | os.PathLike[str], *, what: str) -> Any:
    """Reads a YAML file of plain values: UTF-8, or UTF-16 with its mark.

    Beyond YAML 1.1, floats may come without a dot (`1e-3`), keys are texts, and none may stand twice.

    Raises:
        FileError: The file is missing, cannot be read, is not YAML, holds a value that is not what its tag says, is
            nested too deeply, or would grow beyond measure by its aliases.
    """
    data = _read_bytes(path, what=what, most=_MOST_YAML)
    try:
        return yaml.load(data, Loader=_YamlLoader)
    except RecursionError:
        reason = "it is nested too deeply"
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        reason = where + (error.problem or one_line(error))
    except yaml.YAMLError as error:
        reason = one_line(error)
    raise FileError(f"`{path}` must hold {what} as YAML, but it cannot be parsed ({reason}); mend it there.")


def read_parquet(path: str | os.PathLike[str], *, what: str, schema: pa.Schema | None = None) -> pa.Table:
    """Reads a Parquet file whole, and checks its columns.

    Args:
        path: The file.
        what: What it should hold, as in "a profile".
        schema: Columns that must be there. Each is cast to its type where no value is lost by it, and holds no nulls where its
            field is not nullable; lists never do. Columns beyond these stay as they are. None: no check.

    Raises:
        FileError: The file is missing, cannot be read, is not Parquet, or a column is missing or of another type.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _readable(path, what=what, form="Parquet", broken=(pa.ArrowException, MemoryError)), open(path, "rb") as file:
        table = pq.ParquetFile(file).read()
        table.validate(full=True)
    # pandas' own metadata would be believed by `to_pandas`, whatever it says.
    kept = {key: value for key, value in (table.schema.metadata or {}).items() if key != b"pandas"}
    table = table.replace_schema_metadata(kept)
    return table if schema is None else with_checked_columns(table, schema, path, what=what)


def with_checked_columns(table: pa.Table, schema: pa.Schema, path: str | os.PathLike[str], *, what: str) -> pa.Table:
    """The table with the columns of a schema checked and cast, as `read_parquet` does; it raises the same."""
    for field in schema:
        table = _with_checked_column(table, field, f"`{path}` must hold {what}")
    return table


def _with_checked_column(table: pa.Table, field: pa.Field, must: str) -> pa.Table:
    import pyarrow as pa

    found = table.schema.get_all_field_indices(field.name)
    if len(found) != 1:
        raise FileError(f"{must}, but has {len(found) or 'no'} columns `{field.name}`; write it again.")
    column = table.column(found[0])
    try:
        cast = column.cast(field.type)
    except pa.ArrowException:
        raise FileError(
            f"{must}, with {field.type} in column `{field.name}`, but it holds {column.type}; write it again."
        ) from None
    items = [chunk.flatten() for chunk in cast.chunks] if pa.types.is_list(field.type) else []
    if (cast.null_count and not field.nullable) or any(part.null_count for part in items):
        raise FileError(f"{must}, with a value in each row of column `{field.name}`; write it again.")
    return table.set_column(found[0], field.with_nullable(True), cast)


def read_tensors(path: str | os.PathLike[str], *, what: str, device: str = "cpu") -> dict[str, Tensor]:
    """Reads tensors by name: safetensors, or with another suffix what `torch.save` wrote (weights only).

    Args:
        path: The file.
        what: What it should hold, as in "an adapter's weights".
        device: Where they go; "meta": their shapes only.

    Raises:
        FileError: The file is missing, cannot be read, is truncated, or holds anything but tensors.
    """
    import torch

    if Path(path).suffix != ".safetensors":
        # A broken pickle raises whatever the objects that it names raise.
        with _readable(path, what=what, form="tensors", broken=(Exception,)), open(path, "rb") as file:
            tensors = torch.load(file, map_location=device, weights_only=True)
    else:
        from safetensors import SafetensorError, safe_open

        with _readable(path, what=what, form="safetensors", broken=(SafetensorError,)):
            open(path, "rb").close()  # its errors are plainer than those of safetensors
            with safe_open(path, framework="pt", device="cpu") as file:
                tensors = {
                    key: torch.empty(file.get_slice(key).get_shape(), device="meta")
                    if device == "meta"
                    else file.get_tensor(key).to(device)
                    for key in file.keys()  # noqa: SIM118
                }
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise FileError(f"`{path}` must hold {what} as tensors by name, but holds something else; write it again.")
    return tensors


@contextmanager
def _readable(
    path: str | os.PathLike[str], *, what: str, form: str = "", broken: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Turns what a path or a format's parser raises into one line."""
    try:
        yield
    except FileNotFoundError:
        raise FileError(f"`{path}` must hold {what}, but there is no such file; check the path.") from None
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) else None  # pyarrow's OSErrors about content have none
        if not reason and isinstance(error, (OSError, *broken)):
            raise FileError(
                f"`{path}` must hold {what} as {form}, but it cannot be parsed ({one_line(error)}); "
                "it may be truncated: write it again."
            ) from None
        if not isinstance(error, OSError | ValueError):
            raise
        raise FileError(
            f"`{path}` must hold {what}, but cannot be read ({reason or one_line(error)}); check the path."
        ) from None


def _read_bytes(path: str | os.PathLike[str], *, what: str, most: int = 2**28) -> bytes:
    with _readable(path, what=what), open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise FileError(f"`{path}` must hold {what}, but is larger than {most / 2**20:g} MB; check the path.")
    return data


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {shown(next(key for key in keys if keys.count(key) > 1))} stands twice")
    return value


class _YamlLoader(yaml.SafeLoader):
    """YAML of plain values only: no key stands twice, and what cannot be made of a value is said with its line."""

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            self._measure(node, {})
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, str):
                value.encode()
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception as error:  # PyYAML's constructors raise what int(), datetime() or a lookup do
            raise _complaint(f"this is no {node.tag.rpartition(':')[2]} ({one_line(error)})", node) from None
        return value

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key_node.tag == _MERGE:
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _complaint(f"the key {shown(key)} is no text: put it in quotes", key_node)
            if key in seen:
                raise _complaint(f"the key {shown(key)} stands twice", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def refuse(self, node: Any) -> Any:
        raise _complaint(f"a {node.tag.rpartition(':')[2]} is no plain value: put it in quotes", node)

    def _measure(self, node: Any, sizes: dict[int, int]) -> int:
        """Characters under a node with its aliases written out: they may double at each level, and are measured once."""
        if sizes.setdefault(id(node), -1) >= 0:
            return sizes[id(node)]
        if isinstance(node, yaml.ScalarNode):
            size = 1 + len(node.value)
        else:
            parts = [part for each in node.value for part in (each if isinstance(each, tuple) else (each,))]
            if any(sizes.get(id(part)) == -1 for part in parts):
                raise _complaint("this holds itself", node)
            size = 1 + sum(self._measure(part, sizes) for part in parts)
        if size > _MOST_YAML:
            raise _complaint("with its aliases written out, this is too large", node)
        sizes[id(node)] = size
        return size


def _complaint(problem: str, node: Any) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


_MERGE = "tag:yaml.org,2002:merge"
for _kind in ("timestamp", "binary", "set", "omap", "pairs"):
    _YamlLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _YamlLoader.refuse)
_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


_HASH = re.compile(r"[0-9a-f]{16}")
FORMAT = 2  # of every kept result; raise it where the same settings give other results than before


def require_same(
    kept: Mapping[str, Any],
    wanted: Mapping[str, Any],
    *,
    what: str,
    remedy: str,
    holds: str = "is",
    error: type[RankscopeError] = FileError,
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
    rankscope.errors.FileError: `a` must be about task batch_size 4, but is about 8; make it again.
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
    if hasattr(value, "terms"):  # settings
        return [part for item in value.terms(exclude_defaults=True).items() for part in item]
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
