"""Tables of examples: reading Parquet, JSONL, CSV or a hub data set, and splitting rows into train, validation and test."""

from __future__ import annotations

import difflib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rankscope.exceptions import FileFormatError, TaskError, one_line, shown
from rankscope.files import parse_json, read_parquet, read_text
from rankscope.tasks.pretrained import hub_answers, is_offline
from rankscope.tasks.protocol import Split

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def read_table(source: str | Path | pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """The rows of a local file, of a hub data set, or of a table at hand.

    Args:
        source: A path that ends in .parquet, .jsonl, .json or .csv; anything else is a hub id, for which the package
            `datasets` is needed. A hub data set's own splits go into a column `split`. A DataFrame is only checked.
        columns: Columns that must be there.

    Raises:
        TaskError: The file is missing or cannot be read, has no rows, or lacks a column (the nearest is named).
    """
    what = "the DataFrame" if isinstance(source, pd.DataFrame) else f"`{source}`"
    table = source if isinstance(source, pd.DataFrame) else _read(source)
    if table.empty:
        raise TaskError(f"{what} must hold rows, but holds none; check the data.")
    for column in (*columns, "split"):
        if table.columns.tolist().count(column) > 1:
            raise TaskError(f"{what} must have one column {column!r}, but has several; rename them.")
    for column in columns:
        if column not in table.columns:
            names = [str(name) for name in table.columns]
            close = difflib.get_close_matches(column, names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(names)}."
            raise TaskError(f"{what} must have a column {column!r}, but has none; {hint}")
        if nested := [value for value in table[column] if isinstance(value, list | dict | bytes | np.ndarray)]:
            raise TaskError(
                f"{what} must hold texts or numbers in column {column!r}, but holds {shown(nested[0])}; convert it."
            )
    return table


def check_filled(table: pd.DataFrame, columns: Sequence[str]) -> None:
    """Checks that every row has a value in each of the columns; a blank text is none.

    Raises:
        TaskError: Some rows have none; they are counted.
    """
    for column in columns:
        blank = table[column].isna() | table[column].astype(str).str.strip().eq("")
        if n_blank := int(blank.sum()):
            raise TaskError(
                f"the column {column!r} must hold a value in every row, but {n_blank:,} of {len(table):,} have none; "
                "drop those rows."
            )


def split_rows(
    table: pd.DataFrame, *, key: str, fractions: tuple[float, float, float] = (0.7, 0.15, 0.15), seed: int = 0
) -> dict[Split, pd.DataFrame]:
    """The table's splits: its own column `split` if it has one, else drawn at random by the fractions.

    Where a value of `key` occurs twice, only its first row is kept, so that no text lies in two splits.

    Args:
        table: The rows.
        key: The column that must not repeat.
        fractions: Shares of train, validation and test; they sum to 1.
        seed: Of the draw.

    Raises:
        TaskError: A split is empty, or the fractions do not sum to 1.
    """
    if seed < 0:
        raise TaskError(f"`split_seed` must be 0 or more, but got {seed}.")
    table = table.drop_duplicates(subset=key)
    if "split" in table.columns:
        named = table["split"].map(str)  # a cell may hold anything
        parts = {split: table[named == split] for split in SPLITS}
    else:
        if min(fractions) <= 0 or abs(sum(fractions) - 1.0) > 1e-6:
            raise TaskError(f"`fractions` must be three positive shares that sum to 1, but got {list(fractions)}.")
        order = np.random.default_rng(seed).permutation(len(table))
        cuts = np.round(np.cumsum(fractions)[:2] * len(table)).astype(int)
        parts = {split: table.iloc[rows] for split, rows in zip(SPLITS, np.split(order, cuts), strict=True)}
    if empty := [split for split, rows in parts.items() if rows.empty]:
        held = ", ".join(sorted({str(value) for value in table["split"]})) if "split" in table.columns else ""
        hint = f"its `split` column holds {held}: rename, or drop the column." if held else "add rows."
        raise TaskError(f"the data must have rows in every split, but {empty[0]!r} has none; {hint}")
    return {split: rows.reset_index(drop=True) for split, rows in parts.items()}


def _read(source: str | Path) -> pd.DataFrame:
    path = Path(source)
    if path.suffix.lower() in _READERS:
        return _read_file(path)
    if os.path.exists(path) or path.is_absolute() or path.suffix:
        raise TaskError(
            f"`data` must end in {', '.join(_READERS)} or be a hub id, but got `{source}`; convert the file, or check the path."
        )
    return _read_hub(str(source))


def _read_file(path: Path) -> pd.DataFrame:
    if not os.path.exists(path):
        siblings = os.listdir(path.parent) if os.path.isdir(path.parent) else []
        close = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.7)
        hint = f"did you mean `{close[0]}`?" if close else "check the path."
        raise TaskError(f"`{path}` must hold {_WHAT}, but there is no such file; {hint}")
    try:
        table = _READERS[path.suffix.lower()](path)
    except FileFormatError as error:
        raise TaskError(str(error)) from None
    assert isinstance(table, pd.DataFrame)
    return table


