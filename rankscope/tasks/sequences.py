"""Tasks on texts whose labels are sequences: a tag for each word, and another text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from rankscope.distributed import batch_device
from rankscope.errors import TaskError, shown
from rankscope.files import digest
from rankscope.settings import ModelSettings
from rankscope.tasks.answers import answer_metrics, answer_sums
from rankscope.tasks.conversations import IGNORED
from rankscope.tasks.data import check_cells, in_words, read_columns, split_rows
from rankscope.tasks.pretrained import FreshHead, evaluating, load_tokenizer, own_files
from rankscope.tasks.protocol import Split, check_counts
from rankscope.tasks.text import TextTask, classes_of, named_labels

# Before the first of the words that they are given.
_WANT_A_SPACE = {"bloom", "deberta", "gpt2", "longformer", "roberta"}


class TokenClassification(FreshHead, TextTask):
    """Words with a tag each, classified by a model with a fresh head that is trained beside the adapters.

    A row has `tokens` (a list of words) and `tags` (a list of as many). The first token of each word bears its tag. Where all
    tags are `O`, `B-…` or `I-…`, the metric is `f1`, micro-averaged over whole entities as CoNLL's; else it is `accuracy` of
    words. Words after `max_length` are left out of both.

    Args:
        model: A local model folder or hub id, with a fast tokenizer.
        data: As for `TextClassification`. Rows with the same words are kept once.
        columns: Names of the columns for `tokens` and `tags`, where others.
        max_length: Tokens.
        model_options: `ModelSettings`, or single ones of them by name.
    """

    task_type = "TOKEN_CLS"
    _head_class = "AutoModelForTokenClassification"

    def __init__(
        self,
        model: str | Path,
        data: str | Path | pd.DataFrame,
        *,
        columns: Mapping[str, str] | None = None,
        batch_size: int = 16,
        max_length: int = 256,
        model_options: ModelSettings | Mapping[str, Any] | None = None,
        split_seed: int = 0,
        name: str = "token-classification",
    ) -> None:
        check_counts(batch_size=batch_size, max_length=max_length)
        self._take(model, model_options)
        self.name, self.batch_size, self.max_length = name, batch_size, max_length
        table, found = read_columns("token-classification", data, columns)
        tokens, tags = found.values()
        rows = [_tagged(row[tokens], row[tags], number) for number, row in enumerate(table.to_dict("records"), start=1)]
        self.classes = classes_of(pd.Series([tag for _, tagged in rows for tag in tagged]), name=tags)
        self.metric = "f1" if all(_is_bio(tag) for tag in self.classes) else "accuracy"
        keys = pd.DataFrame({"row": range(len(rows)), "words": ["\0".join(words) for words, _ in rows]})
        if "split" in table.columns:
            keys["split"] = list(table["split"])
        parts = split_rows(keys, key="words", seed=split_seed)
        self._tagged = {split: [rows[index] for index in part["row"]] for split, part in parts.items()}
        self._head_options = named_labels(self.classes)

    @cached_property
    def _tokenizer(self) -> Any:
        spaced = {"add_prefix_space": True} if self._config.model_type in _WANT_A_SPACE else {}
        tokenizer = load_tokenizer(self.model, self.model_options, **spaced)
        if not tokenizer.is_fast:
            must = f"`{self.model}` must have a fast tokenizer, which tells the words of tokens"
            raise TaskError(f"{must}, but has {type(tokenizer).__name__}; convert it.")
        return tokenizer

    @cached_property
    def _rows(self) -> dict[Split, list[dict[str, Any]]]:
        codes = {tag: code for code, tag in enumerate(self.classes)}
        options: Any = {"truncation": True, "max_length": min(self.max_length, self._tokenizer.model_max_length)}
        found: dict[Split, list[dict[str, Any]]] = {}
        for split, tagged in self._tagged.items():
            encoded = self._tokenizer([words for words, _ in tagged], is_split_into_words=True, **options)
            found[split] = []
            for row, (_, tags) in enumerate(tagged):
                places = encoded.word_ids(row)
                first = [place is not None and place not in places[:at] for at, place in enumerate(places)]
                labels = [codes[tags[place]] if new else IGNORED for place, new in zip(places, first, strict=True)]
                found[split].append({"input_ids": encoded["input_ids"][row], "labels": labels})
            if not any(label != IGNORED for row in found[split] for label in row["labels"]):
                raise TaskError(f"`max_length` must leave words with tags, but leaves none in {split!r}; raise it.")
        return found

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        from transformers import DataCollatorForTokenClassification

        return dict(DataCollatorForTokenClassification(self._tokenizer)(rows))

    @cached_property
    def _loaded(self) -> Any:
        return self._load(self._head_class, **self._head_options)

    def evaluate(self, model: nn.Module, split: Split = "validation") -> dict[str, float]:
        """Return accuracy of words, mean cross-entropy, and `f1` of entities if tags tell them. The model keeps its mode."""
        device, rows = batch_device(model), self._rows[split]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))  # wastes least on padding
        loss, true, said = torch.zeros((), device=device), [], []
        with evaluating(model):
            for batch in self._batches(split, order, self._evaluated * self.batch_size):
                inputs = {name: value.to(device) for name, value in batch.items()}
                labels = inputs.pop("labels")
                logits = model(**inputs).logits.float()
                loss += nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
                for tags, chosen in zip(labels.tolist(), logits.argmax(-1).tolist(), strict=True):
                    kept = [place for place, tag in enumerate(tags) if tag != IGNORED]
                    true.append([self.classes[tags[place]] for place in kept])
                    said.append([self.classes[chosen[place]] for place in kept])
        hits = [a == b for tags, chosen in zip(true, said, strict=True) for a, b in zip(tags, chosen, strict=True)]
        metrics = {"accuracy": sum(hits) / len(hits), "loss": float(loss) / len(hits)}
        return {**metrics, "f1": entity_f1(true, said)} if self.metric == "f1" else metrics

    def fingerprint_data(self) -> str:
        """Return a hash of all words and tags, and of the tokenizer's files in a local model folder."""
        return digest([self._tagged, own_files(self.model)])


