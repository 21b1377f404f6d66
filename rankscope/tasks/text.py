"""Tasks on texts: classification with a fresh head, and next-token prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from rankscope.distributed import batch_device, seeded
from rankscope.errors import TaskError
from rankscope.files import digest
from rankscope.settings import ModelSettings
from rankscope.tasks.data import check_cells, in_words, read_columns, split_rows
from rankscope.tasks.pretrained import FreshHead, PretrainedTask, dequantised, load_tokenizer, own_files
from rankscope.tasks.protocol import Split, check_counts


class TextTask(PretrainedTask):
    """Texts by split, tokenised once by the model's own tokenizer, and padded on the right by transformers' collators."""

    model: str | Path
    max_length: int
    _texts: Mapping[Split, list[str]]
    _labels: Mapping[Split, Tensor] | None = None  # of whole texts; None: the tokens are the labels

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.model, self.model_options)

    @cached_property
    def _rows(self) -> dict[Split, list[dict[str, Any]]]:
        found, most = {}, min(self.max_length, self._tokenizer.model_max_length)
        for split, texts in self._texts.items():
            tokens = self._tokenizer(texts, truncation=True, max_length=most)["input_ids"]
            pairs = zip(tokens, self._labels[split].tolist() if self._labels else tokens, strict=True)
            found[split] = [{"input_ids": t, "labels": label} for t, label in pairs if self._labels or len(t) > 1]
            if not found[split]:
                must = f"the data must have texts of two tokens or more in every split, but {split!r} has none"
                raise TaskError(f"{must}; check texts and `max_length`.")
        return found

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

        collator = DataCollatorWithPadding if self._labels else DataCollatorForSeq2Seq  # pads labels with -100
        return dict(collator(self._tokenizer)(rows))

    def _load(self, kind: str, **options: Any) -> Any:
        """The model; its positions must take the longest text."""
        model = self._load_model(kind, **options)
        positions = getattr(model.config, "max_position_embeddings", None)
        longest = max(len(row["input_ids"]) for rows in self._rows.values() for row in rows)
        if positions is not None and longest > positions:
            must = f"`max_length` must be at most {positions:,}, the model's positions"
            raise TaskError(f"{must}, but the longest text has {longest:,} tokens; lower it.")
        return model

    def fingerprint_data(self) -> str:
        """Return a hash of all texts and labels, and of the tokenizer's files in a local model folder."""
        return digest([self._texts, *([self._labels] if self._labels else []), own_files(self.model)])


