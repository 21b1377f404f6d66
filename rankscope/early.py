"""What can be refused before anything heavy is imported: names, models, data and files that do not exist."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from rankscope.columns import DATA_SUFFIXES, check_glance
from rankscope.errors import FileError, SettingsError, TaskError, did_you_mean, one_line, shown
from rankscope.files import AnyPath, read_json
from rankscope.plugins import check_file, entry_points

_LOADED = ("model", "data", "columns", "batch_size", "model_options", "split_seed", "name", "dtype")
_SCENES = ("towers", "test", "blind", "batch_size", "evaluation_fraction", "dtype", "model")
# What each generic task takes, and each ready one.
TASK_TYPES: Mapping[str, tuple[str, ...]] = {
    "sequence-classification": (*_LOADED, "pooling", "max_length"),
    "causal-lm": (*_LOADED, "max_length", "gguf_file"),
    "chat": (*_LOADED, "chat_template", "max_length", "packing", "max_skipped"),
    "sequence-to-sequence": (*_LOADED, "max_length"),
    "token-classification": (*_LOADED, "max_length"),
    "image-classification": (*_LOADED, "image_folder", "max_skipped"),
    "image-text-to-text": (*_LOADED, "image_folder", "text_only", "max_length", "max_skipped"),
}
READY_TASKS: Mapping[str, tuple[str, ...]] = {
    "digits-shift": ("batch_size",),
    "dinov2-digits": ("batch_size", "dtype"),
    **dict.fromkeys(("supersense", "sentiment", "word-order", "glosses"), ("batch_size", "max_length", "dtype")),
    **dict.fromkeys(("emoji-scenes", "digit-scenes"), _SCENES),
}
PATHS = ("model", "data", "image_folder", "chat_template")  # options of generic tasks that may be paths
DATA = "the task's data"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
EXPORTS = ("peft", "axolotl", "kohya", "unsloth", "trl")
_TOKENIZER_FILES = ("token", "vocab", "merges", "spiece", "spm", "tekken", ".model", "bpe")  # parts of their names
# Tools with one rank for all modules, and what they call it.
_ONE_RANK = {"llama-factory": ("LLaMA-Factory", "lora_rank"), "ms-swift": ("ms-swift", "lora_rank")}


def check_task_spec(spec: Any, base: Path, *, dry_run: bool = False) -> None:
    """Raise the TaskError that `load_task` would raise for a name, type, function's file, model folder or data file.

    A dry run needs neither data nor tokenizer.
    """
    if isinstance(spec, str) and ":" in spec:
        check_file(spec, base, error=TaskError)
        return
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    if "type" not in options:
        check_name(name := options.pop("name", None))
        if name in READY_TASKS:
            check_options(options, READY_TASKS[name], what=f"task {name!r}")
        return
    kind = take_type(options)
    options |= resolved(options, base)
    data, columns, model = (options.get(key) for key in ("data", "columns", "model"))
    if not dry_run and isinstance(data, str):
        check_data(data)
        check_glance(kind, Path(data), columns if isinstance(columns, Mapping) else None)
    if isinstance(model, str):
        check_source(model, base=base)
        loading = options.get("model_options")
        own_code = isinstance(loading, Mapping) and loading.get("trust_remote_code")  # knows its own files
        if not (dry_run or own_code) and "gguf_file" not in options:
            check_model_folder(kind, Path(model), has_template=options.get("chat_template") is not None)


def check_options(given: Iterable[str], known: Iterable[str], *, needed: Iterable[str] = (), what: str) -> None:
    """Raise a TaskError unless the options are known ones, and those that are needed are among them."""
    for name in given:
        if name not in known:
            hint = did_you_mean(
                name, known, f"it takes {', '.join(known) or 'none'}.", cutoff=0.4, quoted="`{}`".format
            )
            raise TaskError(f"{what} takes no option `{name}`; {hint}")
    if missing := [name for name in needed if name not in given]:
        raise TaskError(f"{what} needs the option `{missing[0]}`; add it.")


def check_model_folder(kind: str, folder: Path, *, has_template: bool) -> None:
    """Raise a TaskError if a local model folder lacks its configuration, tokenizer, or, for chats, the chat template."""
    if not folder.is_dir():
        return
    check_configuration(folder)
    names = [path.name for path in folder.iterdir()]
    if kind == "image-classification":
        return
    if not any(sign in name for name in names for sign in _TOKENIZER_FILES):
        raise no_tokenizer(folder)
    if kind == "chat" and not has_template and not any("chat_template" in name for name in names):
        told = folder / "tokenizer_config.json"
        if not told.exists() or not read_json(told, what="a tokenizer's config").get("chat_template"):
            raise no_chat_template(folder)


def check_configuration(folder: Path) -> None:
    """Raise a TaskError unless this is a model's folder."""
    if (folder / "config.json").exists():
        return
    must = f"`{folder}` must be a model folder, but has no config.json"
    if (held := folder / ADAPTER_CONFIG).exists():
        base = read_json(held, what="an adapter's config").get("base_model_name_or_path")
        must = f"`{folder}` must be a model's folder, but is an adapter's"
        raise TaskError(f"{must}; name its base model{f' ({base})' if base else ''}.")
    raise TaskError(f"{must}; save the model there with save_pretrained.")


