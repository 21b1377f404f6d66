"""Saving what was trained, so that plain PEFT loads it, or refuses where it could not run it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import nn

from rankscope.files import replacing_folder, write_json
from rankscope.tasks import Task

OPTIONS_FILE = "model_kwargs.json"
_LOADERS = {"SEQ_CLS": "AutoPeftModelForSequenceClassification", "CAUSAL_LM": "AutoPeftModelForCausalLM"}


def save_adapter(model: nn.Module, task: Task, folder: str | os.PathLike[str]) -> Path:
    """Saves a trained model by its own `save_pretrained`, with a README that says how to load it.

    What the base model must be loaded with (`id2label`, …) goes to `model_kwargs.json`. The folder is replaced as a whole.

    Args:
        model: What `train` gave.
        task: What it was trained on.
        folder: Where to.
    """
    options: dict[str, Any] = dict(getattr(task, "model_kwargs", {}))
    with replacing_folder(folder) as temporary:
        model.save_pretrained(str(temporary))  # type: ignore[operator]
        if options:
            write_json(temporary / OPTIONS_FILE, options)
        (temporary / "README.md").write_text(_readme(model, task, options), encoding="utf-8")
    return Path(folder)


def _readme(model: nn.Module, task: Task, options: dict[str, Any]) -> str:
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    source = json.dumps(getattr(base, "name_or_path", "") or "")
    loader = _LOADERS.get(getattr(task, "task_type", None) or "")
    how = ["With `folder` the path of this folder:", "", "```python", *_code(loader, options), "```"]
    if loader is None:
        kind = f"{type(base).__module__}.{type(base).__name__}"
        how = [f"Build the base model, a `{kind}`, then `rankscope.adapters.load_adapter(base, folder)`."]
    return "\n".join(
        ["---", f"base_model: {source}", "library_name: peft", "---", f"# LoRA for `{task.name}`", "", *how, ""]
    )


def _code(loader: str | None, options: dict[str, Any]) -> list[str]:
    lines = [f"from peft import {loader}", ""]
    if options:
        lines = ["import json", *lines, f'options = json.load(open(f"{{folder}}/{OPTIONS_FILE}"))']
    if "id2label" in options:  # JSON knows no keys but strings
        lines.append('options["id2label"] = {int(code): label for code, label in options["id2label"].items()}')
    return [*lines, f"model = {loader}.from_pretrained(folder{', **options' if options else ''})"]
