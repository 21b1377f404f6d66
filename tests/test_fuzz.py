"""Every reader against broken input: mutations of valid files and values of odd types give one line of ours, or a result.

An input is drawn from its reader's name and its number, so that a failure's name repeats it.
"""

import json
import random
import warnings
from collections.abc import Callable
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import rankscope as rs
from rankscope.budget import allocate_marginal, allocate_proportional
from rankscope.columns import check_glance
from rankscope.comparison import read_comparison, summarise
from rankscope.comparison.summary import BEGIN, END, insert_table, to_markdown
from rankscope.errors import RankscopeError
from rankscope.files import read_json, read_parquet, read_tensors, read_yaml
from rankscope.lora import load_adapter, restore_ranks, save_ranks
from rankscope.settings import read_study
from rankscope.strategies import STRATEGIES
from rankscope.tasks.data import check_cells, read_columns, split_rows

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**30, 10**400, 0.0, -0.0, 0.5, 1.5, -1e-300, 1e300, 1e-320,
    float("nan"), float("inf"), -float("inf"), "", " ", "a", "8", "1e3", "nan", "none", "on", "../x", "/abs", "a\0b", "a\nb", "\ud800",
    "\u202e", "\ufeff", "ü" * 300, "x" * 5000, "[", "(", "*", "x{99999999999}", "(a+)+$", "#", "`", "{}", [], [[]], [None], {}, {"": 0},
    {"a": {}}, [1, "a"], [True], [float("nan")], ["q_proj", 3], {"uniform": 1}, {1: 2},
]  # fmt: skip
TOKENS = [
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"[" * 400, b"{" * 400, b'{"a":' * 300, b"9" * 400, b"9" * 5000, b"1e999", b"-1", b"NaN",
    b"Infinity", b"null", b"true", b'"', b"'", b"\n", b"\r", b"\t", b",", b":", b": ", b"- ", b"&a ", b"*a", b"<<: ", b"!!int ", b"!!python/object:x ",
    b"? ", b"|\n", b"%", b"@", b"`", b"2024-02-30", b"0x_", b"1:30", b"\\ud800", b"\\u0000", b"\xe2\x80\xa8", b"\xf0\x9f\x98\x80", b"PAR1",
]  # fmt: skip


def broken(good: bytes, rng: random.Random) -> bytes:
    """A file after a few accidents: cut, bits flipped, parts removed, repeated, or something else put in."""
    data = bytearray(good)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        at = rng.randrange(len(data) + 1)
        length = rng.choice((1, 1, 2, 4, 8, 64))
        match rng.randrange(7):
            case 0:
                del data[at:]
            case 1:
                del data[at : at + length]
            case 2:
                data[at : at + length] = rng.randbytes(min(length, max(len(data) - at, 0)))
            case 3:
                data[at:at] = data[at : at + length] * rng.choice((1, 2, 50))
            case 4 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 5:
                data[at : at + rng.choice((0, length))] = rng.choice(TOKENS)
            case _:
                other = rng.randrange(len(data) + 1)
                data[at : at + length], data[other : other + length] = (
                    data[other : other + length],
                    data[at : at + length],
                )
    return bytes(data)


def odd(value: Any, rng: random.Random, depth: int = 0) -> Any:
    """A value with something of another type or size in it, somewhere."""
    if isinstance(value, dict) and value and (depth == 0 or rng.random() < 0.8):
        value = dict(value)
        key = rng.choice(list(value))
        match rng.randrange(6):
            case 0:
                del value[key]
            case 1:
                value[rng.choice(("x", "name", "", "a.b", str(key) + "s"))] = rng.choice(ODD)
            case 2:
                value = {(f"{name}_" if name == key else name): each for name, each in value.items()}
            case _:
                value[key] = odd(value[key], rng, depth + 1)
        return value
    if isinstance(value, list) and value and rng.random() < 0.7:
        value = list(value)
        at = rng.randrange(len(value))
        match rng.randrange(4):
            case 0:
                del value[at]
            case 1:
                value = value + value[at:]
            case _:
                value[at] = odd(value[at], rng, depth + 1)
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.3:
        return rng.choice((-value, value + 1, value * 1000, float(value), str(value), [value], value + 0.5))
    return rng.choice(ODD)


def as_json(value: Any) -> bytes:
    return json.dumps(value, default=str).encode()


