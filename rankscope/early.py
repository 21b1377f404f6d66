"""What can be refused before anything heavy is imported: names, models, data and files that do not exist."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from rankscope.errors import FileError, SettingsError, TaskError, did_you_mean, one_line, shown
from rankscope.files import AnyPath
from rankscope.plugins import check_file, entry_points

TASK_TYPES = (
    "sequence-classification", "causal-lm", "chat", "sequence-to-sequence", "token-classification", "image-classification",
    "image-text-to-text",
)  # fmt: skip
READY_TASKS = (
    "digits-shift", "dinov2-digits", "supersense", "sentiment", "word-order", "glosses", "emoji-scenes", "digit-scenes",
)  # fmt: skip
PATHS = ("model", "data", "image_folder", "chat_template")  # options of generic tasks that may be paths
DATA_SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")
DATA = "the task's data"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
EXPORTS = ("peft", "axolotl", "kohya", "unsloth", "trl")
# Tools with one rank for all modules, and what they call it.
_ONE_RANK = {"llama-factory": ("LLaMA-Factory", "lora_rank"), "ms-swift": ("ms-swift", "lora_rank")}


def check_task_spec(spec: Any, base: Path, *, data_too: bool = True) -> None:
    """Raise the TaskError that `load_task` would raise for a name, type, function's file, model folder or data file."""
    if isinstance(spec, str) and ":" in spec:
        check_file(spec, base, error=TaskError)
        return
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    if "type" not in options:
        check_name(options.get("name"))
        return
    check_type(options["type"])
    options |= resolved(options, base)
    if data_too and isinstance(data := options.get("data"), str):
        check_data(data)
    if isinstance(model := options.get("model"), str):
        check_source(model, base=base)


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


def check_type(kind: Any) -> None:
    """Raise a TaskError unless this is the type of a generic task."""
    if not isinstance(kind, str) or kind not in TASK_TYPES:
        raise TaskError(f"`task.type` must be one of {', '.join(TASK_TYPES)}, but got {shown(kind)}.")


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