def _tagged(words: Any, tags: Any, number: int) -> tuple[list[str], list[Any]]:
    lists = [list(value) if isinstance(value, list | tuple | np.ndarray) else None for value in (words, tags)]
    tokens, tagged = lists
    if not tokens or tagged is None:
        held = shown(tags if tokens else words)
        raise TaskError(
            f"each row must hold a list of words, and one of tags, but row {number:,} holds {held}; correct it."
        )
    if len(tokens) != len(tagged):
        must = "each row must have as many tags as words"
        raise TaskError(f"{must}, but row {number:,} has {len(tokens)} words and {len(tagged)} tags; correct it.")
    return [str(word) for word in tokens], [tag.item() if isinstance(tag, np.generic) else tag for tag in tagged]


def _is_bio(tag: Any) -> bool:
    return isinstance(tag, str) and (tag == "O" or tag.startswith(("B-", "I-")))


def entities(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """Start, end (exclusive) and kind of each entity in tags `B-kind`, `I-kind` and `O`, by the rules of CoNLL's conlleval.

    An `I-` that continues nothing of its kind begins an entity.

    >>> sorted(entities(["B-a", "I-a", "B-a", "O", "I-b"]))
    [(0, 2, 'a'), (2, 3, 'a'), (4, 5, 'b')]
    """
    found, start = set(), 0
    for place, (tag, before) in enumerate(zip([*tags, "O"], ["O", *tags], strict=True)):
        goes_on = tag.startswith("I-") and before[2:] == tag[2:] and before != "O"
        if before != "O" and not goes_on:
            found.add((start, place, before[2:]))
        if not goes_on:
            start = place
    return found


def entity_f1(true: Sequence[Sequence[str]], said: Sequence[Sequence[str]]) -> float:
    """The harmonic mean of precision and recall over whole entities of all rows; 0 where there are none."""
    real, found = (
        {(row, *entity) for row, tags in enumerate(rows) for entity in entities(tags)} for rows in (true, said)
    )
    return 2 * len(real & found) / max(len(real) + len(found), 1)


class SequenceToSequence(TextTask):
    """Texts with a target text each, as in translation and summaries, for an encoder-decoder model whose head stays frozen.

    A row has `source` and `target`. `token_accuracy`, the metric, is the share of the target's tokens that are predicted right
    from the source and all true tokens before; `exact_match` is the share of rows in which all are.

    Args:
        model: A local model folder or hub id of any class that `AutoModelForSeq2SeqLM` loads, such as T5 and BART.
        data: As for `TextClassification`. Rows that occur twice are kept once; without a column `split`, rows with the same
            source are in the same split.
        columns: Names of the columns for `source` and `target`, where others.
        max_length: Tokens of either text; longer ones are cut.
        model_options: `ModelSettings`, or single ones of them by name.
    """

    metric = "token_accuracy"
    _evaluated = 1
    head_modules = ()
    task_type = "SEQ_2_SEQ_LM"

    def __init__(
        self,
        model: str | Path,
        data: str | Path | pd.DataFrame,
        *,
        columns: Mapping[str, str] | None = None,
        batch_size: int = 8,
        max_length: int = 256,
        model_options: ModelSettings | Mapping[str, Any] | None = None,
        split_seed: int = 0,
        name: str = "sequence-to-sequence",
    ) -> None:
        check_counts(batch_size=batch_size, max_length=max_length)
        self._take(model, model_options)
        self.name, self.batch_size, self.max_length = name, batch_size, max_length
        table, found = read_columns("sequence-to-sequence", data, columns)
        source, target = found.values()
        check_cells(table, source, target, filled=True, what=in_words(data))
        table = table.astype({source: str, target: str})
        keys = table.assign(same=table[source] + "\0" + table[target])
        parts = split_rows(keys, key="same", group=source, seed=split_seed)
        self._pairs = {split: (part[source].tolist(), part[target].tolist()) for split, part in parts.items()}

    @cached_property
    def _rows(self) -> dict[Split, list[dict[str, Any]]]:
        options: Any = {"truncation": True, "max_length": min(self.max_length, self._tokenizer.model_max_length)}
        found: dict[Split, list[dict[str, Any]]] = {}
        for split, (sources, targets) in self._pairs.items():
            tokens, labels = self._tokenizer(sources, **options), self._tokenizer(text_target=targets, **options)
            pairs = zip(tokens["input_ids"], labels["input_ids"], strict=True)
            found[split] = [{"input_ids": source, "labels": target} for source, target in pairs]
        return found

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        from transformers import DataCollatorForSeq2Seq

        return dict(DataCollatorForSeq2Seq(self._tokenizer)(rows))

    @cached_property
    def _loaded(self) -> Any:
        return self._load("AutoModelForSeq2SeqLM", fresh=r"$")

    def evaluate(self, model: nn.Module, split: Split = "validation") -> dict[str, float]:
        """Return token accuracy, exact match, and cross-entropy per token of the target. The model keeps its mode."""
        device, rows = batch_device(model), self._rows[split]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))  # wastes least on padding
        sums = torch.zeros(4, device=device)
        with evaluating(model):
            for batch in self._batches(split, order, self.batch_size):
                inputs = {name: value.to(device) for name, value in batch.items()}
                sums += answer_sums(model(**inputs).logits, inputs["labels"])
        return answer_metrics(sums, len(rows))

    def fingerprint_data(self) -> str:
        """Return a hash of all pairs, and of the tokenizer's files in a local model folder."""
        return digest([self._pairs, own_files(self.model)])
