"""Files are replaced whole or not at all."""

import os
import re
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from rankscope.errors import FileError, RankscopeError, TaskError
from rankscope.files import (
    SEALED,
    read_json,
    read_parquet,
    read_tensors,
    read_yaml,
    replacing,
    seal_metadata,
    seal_tensors,
    write_json,
)


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
        with replacing(path, folder=True) as fresh:
            (fresh / content).touch()
    assert [file.name for file in path.iterdir()] == ["new"]
    with pytest.raises(RuntimeError, match="^half-way$"), replacing(path, folder=True) as fresh:
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
        (b"[" * 100_000, "must hold a value as JSON, but it cannot be parsed (it is nested too deeply); it may be truncated: write it again."),
        (b'{"a": 1, "a": 2}', "must hold a value as JSON, but it cannot be parsed (the key 'a' stands twice); it may be truncated: write it again."),
        (b'{"a": "\\ud800"}', "must hold a value as JSON, but it cannot be parsed ('utf-8' codec can't encode character '\\ud800' in position 7: surrogates not allowed); it may be truncated: write it again."),
        (b"[1]", "must hold a value as a JSON object, but holds a list."),
        (b"3", "must hold a value as a JSON object, but holds a int."),
    ],
)  # fmt: skip
def test_bad_files_are_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "value.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FileError, match=f"^{re.escape(f'`{path}` {message}')}$"):
        read_json(path, what="a value")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    message = f"`{tmp_path}` must hold a value, but cannot be read (Is a directory); check the path."
    with pytest.raises(FileError, match=f"^{re.escape(message)}$"):
        read_json(tmp_path, what="a value")


def test_json_may_be_what_windows_writes(tmp_path: Path) -> None:
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        (tmp_path / "a.json").write_text('{"ü": "\U0001f600"}', encoding=encoding)
        assert read_json(tmp_path / "a.json", what="a value") == {"ü": "\U0001f600"}


