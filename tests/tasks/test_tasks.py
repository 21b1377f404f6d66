"""Tasks, ready and generic: equal models, seeded batches, disjoint splits, honest metrics."""

import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model

import rankscope as rs
from rankscope.tasks import CausalLM, Task, TextClassification, evaluate
from tests.tasks.models import save_bert, save_llama, sentences


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module", params=["digits", "mean", "model", "causal"])
def task(request: pytest.FixtureRequest, bert: Path, llama: Path) -> Task:
    if request.param == "digits":
        return rs.load_task("digits-shift")
    if request.param == "causal":
        return CausalLM(llama, sentences(), batch_size=4)
    return TextClassification(bert, sentences(), pooling=request.param, batch_size=4)


def test_models_and_batches_repeat(task: Task) -> None:
    states = [task.build_model().state_dict() for _ in range(2)]
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())
    state = torch.get_rng_state()
    epochs = [[batch["labels"].tolist() for batch in task.train_batches(seed)] for seed in (5, 5, 6)]
    assert torch.equal(torch.get_rng_state(), state)
    assert epochs[0] == epochs[1] != epochs[2]


def test_evaluation_keeps_the_mode_and_agrees_with_the_loss(task: Task) -> None:
    model = task.build_model()
    model.train()
    metrics = evaluate(task, model, "validation")
    assert model.training
    model.eval()
    assert evaluate(task, model, "validation") == metrics
    assert not model.training
    assert 0 <= metrics[task.metric] <= 1
    assert metrics != evaluate(task, model, "test")


def test_search_trains_it_through_peft(task: Task) -> None:
    targets = rs.find_targets(task.build_model())
    assert {t.tower for t in targets} == {"model"}
    assert not any("classifier" in t.name or "lm_head" in t.name for t in targets)
    allocation = rs.allocate("uniform", targets=targets, budget=rs.ParameterBudget.uniform(targets, 1))
    _, result = rs.train(task, allocation, rs.TrainingSettings(steps=3, learning_rate=1e-2))
    assert math.isfinite(result.metrics["loss"])


def test_digits_splits(digits: Task) -> None:
    images = {split: [row["pixel_values"] for row in digits._rows[split]] for split in ("train", "validation", "test")}
    assert {split: len(rows) for split, rows in images.items()} == {"train": 200, "validation": 200, "test": 496}
    seen = [tuple(image.flatten().tolist()) for rows in images.values() for image in rows]
    assert len(seen) - len(set(seen)) <= 2  # scikit-learn's digits hold a few equal images
    assert {int(row["labels"]) for row in digits._rows["train"]} == {0, 1, 2, 3, 4}


def test_mean_pooling_passes_over_padding_and_names_match_bert(bert: Path) -> None:
    task = TextClassification(bert, sentences(), pooling="mean")
    model = task.build_model().eval()
    short = {"input_ids": torch.tensor([[2, 5]]), "attention_mask": torch.tensor([[1, 1]])}
    padded = {"input_ids": torch.tensor([[2, 5, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 0, 0]])}
    torch.testing.assert_close(model(**short).logits, model(**padded).logits)
    names = {t.name for t in rs.find_targets(model)}
    plain = TextClassification(bert, sentences(), pooling="model").build_model()
    assert names == {t.name for t in rs.find_targets(plain)} - {"bert.pooler.dense"}


def test_the_head_is_trained_beside_adapters(bert: Path) -> None:
    model = TextClassification(bert, sentences()).build_model()
    wrapped = get_peft_model(model, LoraConfig(target_modules=["query"], modules_to_save=["classifier"]))
    trained = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "classifier.modules_to_save" in name for name in trained)
    assert any("classifier" in name for name in trained)


def test_causal_lm_masks_padding_and_measures_tokens(llama: Path) -> None:
    table = pd.DataFrame(
        {"text": ["red cat", "red cat runs", "dog"] * 3, "split": ["train"] * 3 + ["validation"] * 3 + ["test"] * 3}
    )
    table["text"] += [" sings"] * 3 + [" sleeps"] * 3 + [" blue"] * 3
    task = CausalLM(llama, table, batch_size=2)
    batch = next(iter(task.train_batches(0)))
    assert ((batch["labels"] == -100) == (batch["attention_mask"] == 0)).all()
    model = task.build_model().eval()
    metrics = task.evaluate(model, "test")
    losses, right, count = 0.0, 0, 0
    for ids in (row["input_ids"] for row in task._rows["test"]):  # one text at a time, without padding
        row = torch.tensor([ids])
        logits = model(input_ids=row).logits[0, :-1]
        losses += float(torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum"))
        right += int((logits.argmax(-1) == row[0, 1:]).sum())
        count += len(ids) - 1
    assert metrics["loss"] == pytest.approx(losses / count, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(losses / count), rel=1e-5)
    assert metrics["token_accuracy"] == pytest.approx(right / count)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("supersense", (4100, 1640, 2460)),
        ("sentiment", (4000, 2000, 2000)),
        ("word-order", (3249, 1320, 1981)),
    ],
)
def test_ready_text_tasks_load_and_do_not_leak(name: str, sizes: tuple[int, int, int]) -> None:
    task = rs.load_task(name)
    assert tuple(len(texts) for texts in task._texts.values()) == sizes
    texts = [text for rows in task._texts.values() for text in rows]
    assert len(texts) == len(set(texts))
    assert len(rs.find_targets(task.build_model())) == 36


def test_the_wordnet_sample_is_balanced_and_unleaked() -> None:
    table = pd.read_parquet("data/wordnet/glosses.parquet")
    assert len(table) >= 6_000
    assert (table.groupby(["class", "split"]).size().unstack() == [60, 100, 40]).all().all()  # test, train, validation
    assert not table["text"].str.lower().duplicated().any()
    assert table.groupby("label")["class"].nunique().eq(1).all()


@pytest.mark.slow
def test_word_order_swaps_two_neighbours_of_every_other_gloss() -> None:
    task = rs.load_task("word-order")
    glosses = pd.read_parquet("data/wordnet/glosses.parquet").groupby("split")["text"]
    for split, texts in task._texts.items():
        originals = set(glosses.get_group(split))
        bags = {tuple(sorted(text.split())) for text in originals}
        for text, label in zip(texts, task._labels[split].tolist(), strict=True):
            assert (text not in originals) == bool(label)
            assert tuple(sorted(text.split())) in bags
