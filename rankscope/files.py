"""Atomic file writes, one validated reader for each format, and fingerprints of what a kept result depends on."""

from __future__ import annotations

import codecs
import errno
import hashlib
import inspect
import io
import json
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from itertools import chain
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import yaml

from rankscope.errors import FileError, RankscopeError, one_line, shown
from rankscope.plugins import USER_MODULE

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

AnyPath = str | os.PathLike[str]
CHECKSUM = "checksum"  # its key in our own files
SEALED: Any = {"write_page_checksum": True}  # options with which Parquet is written
FORMAT = 2  # of every kept result; raise it where the same settings give other results than before
_MOST_YAML = 2**21  # bytes, and characters with aliases written out: PyYAML reads some 100 kB a second
_MOST_NODES, _MOST_ALIASES, _MOST_DEPTH, _MOST_DIGITS = 50_000, 1_000, 50, 4_000  # of YAML


def packaged(name: str) -> Path:
    """A file or folder that comes with rankscope: in `_data` of an installed package, at the top of a checkout."""
    package = Path(__file__).resolve().parent
    return package / "_data" / name if (package / "_data").is_dir() else package.parent / name


# --- writing ------------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: AnyPath, *, folder: bool = False) -> Iterator[Path]:
    """Yields a new path beside `path`, for a file or a folder; on success it takes the place of `path`, else it is removed.

    A reader sees the old file or the new one, and the content is on the disk before the name is. Two folders cannot be
    exchanged in one step: a crash in between leaves both in a hidden folder.
    """
    path = Path(os.path.realpath(path))
    if path.exists():  # say before the work is done what would fail after it
        if path.is_dir() is not folder:
            code = errno.ENOTDIR if folder else errno.EISDIR
            raise OSError(code, os.strerror(code), str(path))
        if not os.access(path, os.W_OK):  # a rename would replace it all the same
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name[:50]}-"))
    new, old = aside / ("new" if folder else f"new{path.suffix[:50]}"), aside / "old"
    try:
        if folder:
            new.mkdir()
        yield new
        for file in filter(Path.is_file, [new, *new.rglob("*")]):
            _sync(file)
        if folder and path.exists():
            path.rename(old)
        new.rename(path)
        _sync(path.parent)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)  # or fails, and `aside` keeps the only copy of what was there
        shutil.rmtree(aside, ignore_errors=True)


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
    """Removes the files of an earlier result (`names` are globs of all that it may have) which the present one lacks."""
    for path in (found for name in names for found in folder.glob(name)):
        if path not in kept:
            path.unlink()


def write_json(path: AnyPath, value: Any, *, sealed: bool = False) -> None:
    """Writes `value` as indented JSON, atomically; `sealed`: an object, with a checksum by which `read_json` tells damage."""
    if sealed:
        value = {**value, CHECKSUM: _checksum(json.dumps(value).encode())}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def seal_tensors(path: AnyPath) -> None:
    """Adds the checksum of names, shapes and numbers to a safetensors file's own metadata, by which `read_tensors` tells damage.

    Other programs read the file as before, and what they write instead has no checksum.
    """
    header, numbers = _split_safetensors(Path(path).read_bytes())
    about = header.pop("__metadata__", {})
    about = {"__metadata__": {**about, CHECKSUM: _checksum(json.dumps(header, sort_keys=True).encode(), numbers)}}
    text = json.dumps({**about, **header}).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers stay aligned
    with replacing(path) as temporary:
        temporary.write_bytes(len(text).to_bytes(8, "little") + text + numbers)