class TextClassification(FreshHead, TextTask):
    """Labelled texts, classified by a model with a fresh head that is trained beside the adapters.

    Args:
        model: A local model folder or hub id.
        data: A .parquet, .jsonl, .json or .csv file, a hub data set id, or a DataFrame. A column `split` is used as it is;
            otherwise rows are split 70 / 15 / 15 by `split_seed`. Texts that occur twice are kept once.
        columns: Names of the columns for `text` and `label`, where others.
        pooling: `"model"`: transformers' classification class, which plain PEFT loads again; `"mean"`: an encoder under
            `MeanPooledClassifier`. Default: `"mean"` only if transformers has no such class for the model.
        max_length: Tokens; longer texts are cut.
        dtype: Of the frozen weights, `bfloat16` or `float32`; the rest is trained in float32. Default: the checkpoint's.
        model_options: `ModelSettings`, or single ones of them by name.
    """

    metric = "accuracy"
    _head_class = "AutoModelForSequenceClassification"

    def __init__(
        self,
        model: str | Path,
        data: str | Path | pd.DataFrame,
        *,
        columns: Mapping[str, str] | None = None,
        pooling: str | None = None,
        batch_size: int = 16,
        max_length: int = 128,
        dtype: str | None = None,
        model_options: ModelSettings | Mapping[str, Any] | None = None,
        split_seed: int = 0,
        name: str = "sequence-classification",
    ) -> None:
        if pooling not in ("mean", "model", None):
            raise TaskError(f"`pooling` must be 'mean' or 'model', but got {pooling!r}.")
        check_counts(batch_size=batch_size, max_length=max_length)
        self._take(model, model_options, dtype)
        self.name, self.pooling, self.batch_size, self.max_length = name, pooling, batch_size, max_length
        table, found = read_columns("sequence-classification", data, columns)
        text_column, label_column = found.values()
        check_cells(table, text_column, label_column, filled=True, what=in_words(data))
        self.classes = classes_of(table[label_column], name=label_column)
        parts = split_rows(table, key=text_column, seed=split_seed)
        codes = {value: code for code, value in enumerate(self.classes)}
        self._texts = {split: rows[text_column].astype(str).tolist() for split, rows in parts.items()}
        self._labels = {split: torch.tensor(rows[label_column].map(codes).to_numpy()) for split, rows in parts.items()}
        self._head_options = {**named_labels(self.classes), "problem_type": "single_label_classification"}

    @cached_property
    def _mean_pooled(self) -> bool:
        from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

        if self.pooling is not None:
            return self.pooling == "mean"
        return type(self._config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    @property
    def _quantized_apart(self) -> Sequence[str]:
        return () if self._mean_pooled else super()._quantized_apart

    @property
    def task_type(self) -> str:
        """PEFT's task type. PEFT has none for `MeanPooledClassifier` and refuses such an adapter by this name."""
        return f"{MeanPooledClassifier.__module__}.{MeanPooledClassifier.__name__}" if self._mean_pooled else "SEQ_CLS"

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """What `from_pretrained` of the base model needs so that a trained adapter fits."""
        padding = {} if self._mean_pooled else {"pad_token_id": self._loaded.config.pad_token_id}
        return {**super().model_kwargs, **padding}

    @cached_property
    def _loaded(self) -> Any:
        if self._mean_pooled:
            encoder = self._load("AutoModel", fresh=r"pooler\.", **self._head_options)
            if hasattr(encoder, "pooler"):
                encoder.pooler = None  # unused by the mean; an adapter there would never get a gradient
            return MeanPooledClassifier(encoder, len(self.classes)).to(batch_device(encoder))
        model = self._load(self._head_class, **self._head_options)
        if model.config.pad_token_id is None:  # decoders find the last token of a text by it
            model.config.pad_token_id = self._tokenizer.pad_token_id
        return model


def classes_of(labels: pd.Series, *, name: str) -> list[Any]:
    """The classes of a column of labels, sorted; a TaskError if there are fewer than 2, or of several types."""
    try:
        classes: list[Any] = sorted(labels.unique().tolist())
    except TypeError:
        raise TaskError(f"`{name}` must hold labels of one type, but holds several; convert them.") from None
    if len(classes) < 2:
        raise TaskError(f"`{name}` must hold at least 2 classes, but holds {len(classes)}; check the column.")
    return classes


def named_labels(classes: Sequence[Any]) -> dict[str, Any]:
    """Names of classes for a model's configuration."""
    labels = [str(value) for value in classes]
    return {"id2label": dict(enumerate(labels)), "label2id": {label: code for code, label in enumerate(labels)}}


class MeanPooledClassifier(nn.Module):
    """A transformers encoder, the mean of its last hidden states over the attention mask, and a linear head.

    Module names (`bert.encoder.layer.0…`) are those of transformers' classification models.
    """

    def __init__(self, encoder: Any, n_labels: int) -> None:
        super().__init__()
        self.config, self.base_model_prefix = encoder.config, encoder.base_model_prefix
        self.name_or_path = encoder.name_or_path  # PEFT's `base_model_name_or_path`
        setattr(self, self.base_model_prefix, encoder)
        with seeded(0):
            self.classifier = nn.Linear(self.config.hidden_size, n_labels)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, **options: Any) -> Any:
        """Return logits (batch, n_labels), and the mean cross-entropy if `labels` (batch,) are given."""
        from transformers.modeling_outputs import SequenceClassifierOutput

        encoder = getattr(self, self.base_model_prefix)  # PEFT passes many options that are None
        options = {key: value for key, value in options.items() if value is not None and key != "return_dict"}
        hidden = encoder(input_ids=input_ids, attention_mask=attention_mask, **options).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        logits = self.classifier((hidden * mask).sum(1) / mask.sum(1).clamp_min(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class CausalLM(TextTask):
    """Texts continued by a causal language model, whose own head is kept and stays frozen.

    Arguments are as for `TextClassification`. `gguf_file` names a GGUF file in the model folder, if the weights come as one; a
    plain copy is made beside it. Texts of fewer than two tokens predict nothing and are left out. For loss on answers only, see
    `Chat`.
    """

    metric = "token_accuracy"
    _evaluated = 1
    head_modules = ()
    task_type = "CAUSAL_LM"

    def __init__(
        self,
        model: str | Path,
        data: str | Path | pd.DataFrame,
        *,
        columns: Mapping[str, str] | None = None,
        batch_size: int = 8,
        max_length: int = 256,
        dtype: str | None = None,
        model_options: ModelSettings | Mapping[str, Any] | None = None,
        gguf_file: str | None = None,
        split_seed: int = 0,
        name: str = "causal-lm",
    ) -> None:
        check_counts(batch_size=batch_size, max_length=max_length)
        self._take(dequantised(Path(model), gguf_file) if gguf_file else model, model_options, dtype)
        self.name, self.batch_size, self.max_length = name, batch_size, max_length
        table, found = read_columns("causal-lm", data, columns)
        (text_column,) = found.values()
        check_cells(table, text_column, what=in_words(data))
        parts = split_rows(table.dropna(subset=text_column), key=text_column, seed=split_seed)
        self._texts = {split: rows[text_column].astype(str).tolist() for split, rows in parts.items()}

    @cached_property
    def _loaded(self) -> Any:
        return self._load("AutoModelForCausalLM", fresh=r"$")

    def evaluate(self, model: nn.Module, split: Split = "validation") -> dict[str, float]:
        """Return the share of tokens predicted right, cross-entropy per token, and perplexity."""
        metrics = super().evaluate(model, split)
        perplexity = float(torch.tensor(metrics["loss"]).exp())  # of a diverged model infinite, where math.exp raises
        return {**metrics, "perplexity": perplexity}