def _read_jsonl(path: Path) -> pd.DataFrame:
    lines = read_text(path, what=_WHAT).split("\n")
    return _rows(
        [
            parse_json(line, where=f"`{path}`, line {number},", what="an example")
            for number, line in enumerate(lines, start=1)
            if line.strip()
        ],
        path,
    )


def _read_json(path: Path) -> pd.DataFrame:
    value = parse_json(read_text(path, what=_WHAT), where=f"`{path}`", what=_WHAT)
    if isinstance(value, dict):  # columns by name, as pandas writes them
        columns = [list(column.values()) if isinstance(column, dict) else column for column in value.values()]
        if all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
            return pd.DataFrame(dict(zip(value, columns, strict=True)))
    return _rows(value, path)


def _rows(value: Any, path: Path) -> pd.DataFrame:
    rows = value if isinstance(value, list) else [value]
    if odd := [row for row in rows if not isinstance(row, dict)]:
        raise FileFormatError(f"`{path}` must hold objects with keys as rows, but holds {shown(odd[0])}; convert it.")
    return pd.DataFrame(rows)


def _read_csv(path: Path) -> pd.DataFrame:
    text = read_text(path, what=_WHAT)
    try:
        table = pd.read_csv(io.StringIO(text))
        header = pd.read_csv(io.StringIO(text), header=None, nrows=1, dtype=str).iloc[0].dropna().tolist()
    except ValueError as error:  # all of pandas' parsing errors are
        raise FileFormatError(
            f"`{path}` must hold {_WHAT} as CSV, but it cannot be parsed ({one_line(error)})."
        ) from None
    if twice := [name for name in header if header.count(name) > 1]:  # which pandas renames
        raise FileFormatError(f"`{path}` must have one column {twice[0]!r}, but has several; rename them.")
    return table


def _read_hub(name: str) -> pd.DataFrame:
    try:
        import datasets
    except ImportError:
        raise TaskError(
            f"`{name}` looks like a hub data set, which needs the package `datasets`; "
            "install rankscope[hub], or pass a local .parquet, .jsonl or .csv file."
        ) from None
    if not (is_offline() or hub_answers()):
        raise TaskError(
            f"`{name}` looks like a hub data set, but the hub cannot be reached; pass a local file, or set HF_HUB_OFFLINE=1 to "
            "use what was fetched before."
        )
    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # the hub's client raises many unrelated types
        raise TaskError(
            f"the hub data set `{name}` must load, but does not ({one_line(error)}); pass a local file."
        ) from error
    table: pd.DataFrame = pd.concat([p.to_pandas().assign(split=s) for s, p in loaded.items()], ignore_index=True)
    return table


_WHAT = "the task's data"
_READERS: dict[str, Any] = {
    ".parquet": lambda path: read_parquet(path, what=_WHAT).to_pandas(),
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
}