def no_tokenizer(source: str | Path) -> TaskError:
    """The error of a model without a tokenizer."""
    must = f"`{source}` must hold the model's tokenizer, but has none"
    return TaskError(f"{must}; save it there with save_pretrained.")


def no_chat_template(source: str | Path) -> TaskError:
    """The error of a tokenizer that cannot write chats."""
    remedy = "set `chat_template` to a file with one, or take `type: causal-lm` for plain texts."
    return TaskError(f"`{source}` must have a tokenizer with a chat template, but has none; {remedy}")


def check_tool(to: str) -> None:
    """Raise a SettingsError unless `export` knows this tool, and the tool takes ranks by module."""
    if to in _ONE_RANK:
        tool, key = _ONE_RANK[to]
        remedy = "train with one of these, then `rankscope export ADAPTER --padded` gives its modules one rank"
        raise SettingsError(f"{tool} has one `{key}` for all modules and cannot train ranks by module; {remedy}.")
    if to not in EXPORTS:
        hint = did_you_mean(to, [*EXPORTS, *_ONE_RANK], f"choose among {', '.join(EXPORTS)}.")
        raise SettingsError(f"`to` must name a tool that rankscope exports to, but got {to!r}; {hint}")


def check_adapter(folder: AnyPath) -> None:
    """Raise a FileError unless this is an adapter's folder; one with a config only, as `allocate` writes, is none."""
    folder = Path(folder)
    inside = folder / "adapter"  # where `train` puts it
    hint = f"did you mean `{inside}`?" if _holds_adapter(inside) else "check the path."
    must = f"`{folder}` must be an adapter's folder"
    if not folder.is_dir():
        raise FileError(f"{must}, but there is no such folder; {hint}")
    if not (folder / ADAPTER_CONFIG).exists():
        raise FileError(f"{must}, but has no {ADAPTER_CONFIG}; {hint}")
    if not _holds_adapter(folder):
        hint = hint if _holds_adapter(inside) else "train it first, as `rankscope train` does."
        raise FileError(f"{must}, but holds no weights ({ADAPTER_WEIGHTS[0]}); {hint}")


def _holds_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).exists() and any((folder / name).exists() for name in ADAPTER_WEIGHTS)


def check_file_exists(path: AnyPath, *, what: str) -> None:
    """Raise the FileError of a reader where there is no such file."""
    if not os.path.exists(path):
        raise FileError(f"`{path}` must hold {what}, but there is no such file; check the path.")