def odd_table(table: pa.Table, rng: random.Random) -> pa.Table:
    """A table with a column less, of another type, with nulls, other values or metadata; or with other rows."""
    at = rng.randrange(table.num_columns)
    field, rows = table.schema.field(at), table.num_rows
    match rng.randrange(10):
        case 0:
            return table.remove_column(at)
        case 1:
            return table.append_column(field.name, table.column(at))
        case 2:
            return table.rename_columns(["x" if i == at else name for i, name in enumerate(table.column_names)])
        case 3:
            column = pa.array(
                [None if rng.random() < 0.5 else each for each in table.column(at).to_pylist()], field.type
            )
            return table.set_column(at, field.name, column)
        case 4:
            pool = [
                1,
                -1,
                0.5,
                float("nan"),
                float("inf"),
                "",
                "a",
                "{",
                True,
                None,
                [1.0],
                [],
                [None],
                {"a": 1},
                b"\xff",
                2**62,
            ]
            value = rng.choice(pool)
            return table.set_column(at, field.name, pa.array([value] * rows))
        case 5:
            return table.slice(0, rng.randrange(rows + 1))
        case 6:
            return table.take(pa.array([rng.randrange(rows) for _ in range(rows)]))
        case 7:
            values = table.column(at).to_pylist()
            values[rng.randrange(rows)] = odd(values[rng.randrange(rows)], rng)
            try:
                return table.set_column(at, field.name, pa.array(values, field.type if rng.random() < 0.5 else None))
            except (pa.ArrowException, OverflowError, ValueError, TypeError):
                return table.set_column(at, field.name, pa.nulls(rows))
        case _:
            metadata = dict(table.schema.metadata or {})
            key = rng.choice([b"rankscope", b"pandas", *metadata])
            value = metadata.get(key, b"{}")
            metadata[key] = (
                broken(value, rng)
                if rng.random() < 0.5 or key == b"checksum"
                else as_json(odd(json.loads(value or b"{}"), rng))
            )
            return table.replace_schema_metadata(metadata)


class Net(nn.Module):
    """The smallest model with two modules to adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))


TARGETS = tuple(
    rs.TargetModule(name=f"layers.{b}.{role}", in_features=8, out_features=8, block=b, role=role)
    for b in range(2)
    for role in ("q_proj", "v_proj")
)
BUDGET = rs.ParameterBudget(96)
STUDY = {
    "name": "a", "task": {"type": "causal-lm", "model": "m", "data": "d.csv"}, "targets": ["q_proj"], "budget": {"uniform_rank": 1}, "seed": 0,
    "profile": {"n_batches": 4, "tolerance": 0.1}, "allocation": {"strategy": "one-shot", "options": {"power": 2}, "min_rank": 0},
    "training": {"steps": 10, "learning_rate": [1e-3], "warmup_fraction": 0.1}, "search": {"n_trials": 3, "storage": "sqlite:///a.db"},
    "controller": {"mode": "on", "every": 5, "hysteresis": 0.1}, "compare": {"methods": ["uniform"], "n_seeds": 3, "budgets": [1.0]},
}  # fmt: skip
OVERRIDES = {
    "seed": 1,
    "search.n_trials": 5,
    "training.learning_rate": 0.1,
    "budget": {"parameters": 5},
    "profile.n_batches": 3,
}
ROWS = [{"text": f"text {i}", "label": i % 2, "split": ("train", "validation", "test")[i % 3]} for i in range(12)]
OPTION_VALUES = {"concentration": 0.5, "signal": True, "power": 2.0, "depth": 0.0}
CARD = f"# Card\n\n{BEGIN}\n| a |\n{END}\nmore\n".encode()


@cache
def profile() -> rs.Profile:
    torch.manual_seed(0)
    batches = [torch.randn(8, 6) for _ in range(4)]
    return rs.profile(Net(), batches, loss_fn=lambda model, batch: (model(batch) - batch[:, :4]).square().mean())


@cache
def adapter() -> dict[str, bytes]:
    """The files of a saved adapter, by name."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        model = get_peft_model(Net(), LoraConfig(target_modules=["a", "b"], r=2))
        model.save_pretrained(folder)
        save_ranks(model, folder)
        names = ("adapter_config.json", "adapter_model.safetensors", "ranks.json")
        return {name: (Path(folder) / name).read_bytes() for name in names}


