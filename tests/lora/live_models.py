"""Tiny models of every kind of layer that carries a live adapter, and what the resize tests ask of them."""

from collections.abc import Callable, Iterator

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import rankscope as rs


class Kinds(nn.Module):
    """An embedding, a linear, a transposed linear and a convolution, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.linear = nn.Linear(6, 8)
        self.transposed = Conv1D(12, 8)
        self.convolution = nn.Conv2d(3, 5, 2)
        self.head = nn.Linear(15, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.transposed(torch.tanh(self.linear(self.table(tokens))))
        x = self.convolution(torch.tanh(x).reshape(len(tokens), 3, 4, -1)[..., :2])
        return self.head(x.flatten(1))


KINDS = ("table", "linear", "transposed", "convolution")


def kinds_model(dtype: torch.dtype = torch.float64, *, seed: int = 0, r: int = 2, **options) -> PeftModel:
    """Adapters on all kinds, B not zero, so that the adapters matter."""
    torch.manual_seed(seed)
    config = LoraConfig(
        **{"target_modules": list(KINDS), "r": r, "lora_alpha": 2 * r, "fan_in_fan_out": False} | options
    )
    model = get_peft_model(Kinds().to(dtype), config, autocast_adapter_dtype=False)
    stir(model)
    return model


def stir(model: PeftModel, seed: int = 1) -> None:
    """Random factors everywhere, as after some training."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_magnitude" not in name and parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.data.copy_(0.3 * noise)


def tokens(seed: int = 0, n: int = 7) -> Tensor:
    return torch.randint(0, 11, (n, 2), generator=torch.Generator().manual_seed(seed))


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> float:
    optimizer.zero_grad()
    loss = model(tokens(seed)).float().square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def ranks(model: PeftModel) -> dict[str, int]:
    return dict(rs.RankAllocation.from_peft_model(model).ranks)


def layers(model: PeftModel) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "base_layer"):
            yield name, module


def digits_vit() -> nn.Module:
    return rs.load_task("digits-shift").build_model()


OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
