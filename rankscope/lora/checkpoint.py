"""True ranks beside a checkpoint (`ranks.json`), restored before its weights are loaded."""

from __future__ import annotations

import os
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import Tensor
from torch.optim import Optimizer

from rankscope.errors import FileError, ModelError
from rankscope.files import read_json, read_tensors, write_json
from rankscope.lora.masks import RankMasks, masks_on
from rankscope.lora.resize import (
    Resize,
    adapted_parameters,
    adapter_layers,
    choose_adapter,
    factors,
    rank_of,
    resize_adapters,
    unwrap_peft_model,
)

RANKS_FILE = "ranks.json"
SCHEMA = 1
_LOADED = "adapters_loaded_from"
_FACTOR_A = (".lora_A.weight", ".lora_embedding_A")
_MASKED_FACTORS = (".lora_A.weight", ".lora_B.weight")  # rank first and second
_PREFIX = "base_model.model."


def save_ranks(model: PeftModel, folder: str | os.PathLike[str], *, adapter_name: str | None = None) -> Path:
    """Writes the adapter's ranks (0 included) into a checkpoint's folder, atomically.

    Of a model that carries masks these are the active ranks; the capacity and which components are active are written, too.

    Args:
        model: As it was when the checkpoint's weights were saved.
        folder: Where the adapter's weights are; PEFT has a subfolder for an adapter not called `default`.
        adapter_name: Which adapter; may be left out where there is only one.

    Returns:
        The path of `ranks.json`.

    Raises:
        ModelError: The model has no such adapter.
    """
    model = unwrap_peft_model(model)
    adapter = choose_adapter(model, adapter_name)
    path = Path(folder) / RANKS_FILE
    value: dict[str, Any] = {"schema": SCHEMA, "adapter": adapter}
    value["ranks"] = {name: rank_of(layer, adapter) for name, layer in adapter_layers(model, adapter).items()}
    if (masks := masks_on(model)) is not None:
        value["capacity"], value["active"] = dict(value["ranks"]), masks.active
        value["ranks"] |= masks.ranks
    write_json(path, value)
    return path


def restore_ranks(
    model: PeftModel,
    folder: str | os.PathLike[str],
    *,
    optimizer: Optimizer | None = None,
    adapter_name: str | None = None,
) -> None:
    """Gives the model the ranks of a checkpoint, so that the checkpoint's weights, and its optimizer's state, can be loaded.

    The factors keep what fits of their values, to be overwritten by the weights. Where the checkpoint's config differs in
    scaling, the model's stays. A checkpoint of masked ranks gives its masks to a model of the same capacity; its weights, which
    are of the active ranks only, are for `restore_ranks_on_load` to place.

    Args:
        model: With the adapter on the same modules, at whatever ranks.
        folder: The checkpoint's, with its `ranks.json`.
        optimizer: Where there is one already; one that is built afterwards has the right shapes by itself.
        adapter_name: Which adapter; may be left out where there is only one.

    Raises:
        FileError: There is no `ranks.json`, or it is of another schema.
        ModelError: It is of another model, or disagrees with the weights beside it; nothing is changed.
        ModelError: An optimizer that does not own the parameters, or whose state cannot be carried.
    """
    model = unwrap_peft_model(model)
    adapter = choose_adapter(model, adapter_name)
    saved = _read(Path(folder) / RANKS_FILE)
    ranks: Mapping[str, int] = saved["ranks"]
    present = {name: rank_of(layer, adapter) for name, layer in adapter_layers(model, adapter).items()}
    if odd := sorted(set(ranks) ^ set(present)):
        where = "the checkpoint" if odd[0] in ranks else "the model"
        remedy = "adapt the same modules"
        if not any(ranks.get(name, 1) for name in odd):  # all are asleep
            remedy = (
                "wrap the base model as for the first run, since PeftModel.from_pretrained leaves modules of rank 0 out"
            )
        raise ModelError(
            f"`{folder}` must hold ranks of this model's adapted modules, but `{odd[0]}` is in {where} only "
            f"({len(odd)} such); {remedy}."
        )
    if (weights := _ranks_of_weights(Path(folder), model, adapter)) is not None:
        _check_weights(weights, ranks, folder)
    masks = masks_on(model)
    if "active" not in saved:
        if masks is not None:
            raise ModelError(
                f"`{folder}` must hold masked ranks for a model that carries masks, but holds a live resize's; `compress` the "
                "masks."
            )
        resizes = [Resize(name=name, rank=rank) for name, rank in ranks.items() if rank != present[name]]
        resize_adapters(model, optimizer, resizes, adapter_name=adapter)
        return
    if odd := sorted(name for name, capacity in saved["capacity"].items() if present[name] != capacity):
        raise ModelError(
            f"masks must have the capacity of the checkpoint, but `{odd[0]}` has {present[odd[0]]} "
            f"and `{folder}` {saved['capacity'][odd[0]]}; wrap the model at that rank."
        )
    (masks or RankMasks(model, adapter_name=adapter)).restore(saved["active"])


def restore_ranks_on_load(model: PeftModel) -> None:
    """Makes `model.load_adapter` restore a checkpoint's ranks first, where the checkpoint has a `ranks.json`.

    For transformers' Trainer, which calls `load_adapter` on resuming (before it builds the optimizer) and to load the
    best model at the end, and offers no callback before either.
    """
    model.load_adapter = types.MethodType(load_adapter, model)