@cache
def comparison() -> pa.Table:
    runs = pd.read_parquet("studies/results/digits-shift/comparison.parquet")
    return pa.Table.from_pandas(runs[runs["method"].isin(["uniform", "one-shot"])], preserve_index=False)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def write_table(path: Path, table: pa.Table, rng: random.Random) -> Path:
    """The table, in a quarter of the cases odd, in a quarter as a broken file."""
    if rng.random() < 0.6:
        table = odd_table(table, rng)
    try:
        pq.write_table(table, path)
    except pa.ArrowNotImplementedError:  # a struct without fields, which Parquet cannot hold
        pq.write_table(
            table.drop_columns([field.name for field in table.schema if pa.types.is_struct(field.type)]), path
        )
    return write(path, broken(path.read_bytes(), rng)) if rng.random() < 0.4 else path


def fuzz_study(rng: random.Random, folder: Path) -> None:
    value = odd(STUDY, rng) if rng.random() < 0.6 else STUDY
    overrides = odd(OVERRIDES, rng) if rng.random() < 0.3 else {}
    data = as_json(value)
    read_study(write(folder / "a.yaml", broken(data, rng) if rng.random() < 0.5 else data), overrides)


def fuzz_path(rng: random.Random, folder: Path) -> None:
    path = rng.choice([each for each in ODD if isinstance(each, str)] + [str(folder), str(folder / "no" / "x")])
    read = rng.choice((read_json, read_yaml, read_parquet, read_tensors))
    read(path, what="something")


def fuzz_allocation(rng: random.Random, folder: Path) -> None:
    value = rs.allocate("uniform", targets=TARGETS, budget=BUDGET).to_dict()
    data = as_json(odd(value, rng)) if rng.random() < 0.6 else broken(as_json(value), rng)
    found = rs.RankAllocation.from_json(write(folder / "a.json", data))
    hash(found)
    found.to_dict()


def fuzz_profile(rng: random.Random, folder: Path) -> None:
    good = folder / "good.parquet"
    if not good.exists():
        profile().to_parquet(good)
    found = rs.read_profile(write_table(folder / "a.parquet", pq.read_table(good), rng))
    strategy = rng.choice(sorted(STRATEGIES))
    rs.allocate(strategy, targets=found.targets, budget=rs.ParameterBudget(40), profile=found)


def fuzz_comparison(rng: random.Random, folder: Path) -> None:
    to_markdown(summarise(read_comparison(write_table(folder / "c.parquet", comparison(), rng))))


def fuzz_adapter(rng: random.Random, folder: Path) -> None:
    for name, data in adapter().items():
        write(folder / name, data)
    name = rng.choice(sorted(adapter()))
    data = adapter()[name]
    structured = name.endswith(".json") and rng.random() < 0.7
    write(folder / name, as_json(odd(json.loads(data), rng)) if structured else broken(data, rng))
    if rng.random() < 0.2:
        (folder / rng.choice(sorted(adapter()))).unlink()
    if rng.random() < 0.5:
        restore_ranks(get_peft_model(Net(), LoraConfig(target_modules=["a", "b"], r=2)), folder)
    else:
        load_adapter(Net(), folder)


def fuzz_tensors(rng: random.Random, folder: Path) -> None:
    if rng.random() < 0.5:
        path = write(folder / "t.safetensors", broken(adapter()["adapter_model.safetensors"], rng))
    else:
        torch.save({"a": torch.ones(3)}, folder / "t.bin")
        path = write(folder / "t.bin", broken((folder / "t.bin").read_bytes(), rng))
    read_tensors(path, what="weights", device=rng.choice(("cpu", "meta")))


def fuzz_data(rng: random.Random, folder: Path) -> None:
    rows = [odd(row, rng) if rng.random() < 0.2 else row for row in ROWS]
    match rng.choice(("csv", "jsonl", "json", "parquet")):
        case "csv":
            lines = [",".join(map(str, row.values())) if isinstance(row, dict) else str(row) for row in rows]
            data = "\n".join(["text,label,split", *lines]).encode("utf-8", "replace")
            path = write(folder / "r.csv", broken(data, rng))
        case "jsonl":
            data = b"\n".join(map(as_json, rows))
            path = write(folder / "r.jsonl", broken(data, rng) if rng.random() < 0.5 else data)
        case "json":
            data = as_json(rows)
            path = write(folder / "r.json", broken(data, rng) if rng.random() < 0.5 else data)
        case _:
            path = write_table(folder / "r.parquet", pa.Table.from_pylist(ROWS), rng)
    check_glance("sequence-classification", path, None)
    table, found = read_columns("sequence-classification", path, None)
    check_cells(table, *found.values(), filled=True, what="the data")
    split_rows(table, key="text")