def check_output(folder: Path) -> None:
    """Raise a FileError unless the output folder can be written to, or made."""
    nearest = next(each for each in (folder, *folder.absolute().parents) if os.path.lexists(each))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise FileError(f"`--out` must be a folder that can be written to, but `{nearest}` is not; choose another.")


def take_type(options: dict[str, Any]) -> str:
    """Take the type out of a generic task's options; a TaskError unless it is known, and takes the others."""
    kind = options.pop("type")
    if not isinstance(kind, str) or kind not in TASK_TYPES:
        raise TaskError(f"`task.type` must be one of {', '.join(TASK_TYPES)}, but got {shown(kind)}.")
    check_options(options, TASK_TYPES[kind], needed=("model", "data"), what=f"task type {kind!r}")
    return kind


def check_name(name: Any) -> None:
    """Raise a TaskError unless a ready task or an entry point has this name."""
    if isinstance(name, str) and name in READY_TASKS:
        return
    known = [*READY_TASKS, *entry_points("tasks")]
    if not isinstance(name, str) or name not in known:
        hint = did_you_mean(name, known, 'a task of your own is "path/to/file.py:factory".', cutoff=0.4)
        raise TaskError(f"`task` must be one of {', '.join(known)}, but got {shown(name)}; {hint}")


def check_data(source: str | Path) -> None:
    """Raise a TaskError if this names a data file that does not exist."""
    path = Path(source)
    if path.suffix.lower() not in DATA_SUFFIXES or os.path.exists(path):
        return
    siblings = os.listdir(path.parent) if os.path.isdir(path.parent) else []
    hint = did_you_mean(path.name, siblings, "check the path.", cutoff=0.7, quoted="`{}`".format)
    raise TaskError(f"`{path}` must hold {DATA}, but there is no such file; {hint}")


def resolved(options: Mapping[str, Any], base: Path) -> dict[str, str]:
    """Model, data and images as paths from the base folder, where they are paths; hub ids as they are."""
    given = {key: options[key] for key in PATHS if isinstance(options.get(key), str) and options[key]}
    for key, value in given.items():
        path = base / os.path.expanduser(value)  # leaves an unknown user as it is
        if (
            os.path.exists(path)
            or looks_like_path(value)
            or key in ("image_folder", "chat_template")
            or (key == "data" and path.suffix and not os.path.exists(value))
        ):
            given[key] = str(path)
        elif os.path.exists(value):
            must = f"`{key}` must be found from the study file's folder ({base})"
            raise TaskError(f"{must}, but `{value}` is there from the working directory only; correct the path.")
    return given


def check_source(source: str | Path, *, base: Path = Path()) -> None:
    """Raise a TaskError if there is no such model folder, looked for in `base`, and the hub cannot be asked for the model."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    must = f"`{source}` must be a model folder or hub id"
    if not str(source).strip():
        raise TaskError("`model` must be a model folder or hub id, but is empty.")
    path, is_id = Path(source), not looks_like_path(source)
    if os.path.isdir(path):
        return
    try:
        if is_id and (isinstance(try_to_load_from_cache(str(source), "config.json"), str) or hub_answers()):
            return
    except HFValidationError as error:
        raise TaskError(f"{must}, but is neither: {one_line(error)}") from None
    near = (each.name for each in (base / path).parent.glob("*") if each.is_dir())
    hint = did_you_mean(path.name, near, "check the path.", quoted=lambda name: f"`{path.with_name(name)}`")
    where = f" in {(base / path).parent.resolve()}, and the hub cannot be asked for it" if is_id else ""
    raise TaskError(f"{must}, but there is no such folder{where}; {hint}")


def looks_like_path(source: str | Path) -> bool:
    """Whether a name cannot be a hub id, which is `name` or `owner/name`."""
    return str(source).startswith((".", "~", os.sep)) or len(Path(source).parts) > 2


@cache
def hub_answers() -> bool:
    """Whether HF_HUB_OFFLINE is unset and the hub answers within 5 seconds, where its client would try for a minute."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # of the client's HTTP library, which differs between its versions
        return False
    return True
