"""PEFT's EVA (Paischer et al., arXiv 2410.07170), to compare with: LoRA along the inputs' principal directions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from peft import AdaLoraConfig, EvaConfig, LoraConfig, PeftModel, initialize_lora_eva_weights
from torch import Tensor, nn

from rankscope.allocation import RankAllocation
from rankscope.errors import ModelError
from rankscope.lora.config import wrap
from rankscope.lora.resize import alpha_for, config_of, lora_layers, name_fields
from rankscope.targets import TargetModule

SHARE_BEFORE = 0.1  # of the steps, before ranks fall
FEWEST_STEPS = 10


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
    dropout: float = 0.0,
    modules_to_save: Sequence[str] = (),
) -> PeftModel:
    """Wraps `model` (in place) with AdaLoRA on these modules.

    Args:
        model: The base model.
        targets: What to adapt.
        rank: The mean rank at the end.
        initial_rank: Of every module at the beginning.
        alpha: The update's scaling is `alpha / initial_rank`.
        steps: Of the run; ranks begin to fall after a tenth of them.
        share: Of the ranks that a mean of `rank` gives, how many are kept: AdaLoRA counts ranks, not parameters, and may end
            above a budget in parameters.
        settled: Share of the steps after which no rank falls any more.
        dropout: Before A.
        modules_to_save: Trained whole.

    Raises:
        ModelError: Too few steps for ranks to be scored before they fall.
    """
    check_adalora_steps(steps)
    config = AdaLoraConfig(
        target_r=rank,
        init_r=initial_rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        **name_fields([target.name for target in targets]),
        modules_to_save=list(modules_to_save) or None,
        total_step=steps,
        tinit=round(SHARE_BEFORE * steps),
        tfinal=steps - round(settled * steps),
        deltaT=max(1, steps // 100),
    )
    wrapped = wrap(model, config, {target.name: initial_rank for target in targets})
    wrapped.base_model.rankallocator.target_bgt = round(share * rank * len(targets))
    return wrapped


def check_adalora_steps(steps: int) -> None:
    """Checks that a run is long enough for ranks to be scored before they fall.

    Raises:
        ModelError: It is not.
    """
    if steps < FEWEST_STEPS:
        raise ModelError(f"`steps` must be at least {FEWEST_STEPS} for AdaLoRA, but got {steps}; train longer.")


def step_adalora(model: Any, step: int) -> None:
    """What AdaLoRA does after the optimizer's `step`-th step (from 1), while gradients are still there."""
    model.base_model.update_and_allocate(step)


def ranks_of_adalora(model: Any, targets: Sequence[TargetModule]) -> RankAllocation:
    """The ranks that are not masked; each also has one singular value, which the allocation does not count."""
    (config,) = model.peft_config.values()
    kept = {} if config.rank_pattern is None else config.rank_pattern
    ranks = {name.split(".lora_E")[0].removeprefix("base_model.model."): sum(mask) for name, mask in kept.items()}
    return RankAllocation.from_ranks(
        targets, {t.name: ranks.get(t.name, config.init_r if not kept else 0) for t in targets}, strategy="AdaLoRA"
    )


def wrap_with_eva(
    model: nn.Module,
    targets: Sequence[TargetModule],
    batches: Sequence[Mapping[str, Any]],
    *,
    rank: int,
    scaling: float,
    rho: float = 2.0,
    dropout: float = 0.0,
    modules_to_save: Sequence[str] = (),
) -> PeftModel:
    """Wraps `model` (in place) with LoRA whose ranks and rows of A come from the inputs of these batches.

    Args:
        model: The base model.
        targets: What to adapt.
        batches: Go through the model again and again until directions have settled.
        rank: The mean over modules; where EVA puts them, a module may end with none.
        scaling: The factor on the update at this rank.
        rho: The largest rank is `rho * rank`; 1: no redistribution.
        dropout: Before A.
        modules_to_save: Trained whole.

    Raises:
        ModelError: The first batch does not reach one of the targets.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha_for(rank, scaling, rslora=False),
        lora_dropout=dropout,
        **name_fields([target.name for target in targets]),
        modules_to_save=list(modules_to_save) or None,
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=rho),
    )
    wrapped = wrap(model, config, {target.name: rank for target in targets}, low_cpu_mem_usage=True)
    inputs = _Inputs(f"base_model.model.{target.name}" for target in targets)
    initialize_lora_eva_weights(
        wrapped,
        [_without_class_labels(batch) for batch in batches],
        forward_fn=inputs.forward,
        prepare_model_inputs_fn=_tokens_seen,
        prepare_layer_inputs_fn=inputs.rows,
        show_progress_bar=False,
    )
    kept = {name: layer.r["default"] for name, layer in lora_layers(wrapped, "default").items()}
    wrapped.peft_config["default"] = config_of(wrapped, "default", kept)  # EVA's has a pattern for each module
    return wrapped


class _Inputs:
    """What EVA sees of the modules' inputs; PEFT's own functions mask inputs of any shape as if they were (batch, length, width).

    Args:
        names: Of the modules, inside the PEFT model.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._unseen = dict.fromkeys(names)

    def forward(self, model: nn.Module, batch: Mapping[str, Any]) -> Any:
        """Run a batch.

        Raises:
            ModelError: It did not reach a module.
        """
        outputs = model(**batch)
        if self._unseen:
            name = next(iter(self._unseen)).removeprefix("base_model.model.")
            raise ModelError(
                f"EVA needs the inputs of every target module, but the first batch does not reach `{name}` "
                f"({len(self._unseen)} such); leave it out of the targets, or give batches that do."
            )
        return outputs

    def rows(self, inputs: Any, seen: Tensor | None, name: str) -> Tensor:
        """(n, width): the inputs at the tokens seen, whether (batch, length, width) or already flat, as before experts."""
        self._unseen.pop(name, None)
        values: Tensor = inputs[0] if isinstance(inputs, tuple | list) else inputs
        rows = values.reshape(-1, values.shape[-1])
        if seen is None or values.shape[:-1] not in (seen.shape, (seen.numel(),)):
            return rows
        kept: Tensor = rows[seen.flatten().to(rows.device)]
        return kept


def _tokens_seen(batch: Mapping[str, Any], config: LoraConfig) -> Tensor | None:
    """(batch, length): the tokens that are neither padding nor without a label; None where there are none."""
    if (tokens := batch.get("input_ids")) is None:
        return None
    seen: Tensor = batch.get("attention_mask", torch.ones_like(tokens)).bool()
    labels = batch.get("labels")
    if labels is not None and labels.shape == tokens.shape and config.eva_config.use_label_mask:
        seen = seen & (labels != config.eva_config.label_mask_value)
    return seen


def _without_class_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A model needs its labels only where they are tokens that a decoder reads."""
    tokens = batch.get("input_ids", batch.get("decoder_input_ids"))
    return {
        key: value
        for key, value in batch.items()
        if key != "labels" or (tokens is not None and value.ndim == tokens.ndim)
    }
