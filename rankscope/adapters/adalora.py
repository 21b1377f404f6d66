"""PEFT's AdaLoRA (Zhang et al., arXiv 2303.10512), to compare with: wrapping, its step, and the ranks that it ends with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft import AdaLoraConfig, PeftModel
from torch import nn

from rankscope.adapters.lora import wrap
from rankscope.adapters.patterns import name_fields
from rankscope.allocation import RankAllocation
from rankscope.exceptions import AdapterError
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
        AdapterError: Too few steps for ranks to be scored before they fall.
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
        AdapterError: It is not.
    """
    if steps < FEWEST_STEPS:
        raise AdapterError(f"`steps` must be at least {FEWEST_STEPS} for AdaLoRA, but got {steps}; train longer.")


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
