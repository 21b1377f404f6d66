"""Two hundred resizes under AdamW, against a hand-written reference that knows components only.

The reference keeps each module's components as separate vectors, each with moments of its own, and does AdamW by its formula.
A component is born with zero moments, dies with all that is its own, and is untouched otherwise. A module's step count rests
while it has no component.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import rankscope as rs
from rankscope.lora import Resize, count_adapter_parameters, resize_adapters

RATE, DECAY, BETAS, EPSILON, SCALING = 0.01, 0.05, (0.9, 0.999), 1e-8, 2.0
WIDTHS = {"first": (6, 9), "second": (9, 7), "untouched": (7, 5)}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, (inputs, outputs) in WIDTHS.items():
            self.add_module(name, nn.Linear(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        for name in WIDTHS:
            x = torch.tanh(getattr(self, name)(x))
        return x


@dataclasses.dataclass
class Vector:
    value: Tensor
    mean: Tensor = dataclasses.field(init=False)
    square: Tensor = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.value = self.value.clone().requires_grad_()
        self.mean = torch.zeros_like(self.value)
        self.square = torch.zeros_like(self.value)

    def adamw(self, step: int) -> None:
        gradient, value = self.value.grad, self.value.detach()
        self.mean = BETAS[0] * self.mean + (1 - BETAS[0]) * gradient
        self.square = BETAS[1] * self.square + (1 - BETAS[1]) * gradient**2
        mean, square = self.mean / (1 - BETAS[0] ** step), self.square / (1 - BETAS[1] ** step)
        self.value = (value * (1 - RATE * DECAY) - RATE * mean / (square.sqrt() + EPSILON)).requires_grad_()


class Reference:
    def __init__(self, model: PeftModel) -> None:
        self.base = Net().double()
        self.base.load_state_dict({k.replace("base_layer.", ""): v for k, v in base_state(model).items()})
        self.components: dict[str, list[tuple[Vector, Vector]]] = {}
        self.steps = dict.fromkeys(WIDTHS, 0)
        for name in WIDTHS:
            layer = getattr(model.get_base_model(), name)
            a, b = (f["default"].weight.detach() for f in (layer.lora_A, layer.lora_B))
            self.components[name] = [(Vector(a[i]), Vector(b[:, i])) for i in range(len(a))]

    def forward(self, x: Tensor) -> Tensor:
        for name in WIDTHS:
            y = getattr(self.base, name)(x)
            for a, b in self.components[name]:
                y = y + SCALING * torch.outer(x @ a.value, b.value)
            x = torch.tanh(y)
        return x

    def train_step(self, x: Tensor, y: Tensor) -> float:
        loss = (self.forward(x) - y).square().mean()
        loss.backward()
        for name, components in self.components.items():
            self.steps[name] += bool(components)
            for vector in (v for component in components for v in component):
                vector.adamw(self.steps[name])
        return loss.item()

    def resize(self, name: str, rank: int, rows: Tensor | None) -> None:
        components = self.components[name]
        norms = [a.value.norm().item() * b.value.norm().item() for a, b in components]
        keep = sorted(sorted(range(len(norms)), key=lambda i: (-norms[i], i))[:rank])
        kept = [components[i] for i in keep]
        born = [] if rows is None else [(Vector(row), Vector(row.new_zeros(WIDTHS[name][1]))) for row in rows]
        self.components[name] = kept + born


def base_state(model: PeftModel) -> dict[str, Tensor]:
    return {k: v for k, v in model.get_base_model().state_dict().items() if "lora_" not in k}


@pytest.mark.parametrize("seed", range(3))
def test_two_hundred_resizes_end_as_predicted(seed: int) -> None:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    teacher = Net().double()
    model = get_peft_model(
        Net().double(), LoraConfig(target_modules=list(WIDTHS), r=2, lora_alpha=4), autocast_adapter_dtype=False
    )
    reference = Reference(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=DECAY, betas=BETAS, eps=EPSILON)
    untouched = [id(p) for p in model.get_base_model().untouched.parameters() if p.requires_grad]
    losses: list[tuple[float, float]] = []
    ranks = dict.fromkeys(WIDTHS, 2)
    visited: set[int] = set()
    for _ in range(200):
        name = str(rng.choice(["first", "second"]))
        rank = int(rng.choice([r for r in range(6) if r != ranks[name]]))
        added = rank - ranks[name]
        rows = torch.randn(added, WIDTHS[name][0], dtype=torch.float64) / math.sqrt(3) if added > 0 else None
        resize_adapters(model, optimizer, [Resize(name=name, rank=rank, directions=rows)])
        reference.resize(name, rank, rows)
        ranks[name] = rank
        visited.add(rank)
        x = torch.randn(8, 6, dtype=torch.float64)
        y = teacher(x).detach()
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append((loss.item(), reference.train_step(x, y)))

    assert visited == set(range(6))
    ours, theirs = np.array(losses).T
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)
    assert theirs[-20:].mean() < 0.7 * theirs[:20].mean()  # it did learn
    torch.testing.assert_close(model(x), reference.forward(x), rtol=1e-9, atol=1e-11)
    assert dict(rs.RankAllocation.from_peft_model(model).ranks) == ranks
    assert count_adapter_parameters(model) == sum(sum(WIDTHS[n]) * r for n, r in ranks.items())
    assert [id(p) for p in model.get_base_model().untouched.parameters() if p.requires_grad] == untouched
    assert len(optimizer.param_groups[0]["params"]) == len(parameters)
    for name in WIDTHS:
        if ranks[name]:
            parameter = getattr(model.get_base_model(), name).lora_A["default"].weight
            state = optimizer.state[parameter]
            assert state["step"] == reference.steps[name]
            expected = torch.stack([a.mean for a, _ in reference.components[name]])
            torch.testing.assert_close(state["exp_avg"], expected, rtol=1e-7, atol=1e-12)
