"""Files are replaced whole or not at all."""

from pathlib import Path

import pytest

from rankscope.files import read_json, replacing, write_json


def test_success_replaces_and_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    with pytest.raises(RuntimeError, match="^half-way$"), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("half-way")
    assert read_json(path, what="a value") == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_files_have_ordinary_permissions(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    write_json(tmp_path / "ours", {})
    assert (tmp_path / "ours").stat().st_mode == plain.stat().st_mode
