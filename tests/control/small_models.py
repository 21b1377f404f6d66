"""A small network with adapters, its data, and a plain training loop around a controller."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.utils import ModelOutput

import rankscope as rs

LAYERS = ["first", "second", "third", "fourth"]
COSTS = (32, 48, 36, 16)
BUDGET = 2 * sum(COSTS)
START = (4, 1, 1, 1)  # misplaced: the first layer has most


@dataclass
class Output(ModelOutput):
    loss: Tensor | None = None
    logits: Tensor | None = None


class Net(nn.Module):
    """Four linear layers of unequal sizes, the third checkpointed on demand; it returns its loss as transformers' models do."""

    def __init__(self, *, checkpointing: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 24), nn.Linear(24, 24)
        self.third, self.fourth = nn.Linear(24, 12), nn.Linear(12, 4)
        self.checkpointing = checkpointing

    def forward(self, x: Tensor, labels: Tensor) -> Output:
        x = torch.tanh(self.second(torch.tanh(self.first(x))))
        if self.checkpointing and self.training:
            x = torch.utils.checkpoint.checkpoint(self.third, x, use_reentrant=False)
        else:
            x = self.third(x)
        logits = self.fourth(torch.tanh(x))
        return Output(loss=nn.functional.cross_entropy(logits.float(), labels), logits=logits)


def net(*, r: int = 2, seed: int = 0, checkpointing: bool = False, **options: Any) -> PeftModel:
    torch.manual_seed(seed)
    config = LoraConfig(target_modules=LAYERS, r=r, lora_alpha=2 * r, **options)
    return get_peft_model(Net(checkpointing=checkpointing), config)


def batch(step: int, n: int = 16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step % 8)
    x = torch.randn(n, 8, generator=generator)
    return {"x": x, "labels": (x[:, 0] > 0).long() + 2 * (x[:, 1] * x[:, 2] > 0).long()}


def adamw(model: nn.Module, lr: float = 0.02) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def control(model: Any, optimizer: Any, **options: Any) -> rs.RankController:
    start = rs.RankAllocation(rs.find_targets(model, LAYERS), START)
    settings = {
        "start": start,
        "budget": rs.ParameterBudget(BUDGET),
        "every": 4,
        "total_steps": 40,
        "freeze_fraction": 0.5,
        "samples": 3,
        "hysteresis": 0.0,
        "min_gain_ratio": 0.0,
    }
    return rs.RankController(model, optimizer, **(settings | options))


def run(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    controller: rs.RankController,
    steps: range,
    *,
    after: Callable[[int], None] = lambda step: None,
) -> list[float]:
    losses = []
    model.train()
    for step in steps:
        loss = model(**batch(step)).loss
        loss.backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        after(step)
    return losses
