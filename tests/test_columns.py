"""A first look at data files: what it reads, and when it leaves the judgement to the reading of the whole file."""

import json
from pathlib import Path

import pandas as pd
import pytest

from rankscope.columns import check_glance, find_columns, glance
from rankscope.errors import TaskError


def test_a_column_counts_if_any_row_has_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": 1}\n\n{"id": 2, "text": "a"}\n')
    check_glance("causal-lm", path, None)
    assert glance(path) == (["id", "text"], [{"id": 1}, {"id": 2, "text": "a"}])


def test_images_in_parquet_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    pd.DataFrame({"image": [b"x" * 1000], "messages": [turns]}).to_parquet(path)
    assert glance(path) == (["image", "messages"], [{"messages": turns}])
    check_glance("image-text-to-text", path, None)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.parquet", b"PAR1"),
        ("cut.jsonl", b'{"text": "a"}\n{"text": '),
        ("lists.jsonl", b'["text"]\n'),
        ("empty.jsonl", b""),
        ("empty.csv", b""),
        ("twice.csv", b"text,text\na,b\n"),
        ("blank.csv", b",label\n0,1\n"),
        ("other.csv", "text,label\na,b\n".encode("utf-16")),
        ("rows.json", b'{"text": {"0": "a"}}'),
        ("absent.csv", None),
    ],
)
def test_what_a_glance_does_not_tell_is_left_to_the_reader(name: str, content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert glance(tmp_path / name) is None
    check_glance("sequence-classification", tmp_path / name, None)


def test_the_form_with_messages_is_taken_where_both_are_there() -> None:
    names = ["prompt", "completion", "messages"]
    assert find_columns("chat", names, None, what="it") == {"messages": "messages"}
    assert find_columns("chat", names[:2], None, what="it") == {"prompt": "prompt", "completion": "completion"}
    assert find_columns("chat", ["q", "a"], {"prompt": "q", "completion": "a"}, what="it") == {
        "prompt": "q",
        "completion": "a",
    }


def test_a_role_is_checked_in_all_rows_at_hand(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    good = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    rows = [{"messages": good}, {"messages": [*good, {"role": "tool", "content": "3"}]}, {"messages": "x"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(TaskError, match=r"^messages must have a role among .*, but row 2 holds \{'role': 'tool'"):
        check_glance("chat", path, None)
