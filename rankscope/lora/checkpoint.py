"""Checkpoints of adapters whose ranks changed: true ranks in `ranks.json`, restored before the weights are loaded."""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, PeftType, load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from torch.optim import Optimizer

from rankscope.errors import FileError, ModelError
from rankscope.files import AnyPath, read_json, read_tensors, write_json
from rankscope.lora.config import PEFT_PREFIX
from rankscope.lora.masks import RankMasks, masks_on
from rankscope.lora.resize import FACTORS, LiveAdapter, Resize, resize_adapters
from rankscope.targets import unwrapped

RANKS_FILE = "ranks.json"
SCHEMA = 1
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_FACTOR_A = re.compile(rf"(?:{re.escape(PEFT_PREFIX)})?(.*)\.lora_(?:A\.weight|embedding_A)")


def save_ranks(model: PeftModel, folder: AnyPath, *, adapter_name: str | None = None) -> Path:
    """Write the adapter's ranks, of a masked model the active ones, to `ranks.json` beside its weights; return the path."""
    adapter, path = LiveAdapter(model, adapter_name), Path(folder) / RANKS_FILE
    value: dict[str, Any] = {"schema": SCHEMA, "adapter": adapter.name, "ranks": adapter.ranks}
    if (masks := masks_on(adapter.model)) is not None:
        value |= {"ranks": adapter.ranks | dict(masks.ranks), "capacity": adapter.ranks, "active": masks.active}
    write_json(path, value, sealed=True)
    return path


def restore_ranks(
    model: PeftModel, folder: AnyPath, *, optimizer: Optimizer | None = None, adapter_name: str | None = None
) -> None:
    """Give the model a checkpoint's ranks, so that the checkpoint's weights and optimizer state can be loaded.

    The model, and the optimizer if there is one, may be at any ranks; its scaling stays. Masked ranks need a model of the same
    capacity; `restore_ranks_on_load` places their weights. Nothing is changed if `ranks.json` is broken (a FileError), is of
    another model, or disagrees with the weights beside it (a ModelError).
    """
    adapter = LiveAdapter(model, adapter_name)
    saved = _read(Path(folder) / RANKS_FILE)
    ranks, present, masks = saved["ranks"], adapter.ranks, masks_on(adapter.model)
    if odd := sorted(set(ranks) ^ set(present)):
        where, remedy = "checkpoint" if odd[0] in ranks else "model", "adapt the same modules."
        if not any(ranks.get(name, 1) for name in odd):
            remedy = "wrap the base model as for the first run, since PeftModel.from_pretrained leaves modules of rank 0 out."
        must = f"`{folder}` must hold ranks of this model's adapted modules"
        raise ModelError(f"{must}, but `{odd[0]}` is in the {where} only ({len(odd)} such); {remedy}")
    _check_weights(adapter, Path(folder), ranks)
    if "active" in saved:
        for name, capacity in sorted(saved["capacity"].items()):
            if (has := present[name]) != capacity:
                but = f"but `{name}` has {has} and `{folder}` {capacity}; wrap the model at that rank."
                raise ModelError(f"masks must have the capacity of the checkpoint, {but}")
        (masks or RankMasks(model, adapter_name=adapter.name)).restore(saved["active"])
        return
    if masks is not None:
        but = "but holds a live resize's; `compress` the masks."
        raise ModelError(f"`{folder}` must hold masked ranks for a model that carries masks, {but}")
    resizes = [Resize(name=name, rank=rank) for name, rank in ranks.items() if rank != present[name]]
    resize_adapters(model, optimizer, resizes, adapter_name=adapter.name)


def restore_ranks_on_load(model: PeftModel) -> None:
    """Make `model.load_adapter` restore a checkpoint's ranks first; `del model.load_adapter` undoes it."""
    model.load_adapter = types.MethodType(_load_with_ranks, model)


def loaded_from(model: PeftModel, adapter_name: str) -> Path | None:
    """The folder that an adapter was last loaded from, since `restore_ranks_on_load`."""
    folders: dict[str, Path] = vars(unwrapped(model)).get("adapters_loaded_from", {})
    return folders.get(adapter_name)


def _load_with_ranks(self: PeftModel, model_id: AnyPath, adapter_name: str, *args: Any, **kw: Any) -> Any:
    """`PeftModel.load_adapter`, the ranks restored first."""
    folder = Path(model_id)
    if adapter_name in self.peft_config:
        self.adapters_loaded_from = {**vars(self).get("adapters_loaded_from", {}), adapter_name: folder}
        if (folder / RANKS_FILE).exists():
            restore_ranks(self, folder, adapter_name=adapter_name)
            if (masks := masks_on(self)) is not None:
                weights = _at_capacity(masks, load_peft_weights(str(folder), device="cpu"))
                return set_peft_model_state_dict(self, weights, adapter_name=adapter_name)
        else:
            _check_weights(LiveAdapter(self, adapter_name), folder)
    return type(self).load_adapter(self, model_id, adapter_name, *args, **kw)


