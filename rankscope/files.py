"""Atomic file writes, and one validated reader for each format: JSON, YAML, Parquet and tensors.

A reader raises `FileFormatError` for whatever is wrong with a path or a file's content, and nothing else.
"""

from __future__ import annotations

import codecs
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rankscope.exceptions import FileFormatError, one_line, shown

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
        FileFormatError: The file is missing, cannot be read, is not JSON, names a key twice, or does not hold an object.
    """
    value = parse_json(_read_bytes(path, what=what), where=f"`{path}`", what=what)
    if not isinstance(value, dict):
        raise FileFormatError(f"`{path}` must hold {what} as a JSON object, but holds a {type(value).__name__}.")
    return value


def read_text(path: str | os.PathLike[str], *, what: str) -> str:
    """Reads a text of UTF-8, or of UTF-16 with its mark; line ends stay as they are.

    Raises:
        FileFormatError: The file is missing, cannot be read, or is no such text.
    """
    data = _read_bytes(path, what=what, most=2**34)
    encoding = "utf-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise FileFormatError(
            f"`{path}` must hold {what} as text, but cannot be read ({one_line(error)}); save it as UTF-8."
        ) from None


def parse_json(text: str | bytes, *, where: str, what: str) -> Any:
    """Parses JSON of any kind, as of a file's metadata or one of its lines.

    Args:
        text: The JSON.
        where: Where it stands, as in "`data.jsonl`, line 7".
        what: What it should hold, as in "an example".

    Raises:
        FileFormatError: It is not JSON, or names a key twice.
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
    raise FileFormatError(
        f"{where} must hold {what} as JSON, but it cannot be parsed ({reason}); it may be truncated: write it again."
    )


def read_yaml(path: str | os.PathLike[str], *, what: str) -> Any:
    """Reads a YAML file of plain values: UTF-8, or UTF-16 with its mark.

    Beyond YAML 1.1, floats may come without a dot (`1e-3`), keys are texts, and none may stand twice.

    Raises:
        FileFormatError: The file is missing, cannot be read, is not YAML, holds a value that is not what its tag says, is
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
    raise FileFormatError(f"`{path}` must hold {what} as YAML, but it cannot be parsed ({reason}); mend it there.")


def read_parquet(path: str | os.PathLike[str], *, what: str, schema: pa.Schema | None = None) -> pa.Table:
    """Reads a Parquet file whole, and checks its columns.

    Args:
        path: The file.
        what: What it should hold, as in "a profile".
        schema: Columns that must be there. Each is cast to its type where no value is lost by it, and holds no nulls where its
            field is not nullable; lists never do. Columns beyond these stay as they are. None: no check.

    Raises:
        FileFormatError: The file is missing, cannot be read, is not Parquet, or a column is missing or of another type.
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
        raise FileFormatError(f"{must}, but has {len(found) or 'no'} columns `{field.name}`; write it again.")
    column = table.column(found[0])
    try:
        cast = column.cast(field.type)
    except pa.ArrowException:
        raise FileFormatError(
            f"{must}, with {field.type} in column `{field.name}`, but it holds {column.type}; write it again."
        ) from None
    items = [chunk.flatten() for chunk in cast.chunks] if pa.types.is_list(field.type) else []
    if (cast.null_count and not field.nullable) or any(part.null_count for part in items):
        raise FileFormatError(f"{must}, with a value in each row of column `{field.name}`; write it again.")
    return table.set_column(found[0], field.with_nullable(True), cast)


def read_tensors(path: str | os.PathLike[str], *, what: str, device: str = "cpu") -> dict[str, Tensor]:
    """Reads tensors by name: safetensors, or with another suffix what `torch.save` wrote (weights only).

    Args:
        path: The file.
        what: What it should hold, as in "an adapter's weights".
        device: Where they go; "meta": their shapes only.

    Raises:
        FileFormatError: The file is missing, cannot be read, is truncated, or holds anything but tensors.
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
        raise FileFormatError(
            f"`{path}` must hold {what} as tensors by name, but holds something else; write it again."
        )
    return tensors


@contextmanager
def _readable(
    path: str | os.PathLike[str], *, what: str, form: str = "", broken: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Turns what a path or a format's parser raises into one line."""
    try:
        yield
    except FileNotFoundError:
        raise FileFormatError(f"`{path}` must hold {what}, but there is no such file; check the path.") from None
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) else None  # pyarrow's OSErrors about content have none
        if not reason and isinstance(error, (OSError, *broken)):
            raise FileFormatError(
                f"`{path}` must hold {what} as {form}, but it cannot be parsed ({one_line(error)}); "
                "it may be truncated: write it again."
            ) from None
        if not isinstance(error, OSError | ValueError):
            raise
        raise FileFormatError(
            f"`{path}` must hold {what}, but cannot be read ({reason or one_line(error)}); check the path."
        ) from None


def _read_bytes(path: str | os.PathLike[str], *, what: str, most: int = 2**28) -> bytes:
    with _readable(path, what=what), open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise FileFormatError(f"`{path}` must hold {what}, but is larger than {most / 2**20:g} MB; check the path.")
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
