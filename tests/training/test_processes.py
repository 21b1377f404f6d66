"""Two processes under torchrun with gloo train and profile as one process does on the same batches."""

import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import rankscope as rs
from rankscope.distributed import check_same
from rankscope.errors import TrainingError
from rankscope.files import digest
from rankscope.tasks import CausalLM, Task, TextClassification, profile_task
from rankscope.training import AdaLora, Eva, FullFineTuning, Lora, Method
from rankscope.training.sharding import Shards
from tests.launcher import torchrun
from tests.tasks.models import save_bert, save_llama, sentences

MOVING = rs.ControllerSettings(freeze_fraction=0.9, hysteresis=0.0, min_gain_ratio=0.0, every=3, samples=3)

WORKER = """
import sys
import torch
from rankscope.distributed import is_first
from tests.training.test_processes import profiles, results

torch.set_num_threads(1)
found = results(sys.argv[1])
taken = profiles()
if is_first():
    torch.save(found, sys.argv[1] + "/found.pt")
    for name, each in taken.items():
        each.to_parquet(f"{sys.argv[1]}/{name}.parquet")
"""


def digits(batch_size: int = 32) -> Task:
    return rs.load_task({"name": "digits-shift", "batch_size": batch_size})


def uneven() -> pd.DataFrame:
    """Texts of 2 to 6 words."""
    texts = [
        " ".join([*text.split(), *["cat"] * (n % 5 - 1)][: n % 5 + 2]) for n, text in enumerate(sentences()["text"])
    ]
    return pd.DataFrame({"text": texts, "split": ["train"] * 19 + ["validation"] * 4 + ["test"] * 4}).drop_duplicates(
        "text"
    )


def method_on(task: Task, controller: rs.ControllerSettings | None = None) -> Lora:
    targets = rs.find_targets(task.build_model())
    budget = rs.ParameterBudget.uniform(targets, 2)
    return Lora(rs.allocate("uniform", targets=targets, budget=budget), controller)


def cases(folder: str) -> dict[str, tuple[Task, Method, dict[str, Any]]]:
    """Methods on tasks; of 199 rows a batch, the second batch has one row."""
    llama, bert = f"{folder}/llama", f"{folder}/bert"
    texts = CausalLM(llama, uneven(), name="texts", batch_size=5)
    half, halves = (
        TextClassification(bert, sentences(), batch_size=size, dtype="bfloat16", pooling="mean") for size in (6, 3)
    )
    targets = rs.find_targets(digits().build_model())
    late = {"weight_decay": 0.1, "head_learning_rate": 0.003, "evaluate_every": 2}
    return {
        "last batch of one row": (digits(199), method_on(digits()), {"steps": 4, **late}),
        "controller": (digits(33), method_on(digits(), MOVING), {"steps": 12, "gradient_accumulation": 2}),
        "tokens": (texts, method_on(texts), {"steps": 6, "gradient_accumulation": 2}),
        "controller of tokens": (texts, method_on(texts, MOVING), {"steps": 12}),
        "bfloat16": (half, method_on(half), {"steps": 3}),
        "bfloat16 by halves": (halves, method_on(half), {"steps": 3, "gradient_accumulation": 2}),
        "adalora": (digits(48), AdaLora(targets, 1, 32.0), {"steps": 10}),
        "eva": (digits(48), Eva(targets, 1), {"steps": 3}),
        "full": (digits(48), FullFineTuning(), {"steps": 3, "max_grad_norm": 0.0}),
    }


def results(folder: str) -> dict[str, Any]:
    found = {}
    for name, (task, method, options) in cases(folder).items():
        model, result = rs.train(task, method, {"learning_rate": 0.01, **options}, seed=3)
        weights = {key: each.detach() for key, each in model.named_parameters() if each.requires_grad}
        weights = {
            key: each for key, each in weights.items() if "k_proj.bias" not in key
        }  # its gradient is rounding alone
        check_same(digest(weights), what="the weights")
        ranks = None if result.allocation is None else list(result.allocation.vector)
        actions = (
            None if result.decisions is None else result.decisions[["action", "batches", "broken"]].to_dict("list")
        )
        found[name] = {"history": dict(result.history), "ranks": ranks, "actions": actions, "weights": weights}
    return found


