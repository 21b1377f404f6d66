"""Token classification and sequence to sequence, end to end, and rows that cannot be used."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import datasets
import pandas as pd
import pytest
import torch
from peft import AutoPeftModelForSeq2SeqLM, AutoPeftModelForTokenClassification
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

import rankscope as rs
from rankscope.tasks import SequenceToSequence, TokenClassification, evaluate, outline_task, profile_task
from rankscope.tasks.sequences import entities, entity_f1
from rankscope.training import save_adapter
from tests.refusals import refused
from tests.tasks.models import WORDS, save_bert, save_llama, save_tokenizer
from tests.tasks.vision_models import tokenizer

# --- tags ------------------------------------------------------------------------------------------------------

TAGS = {"red": "B-COLOUR", "green": "I-COLOUR", "blue": "I-COLOUR", "cat": "B-ANIMAL", "dog": "B-ANIMAL", "bird": "O"}


def tagged(n: int = 36) -> pd.DataFrame:
    words = list(itertools.permutations(TAGS, 3))[:n]
    return pd.DataFrame(
        {"tokens": [list(row) for row in words], "tags": [[TAGS[word] for word in row] for row in words]}
    )


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return save_bert(tmp_path / "bert")


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_tags_from_the_profile_to_plain_peft(kind: str, tmp_path: Path) -> None:
    (save_bert if kind == "bert" else save_llama)(tmp_path / "model")
    tagged().to_json(tmp_path / "rows.jsonl", orient="records", lines=True)
    spec = {"type": "token-classification", "model": "model", "data": "rows.jsonl", "batch_size": 4}
    task = rs.load_task(spec, base_dir=tmp_path)
    assert task.metric == "f1"
    targets = rs.find_targets(task.build_model())
    taken = profile_task(task, n_batches=2)
    budget = rs.ParameterBudget.uniform(targets, 1)
    allocation = rs.allocate("one-shot", targets=targets, budget=budget, profile=taken)
    model, result = rs.train(task, allocation, steps=2, learning_rate=0.05)
    assert set(result.metrics) == {"accuracy", "loss", "f1"}
    save_adapter(model, task, tmp_path / "adapter")
    options = json.loads((tmp_path / "adapter" / "model_kwargs.json").read_text())
    options["id2label"] = {int(code): label for code, label in options["id2label"].items()}
    again = AutoPeftModelForTokenClassification.from_pretrained(tmp_path / "adapter", **options)
    assert evaluate(task, again) == pytest.approx(dict(result.metrics))


def test_a_word_of_several_tokens_bears_its_tag_once(bert: Path) -> None:
    torch.manual_seed(0)
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    tokenizer().save_pretrained(bert)
    rows = pd.DataFrame({"tokens": [["ab", "c"], ["d", "efg"], ["h", "i"], ["j", "k"]] * 5, "tags": [[0, 1]] * 20})
    rows["tokens"] = [[f"{word}{i}" for word in words] for i, words in enumerate(rows["tokens"])]
    task = TokenClassification(bert, rows)
    assert task.metric == "accuracy"
    for split, found in task._rows.items():
        for row, (words, tags) in zip(found, task._tagged[split], strict=True):
            kept = [label for label in row["labels"] if label != -100]
            assert kept == tags
            assert len(row["input_ids"]) == sum(map(len, words))
            assert row["labels"][len(words[0])] == 1


def test_metrics_are_those_of_single_rows(bert: Path) -> None:
    task = TokenClassification(bert, tagged(), batch_size=5)
    network = task.build_model().eval()
    losses, true, said = [], [], []
    with torch.no_grad():
        for row in task._rows["test"]:
            logits = network(torch.tensor([row["input_ids"]])).logits[0]
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(row["labels"])).item())
            true.append([task.classes[label] for label in row["labels"]])
            said.append([task.classes[label] for label in logits.argmax(-1).tolist()])
    metrics = task.evaluate(network, "test")
    assert metrics["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    hits = [a == b for pair in zip(true, said, strict=True) for a, b in zip(*pair, strict=True)]
    assert metrics["accuracy"] == sum(hits) / len(hits)
    assert metrics["f1"] == entity_f1(true, said)


def spans(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """By brute force: each stretch of one kind that no B- cuts, and that cannot be longer."""
    found = set()
    for start in range(len(tags)):
        for end in range(start + 1, len(tags) + 1):
            kinds = {tag[2:] for tag in tags[start:end]}
            whole = (
                len(kinds) == 1 and "O" not in tags[start:end] and not any(t[0] == "B" for t in tags[start + 1 : end])
            )
            longer_left = start > 0 and tags[start][0] == "I" and tags[start - 1][2:] == tags[start][2:] != ""
            longer_right = end < len(tags) and tags[end][0] == "I" and tags[end][2:] == tags[end - 1][2:]
            if whole and not longer_left and not longer_right:
                found.add((start, end, tags[start][2:]))
    return found


def test_entities_by_brute_force() -> None:
    for tags in itertools.product(["O", "B-a", "I-a", "I-b"], repeat=5):
        assert entities(tags) == spans(tags)
    assert entity_f1([["B-a", "I-a", "O", "B-b"]], [["B-a", "O", "O", "B-b"]]) == 0.5
    assert entity_f1([["O"]], [["O"]]) == 0


def test_tags_that_cannot_be_read(bert: Path) -> None:
    rows = tagged()
    refused(
        "each row must have as many tags as words, but row 2 has 3 words and 1 tags; correct it.",
        lambda: TokenClassification(
            bert, rows.assign(tags=[["O"] if i == 1 else t for i, t in enumerate(rows["tags"])])
        ),
    )
    refused(
        "each row must hold a list of words, and one of tags, but row 1 holds 'a b'; correct it.",
        lambda: TokenClassification(bert, rows.assign(tokens="a b")),
    )
    refused(
        "the DataFrame must have a column 'tags', but has none; did you mean 'ner_tags'?",
        lambda: TokenClassification(bert, rows.rename(columns={"tags": "ner_tags"})),
    )


def test_tags_of_a_hub_data_set_have_their_names(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["O", "B-COLOUR", "I-COLOUR", "B-ANIMAL"]
    rows = tagged()
    rows["tags"] = [[names.index(tag) for tag in tags] for tags in rows["tags"]]
    kinds = datasets.ClassLabel(names=["short", "long"])
    features = {
        "tokens": datasets.List(datasets.Value("string")),
        "tags": datasets.List(datasets.ClassLabel(names=names)),
    }
    whole = datasets.Dataset.from_dict(
        {**{name: rows[name].tolist() for name in rows}, "kind": [0, 1, -1] * 12},
        features=datasets.Features({**features, "kind": kinds}),
    )
    monkeypatch.setitem(
        __import__("sys").modules, "datasets", SimpleNamespace(load_dataset=lambda name: {"train": whole})
    )
    task = TokenClassification(bert, "org/tags")
    assert task.classes == sorted(names)
    from rankscope.tasks.data import read_table

    assert read_table("org/tags")["kind"].dropna().tolist() == ["short", "long"] * 12


# --- two texts -------------------------------------------------------------------------------------------------


def save_seq2seq(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "vocab_size": len(WORDS)}
    if name == "t5":
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
        T5ForConditionalGeneration(T5Config(**sizes, **ids)).save_pretrained(folder)
    else:
        layers = {f"{part}_{what}": n for part in ("encoder", "decoder")
                  for what, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))}  # fmt: skip
        config = BartConfig(
            d_model=16, max_position_embeddings=32, bos_token_id=1, forced_eos_token_id=1, **layers, **ids
        )
        BartForConditionalGeneration(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def pairs() -> pd.DataFrame:
    """The target is the source, backwards."""
    rows = list(itertools.permutations(WORDS[2:7], 3))
    return pd.DataFrame({"source": map(" ".join, rows), "target": [" ".join(row[::-1]) for row in rows]})


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_two_texts_from_the_profile_to_plain_peft(name: str, tmp_path: Path) -> None:
    save_seq2seq(name, tmp_path / "model")
    pairs().rename(columns={"target": "backwards"}).to_csv(tmp_path / "rows.csv", index=False)
    spec = {"type": "sequence-to-sequence", "model": "model", "data": "rows.csv", "batch_size": 4}
    task = rs.load_task({**spec, "columns": {"target": "backwards"}}, base_dir=tmp_path)
    targets = rs.find_targets(task.build_model())
    taken = profile_task(task, n_batches=2)
    budget = rs.ParameterBudget.uniform(targets, 1)
    allocation = rs.allocate("one-shot", targets=targets, budget=budget, profile=taken)
    model, result = rs.train(task, allocation, steps=2, learning_rate=0.05)
    assert set(result.metrics) == {"token_accuracy", "exact_match", "loss"}
    save_adapter(model, task, tmp_path / "adapter")
    again = AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter", **task.model_kwargs)
    assert evaluate(task, again) == pytest.approx(dict(result.metrics))


def test_metrics_of_two_texts_are_those_of_single_rows(tmp_path: Path) -> None:
    table = pairs()
    table["target"] += [" red" * (i % 4) for i in range(len(table))]
    task = SequenceToSequence(save_seq2seq("t5", tmp_path), table, batch_size=4)
    network = task.build_model().eval()
    right = exact = n_tokens = 0
    losses = []
    with torch.no_grad():
        batch = next(iter(task.train_batches(0)))
        assert (batch["labels"] == -100).any()
        torch.testing.assert_close(task.loss(network, batch), network(**batch).loss)
        for row in task._rows["test"]:
            labels = torch.tensor([row["labels"]])
            output = network(input_ids=torch.tensor([row["input_ids"]]), labels=labels)
            hits = output.logits.argmax(-1) == labels
            right, exact, n_tokens = right + int(hits.sum()), exact + int(hits.all()), n_tokens + labels.numel()
            losses.append(output.loss.item() * labels.numel())
    metrics = task.evaluate(network, "test")
    assert metrics["token_accuracy"] == pytest.approx(right / n_tokens)
    assert metrics["exact_match"] == exact / len(task._rows["test"])
    assert metrics["loss"] == pytest.approx(sum(losses) / n_tokens, rel=1e-4)


def test_two_texts_are_learned_and_split_by_their_source(tmp_path: Path) -> None:
    table = pd.concat([pairs(), pairs().assign(target="cat")])
    task = SequenceToSequence(save_seq2seq("t5", tmp_path), table, batch_size=16)
    parts = [set(sources) for sources, _ in task._pairs.values()]
    assert sum(map(len, parts)) == len(set(table["source"]))
    network = task.build_model().train()
    before = task.evaluate(network)["loss"]
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for step in range(10):
        for batch in task.train_batches(step):
            task.loss(network, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert task.evaluate(network)["loss"] < 0.6 * before


def test_texts_that_are_missing(tmp_path: Path) -> None:
    table = pairs()
    table.loc[0, "target"] = " "
    refused(
        "the column 'target' must hold a value in every row, but 1 of 60 have none; drop those rows.",
        lambda: SequenceToSequence(tmp_path, table),
    )


@pytest.mark.parametrize("kind", ["token-classification", "sequence-to-sequence"])
def test_dry_runs_need_no_data(kind: str, tmp_path: Path) -> None:
    save_bert(tmp_path / "model") if kind == "token-classification" else save_seq2seq("t5", tmp_path / "model")
    outline = outline_task({"type": kind, "model": "model", "data": "gone.jsonl", "max_length": 12}, base_dir=tmp_path)
    assert outline.max_length == 12
    assert rs.find_targets(outline.model)