_load_with_ranks.__name__ = "load_adapter"  # under which a model's copy or pickle looks for it


def _at_capacity(masks: RankMasks, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the active ranks in tensors of the capacity; inactive rows of A stay, inactive columns of B are 0."""
    placed = dict(weights)
    for name, active in masks.active.items():
        a, b = (factor.detach().cpu() for factor in masks.live.modules[name].factors)
        for dim, (part, full) in enumerate(zip(FACTORS, (a.clone(), torch.zeros_like(b)), strict=True)):
            key = f"{PEFT_PREFIX}{name}.{part[0]}.{part[1]}"
            if active:
                full.index_copy_(dim, torch.tensor(active), weights[key].to(full))
            placed[key] = full
    return placed


def load_adapter(model: nn.Module, folder: AnyPath) -> PeftModel:
    """Wrap `model` (in place) with the adapter that `PeftModel.save_pretrained` left in a folder, trained modules included.

    An adapter whose `task_type` names one of rankscope's own classes, which plain PEFT rejects, is loaded into that class only.
    A FileError if the folder does not hold an adapter of this model.
    """
    path = Path(folder) / "adapter_config.json"
    values = read_json(path, what="an adapter's config")
    if "peft_type" not in values:
        raise FileError(f"`{path}` must hold an adapter's config, but has no `peft_type`; save the adapter again.")
    if values.get("task_type") == f"{type(model).__module__}.{type(model).__name__}":
        values["task_type"] = None
    try:
        loaded = PeftModel.from_pretrained(model, str(folder), config=LoraConfig.from_peft_type(**values))
        if loaded.peft_config["default"].peft_type == PeftType.LORA:
            _check_weights(LiveAdapter(loaded), Path(folder))  # PEFT loads what it finds
    except FileError:
        raise
    except Exception as error:  # PEFT checks no values: a wrong one raises whatever its first use raises
        why = f"cannot be loaded ({f'{type(error).__name__}: {error}'.splitlines()[0]})"
        raise FileError(f"`{folder}` must hold an adapter of this model, but {why}; delete it.") from None
    return loaded


def _read(path: Path) -> dict[str, Any]:
    saved = read_json(path, what="an adapter's ranks")
    ranks, edited = saved.get("ranks"), "but does not; it was edited: write it again."
    if saved.get("schema") != SCHEMA:
        raise FileError(f"`{path}` must have schema {SCHEMA}, but has {saved.get('schema')!r}; write it again.")
    if not isinstance(ranks, dict) or not all(type(rank) is int and rank >= 0 for rank in ranks.values()):
        raise FileError(f"`{path}` must hold a rank for each module, {edited}")
    if "active" in saved and not _are_masks(saved["active"], saved.get("capacity"), ranks):
        raise FileError(f"`{path}` must hold the active components of each module within its capacity, {edited}")
    return saved


def _are_masks(active: Any, capacity: Any, ranks: dict[str, int]) -> bool:
    """Whether this lists as many components of each module as its rank, each below its capacity, none twice."""
    if not (isinstance(active, dict) and isinstance(capacity, dict)):
        return False
    for name, found in active.items():
        most = capacity.get(name)
        if not isinstance(found, list) or any(type(number) is not int for number in (most, *found)):
            return False
        if not len(found) == len(set(found)) == ranks.get(name) or any(not 0 <= index < most for index in found):
            return False
    return active.keys() == capacity.keys()


def _check_weights(adapter: LiveAdapter, folder: Path, saved: Mapping[str, int] | None = None) -> None:
    """Raise a ModelError unless the folder's weights, if there are any, have the ranks saved beside them, or the model's."""
    if not (paths := [folder / name for name in _WEIGHTS if (folder / name).exists()]):
        return
    fused = {name.rpartition(".")[0] for name in adapter.parameters}
    found = {}
    for key, tensor in read_tensors(paths[0], what="an adapter's weights", device="meta").items():
        match = _FACTOR_A.fullmatch(key)
        if match and tensor.ndim and match[1].replace(".base_layer", "") not in fused:
            found[match[1]] = len(tensor)
    what, where, why = f"the ranks in its {RANKS_FILE}", "there", "it mixes two checkpoints"
    if saved is None:
        what, where = f"the model's ranks, or its own {RANKS_FILE} beside them", "in the model"
        why = "it was not finished, or is of another model"
    ranks = adapter.ranks if saved is None else saved
    for name in sorted({*ranks, *found}):
        if (rank := found.get(name, 0)) != (wanted := ranks.get(name, 0)):
            but = f"but `{name}` has rank {rank} in the weights and {wanted} {where}"
            raise ModelError(f"`{folder}` must hold weights of {what}, {but}; {why}: use another.")
