"""Saved adapters: PEFT's own files, with a model card that says how to load them, which ranks they have and what they reach."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rankscope.allocation import RankAllocation
from rankscope.early import looks_like_path
from rankscope.files import replacing, seal_tensors, write_json
from rankscope.lora import CARD, RANKS_TITLE, count_adapter_parameters
from rankscope.tasks import Task

_LOADERS = {  # by the task's `task_type`
    "SEQ_CLS": "AutoPeftModelForSequenceClassification", "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification", "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM", None: "AutoPeftModel",
}  # fmt: skip


def save_adapter(model: Any, task: Task, folder: str | os.PathLike[str]) -> Path:
    """Save a trained model by its own `save_pretrained`, with a model card that says how to load it in plain PEFT.

    Options for the base model (`id2label`, …) go to `model_kwargs.json`. The folder is replaced as a whole.
    """
    options = dict(getattr(task, "model_kwargs", {}))
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    source = str(getattr(base, "name_or_path", "") or "")
    on_hub = source and not looks_like_path(source) and not os.path.isdir(source)
    head = ["---", *([f"base_model: {json.dumps(source)}"] if on_hub else []), "library_name: peft"]
    text = [*head, "tags:", "- lora", "- rankscope", "---", f"# Adapter for `{task.name}`", ""]
    text += [
        f"Base model: `{source or type(base).__name__}`.",
        "",
        "## How to load it",
        "",
        *_how(base, task, options),
        "",
    ]
    with replacing(folder, folder=True) as temporary:
        model.save_pretrained(str(temporary))
        for weights in temporary.rglob("*.safetensors"):
            seal_tensors(weights)
        if options:
            write_json(temporary / "model_kwargs.json", options)
        (temporary / CARD).write_text("\n".join([*text, *_ranks(model)]), encoding="utf-8")
    return Path(folder)


def add_to_card(folder: str | os.PathLike[str], title: str, lines: Sequence[str]) -> None:
    """Add a section to the model card of a saved adapter."""
    path = Path(folder, CARD)
    text = path.read_text(encoding="utf-8")
    with replacing(path) as temporary:
        temporary.write_text("\n".join([text, f"## {title}", "", *lines, ""]), encoding="utf-8")


def _how(base: Any, task: Task, options: dict[str, Any]) -> list[str]:
    """What to do to load it, as Markdown."""
    kind = f"{type(base).__module__}.{type(base).__name__}"
    loader = _LOADERS.get(getattr(task, "task_type", ""))
    if loader == "AutoPeftModel" and not kind.startswith("transformers."):  # it would refuse to import the class
        loader = None
    if loader is None:
        return [f"Build the base model, a `{kind}`, then `rankscope.lora.load_adapter(base, folder)`."]
    code = [f"from peft import {loader}", ""]
    if options:
        code = ["import json", *code, 'options = json.load(open(f"{folder}/model_kwargs.json"))']
    if "id2label" in options:  # JSON has no keys but strings
        code.append('options["id2label"] = {int(code): label for code, label in options["id2label"].items()}')
    code.append(f"model = {loader}.from_pretrained(folder{', **options' if options else ''})")
    return ["With `folder` the path of this folder:", "", "```python", *code, "```"]


def _ranks(model: Any) -> list[str]:
    """Parameters, and of LoRA the ranks by tower and role, as Markdown."""
    configs = getattr(model, "peft_config", {})
    if not configs:
        return []
    lines = [RANKS_TITLE, "", f"{count_adapter_parameters(model):,} adapter parameters."]
    if any(config.peft_type != "LORA" for config in configs.values()) or len(configs) > 1:
        return [*lines, ""]
    allocation = RankAllocation.from_peft_model(model)
    lines += ["", "| modules | adapted | ranks | parameters |", "| --- | ---: | ---: | ---: |"]
    groups: dict[str, list[tuple[int, int]]] = {}
    for target, rank in zip(allocation.targets, allocation.vector, strict=True):
        groups.setdefault(f"{target.tower} {target.role}", []).append((rank, rank * target.rank_cost))
    for group, members in groups.items():
        ranks = sorted({rank for rank, _ in members})
        span = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"{ranks[0]}"
        lines.append(f"| {group} | {len(members)} | {span} | {sum(cost for _, cost in members):,} |")
    return [*lines, "", "All others have none. `adapter_config.json` holds each module's.", ""]
