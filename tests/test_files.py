"""Files are replaced whole or not at all."""

from pathlib import Path

import pytest

from rankscope.files import read_json, replacing, replacing_folder, write_json


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


def test_folders_are_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for content in ("old", "new"):
        with replacing_folder(path) as fresh:
            (fresh / content).touch()
    assert [file.name for file in path.iterdir()] == ["new"]
    with pytest.raises(RuntimeError, match="^half-way$"), replacing_folder(path) as fresh:
        (fresh / "half").touch()
        raise RuntimeError("half-way")
    assert [file.name for file in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]
