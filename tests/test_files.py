"""Files are replaced whole or not at all."""

import re
from pathlib import Path

import pytest

from rankscope.exceptions import FileFormatError
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


def test_parents_are_made_and_json_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "value.json"
    value = {"a": [1, 2.5, None], "ü": {"b": True}}
    write_json(str(path), value)
    assert read_json(path, what="a value") == value
    assert path.read_text(encoding="utf-8").endswith("}\n")


def test_what_is_no_json_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError, match="^Object of type object is not JSON serializable"):
        write_json(path, {"a": object()})
    assert read_json(path, what="a value") == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "must hold a value, but there is no such file; check the path."),
        (b"", "must hold a value as JSON, but it cannot be parsed (Expecting value: line 1 column 1 (char 0)); it may be truncated: write it again."),
        (b'{"a": 1', "must hold a value as JSON, but it cannot be parsed (Expecting ',' delimiter: line 1 column 8 (char 7)); it may be truncated: write it again."),
        (b"\xff{}", "must hold a value as JSON, but it cannot be parsed ('utf-8' codec can't decode byte 0xff in position 0: invalid start byte); it may be truncated: write it again."),
        (b"[1]", "must hold a value as a JSON object, but holds a list."),
        (b"3", "must hold a value as a JSON object, but holds a int."),
    ],
)  # fmt: skip
def test_bad_files_are_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "value.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FileFormatError, match=f"^{re.escape(f'`{path}` {message}')}$"):
        read_json(path, what="a value")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    message = f"`{tmp_path}` must hold a value, but cannot be read (Is a directory); check the path."
    with pytest.raises(FileFormatError, match=f"^{re.escape(message)}$"):
        read_json(tmp_path, what="a value")