def _split_safetensors(data: bytes) -> tuple[dict[str, Any], memoryview]:
    """Header and numbers: https://huggingface.co/docs/safetensors, "Format"."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), memoryview(data)[end:]


def _checksum(*parts: bytes | memoryview) -> str:
    content = hashlib.sha256()
    for part in parts:
        content.update(part)
    return content.hexdigest()[:16]


def seal_metadata(text: bytes) -> dict[bytes, bytes]:
    """The checksum of what Parquet metadata hold under `rankscope`, as a further entry."""
    return {CHECKSUM.encode(): _checksum(text).encode()}


def _require_checksum(kept: Any, found: str, path: AnyPath, what: str) -> None:
    """A FileError where a file that says its checksum holds something else; older files say none."""
    if kept is not None and kept != found:
        raise FileError(
            f"`{path}` must hold {what} as it was written, but its checksum differs: it is damaged or was edited; write it again."
        )


# --- reading: `what` says what a file should hold, as in "an allocation"; whatever is wrong with it is a `FileError` ---


def read_json(path: AnyPath, *, what: str) -> dict[str, Any]:
    """Reads a JSON object; no key may stand twice."""
    value = parse_json(_read_bytes(path, what, most=2**28), where=f"`{path}`", what=what)
    if not isinstance(value, dict):
        raise FileError(f"`{path}` must hold {what} as a JSON object, but holds a {type(value).__name__}.")
    if CHECKSUM in value:
        _require_checksum(value.pop(CHECKSUM), _checksum(json.dumps(value).encode()), path, what)
    return value


def parse_json(text: str | bytes, *, where: str, what: str) -> Any:
    """Parses JSON; `where` says where it stands, as in "`data.jsonl`, line 7"."""
    with _parsing(where, what, "JSON", ValueError):
        value = json.loads(text, object_pairs_hook=_once)
        json.dumps(value, ensure_ascii=False).encode()  # an escaped half of a character can be written nowhere
        return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError(f"the key {shown(Counter(key for key, _ in pairs).most_common(1)[0][0])} stands twice")
    return value


def read_text(path: AnyPath, *, what: str) -> str:
    """Reads text in UTF-8, or in UTF-16 with its mark; line ends stay as they are."""
    data = _read_bytes(path, what)
    encoding = "utf-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    with _parsing(f"`{path}`", what, "text", UnicodeDecodeError, remedy="save it as UTF-8."):
        return data.decode(encoding)


def read_yaml(path: AnyPath, *, what: str) -> Any:
    """Reads YAML as `parse_yaml` parses it."""
    return parse_yaml(_read_bytes(path, what, most=_MOST_YAML), where=f"`{path}`", what=what)


def parse_yaml(data: str | bytes, *, where: str, what: str) -> Any:
    """Parses YAML of plain values. Beyond YAML 1.1: floats as `1e-3`, only texts as keys, and none of them twice."""
    with _parsing(where, what, "YAML", yaml.YAMLError, remedy="mend it there."):
        return yaml.load(data, Loader=_YamlLoader)  # nosec B506: a SafeLoader


def read_parquet(path: AnyPath, *, what: str, schema: pa.Schema | None = None) -> pa.Table:
    """Reads a Parquet file whole; its columns are checked where there is a schema, as `with_checked_columns` does."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = _read_bytes(path, what)
    with _parsing(f"`{path}`", what, "Parquet", pa.ArrowException, MemoryError, OSError, ValueError):
        # Pages say their checksums where rankscope wrote them (`SEALED`).
        table = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read()
        table.validate(full=True)
    # pandas' own metadata would be believed by `to_pandas`, whatever it says.
    kept = {key: value for key, value in (table.schema.metadata or {}).items() if key != b"pandas"}
    seal = kept.pop(CHECKSUM.encode(), None)
    _require_checksum(seal and seal.decode("ascii", "replace"), _checksum(kept.get(b"rankscope", b"")), path, what)
    table = table.replace_schema_metadata(kept)
    return table if schema is None else with_checked_columns(table, schema, path, what=what)


def with_checked_columns(table: pa.Table, schema: pa.Schema, path: AnyPath, *, what: str) -> pa.Table:
    """The table with the columns of a schema cast to their types without loss; others stay as they are.

    A column holds no nulls unless its field is nullable; lists never do.
    """
    import pyarrow as pa

    must = f"`{path}` must hold {what}"
    for field in schema:
        found = table.schema.get_all_field_indices(field.name)
        if len(found) != 1:
            raise FileError(f"{must}, but has {len(found) or 'no'} columns `{field.name}`; write it again.")
        column = table.column(found[0])
        try:
            cast = column.cast(field.type)
        except pa.ArrowException:
            wrong = f"with {field.type} in column `{field.name}`, but it holds {column.type}"
            raise FileError(f"{must}, {wrong}; write it again.") from None
        items = [chunk.flatten() for chunk in cast.chunks] if pa.types.is_list(field.type) else []
        if (cast.null_count and not field.nullable) or any(part.null_count for part in items):
            raise FileError(f"{must}, with a value in each row of column `{field.name}`; write it again.")
        table = table.set_column(found[0], field.with_nullable(True), cast)
    return table