def loaded_from(model: PeftModel, adapter_name: str) -> Path | None:
    """The folder that an adapter was last loaded from, since `restore_ranks_on_load`."""
    folders: Mapping[str, Path] = getattr(unwrap_peft_model(model), _LOADED, {})
    return folders.get(adapter_name)


def load_adapter(
    self: PeftModel, model_id: str | os.PathLike[str], adapter_name: str, *args: Any, **kwargs: Any
) -> Any:
    """`PeftModel.load_adapter`, the ranks restored first.

    Raises:
        ModelError: As `restore_ranks`; also where there is no `ranks.json`, and the weights are of other ranks.
    """
    if adapter_name not in self.peft_config:
        return type(self).load_adapter(self, model_id, adapter_name, *args, **kwargs)
    setattr(self, _LOADED, {**getattr(self, _LOADED, {}), adapter_name: Path(model_id)})
    if not (Path(model_id) / RANKS_FILE).exists():
        check_weights_fit(self, Path(model_id), adapter_name)
        return type(self).load_adapter(self, model_id, adapter_name, *args, **kwargs)
    restore_ranks(self, model_id, adapter_name=adapter_name)
    if (masks := masks_on(self)) is None:
        return type(self).load_adapter(self, model_id, adapter_name, *args, **kwargs)
    weights = load_peft_weights(str(model_id), device="cpu")
    return set_peft_model_state_dict(self, _at_capacity(self, masks, weights), adapter_name=adapter_name)


def _at_capacity(model: PeftModel, masks: RankMasks, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the active ranks in tensors of the capacity; inactive rows of A stay, inactive columns of B are 0."""
    placed = dict(weights)
    layers = adapter_layers(model, masks.adapter)
    for name, active in masks.active.items():
        for dim, factor in enumerate(factors(layers[name], masks.adapter)):
            whole = factor.detach().cpu().clone() if dim == 0 else torch.zeros(factor.shape, dtype=factor.dtype)
            key = _PREFIX + name + _MASKED_FACTORS[dim]
            if active:
                whole.index_copy_(dim, torch.tensor(active), weights[key].to(whole))
            placed[key] = whole
    return placed


def _read(path: Path) -> dict[str, Any]:
    saved = read_json(path, what="an adapter's ranks")
    if saved.get("schema") != SCHEMA:
        raise FileError(f"`{path}` must have schema {SCHEMA}, but has {saved.get('schema')!r}; write it again.")
    ranks = saved.get("ranks")
    if not isinstance(ranks, dict) or not all(type(rank) is int and rank >= 0 for rank in ranks.values()):
        raise FileError(f"`{path}` must hold a rank for each module, but does not; it was edited: write it again.")
    if "active" in saved and not _are_masks(saved["active"], saved.get("capacity"), ranks):
        raise FileError(
            f"`{path}` must hold the active components of each module within its capacity, but does not; it was edited: write it "
            "again."
        )
    return saved


def _are_masks(active: Any, capacity: Any, ranks: Mapping[str, int]) -> bool:
    if (
        not isinstance(active, dict)
        or not isinstance(capacity, dict)
        or not active.keys() == capacity.keys() <= ranks.keys()
    ):
        return False
    return all(
        isinstance(indices, list)
        and type(capacity[name]) is int
        and all(type(index) is int and 0 <= index < capacity[name] for index in indices)
        and len(set(indices)) == len(indices) == ranks[name]
        for name, indices in active.items()
    )


def _check_weights(weights: Mapping[str, int], ranks: Mapping[str, int], folder: str | os.PathLike[str]) -> None:
    """Refuses ranks that are not those of the weights in the same folder."""
    for name in sorted({name for name, rank in ranks.items() if rank > 0} | set(weights)):
        if ranks.get(name, 0) != weights.get(name, 0):
            raise ModelError(
                f"`{folder}` must hold weights of the ranks in its {RANKS_FILE}, but `{name}` has rank {weights.get(name, 0)} in "
                f"the weights and {ranks.get(name, 0)} there; it mixes two checkpoints: use another."
            )


def check_weights_fit(model: PeftModel, folder: Path, adapter: str) -> None:
    """Refuses weights of other ranks than the model's."""
    weights = _ranks_of_weights(folder, model, adapter)
    if weights is None:
        return
    present = {name: rank_of(layer, adapter) for name, layer in adapter_layers(model, adapter).items()}
    for name in sorted({*present, *weights}):
        if present.get(name, 0) != (rank := weights.get(name, 0)):
            raise ModelError(
                f"`{folder}` must hold weights of the model's ranks, or its own {RANKS_FILE} beside them, but `{name}` has rank "
                f"{rank} there and {present.get(name, 0)} in the model; it was not finished, or is of another model: use another."
            )


def _ranks_of_weights(folder: Path, model: PeftModel, adapter: str) -> dict[str, int] | None:
    """Read from the shapes alone, adapters on parameters left out; None in a folder without weights."""
    paths = [folder / name for name in ("adapter_model.safetensors", "adapter_model.bin")]
    if not (present := [path for path in paths if path.exists()]):
        return None
    shapes = {
        key: tensor.shape
        for key, tensor in read_tensors(present[0], what="an adapter's weights", device="meta").items()
    }
    fused = {name.rpartition(".")[0] for name in adapted_parameters(model, adapter)}
    ranks = {
        key.removeprefix(_PREFIX).removesuffix(suffix): shape[0]
        for key, shape in shapes.items()
        for suffix in _FACTOR_A
        if key.endswith(suffix) and shape
    }
    return {name: rank for name, rank in ranks.items() if name.replace(".base_layer", "") not in fused}
