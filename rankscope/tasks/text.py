"""Tasks on texts: classification with a fresh head, and next-token prediction."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from rankscope.distributed import seeded
from rankscope.errors import TaskError
from rankscope.files import digest
from rankscope.tasks.data import read_table, split_rows
from rankscope.tasks.pretrained import DTYPES, PretrainedTask, dequantised, load_model, load_pretrained
from rankscope.tasks.protocol import Split, check_choice, check_counts


class TextTask(PretrainedTask):
    """Texts by split, tokenised once by the model's own tokenizer, and padded on the right by transformers' collators."""

    model: str | Path
    max_length: int
    _texts: Mapping[Split, list[str]]
    _labels: Mapping[Split, Tensor] | None = None  # of whole texts; None: the tokens are the labels

    @cached_property
    def _tokenizer(self) -> Any:
        tokenizer = load_pretrained("AutoTokenizer", self.model)
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # transformers' stand-in for a missing one
            must = f"`{self.model}` must hold the model's tokenizer, but has none"
            raise TaskError(f"{must}; save it there with save_pretrained.")
        if tokenizer.pad_token_id is None:  # padding is masked, so any token will do
            tokenizer.pad_token_id = tokenizer.eos_token_id or 0
        tokenizer.padding_side, tokenizer.model_input_names = "right", ["input_ids", "attention_mask"]
        return tokenizer

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
        model = load_model(kind, self.model, dtype=self.dtype, **options)
        positions = getattr(model.config, "max_position_embeddings", None)
        longest = max(len(row["input_ids"]) for rows in self._rows.values() for row in rows)
        if positions is not None and longest > positions:
            must = f"`max_length` must be at most {positions:,}, the model's positions"
            raise TaskError(f"{must}, but the longest text has {longest:,} tokens; lower it.")
        return model

    def fingerprint_data(self) -> str:
        """Return a hash of all texts and labels, and of the tokenizer's files in a local model folder."""
        suffixes = (".json", ".txt", ".model", ".jinja")
        paths = [path for path in Path(self.model).glob("*") if path.suffix in suffixes]
        files = {path.name: path.read_bytes() for path in paths if not path.name.endswith("index.json")}
        return digest([self._texts, *([self._labels] if self._labels else []), files])