def read_tensors(path: AnyPath, *, what: str, device: str = "cpu") -> dict[str, Tensor]:
    """Reads tensors by name: safetensors, or what `torch.save` wrote (weights only)."""
    import torch
    from safetensors.torch import load

    data, form = _read_bytes(path, what), "safetensors" if Path(path).suffix == ".safetensors" else "tensors"
    with _parsing(f"`{path}`", what, form, Exception):  # a broken pickle raises whatever its objects raise
        tensors = load(data) if form == "safetensors" else torch.load(io.BytesIO(data), "cpu", weights_only=True)
    if form == "safetensors":
        header, numbers = _split_safetensors(data)
        kept = header.pop("__metadata__", {}).get(CHECKSUM)
        _require_checksum(kept, kept and _checksum(json.dumps(header, sort_keys=True).encode(), numbers), path, what)
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise FileError(f"`{path}` must hold {what} as tensors by name, but holds something else; write it again.")
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _read_bytes(path: AnyPath, what: str, most: int | None = None) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(-1 if most is None else most + 1)
        if most is None or len(data) <= most:
            return data
        reason = f"is larger than {most / 2**20:g} MB"
    except FileNotFoundError:
        reason = "there is no such file"
    except (OSError, ValueError) as error:
        reason = f"cannot be read ({getattr(error, 'strerror', None) or one_line(error)})"
    raise FileError(f"`{path}` must hold {what}, but {reason}; check the path.")


@contextmanager
def _parsing(
    where: str, what: str, form: str, *broken: type[Exception], remedy: str = "it may be truncated: write it again."
) -> Iterator[None]:
    """Turns what the parser of a format raises into one line."""
    try:
        yield
    except RecursionError:
        reason = "it is nested too deeply"
    except broken as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)  # PyYAML's
        reason = f"line {mark.line + 1}: {problem or one_line(error)}" if mark else problem or one_line(error)
    else:
        return
    raise FileError(f"{where} must hold {what} as {form}, but it cannot be parsed ({reason}); {remedy}")


class _YamlLoader(yaml.SafeLoader):
    """YAML of plain values only, within limits. Problems are said with their line."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth, self._counts = 0, Counter[str]()

    def compose_node(self, parent: Any, index: Any) -> Any:
        events: Any = self
        event = events.peek_event()
        self._depth += 1
        self._counts["aliases" if isinstance(event, yaml.AliasEvent) else "values"] += 1
        for what, most in {"aliases": _MOST_ALIASES, "values": _MOST_NODES}.items():
            if self._counts[what] > most:
                raise _complaint(f"more than {most:,} {what} are no study", event)
        if self._depth > _MOST_DEPTH:
            raise _complaint(f"nested more than {_MOST_DEPTH} deep", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            self._check(node, {})
        return node

    def _check(self, node: Any, sizes: dict[int, int]) -> int:
        """Characters under a node with its aliases written out: they may double at each level, so each is measured once."""
        if sizes.setdefault(id(node), 0) < 0:
            raise _complaint("this holds itself", node)
        if sizes[id(node)]:
            return sizes[id(node)]
        sizes[id(node)] = -1  # under way
        kind = node.tag.rpartition(":")[2]
        if kind in ("timestamp", "binary", "set", "omap", "pairs"):
            raise _complaint(f"a {kind} is no plain value: put it in quotes", node)
        if kind in ("int", "float") and len(node.value) > _MOST_DIGITS:
            raise _complaint(f"this is no {kind} (of {len(node.value):,} characters)", node)
        pairs = node.value if isinstance(node, yaml.MappingNode) else ()
        parts = chain(*pairs) if pairs else node.value
        size = 1 + (len(parts) if isinstance(parts, str) else sum(self._check(part, sizes) for part in parts))
        if size > _MOST_YAML:
            raise _complaint("with its aliases written out, this is too large", node)
        seen: set[str] = set()
        for node_of_key in (key for key, _ in pairs if not key.tag.endswith(":merge")):
            key = self.construct_object(node_of_key, deep=True)
            if not isinstance(key, str):
                raise _complaint(f"the key {shown(key)} is no text: put it in quotes", node_of_key)
            if key in seen:
                raise _complaint(f"the key {shown(key)} stands twice", node_of_key)
            seen.add(key)
        sizes[id(node)] = size
        return size

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, str):
                value.encode()
        except (ValueError, LookupError, TypeError, AttributeError) as error:  # whatever PyYAML's constructors raise
            raise _complaint(f"this is no {node.tag.rpartition(':')[2]} ({one_line(error)})", node) from None
        return value


def _complaint(problem: str, node: Any) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)

# --- fingerprints -------------------------------------------------------------------------------------------------


def require_same(
    kept: Any,
    wanted: Mapping[str, Any],
    *,
    what: str,
    remedy: str,
    holds: str = "is",
    error: type[RankscopeError] = FileError,
) -> None:
    """Raises `error`, with the first key that differs, where a kept result was made from something else than is wanted."""
    if not (isinstance(kept, Mapping) and kept):
        raise error(f"{what} must say what it was made from, but does not: an older rankscope wrote it; {remedy}")
    for key, theirs, ours in _differences(kept, json.loads(json.dumps(wanted))):
        about, other = f"{key} {ours!r}", repr(theirs)
        if isinstance(theirs, str) and isinstance(ours, str) and re.fullmatch(r"[0-9a-f]{16}", theirs):
            about, other = f"the present {key} ({ours})", f"another ({theirs})"
        raise error(f"{what} must be about {about}, but {holds} about {other}; {remedy}")


def _differences(kept: Any, wanted: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The keys whose values differ, with both values; a key that is missing counts as None."""
    if not (isinstance(kept, Mapping) and isinstance(wanted, Mapping)):
        yield from [(key, kept, wanted)] * (kept != wanted)
        return
    for name in dict.fromkeys([*wanted, *kept]):
        yield from _differences(kept.get(name), wanted.get(name), f"{key} {name}".lstrip())


