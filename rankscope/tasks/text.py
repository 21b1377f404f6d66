"""`TextClassification`: a model with a fresh head on labelled texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor, nn

from rankscope.distributed import seeded
from rankscope.errors import TaskError
from rankscope.files import digest
from rankscope.tasks.data import check_filled, read_table, split_rows
from rankscope.tasks.language import TokenRows, check_positions, tokenize, tokenizer_files
from rankscope.tasks.pretrained import load_model, load_pretrained
from rankscope.tasks.protocol import Batch, Split, check_counts, evaluating, model_loss


class MeanPooledClassifier(nn.Module):
    """An encoder, the mean of its last hidden states over the attention mask, and a linear head.

    The encoder is held under its own `base_model_prefix`, so module names are those of transformers' classification models
    (`bert.encoder.layer.0…`), and an allocation found here fits them too.

    Args:
        encoder: A transformers model whose output has `last_hidden_state`.
        n_labels: Classes.
        seed: Of the head's initial weights.
    """

    def __init__(self, encoder: nn.Module, n_labels: int, *, seed: int = 0) -> None:
        super().__init__()
        self.config: Any = cast(Any, encoder.config)
        self.name_or_path = str(getattr(encoder, "name_or_path", ""))  # PEFT's `base_model_name_or_path`
        self._prefix = str(encoder.base_model_prefix)
        setattr(self, self._prefix, encoder)
        with seeded(seed):
            self.classifier = nn.Linear(self.config.hidden_size, n_labels)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, **options: Any) -> Any:
        """Logits (batch, n_labels), and the mean cross-entropy where `labels` (batch,) are given.

        Further options (`token_type_ids`, …) go to the encoder, unless they are None, as PEFT passes many.
        """
        from transformers.modeling_outputs import SequenceClassifierOutput

        encoder = getattr(self, self._prefix)
        options = {key: value for key, value in options.items() if value is not None and key != "return_dict"}
        hidden = encoder(input_ids=input_ids, attention_mask=attention_mask, **options).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        logits = self.classifier((hidden * mask).sum(1) / mask.sum(1).clamp_min(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class TextClassification:
    """Labelled texts, classified by a model with a fresh head, which is trained beside the adapters.

    Args:
        model: A local model folder or hub id.
        data: A .parquet, .jsonl or .csv file, a hub data set id, or a DataFrame. A column `split` is used as it is; else
            the rows are split 70 / 15 / 15 by `split_seed`. Texts that occur twice are kept once.
        text_column: The column with the texts.
        label_column: The column with the labels, of any one type.
        pooling: `"model"`: the model's own class for classification, which plain PEFT loads again; `"mean"`: an encoder under
            `MeanPooledClassifier`. Default: `"mean"` only where transformers has no class of its own for the model.
        batch_size: Texts a training batch; the last of an epoch is smaller.
        max_length: Tokens; longer texts are cut.
        split_seed: Of the splits.
        name: Of the task.

    Raises:
        TaskError: Model or data cannot be loaded.
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
        split_seed: int = 0,
        name: str = "sequence-classification",
    ) -> None:
        if pooling not in ("mean", "model", None):
            raise TaskError(f"`pooling` must be 'mean' or 'model', but got {pooling!r}.")
        check_counts(batch_size=batch_size, max_length=max_length)
        self.name, self.model, self.pooling = name, model, pooling
        self.batch_size, self.max_length = batch_size, max_length
        table = read_table(data, (text_column, label_column))
        check_filled(table, (text_column, label_column))
        try:
            self.classes = sorted(table[label_column].unique().tolist())
        except TypeError:
            raise TaskError(
                f"`{label_column}` must hold labels of one type, but holds several; convert them."
            ) from None
        if len(self.classes) < 2:
            raise TaskError(
                f"`{label_column}` must hold at least 2 classes, but holds {len(self.classes)}; check the column."
            )
        self._texts: Mapping[Split, list[str]]
        parts = split_rows(table, key=text_column, seed=split_seed)
        self._texts = {split: rows[text_column].astype(str).tolist() for split, rows in parts.items()}
        codes = {value: code for code, value in enumerate(self.classes)}
        self._labels = {split: torch.tensor(rows[label_column].map(codes).to_numpy()) for split, rows in parts.items()}

    def __getstate__(self) -> dict[str, Any]:
        """Leaves loaded weights and tokens behind: worker processes load their own."""
        return {key: value for key, value in vars(self).items() if key not in ("_loaded", "_rows")}

    @cached_property
    def _mean_pooled(self) -> bool:
        from transformers import AutoConfig
        from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

        if self.pooling is not None:
            return self.pooling == "mean"
        config: Any = load_pretrained(AutoConfig.from_pretrained, self.model)
        return type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    @property
    def task_type(self) -> str:
        """PEFT's kind of model; `MeanPooledClassifier` is none of its kinds, and names itself, so that PEFT refuses it."""
        return f"{MeanPooledClassifier.__module__}.{MeanPooledClassifier.__name__}" if self._mean_pooled else "SEQ_CLS"

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """What the base model's `from_pretrained` needs to be given for a trained adapter to fit."""
        config: Any = self._loaded.config
        return self._labelling | ({} if self._mean_pooled else {"pad_token_id": config.pad_token_id})

    @property
    def _labelling(self) -> dict[str, Any]:
        labels = {code: str(label) for code, label in enumerate(self.classes)}
        kind = "single_label_classification"  # whatever the checkpoint was trained for
        return {"id2label": labels, "label2id": {label: code for code, label in labels.items()}, "problem_type": kind}

    @cached_property
    def head_modules(self) -> tuple[str, ...]:
        """The fresh head; that of a model's own class is all that it has outside its base, such as `classifier` or `score`."""
        if self._mean_pooled:
            return ("classifier",)
        base = getattr(self._loaded, "base_model_prefix", "")
        children = self._loaded.named_children()
        return tuple(name for name, child in children if name != base and any(True for _ in child.parameters()))

    @cached_property
    def _loaded(self) -> nn.Module:
        from transformers import AutoModel, AutoModelForSequenceClassification

        options = self._labelling
        if self._mean_pooled:
            encoder: Any = load_model(AutoModel.from_pretrained, self.model, fresh=r"pooler\.", **options)
            if hasattr(encoder, "pooler"):
                encoder.pooler = None  # unused by the mean; an adapter there would never get a gradient
            model: Any = MeanPooledClassifier(encoder, len(self.classes))
        else:
            model = load_model(AutoModelForSequenceClassification.from_pretrained, self.model, **options)
            if model.config.pad_token_id is None:  # decoders find a text's last token by it
                model.config.pad_token_id = self._rows["train"].pad
        check_positions(self._rows, model.config)
        assert isinstance(model, nn.Module)
        return model

    @cached_property
    def _rows(self) -> dict[Split, TokenRows]:
        return tokenize(self.model, self._texts, max_length=self.max_length)

    def fingerprint_data(self) -> str:
        """A hash of all texts and labels, by split, and of what tokenises them."""
        return digest([self._texts, self._labels, tokenizer_files(self.model)])

    def build_model(self) -> nn.Module:
        """The encoder with its fresh head, the same at every call."""
        return deepcopy(self._loaded)

    def train_batches(self, seed: int) -> Iterator[Batch]:
        """One epoch, shuffled by the seed, each batch padded to its longest text."""
        labels = self._labels["train"]
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        for index in order.split(self.batch_size):
            yield {**self._rows["train"].batch(index), "labels": labels[index]}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy."""
        return model_loss(model, batch)

    def evaluate(self, model: nn.Module, split: Split = "validation") -> dict[str, float]:
        """Accuracy and mean cross-entropy; the model's training mode is kept."""
        labels = self._labels[split]
        with evaluating(model) as device:
            correct, loss = torch.zeros((), device=device), torch.zeros((), device=device)
            for index, batch in self._rows[split].by_length(4 * self.batch_size):
                logits = model(**{key: value.to(device) for key, value in batch.items()}).logits.float()
                target = labels[index].to(device)
                correct += (logits.argmax(-1) == target).sum()
                loss += nn.functional.cross_entropy(logits, target, reduction="sum")
        return {"accuracy": float(correct) / len(labels), "loss": float(loss) / len(labels)}
