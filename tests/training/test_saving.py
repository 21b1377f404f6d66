"""Saved adapters: plain PEFT loads them in a process that has no rankscope, with the metric that was measured, or refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from peft import AutoPeftModel, AutoPeftModelForSequenceClassification, PeftModel
from transformers import AutoModelForSequenceClassification, BertConfig, BertForMaskedLM

import rankscope as rs
from rankscope.errors import FileError, TaskError
from rankscope.lora import load_adapter
from rankscope.tasks import Task, evaluate
from rankscope.tasks.text import CausalLM, MeanPooledClassifier, TextClassification
from rankscope.training import add_to_card, save_adapter
from tests.tasks.models import TINY, WORDS, save_bert, save_llama, save_tokenizer, sentences

PLAIN = """
import json, sys
sys.modules["rankscope"] = None
import torch
from transformers import AutoTokenizer
folder, base, texts, labels = json.loads(sys.argv[1])
exec(open(folder + "/README.md").read().split("```")[1].removeprefix("python"))
model.eval()
tokenizer = AutoTokenizer.from_pretrained(base)
right = count = 0
for place, text in enumerate(texts):
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    logits = model(input_ids=ids).logits
    if labels is None:
        right += int((logits[0, :-1].argmax(-1) == ids[0, 1:]).sum())
        count += ids.shape[1] - 1
    else:
        right += model.config.id2label[int(logits[0].argmax())] == labels[place]
        count += 1
print(right / count)
"""


def plain(folder: Path, task: Task, base: Path, *, labelled: bool) -> float:
    """The metric on the test split by plain PEFT, loaded as the README in the folder says."""
    labels = [task.classes[i] for i in task._labels["test"].tolist()] if labelled else None
    given = json.dumps([str(folder), str(base), task._texts["test"], labels])
    done = subprocess.run([sys.executable, "-c", PLAIN, given], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def trained(task: Task, *, steps: int = 30, **config: float) -> PeftModel:
    targets = rs.find_targets(task.build_model())
    allocation = rs.allocate("random", targets=targets, budget=rs.ParameterBudget.uniform(targets, 2), seed=1)
    return rs.train(task, allocation, rs.TrainingSettings(steps=steps, **config))[0]


def save_wide_bert(folder: Path) -> Path:
    """One that learns: at BERT's own scale of 0.02 the words of so small a model hardly reach its first token."""
    return save_bert(folder, initializer_range=0.3)


@pytest.mark.parametrize("save", [save_wide_bert, save_llama])
def test_a_classifier_in_plain_peft(tmp_path: Path, save, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    task = TextClassification("base", sentences())  # the path is relative, the adapter's must not be
    model = trained(task, steps=60, learning_rate=0.02)
    save_adapter(model, task, "adapter")
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    assert (config["task_type"], config["base_model_name_or_path"]) == ("SEQ_CLS", str(tmp_path / "base"))
    assert json.loads(Path("adapter/model_kwargs.json").read_text())["label2id"] == {"bird": 0, "cat": 1, "dog": 2}
    measured = evaluate(task, model, "test")["accuracy"]
    assert measured > 0.7
    assert "AutoPeftModelForSequenceClassification" in Path("adapter/README.md").read_text()
    monkeypatch.chdir("/")
    found = plain(tmp_path / "adapter", task, tmp_path / "base", labelled=True)
    assert found == pytest.approx(measured)


def test_two_classes_need_no_options(tmp_path: Path) -> None:
    task = TextClassification(save_bert(tmp_path / "base"), sentences().query("label != 'dog'"))
    model = trained(task, learning_rate=0.02)
    save_adapter(model, task, tmp_path / "adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    assert evaluate(task, loaded, "test") == pytest.approx(evaluate(task, model, "test"), rel=1e-5)


def test_a_language_model_in_plain_peft(tmp_path: Path) -> None:
    save_llama(tmp_path / "base")
    task = CausalLM(tmp_path / "base", sentences())
    model = trained(task, learning_rate=0.02)
    save_adapter(model, task, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model_kwargs.json").exists()
    found = plain(tmp_path / "adapter", task, tmp_path / "base", labelled=False)
    assert found == pytest.approx(evaluate(task, model, "test")["token_accuracy"])


def test_a_classifier_is_not_loaded_into_another(tmp_path: Path) -> None:
    task = TextClassification(save_bert(tmp_path / "base"), sentences(), pooling="mean")
    model = trained(task, learning_rate=0.02)
    save_adapter(model, task, tmp_path / "adapter")
    readme = (tmp_path / "adapter" / "README.md").read_text()
    assert "Build the base model, a `rankscope.tasks.text.MeanPooledClassifier`, then `rankscope.lora.load" in readme
    other = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    refusal = "Invalid task type: 'rankscope.tasks.text.MeanPooledClassifier'. Must be one of"
    for load in (
        lambda: PeftModel.from_pretrained(other, tmp_path / "adapter"),
        lambda: AutoPeftModel.from_pretrained(tmp_path / "adapter"),
        lambda: AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter"),
    ):
        with pytest.raises(ValueError, match=refusal):
            load()
    with pytest.raises(FileError, match=refusal):
        load_adapter(other, tmp_path / "adapter")
    loaded = load_adapter(task.build_model(), tmp_path / "adapter")
    assert isinstance(loaded.get_base_model(), MeanPooledClassifier)
    assert evaluate(task, loaded) == pytest.approx(evaluate(task, model), rel=1e-5)


def test_a_pooler_that_would_be_random_is_refused(tmp_path: Path) -> None:
    BertForMaskedLM(BertConfig(vocab_size=len(WORDS), **TINY)).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    message = (
        "must hold the weights of BertForSequenceClassification, but lacks 2 of them, as 'bert.pooler.dense.bias'; "
        "set `pooling: mean`, which needs no pooler."
    )
    with pytest.raises(TaskError, match=message):
        TextClassification(tmp_path, sentences()).build_model()
    assert TextClassification(tmp_path, sentences(), pooling="mean").build_model()


def test_the_model_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = CausalLM(save_llama(tmp_path / "base"), sentences())
    model = trained(task, steps=1)
    save_adapter(model, task, tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    front, text = card.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(front) == {
        "library_name": "peft",
        "tags": ["lora", "rankscope"],
    }  # the hub refuses a path as base
    allocation = rs.RankAllocation.from_peft_model(model)
    assert f"Base model: `{tmp_path / 'base'}`." in text
    assert f"\n{allocation.parameters:,} adapter parameters.\n" in text
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| model ")
    ]
    assert sum(int(row[3].replace(",", "")) for row in rows) == allocation.parameters
    assert sum(int(row[1]) for row in rows) == sum(rank > 0 for rank in allocation.vector)
    of_role = [
        rank
        for target, rank in zip(allocation.targets, allocation.vector, strict=True)
        if target.role == "v_proj" and rank
    ]
    (found,) = (row[2] for row in rows if row[0] == "model v_proj")
    assert found == (f"{min(of_role)} to {max(of_role)}" if len(set(of_role)) > 1 else f"{of_role[0]}")
    add_to_card(tmp_path / "adapter", "Results", ["It is good."])
    assert (tmp_path / "adapter" / "README.md").read_text() == f"{card}\n## Results\n\nIt is good.\n"
    monkeypatch.setattr(model.get_base_model(), "name_or_path", "owner/name")
    save_adapter(model, task, tmp_path / "adapter")
    front = (tmp_path / "adapter" / "README.md").read_text().removeprefix("---\n").split("\n---\n", 1)[0]
    assert yaml.safe_load(front)["base_model"] == "owner/name"