# --- what is replaced --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["new", "old"])
def test_a_folder_that_cannot_be_replaced_stays(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder"
    with replacing(path, folder=True) as fresh:
        (fresh / "old").touch()
    rename = Path.rename

    def broken(self: Path, target: Path) -> Path:
        if Path(self if failing == "new" else target).name == failing:
            raise OSError("disk full")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(OSError, match="^disk full$"), replacing(path, folder=True) as fresh:
        (fresh / "new").touch()
    assert [file.name for file in path.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_can_be_put_nowhere_is_kept_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()
    rename = Path.rename

    def broken(self: Path, target: Path) -> Path:
        if self.parent != tmp_path:
            raise OSError("disk gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(OSError, match="^disk gone$"), replacing(path, folder=True):
        pass
    assert len(list(tmp_path.glob(".folder-*/old/old"))) == 1


def test_targets_of_the_wrong_kind_are_told_before_the_work(tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    file.touch()
    with pytest.raises(IsADirectoryError), replacing(folder):
        pytest.fail("the work was begun")
    with pytest.raises(NotADirectoryError), replacing(file, folder=True):
        pytest.fail("the work was begun")
    assert sorted(tmp_path.iterdir()) == [file, folder]


def test_links_are_followed(tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "a").symlink_to(file)
    (tmp_path / "b").symlink_to(folder)
    write_json(tmp_path / "a", {"a": 1})
    with replacing(tmp_path / "b", folder=True) as fresh:
        (fresh / "new").touch()
    assert read_json(file, what="a value") == {"a": 1}
    assert [each.name for each in folder.iterdir()] == ["new"]
    assert (tmp_path / "a").is_symlink()
    assert (tmp_path / "b").is_symlink()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_files_stay(tmp_path: Path) -> None:
    (tmp_path / "file").touch(mode=0o444)
    with pytest.raises(PermissionError), replacing(tmp_path / "file"):
        pytest.fail("the work was begun")


# --- YAML --------------------------------------------------------------------------------------------------------

DEEP = b"a: " + b"[" * 3000 + b"]" * 3000
BOMB = b"a: &a [x, x]\n" + b"".join(b"%c: &%c [*%c, *%c]\n" % (i + 1, i + 1, i, i) for i in range(97, 121))
LAUGHS = b"a: &a [lol, lol, lol, lol, lol, lol, lol, lol, lol]\n" + b"".join(
    b"%c: &%c [%s]\n" % (i + 1, i + 1, b", ".join([b"*%c" % i] * 9)) for i in range(97, 106)
)
MERGES = b"a: &a {x: 1}\n" + b"".join(b"%c: &%c {<<: [*%c, *%c]}\n" % (i + 1, i + 1, i, i) for i in range(97, 121))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"a: 1\na: 2", "(line 2: the key 'a' stands twice"),
        (b"a: {b: 1, 'b': 2}", "the key 'b' stands twice"),
        (b"a: 2024-02-01", "a timestamp is no plain value: put it in quotes"),
        (b"a: 2024-02-30", "a timestamp is no plain value: put it in quotes"),
        (b"a: !!binary aGk=", "a binary is no plain value: put it in quotes"),
        (b"a: 0x_", "this is no int (invalid literal for int() with base 16: '')"),
        (b"a: !!int abc", "this is no int (invalid literal for int() with base 10: 'abc')"),
        (b"a: !!bool abc", "this is no bool ('abc')"),
        (b"a: " + b"9" * 5000, "line 1: this is no int (of 5,000 characters)"),
        (b"a: " + b"1:" * 5000 + b"1", "line 1: this is no int (of 10,001 characters)"),
        (b'a: "\\ud800"', "this is no str ("),
        (b"a: !!python/name:os.system x", "could not determine a constructor for the tag"),
        (b"a: &a [*a]", "this holds itself"),
        (b"a: *b", "found undefined alias 'b'"),
        (b"? [1]\n: 2", "line 1: the key [1] is no text: put it in quotes"),
        (b"a: 1\nb: {on: 1}", "line 2: the key True is no text: put it in quotes"),
        (b"null: 1", "the key None is no text"),
        (b"a: 1\n--- \nb: 2", "line 2: but found another document"),
        (b"a: x\0y", "special characters are not allowed"),
        (b"a: \xff", "invalid start byte"),
        (b"a: [", "line 1: expected the node content"),
        (DEEP, "line 1: nested more than 50 deep"),
        (b"".join(b" " * i + b"a:\n" for i in range(60)), "line 50: nested more than 50 deep"),
        (b"a: &a 1\nb:\n" + b"- *a\n" * 1001, "line 1003: more than 1,000 aliases are no study"),
        (LAUGHS, "with its aliases written out, this is too large"),
        (BOMB, "with its aliases written out, this is too large"),
        (MERGES, "with its aliases written out, this is too large"),
    ],
)  # fmt: skip
def test_what_is_no_yaml_of_plain_values_is_told(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    with pytest.raises(FileError) as caught:
        read_yaml(path, what="a study")
    assert str(caught.value).startswith(f"`{path}` must hold a study as YAML, but it cannot be parsed (")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_yaml_comes_in_the_usual_encodings_and_ways(encoding: str, tmp_path: Path) -> None:
    text = "a: &a {x: 1e-3, y: 2e6, z: .5E+1}\nb: {<<: *a, x: ü}\nc: 2024\nd: '2024-01-01'\ne: 1.2.3e4\nf: -e5\n"
    (tmp_path / "a.yaml").write_text(text, encoding=encoding)
    assert read_yaml(tmp_path / "a.yaml", what="a study") == {
        "a": {"x": 1e-3, "y": 2e6, "z": 5.0},
        "b": {"x": "ü", "y": 2e6, "z": 5.0},
        "c": 2024,
        "d": "2024-01-01",
        "e": "1.2.3e4",
        "f": "-e5",
    }


def test_a_billion_laughs_are_refused_within_a_second(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(LAUGHS)
    started = time.process_time()
    with pytest.raises(FileError):
        read_yaml(tmp_path / "a.yaml", what="a study")
    assert time.process_time() - started < 1.0


def test_a_yaml_file_beyond_measure_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"#" * (2**21 + 1))
    message = f"`{tmp_path / 'a.yaml'}` must hold a study, but is larger than 2 MB; check the path."
    with pytest.raises(FileError, match=f"^{re.escape(message)}$"):
        read_yaml(tmp_path / "a.yaml", what="a study")


# --- Parquet and tensors -----------------------------------------------------------------------------------------

SCHEMA = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("rank", pa.int64()),
        pa.field("gains", pa.list_(pa.float64())),
    ]
)
TABLE = pa.table({"name": ["a", "b"], "rank": [1, None], "gains": [[1.0], []], "more": [1, 2]})