def fuzz_task(rng: random.Random, folder: Path) -> None:
    if not (data := folder / "good.csv").exists():
        pd.DataFrame(ROWS).to_csv(data, index=False)
        write(folder / "factory.py", b"def make(): return 3\n")
    options = {
        "type": "sequence-classification",
        "model": str(folder),
        "data": str(data),
        "batch_size": 4,
        "max_length": 8,
    }
    options |= {"columns": {"text": "text", "label": "label"}, "split_seed": 0, "name": "a"}
    if rng.random() < 0.3:
        options |= {"type": "causal-lm"}
    if rng.random() < 0.2:
        options = {"name": rng.choice(("digits-shift", "supersense")), "x": 1}
    spec = odd(options, rng)
    if rng.random() < 0.1:
        spec = rng.choice(
            ("factory.py:make", "factory.py:none", "factory.py:", "good.csv:make", ".py:make", "no.py:x", *ODD)
        )
    rs.load_task(spec, base_dir=folder)


def fuzz_strategy(rng: random.Random, folder: Path) -> None:
    strategy = rng.choice(sorted(STRATEGIES))
    targets = profile().targets
    given: dict[str, Any] = {name: OPTION_VALUES[name] for name in list(signature(STRATEGIES[strategy]).parameters)[1:]}
    given |= {"min_rank": 0, "max_rank": {targets[0].name: 3}, "seed": 0}
    given = odd(given, rng)
    given = {str(name): value for name, value in given.items() if name not in ("targets", "budget", "profile", "name")}
    given.pop("x", None) if rng.random() < 0.5 else None
    rs.allocate(
        rng.choice((strategy, strategy, strategy, rng.choice(ODD))),
        targets=targets,
        budget=BUDGET,
        profile=profile(),
        **given,
    )


def fuzz_budget(rng: random.Random, folder: Path) -> None:
    values = odd({"limit": 96, "rank": 2, "scores": dict.fromkeys((t.name for t in TARGETS), 1.0)}, rng)
    scores, gains = values.get("scores"), {t.name: [3.0, 2.0, 1.0] for t in TARGETS}
    match rng.randrange(4):
        case 0:
            rs.ParameterBudget(rng.choice((values.get("limit"), rng.choice(ODD))))
        case 1:
            rs.ParameterBudget.uniform(TARGETS, rng.choice((values.get("rank"), rng.choice(ODD))))
        case 2 if isinstance(scores, dict):
            allocate_proportional(TARGETS, scores, BUDGET)
        case _:
            allocate_marginal(TARGETS, {**gains, TARGETS[0].name: rng.choice(ODD)}, BUDGET)


def fuzz_selection(rng: random.Random, folder: Path) -> None:
    selection = odd(rng.choice(("all-linear", ["a", "b"], "a|b", "(a", ["a.*"], {"target_modules": ["a"]})), rng)
    rs.find_targets(Net(), selection)


def fuzz_markdown(rng: random.Random, folder: Path) -> None:
    insert_table(broken(CARD, rng).decode("utf-8", "surrogateescape"), "| new |", where="card.md")


class Reader(NamedTuple):
    """A reader and its share of the inputs."""

    fuzz: Callable[[random.Random, Path], None]
    weight: int


READERS = [
    Reader(fuzz_study, 12), Reader(fuzz_path, 3), Reader(fuzz_allocation, 14), Reader(fuzz_profile, 8), Reader(fuzz_comparison, 1),
    Reader(fuzz_adapter, 6), Reader(fuzz_tensors, 8), Reader(fuzz_data, 10), Reader(fuzz_task, 10), Reader(fuzz_strategy, 10),
    Reader(fuzz_budget, 8), Reader(fuzz_selection, 5), Reader(fuzz_markdown, 5),
]  # fmt: skip


def complaints(reader: Reader, numbers: range, folder: Path) -> list[str]:
    """What came out of inputs of these numbers that is not one line of ours."""
    found = []
    for number in numbers:
        rng = random.Random(f"{reader.fuzz.__name__}/{number}")

        try:
            reader.fuzz(rng, folder)
        except RankscopeError as error:
            message = str(error)
            if not message.strip() or len(message.splitlines()) > 1:
                found.append(f"{number}: not one line: {message!r}")
        except Exception as error:
            found.append(f"{number}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return found


@pytest.mark.parametrize("n_inputs", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.fuzz.__name__.removeprefix("fuzz_"))
def test_only_our_own_errors_come_out(reader: Reader, n_inputs: int, tmp_path: Path) -> None:
    n_own = -(-n_inputs * reader.weight // sum(each.weight for each in READERS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = complaints(reader, range(n_own), tmp_path)
    assert not found, f"{len(found)} of {n_own}: " + "\n".join(found[:20])