def digest(value: Any) -> str:
    """A short hash of a value's content, the same in any process.

    Dataclasses and settings are hashed by the fields that are not at their defaults, so that a new field changes nothing;
    functions by their source; modules by configuration and weights; other objects by class, source and state.
    """
    content = hashlib.sha256()
    _feed(content.update, value, ())
    return content.hexdigest()[:16]


def digest_source(*functions: Any) -> str:
    """A short hash of the source of functions: of a study's `path.py:name`, the whole file; of others, their own lines.

    rankscope's own functions are left out: `FORMAT` speaks for them.
    """
    sources: list[Any] = []
    for function in functions:
        code = getattr(inspect.unwrap(function), "__code__", None)
        if code is None or Path(__file__).parent in Path(code.co_filename).parents:
            continue
        whole = (getattr(function, "__module__", "") or "").startswith(USER_MODULE)
        try:
            sources.append(Path(code.co_filename).read_bytes() if whole else inspect.getsource(code))
        except OSError:  # typed in, without a file
            sources.append([code.co_code, code.co_names])
    return digest(sources)


def _feed(update: Callable[[Any], None], value: Any, inside: tuple[int, ...]) -> None:
    """Hashes a value; `inside` are the ids of the objects that hold it, since objects may hold each other."""
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if numpy and isinstance(value, numpy.generic):
        value = value.item()
    if isinstance(value, bytes):
        update(f"{len(value)}b".encode() + value)
    elif value is None or isinstance(value, bool | int | float | complex | str | PurePath):
        text = repr(str(value) if isinstance(value, PurePath) else value).encode()
        update(f"{len(text)}:".encode() + text)
    elif id(value) in inside:
        update(b"cycle")
    elif numpy and isinstance(value, numpy.ndarray) and value.dtype != object:
        update(repr((value.dtype.str, value.shape)).encode())
        update(memoryview(numpy.ascontiguousarray(value)).cast("B") if value.size else b"")
    elif torch and isinstance(value, torch.Tensor):
        update(repr((str(value.dtype), tuple(value.shape))).encode())
        if hasattr(value, "__tensor_flatten__"):  # quantised: the tensors that it holds
            for name in value.__tensor_flatten__()[0]:
                _feed(update, getattr(value, name), (*inside, id(value)))
        elif not value.is_meta and value.numel():
            update(memoryview(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    else:
        parts, kind = _parts(value), type(value).__qualname__
        kind = "list" if isinstance(value, list | tuple) else "dict" if isinstance(value, Mapping) else kind
        update(f"{kind}[{len(parts)}".encode())
        for part in parts:
            _feed(update, part, (*inside, id(value)))


def _parts(value: Any) -> list[Any]:
    """What an object that is no plain value consists of."""
    torch, pandas = sys.modules.get("torch"), sys.modules.get("pandas")
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
    if hasattr(value, "model_dump") and not isinstance(value, type):  # pydantic's
        return [value.model_dump(exclude_defaults=True)]
    if isinstance(value, type):
        return [value.__qualname__, digest_source(*vars(value).values())]
    if inspect.isroutine(value):
        return [value.__qualname__, digest_source(value)]
    try:
        state = value.__getstate__()
    except TypeError:  # what cannot be pickled (locks, generators) has no content that could be told
        state = None
    return [digest_source(*vars(type(value)).values()), state]


def _settings(config: Any) -> Any:
    """A model's configuration, without where it was loaded from."""
    config = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(config, Mapping):
        return config
    hidden = {key for key in config if str(key).startswith("_") or key == "transformers_version"}
    return {key: _settings(each) for key, each in config.items() if key not in hidden}


def _is_default(field: Any, value: Any) -> bool:
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    return type(default) is type(value) and digest(default) == digest(value)