def test_parquet_columns_are_cast_and_others_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    narrow = TABLE.set_column(0, "name", TABLE["name"].dictionary_encode()).set_column(
        1, "rank", TABLE["rank"].cast("int8")
    )
    pq.write_table(narrow.replace_schema_metadata({"pandas": "{", "rankscope": "x"}), path)
    found = read_parquet(path, what="ranks", schema=SCHEMA)
    assert found.to_pydict() == TABLE.to_pydict()
    assert found.schema.types == TABLE.schema.types
    assert found.schema.metadata == {b"rankscope": b"x"}
    assert read_parquet(path, what="ranks").column_names == TABLE.column_names


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        (TABLE.drop_columns("rank"), ", but has no columns `rank`; write it again."),
        (TABLE.append_column("rank", TABLE["rank"]), ", but has 2 columns `rank`; write it again."),
        (TABLE.set_column(1, "rank", pa.array(["x", "y"])), ", with int64 in column `rank`, but it holds string; write it again."),
        (TABLE.set_column(1, "rank", pa.array([0.5, 1.0])), ", with int64 in column `rank`, but it holds double; write it again."),
        (TABLE.set_column(0, "name", pa.array(["x", None])), ", with a value in each row of column `name`; write it again."),
        (TABLE.set_column(2, "gains", pa.array([[1.0], [None]])), ", with a value in each row of column `gains`; write it again."),
    ],
)  # fmt: skip
def test_parquet_columns_that_do_not_fit_are_named(table: pa.Table, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(table, path)
    with pytest.raises(FileError, match=f"^{re.escape(f'`{path}` must hold ranks{problem}')}$"):
        read_parquet(path, what="ranks", schema=SCHEMA)


@pytest.mark.parametrize("form", ["Parquet", "safetensors", "tensors"])
def test_truncated_and_foreign_files_are_told(form: str, tmp_path: Path) -> None:
    path = tmp_path / {"Parquet": "a.parquet", "safetensors": "a.safetensors", "tensors": "a.bin"}[form]
    read = read_parquet if form == "Parquet" else read_tensors
    if form == "Parquet":
        pq.write_table(TABLE, path)
    elif form == "safetensors":
        save_file({"a": torch.ones(3)}, path)
    else:
        torch.save({"a": torch.ones(3)}, path)
    good = path.read_bytes()
    start = f"`{path}` must hold ranks as {form}, but it cannot be parsed ("
    for content in (b"", b"x" * 50, good[: len(good) // 2], good[:-1]):
        path.write_bytes(content)
        with pytest.raises(FileError, match=f"^{re.escape(start)}"):
            read(path, what="ranks")
    for odd in (tmp_path, tmp_path / "none", "a\0b", "x" * 5000, "\ud800"):
        with pytest.raises(FileError, match="must hold ranks"):
            read(odd, what="ranks")


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin"])
def test_tensors_come_back_or_their_shapes_alone(name: str, tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3)}
    (save_file if name.endswith("tensors") else torch.save)(tensors, tmp_path / name)
    assert torch.equal(read_tensors(tmp_path / name, what="weights")["a"], tensors["a"])
    shapes = read_tensors(tmp_path / name, what="weights", device="meta")
    assert shapes["a"].is_meta
    assert shapes["a"].shape == (2, 3)


def test_a_pickle_of_something_else_is_told(tmp_path: Path) -> None:
    torch.save([torch.ones(1)], tmp_path / "a.bin")
    with pytest.raises(FileError, match="must hold weights as tensors by name, but holds something else"):
        read_tensors(tmp_path / "a.bin", what="weights")


def test_messages_are_one_line_whatever_they_name() -> None:
    assert str(TaskError("no `a\nb\r\u2028c` here")) == "no `a b  c` here"
    assert issubclass(TaskError, RankscopeError)


# --- damage ------------------------------------------------------------------------------------------------------

DAMAGED = "as it was written, but its checksum differs: it is damaged or was edited; write it again."


def flipped(path: Path, place: int, bit: int = 0) -> None:
    """One bit of a file is another."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(bytes(data))


def test_sealed_json_tells_an_edit_and_an_older_file_has_no_seal(tmp_path: Path) -> None:
    path, value = tmp_path / "a.json", {"a": [1, 2.5, None], "b": {"c": "ü"}, "t": (1,), "x": float("nan"), "y": 1e-300}
    write_json(path, value, sealed=True)
    read = read_json(path, what="a run")
    assert repr(read) == repr({**value, "t": [1]})
    text = path.read_text()
    path.write_text(text.replace("2.5", "2.7"))
    with pytest.raises(FileError, match=f"^`{re.escape(str(path))}` must hold a run {re.escape(DAMAGED)}$"):
        read_json(path, what="a run")
    write_json(path, value)
    assert repr(read_json(path, what="a run")) == repr(read)


def test_sealed_tensors_tell_a_flipped_bit(tmp_path: Path) -> None:
    path, tensors = (
        tmp_path / "a.safetensors",
        {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5, dtype=torch.bfloat16)},
    )
    save_file(tensors, path, {"format": "pt"})
    older = read_tensors(path, what="weights")
    seal_tensors(path)
    for read in (read_tensors(path, what="weights"), load_file(path), older):
        assert all(
            torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors
        )
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "pt"
    sealed = path.read_bytes()
    for place in range(len(sealed)):
        path.write_bytes(sealed)
        flipped(path, place, bit=place % 8)
        try:
            read = read_tensors(path, what="weights")
        except FileError:
            continue
        else:  # what was hit says nothing about the tensors
            assert set(read) == set(tensors)
            assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_sealed_parquet_tells_a_flipped_bit(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    frame = pd.DataFrame({"a": np.random.default_rng(0).normal(size=500), "b": list("vwxyz") * 100})
    text = b'{"batches": 8}'
    table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(
        {b"rankscope": text, **seal_metadata(text)}
    )
    pq.write_table(table, path, compression="zstd", **SEALED)
    assert read_parquet(path, what="a profile").to_pandas().equals(frame)
    sealed = path.read_bytes()
    refused = 0
    for place in range(0, len(sealed), 11):
        path.write_bytes(sealed)
        flipped(path, place, bit=place % 8)
        try:
            read = read_parquet(path, what="a profile")
        except FileError:
            refused += 1
        else:
            assert (read.schema.metadata or {}).get(b"rankscope", text) == text
            if read.column_names == ["a", "b"]:  # a column of another name is missed by its reader
                assert read.to_pandas().equals(frame)
    assert refused > 0.7 * len(sealed) / 11
