"""Columns of a task's data: which there must be, under which names; and a first look, before anything heavy is imported."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rankscope.errors import TaskError, did_you_mean, shown

DATA_SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")
# Of each type of task. Where there are two forms, the first has `messages`.
FORMS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "sequence-classification": (("text", "label"),),
    "causal-lm": (("text",),),
    "chat": (("messages",), ("prompt", "completion")),
    "sequence-to-sequence": (("source", "target"),),
    "token-classification": (("tokens", "tags"),),
    "image-classification": (("image", "label"),),
    "image-text-to-text": (("image", "messages"), ("image", "question", "answer")),
}
ROLES = {"human": "user", "gpt": "assistant", **{role: role for role in ("system", "user", "assistant")}}
_ELSEWHERE = ("conversations", "conversation", "chat")  # what other tools' data calls messages
_LOOKED_AT = 2**22  # characters of a text file


def find_columns(kind: str, names: Iterable[object], columns: Mapping[str, str] | None, *, what: str) -> dict[str, str]:
    """The data's column for each that this type of task reads.

    `columns` are names that differ from the task's own, and `what` is the data in words.

    Raises:
        TaskError: `columns` has a key that is none of the task's, or a column is missing.
    """
    forms, there = FORMS[kind], [str(name) for name in names]
    known = list(dict.fromkeys(column for form in forms for column in form))
    for key in columns or ():
        if key not in known:
            hint = did_you_mean(key, known, f"it takes {', '.join(known)}.")
            raise TaskError(f"`columns` takes no key `{key}`; {hint}")
    named = {column: column for column in known} | dict(columns or {})
    form, *others = forms
    if others and named["messages"] not in there:
        (form,) = others
        first, second = (named[column] for column in form if column != "image")
        if first not in there:
            must = f"the data must have a column {named['messages']!r}, or {first!r} and {second!r}"
            remedy = next((f"set `columns: {{messages: {name}}}`" for name in _ELSEWHERE if name in there), None)
            raise TaskError(f"{must}, but has {', '.join(there)}; {remedy or 'rename them, or set `columns`'}.")
    for column in form:
        if named[column] not in there:
            hint = did_you_mean(named[column], there, f"it has {', '.join(there)}.")
            raise TaskError(f"{what} must have a column {named[column]!r}, but has none; {hint}")
    return {column: named[column] for column in form}


def check_messages(value: Any, *, where: str) -> None:
    """Raise a TaskError unless a cell of `messages` is a list of mappings whose role is known."""
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__iter__"):
        raise TaskError(f"messages must be a list, but {where} holds {shown(value)}; convert it.")
    for message in value:
        role = message.get("role") or message.get("from") if isinstance(message, Mapping) else None
        if role not in ROLES:
            must = f"messages must have a role among {', '.join(ROLES)}"
            raise TaskError(f"{must}, but {where} holds {shown(message)}; correct it.")


def check_glance(kind: str, path: Path, columns: Mapping[str, str] | None) -> None:
    """Raise the TaskError that reading the whole file would raise for its columns, or for messages among its first rows."""
    seen = glance(path)
    if seen is None:
        return
    names, rows = seen
    if "messages" in (found := find_columns(kind, names, columns, what=f"`{path}`")):
        for number, row in enumerate(rows, start=1):
            check_messages(row.get(found["messages"]), where=f"row {number:,}")


def glance(path: Path) -> tuple[list[str], list[Mapping[str, Any]]] | None:
    """The columns and first rows of a data file; None where a glance does not tell, and reading the file will."""
    reader = {".parquet": _glance_parquet, ".jsonl": _glance_lines, ".csv": _glance_csv}.get(path.suffix.lower())
    try:
        names, rows = reader(path) if reader else ([], [])
    except (OSError, ValueError, StopIteration, csv.Error):
        return None
    return (names, rows) if names and all(names) and len(set(names)) == len(names) else None


def _glance_parquet(path: Path) -> tuple[list[str], list[Mapping[str, Any]]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        batches = file.iter_batches(batch_size=100, columns=[name for name in names if "image" not in name])
        return names, next(batches).to_pylist()


def _glance_lines(path: Path) -> tuple[list[str], list[Mapping[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        lines = file.readlines(_LOOKED_AT)  # whole ones
    rows = [json.loads(line) for line in lines if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        return [], []
    return list(dict.fromkeys(name for row in rows for name in row)), rows


def _glance_csv(path: Path) -> tuple[list[str], list[Mapping[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return next(csv.reader(file)), []
