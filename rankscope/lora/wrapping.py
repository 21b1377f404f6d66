"""Base models wrapped with adapters: LoRA of an allocation, and what PEFT has to compare with."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import peft
import torch
from torch import Tensor, nn

from rankscope.errors import ModelError, SettingsError
from rankscope.lora.config import (
    PEFT_PREFIX,
    alpha_for,
    applied_by_peft,
    check_block_names,
    check_config,
    name_fields,
    names_regex,
    taken_for_experts,
    to_lora_config,
)
from rankscope.lora.resize import LiveAdapter, Resize, lora_modules, resize_adapters
from rankscope.targets import TargetModule, unwrapped

if TYPE_CHECKING:
    from rankscope.allocation import RankAllocation


def apply_allocation(
    model: nn.Module, allocation: RankAllocation, *, dormant: bool = False, **peft_kwargs: Any
) -> peft.PeftModel:
    """Wrap the base `model` (in place) with LoRA of exactly these ranks, and check that PEFT built what was asked.

    With `dormant`, modules of rank 0 get an inactive adapter, which `resize_adapters` can activate. The other arguments are
    those of `to_lora_config`. A SettingsError if the allocation is for another model, or PEFT cannot build it.
    """
    if dormant and "lora_alpha" in peft_kwargs:
        raise SettingsError("`dormant` needs one scaling at every rank, which `lora_alpha` is not; pass `scaling`.")
    model = unwrapped(model)  # PEFT takes the name of torch.compile's wrapper for a part of every module's
    if isinstance(model, peft.PeftModel):
        raise SettingsError("`model` must be a base model, but is a PeftModel already; pass `model.unload()`.")
    present = dict(model.named_modules())
    check_block_names(present)
    if missing := [name for name, rank in allocation.ranks.items() if (rank or dormant) and name not in present]:
        lacks = f"{type(model).__name__} has no module {missing[0]!r} ({len(missing)} such)"
        raise SettingsError(f"`allocation` must be for this model, but {lacks}; find targets on it and allocate again.")
    inactive = [Resize(name=name, rank=0) for name, rank in allocation.ranks.items() if rank == 0 and dormant]
    if inactive:
        allocation = replace(allocation, vector=tuple(max(rank, 1) for rank in allocation.vector))
    config = to_lora_config(allocation, **peft_kwargs)
    if dormant:
        check_config(config, to_zero=bool(inactive))
    peft_model = _wrap(model, config, allocation.ranks)
    resize_adapters(peft_model, None, inactive)
    return peft_model


def _wrap(model: nn.Module, config: peft.PeftConfig, ranks: Mapping[str, int], **options: Any) -> peft.PeftModel:
    """`get_peft_model`, and a check that PEFT adapts exactly these modules at these ranks; otherwise the model is unwrapped."""
    names = [name for name, rank in ranks.items() if rank]
    if away := [name for name in names if any(weight.is_meta for weight in model.get_submodule(name).parameters())]:
        raise SettingsError(f"the weights of `{away[0]}` must be in memory, but are offloaded; load the model without.")
    if config.peft_type == peft.PeftType.LORA and (taken := sorted(taken_for_experts(model, names))):
        what = (
            f"`{taken[0]}` ({len(taken)} such), whose name PEFT takes for the fused experts of {type(model).__name__}"
        )
        raise SettingsError(f"the allocation must leave out {what}; give it rank 0.")
    peft_model = peft.get_peft_model(model, config, **options)
    built = {name: module.layer.r["default"] for name, module in lora_modules(peft_model, "default")[0].items()}
    for name in sorted({*built, *names}):
        if (asked := ranks.get(name, 0)) != (got := built.get(name, 0)):
            peft_model.unload()
            raise SettingsError(f"PEFT must build rank {asked} for `{name}`, but built {got}; leave it out.")
    return peft_model


def wrap_with_config(model: nn.Module, config: peft.PeftConfig, heads: Sequence[str] = ()) -> peft.PeftModel:
    """Wrap `model` (in place) with any adapter of PEFT, as `get_peft_model` does; `heads` are trained as well.

    The config is copied. A ModelError if PEFT cannot apply it to this model.
    """
    if not isinstance(config, peft.PeftConfig):
        raise ModelError(f"`config` must be a peft.PeftConfig, but is a {type(config).__name__}.")
    config = with_heads(config, heads)
    with applied_by_peft("config"):
        return peft.get_peft_model(unwrapped(model), config)


def with_heads(config: peft.PeftConfig, heads: Sequence[str]) -> peft.PeftConfig:
    """A copy of the config that also trains these modules in full."""
    config = copy.deepcopy(config)
    if heads:
        config.modules_to_save = sorted({*(getattr(config, "modules_to_save", None) or ()), *heads})
    return config


def vera_config(targets: Sequence[TargetModule], r: int) -> peft.VeraConfig:
    """VeRA (Kopiczko et al., arXiv 2310.11454) on the linear modules among the targets, which share two random projections.

    Each module trains a vector of `r` and one of its outputs.
    """
    linear = [target.name for target in targets if target.kind in ("linear", "conv1d")]
    if not linear:
        raise SettingsError(f"VeRA needs linear modules, but none of the {len(targets)} targets is one; leave it out.")
    return peft.VeraConfig(r=r, target_modules=names_regex(linear))


def ia3_config(targets: Sequence[TargetModule]) -> peft.IA3Config:
    """(IA)³ (Liu et al., arXiv 2205.05638) on all targets: a factor for each output, in the last module of an MLP each input.

    In the paper it is on keys, values and that last module only.
    """
    inputs = [target.name for target in targets if target.role in ("fc2", "down_proj")]
    feedforward = names_regex(inputs) if inputs else []  # None: PEFT's own choice
    return peft.IA3Config(target_modules=names_regex(t.name for t in targets), feedforward_modules=feedforward)


def wrap_with_adalora(
    model: nn.Module,
    targets: Sequence[TargetModule],
    *,
    rank: int,
    initial_rank: int,
    alpha: float,
    steps: int,
    share: float = 1.0,
    settled: float,
    **peft_kwargs: Any,
) -> peft.PeftModel:
    """Wrap `model` (in place) with AdaLoRA (Zhang et al., arXiv 2303.10512), which starts at `initial_rank` everywhere.

    A tenth of the steps in, ranks begin to fall, to a mean of `share * rank` when the fraction `settled` of the steps is over.
    AdaLoRA counts ranks, not parameters, so with `share=1` it may end above a budget in parameters.
    """
    ranks = {target.name: initial_rank for target in targets}
    when = {"tinit": round(0.1 * steps), "tfinal": steps - round(settled * steps), "deltaT": max(1, steps // 100)}
    options = peft_kwargs | name_fields(ranks) | {"total_step": steps} | when
    config = peft.AdaLoraConfig(target_r=rank, init_r=initial_rank, lora_alpha=alpha, **options)
    wrapped = _wrap(model, config, ranks)
    wrapped.base_model.rankallocator.target_bgt = round(share * rank * len(targets))
    return wrapped


def ranks_of_adalora(model: Any) -> dict[str, int]:
    """The ranks that are not masked; each also has one singular value, which is not counted."""
    (config,) = model.peft_config.values()
    if not config.rank_pattern:
        return dict.fromkeys(lora_modules(model, "default")[0], config.init_r)
    return {name.split(".lora_E")[0].removeprefix(PEFT_PREFIX): sum(mask) for name, mask in config.rank_pattern.items()}


def wrap_with_eva(
    model: nn.Module,
    targets: Sequence[TargetModule],
    batches: Sequence[Mapping[str, Any]],
    *,
    rank: int,
    scaling: float,
    rho: float = 2.0,
    **peft_kwargs: Any,
) -> peft.PeftModel:
    """Wrap `model` (in place) with EVA (Paischer et al., arXiv 2410.07170): ranks and rows of A come from modules' inputs.

    The mean is `rank` and the largest `rho * rank`; a module may end without any. The batches are repeated until the directions
    have settled; the first one must reach all targets.
    """
    ranks = {target.name: rank for target in targets}
    options = peft_kwargs | name_fields(ranks) | {"init_lora_weights": "eva", "eva_config": peft.EvaConfig(rho=rho)}
    config = peft.LoraConfig(r=rank, lora_alpha=alpha_for(rank, scaling, rslora=False), **options)
    wrapped = _wrap(model, config, ranks, low_cpu_mem_usage=True)
    unseen = {PEFT_PREFIX + name: name for name in ranks}

    def forward(model: nn.Module, batch: Mapping[str, Any]) -> None:
        model(**batch)
        if unseen:
            but = f"but the first batch does not reach `{next(iter(unseen.values()))}` ({len(unseen)} such)"
            remedy = "leave it out of the targets, or give batches that do."
            raise ModelError(f"EVA needs the inputs of every target module, {but}; {remedy}")

    def rows(inputs: Any, seen: Tensor | None, name: str) -> Tensor:
        """(n, width): the inputs at the tokens seen, whether (batch, length, width) or already flat, as before experts."""
        unseen.pop(name, None)
        values: Tensor = inputs[0] if isinstance(inputs, tuple | list) else inputs
        flat = values.reshape(-1, values.shape[-1])
        if seen is None or values.shape[:-1] not in (seen.shape, (seen.numel(),)):
            return flat
        return flat[seen.flatten().to(flat.device)]

    try:
        peft.initialize_lora_eva_weights(
            wrapped,
            [_without_class_labels(batch) for batch in batches],
            forward_fn=forward,
            prepare_model_inputs_fn=_tokens_seen,
            prepare_layer_inputs_fn=rows,
            show_progress_bar=False,
        )
    except BaseException:  # PEFT's hooks are still on the adapted modules
        wrapped.unload()
        raise
    adapter = LiveAdapter(wrapped)
    wrapped.peft_config["default"] = adapter.config(adapter.ranks)  # EVA's has a pattern for each module
    return wrapped


def _tokens_seen(batch: Mapping[str, Any], config: peft.LoraConfig) -> Tensor | None:
    """(batch, length): the tokens that are neither padding nor without a label; None if there are none."""
    if (tokens := batch.get("input_ids")) is None:
        return None
    seen: Tensor = batch.get("attention_mask", torch.ones_like(tokens)).bool()
    labels = batch.get("labels")
    if labels is not None and labels.shape == tokens.shape and config.eva_config.use_label_mask:
        seen = seen & (labels != config.eva_config.label_mask_value)
    return seen


def _without_class_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A model needs its labels only where they are tokens that a decoder reads."""
    tokens, labels = batch.get("input_ids", batch.get("decoder_input_ids")), batch.get("labels")
    keep = tokens is not None and labels is not None and labels.ndim == tokens.ndim
    return {key: value for key, value in batch.items() if key != "labels" or keep}
