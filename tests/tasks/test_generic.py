"""The generic tasks on users' models and data: heads, PEFT's wrappers, and data that would spoil a result in silence."""

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
from transformers import DistilBertConfig, DistilBertModel

import rankscope as rs
from rankscope.tasks import CausalLM, TextClassification, evaluate, fingerprint_task
from rankscope.training import save_adapter
from tests.refusals import refused
from tests.tasks.models import WORDS, save_bert, save_llama, save_tokenizer, sentences

SPLITS = ["train", "validation", "test"]


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return save_bert(tmp_path / "bert")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_llama(tmp_path / "llama")


# --- precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sequence-classification", "causal-lm"])
def test_bfloat16_weights_train_float32_adapters_that_plain_peft_loads(kind: str, llama: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.parquet"
    sentences().to_parquet(data)
    plain: Any = {"type": kind, "model": str(llama), "data": str(data), "batch_size": 4}
    task = rs.load_task({**plain, "dtype": "bfloat16"})
    targets = rs.find_targets(task.build_model())
    allocation = rs.allocate("uniform", targets=targets, budget=rs.ParameterBudget.uniform(targets, 2))
    model, result = rs.train(task, allocation, rs.TrainingSettings(steps=3, learning_rate=0.02))
    dtypes = {p.dtype for name, p in model.named_parameters() if "lora_" in name}
    assert (dtypes, model.get_input_embeddings().weight.dtype) == ({torch.float32}, torch.bfloat16)
    save_adapter(model, task, tmp_path / "adapter")
    loader = AutoPeftModelForSequenceClassification if kind == "sequence-classification" else AutoPeftModelForCausalLM
    options = json.loads((tmp_path / "adapter" / "model_kwargs.json").read_text())
    if "id2label" in options:
        options["id2label"] = {int(code): label for code, label in options["id2label"].items()}
    again = loader.from_pretrained(tmp_path / "adapter", **options)
    assert again.get_input_embeddings().weight.dtype == torch.bfloat16
    assert evaluate(task, again) == dict(result.metrics)
    assert fingerprint_task(task)["task"]["dtype"] == "bfloat16"
    assert "dtype" not in fingerprint_task(rs.load_task(plain))["task"]


def test_a_dtype_is_one_of_two(llama: Path) -> None:
    message = "`dtype` must be bfloat16 or float32 or null, but got 'fp16'."
    refused(message, lambda: TextClassification(llama, sentences(), dtype="fp16"))
    refused(message, lambda: rs.load_task({"name": "dinov2-digits", "dtype": "fp16"}))


# --- heads and wrappers ----------------------------------------------------------------------------------------


def test_a_decoders_head_is_found_and_trained(llama: Path) -> None:
    task = TextClassification(llama, sentences(), pooling="model")
    assert task.head_modules == ("score",)
    targets = rs.find_targets(task.build_model())
    allocation = rs.allocate("uniform", targets=targets, budget=rs.ParameterBudget.uniform(targets, 1))
    model, _ = rs.train(task, allocation, rs.TrainingSettings(steps=1))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora_" not in name}
    assert trained == {"base_model.model.score.modules_to_save.default.weight"}


def test_a_decoder_without_a_padding_token(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    table = sentences()
    table["text"] = [text + " red" * (i % 4) for i, text in enumerate(table["text"])]  # of unlike lengths: padded
    task = TextClassification(llama, table, pooling="model", batch_size=4)
    model = task.build_model().eval()
    rows = task._rows["validation"]
    batch = task._collate(rows)
    alone = [model(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in rows]
    torch.testing.assert_close(model(**batch).logits, torch.stack(alone))


def test_heads_of_several_modules(tmp_path: Path) -> None:
    config = DistilBertConfig(vocab_size=len(WORDS), dim=16, n_layers=1, n_heads=2, hidden_dim=32)
    DistilBertModel(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    assert TextClassification(tmp_path, sentences()).head_modules == ("pre_classifier", "classifier")
    assert TextClassification(tmp_path, sentences(), pooling="mean").head_modules == ("classifier",)


def test_pefts_classification_wrapper_gives_the_same_loss(bert: Path) -> None:
    task = TextClassification(bert, sentences(), pooling="mean")
    batch = next(iter(task.train_batches(0)))
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=["classifier"])
    wrapped = get_peft_model(task.build_model(), config).eval()  # B is zero: the function is unchanged
    plain = task.build_model().eval()
    assert torch.equal(wrapped(**batch).loss, plain(**batch).loss)
    types = torch.ones_like(batch["input_ids"])
    assert not torch.equal(plain(**batch, token_type_ids=types).logits, plain(**batch).logits)


def test_the_head_is_the_same_for_every_task_object(bert: Path) -> None:
    heads = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        heads.append(TextClassification(bert, sentences()).build_model().classifier.weight)
    assert torch.equal(*heads)


# --- evaluation ------------------------------------------------------------------------------------------------


def test_accuracy_and_loss_are_those_of_single_texts(bert: Path) -> None:
    table = sentences()
    table["text"] = [text + " red" * (i % 5) for i, text in enumerate(table["text"])]
    task = TextClassification(bert, table, batch_size=2, pooling="mean")
    model = task.build_model().eval()
    rows = [row["input_ids"] for row in task._rows["test"]]
    logits = torch.cat([model(torch.tensor([row]), torch.ones(1, len(row))).logits for row in rows])
    labels = task._labels["test"]
    metrics = task.evaluate(model, "test")
    assert metrics["accuracy"] == pytest.approx(float((logits.argmax(-1) == labels).float().mean()))
    assert metrics["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


def test_a_diverged_language_model_has_infinite_perplexity(llama: Path) -> None:
    task = CausalLM(llama, sentences())
    model = task.build_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    metrics = task.evaluate(model)
    assert metrics["perplexity"] == math.inf
    assert math.isfinite(metrics["loss"])


def test_texts_that_predict_nothing_are_left_out_of_a_language_task(llama: Path) -> None:
    texts = ["", "red", "red cat runs", None, "dog runs", "blue bird sings"]
    table = pd.DataFrame({"text": texts, "split": ["train"] * 4 + ["validation", "test"]})
    task = CausalLM(llama, table)
    assert {split: [len(row["input_ids"]) for row in rows] for split, rows in task._rows.items()} == {
        "train": [3],
        "validation": [2],
        "test": [3],
    }
    refused(
        "the data must have texts of two tokens or more in every split, but 'train' has none; check texts and `max_length`.",
        lambda: CausalLM(llama, table, max_length=1).build_model(),
    )


# --- mistakes --------------------------------------------------------------------------------------------------


def test_rows_without_text_or_label_are_refused(bert: Path) -> None:
    for column, value in (("text", None), ("text", "  "), ("label", None)):
        table = sentences()
        table.loc[[3, 5], column] = value
        refused(
            f"the column {column!r} must hold a value in every row, but 2 of 27 have none; drop those rows.",
            lambda table=table: TextClassification(bert, table),
        )


def test_tables_that_cannot_be_used(bert: Path) -> None:
    table = sentences()
    refused(
        "`label` must hold labels of one type, but holds several; convert them.",
        lambda: TextClassification(bert, table.assign(label=[1, "a", 2] * 9)),
    )
    refused(
        "the DataFrame must have a column 'txt', but has none; did you mean 'text'?",
        lambda: CausalLM(bert, table, columns={"text": "txt"}),
    )
    refused("the DataFrame must hold rows, but holds none; check the data.", lambda: CausalLM(bert, table[:0]))
    refused(
        "`label` must hold at least 2 classes, but holds 1; check the column.",
        lambda: TextClassification(bert, table.assign(label=1)),
    )
    refused(
        "the data must have rows in every split, but 'validation' has none; "
        "its `split` column holds dev, test, train: rename, or drop the column.",
        lambda: TextClassification(bert, table.assign(split=["train", "dev", "test"] * 9)),
    )


def test_a_given_split_column_is_used_as_it_is(bert: Path) -> None:
    table = sentences().assign(split=SPLITS * 9)
    task = TextClassification(bert, table)
    for split in SPLITS:
        assert task._texts[split] == table.loc[table["split"] == split, "text"].tolist()
        codes = [task.classes.index(label) for label in table.loc[table["split"] == split, "label"]]
        assert task._labels[split].tolist() == codes


def test_a_hub_data_set_needs_its_package(monkeypatch: pytest.MonkeyPatch, bert: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    refused(
        "`org/reviews` looks like a hub data set, which needs the package `datasets`; "
        "install rankscope[hub], or pass a local .parquet, .jsonl or .csv file.",
        lambda: TextClassification(bert, "org/reviews"),
    )


def test_a_model_folder_without_tokenizer(bert: Path) -> None:
    for file in bert.glob("tokenizer*"):
        file.unlink()
    refused(
        f"`{bert}` must hold the model's tokenizer, but has none; save it there with save_pretrained.",
        lambda: TextClassification(bert, sentences()).build_model(),
    )


def test_texts_are_cut_and_must_fit_the_models_positions(bert: Path) -> None:
    long = sentences()
    long["text"] += " red" * 40
    refused(
        "`max_length` must be at most 16, the model's positions, but the longest text has 43 tokens; lower it.",
        lambda: TextClassification(bert, long).build_model(),
    )
    task = TextClassification(bert, long, max_length=16)
    assert next(iter(task.train_batches(0)))["input_ids"].shape == (16, 16)
    assert set(task.evaluate(task.build_model())) == {"accuracy", "loss"}


def test_model_folders_that_do_not_load(bert: Path, tmp_path: Path) -> None:
    gone = f"`{tmp_path}/gone` must be a model folder or hub id, but there is no such folder; check the path."
    refused(gone, lambda: CausalLM(tmp_path / "gone", sentences()).build_model())
    broken = f"`{bert}` must be a model folder or hub id that loads, but does not: "
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps({**config, "hidden_size": 18}))
    task = TextClassification(bert, sentences())
    refused(broken + "its config.json does not fit its weights.", task.build_model)
    weights = bert / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    refused(broken + "Error while deserializing header: invalid header length", task.build_model)