def profiles() -> dict[str, rs.Profile]:
    """With the rest of the epoch for the head, and cross-fitted."""
    options = ({"n_batches": 5, "head_steps": 7}, {"head_steps": 5})
    return {str(n): profile_task(digits(), **each) for n, each in enumerate(options)}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what two processes found."""
    folder = tmp_path_factory.mktemp("shared")
    save_llama(folder / "llama")
    save_bert(folder / "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    (folder / "worker.py").write_text(WORKER)
    done = torchrun(str(folder / "worker.py"), str(folder))
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.slow
def test_two_processes_train_as_one(shared: Path) -> None:
    two, one = torch.load(shared / "found.pt", weights_only=True), results(str(shared))
    assert "moved" in one["controller"]["actions"]["action"]
    one["bfloat16"] = one[
        "bfloat16 by halves"
    ]  # the rows that each process takes: Adam's first steps follow signs, rounding too
    for name, expected in one.items():
        found = two[name]
        assert (found["ranks"], found["actions"]) == (expected["ranks"], expected["actions"]), name
        assert found["history"].keys() == expected["history"].keys()
        for step, metrics in expected["history"].items():
            assert found["history"][step] == pytest.approx(metrics, rel=1e-3), name
        if name != "bfloat16 by halves":
            torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.slow
def test_two_processes_profile_as_one(shared: Path) -> None:
    for name, expected in profiles().items():
        found = rs.read_profile(shared / f"{name}.parquet")
        for key in ("batches", "data", "weights", "skipped_batches", "sketch_size"):
            assert found.metadata[key] == expected.metadata[key]
        assert found.metadata["loss"] == pytest.approx(expected.metadata["loss"], rel=1e-5)
        numbers = [c for c in expected.table.columns if pd.api.types.is_float_dtype(expected.table[c])]
        pd.testing.assert_frame_equal(found.table[numbers], expected.table[numbers], rtol=1e-3, check_dtype=False)
        request = {"targets": expected.targets, "budget": rs.ParameterBudget.uniform(expected.targets, 1)}
        ranks = [rs.allocate("one-shot", profile=each, **request).vector for each in (found, expected)]
        assert ranks[0] == ranks[1]


# --- shards ---------------------------------------------------------------------------------------------------------


class Rows:
    """A task of one linear layer, whose loss may be no mean."""

    name, metric = "rows", "accuracy"

    def __init__(self, loss: Any) -> None:
        self._loss = loss

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return self._loss(model(batch["x"]).squeeze(-1), batch)


def batch_of(n: int, **others: Tensor) -> dict[str, Tensor]:
    return {"x": torch.randn(n, 4, generator=torch.Generator().manual_seed(0)), **others}


def on_each(monkeypatch: pytest.MonkeyPatch, task: Any, batch: Any, n: int) -> list[tuple[Any, float]]:
    """What each of n processes gets."""
    shards, found = Shards(task, nn.Linear(4, 1)), []
    for index in range(n):
        monkeypatch.setattr("rankscope.training.sharding.n_processes", lambda: n)
        monkeypatch.setattr("rankscope.training.sharding.process_index", lambda index=index: index)
        found.append(shards.of(batch))
    return found


@pytest.mark.parametrize(("rows", "n"), [(7, 2), (2, 3), (1, 4), (8, 3)])
def test_shares_of_a_loss_add_up(monkeypatch: pytest.MonkeyPatch, rows: int, n: int) -> None:
    """Of rows, and of labels: whatever their numbers."""
    model = nn.Linear(4, 1)
    of_rows = Rows(lambda out, batch: out.square().mean())
    whole = batch_of(rows)
    parts = on_each(monkeypatch, of_rows, whole, n)
    assert float(sum(share * of_rows.loss(model, part) for part, share in parts)) == pytest.approx(
        float(of_rows.loss(model, whole)), rel=1e-5
    )
    assert [share == 0.0 for _, share in parts] == [index >= rows for index in range(n)]

    labels = torch.full((rows, 5), -100)
    for row in range(rows):
        labels[row, : row % 4 + 1] = row
    tokens = Rows(
        lambda out, batch: (
            (out[:, None] * batch["labels"][:, 1:].ne(-100)).sum() / batch["labels"][:, 1:].ne(-100).sum()
        )
    )
    whole = batch_of(rows, labels=labels)
    if rows > 1:  # the first row has one label, which no token predicts
        parts = on_each(monkeypatch, tokens, whole, n)
        found = sum(share * float(tokens.loss(model, part)) for part, share in parts if share)
        assert found == pytest.approx(float(tokens.loss(model, whole)), rel=1e-5)
        assert sum(share for _, share in parts) == pytest.approx(1.0)


def test_a_task_says_what_its_loss_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    task: Any = Rows(lambda out, batch: (out * batch["weight"]).sum() / batch["weight"].sum())
    task.count_examples = lambda batch: batch["weight"].sum()
    parts = on_each(monkeypatch, task, batch_of(3, weight=torch.tensor([1, 2, 5])), 2)
    assert [share for _, share in parts] == [3 / 8, 5 / 8]


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda out, batch: out.square().sum(), "the loss must be a mean over rows or labels to be shared over 2 processes, but that of two rows is "),
        (lambda out, batch: (out - out.mean()).square().mean(), "the loss must be a mean over rows or labels to be shared over 2 processes, but "),
    ],
)  # fmt: skip
def test_a_loss_that_is_no_mean_is_refused(monkeypatch: pytest.MonkeyPatch, loss: Any, message: str) -> None:
    monkeypatch.setattr("rankscope.training.sharding.n_processes", lambda: 2)
    task: Any = Rows(loss)
    with pytest.raises(
        TrainingError, match=f"^`rows`: {re.escape(message)}.*; train in one process, or give the task a method"
    ):
        Shards(task, nn.Linear(4, 1)).check(nn.Linear(4, 1), batch_of(4))
    task = Rows(lambda out, batch: out.square().mean())
    Shards(task, nn.Linear(4, 1)).check(nn.Linear(4, 1), batch_of(4))
    Shards(task, nn.Linear(4, 1)).check(nn.Linear(4, 1), batch_of(1))


def test_batches_without_rows_and_batch_norms_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankscope.training.sharding.n_processes", lambda: 2)
    task: Any = Rows(lambda out, batch: out.square().mean())
    with pytest.raises(
        TrainingError,
        match="^`rows`: each tensor of a batch must have a row for each example to be shared over 2 processes, but `grid` has 6 and the first 4; train in one process",
    ):
        Shards(task, nn.Linear(4, 1)).of(batch_of(4, grid=torch.zeros(6, 3)))
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))
    with pytest.raises(
        TrainingError,
        match="^`rows`: the model must normalise each row by itself to be shared over 2 processes, but `0` is a batch normalisation",
    ):
        Shards(task, model).check(model, batch_of(4))