class TextClassification(TextTask):
    """Labelled texts, classified by a model with a fresh head that is trained beside the adapters.

    Args:
        model: A local model folder or hub id.
        data: A .parquet, .jsonl, .json or .csv file, a hub data set id, or a DataFrame. A column `split` is used as it is;
            otherwise rows are split 70 / 15 / 15 by `split_seed`. Texts that occur twice are kept once.
        pooling: `"model"`: transformers' classification class, which plain PEFT loads again; `"mean"`: an encoder under
            `MeanPooledClassifier`. Default: `"mean"` only if transformers has no such class for the model.
        max_length: Tokens; longer texts are cut.
        dtype: Of the frozen weights, `bfloat16` or `float32`; the rest is trained in float32. Default: the checkpoint's.
    """

    metric = "accuracy"

    def __init__(
        self,
        model: str | Path,
        data: str | Path | pd.DataFrame,
        *,
        text_column: str = "text",
        label_column: str = "label",
        pooling: str | None = None,
        batch_size: int = 16,
        max_length: int = 128,
        dtype: str | None = None,
        split_seed: int = 0,
        name: str = "sequence-classification",
    ) -> None:
        if pooling not in ("mean", "model", None):
            raise TaskError(f"`pooling` must be 'mean' or 'model', but got {pooling!r}.")
        check_counts(batch_size=batch_size, max_length=max_length)
        check_choice(dtype, (*DTYPES, None), name="dtype")
        self.name, self.model, self.pooling, self.dtype = name, model, pooling, dtype
        self.batch_size, self.max_length = batch_size, max_length
        table = read_table(data, (text_column, label_column), filled=True)
        try:
            self.classes = sorted(table[label_column].unique().tolist())
        except TypeError:
            raise TaskError(
                f"`{label_column}` must hold labels of one type, but holds several; convert them."
            ) from None
        if (n_classes := len(self.classes)) < 2:
            raise TaskError(f"`{label_column}` must hold at least 2 classes, but holds {n_classes}; check the column.")
        parts = split_rows(table, key=text_column, seed=split_seed)
        codes = {value: code for code, value in enumerate(self.classes)}
        self._texts = {split: rows[text_column].astype(str).tolist() for split, rows in parts.items()}
        self._labels = {split: torch.tensor(rows[label_column].map(codes).to_numpy()) for split, rows in parts.items()}
        labels = [str(value) for value in self.classes]
        names = {"id2label": dict(enumerate(labels)), "label2id": {label: code for code, label in enumerate(labels)}}
        self._head_options: dict[str, Any] = {**names, "problem_type": "single_label_classification"}

    @cached_property
    def _mean_pooled(self) -> bool:
        from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

        if self.pooling is not None:
            return self.pooling == "mean"
        return type(load_pretrained("AutoConfig", self.model)) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    @property
    def task_type(self) -> str:
        """PEFT's task type. PEFT has none for `MeanPooledClassifier` and refuses such an adapter by this name."""
        return f"{MeanPooledClassifier.__module__}.{MeanPooledClassifier.__name__}" if self._mean_pooled else "SEQ_CLS"

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """What `from_pretrained` of the base model needs so that a trained adapter fits."""
        padding = {} if self._mean_pooled else {"pad_token_id": self._loaded.config.pad_token_id}
        return {**super().model_kwargs, **self._head_options, **padding}

    @cached_property
    def head_modules(self) -> tuple[str, ...]:
        """The fresh head: all modules with parameters outside the base model, such as `classifier` or `score`."""
        base, children = self._loaded.base_model_prefix, self._loaded.named_children()
        return tuple(name for name, child in children if name != base and any(True for _ in child.parameters()))

    @cached_property
    def _loaded(self) -> Any:
        if self._mean_pooled:
            encoder = self._load("AutoModel", fresh=r"pooler\.", **self._head_options)
            if hasattr(encoder, "pooler"):
                encoder.pooler = None  # unused by the mean; an adapter there would never get a gradient
            return MeanPooledClassifier(encoder, len(self.classes))
        model = self._load("AutoModelForSequenceClassification", **self._head_options)
        if model.config.pad_token_id is None:  # decoders find the last token of a text by it
            model.config.pad_token_id = self._tokenizer.pad_token_id
        return model


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
    plain copy is made beside it. Texts of fewer than two tokens predict nothing and are left out.
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
        text_column: str = "text",
        batch_size: int = 8,
        max_length: int = 256,
        dtype: str | None = None,
        gguf_file: str | None = None,
        split_seed: int = 0,
        name: str = "causal-lm",
    ) -> None:
        check_counts(batch_size=batch_size, max_length=max_length)
        check_choice(dtype, (*DTYPES, None), name="dtype")
        self.model = dequantised(Path(model), gguf_file) if gguf_file else model
        self.name, self.batch_size, self.max_length, self.dtype = name, batch_size, max_length, dtype
        table = read_table(data, (text_column,)).dropna(subset=text_column)
        parts = split_rows(table, key=text_column, seed=split_seed)
        self._texts = {split: rows[text_column].astype(str).tolist() for split, rows in parts.items()}

    @cached_property
    def _loaded(self) -> Any:
        return self._load("AutoModelForCausalLM", fresh=r"$")

    def evaluate(self, model: nn.Module, split: Split = "validation") -> dict[str, float]:
        """Return the share of tokens predicted right, cross-entropy per token, and perplexity."""
        metrics = super().evaluate(model, split)
        perplexity = float(torch.tensor(metrics["loss"]).exp())  # of a diverged model infinite, where math.exp raises
        return {**metrics, "perplexity": perplexity}
