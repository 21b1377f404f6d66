"""Rank prefixes against stand-alone PEFT adapters of the same ranks with the leading rows and columns of the weights."""

import re

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

import rankscope as rs
from rankscope.adapters import RankPrefix, apply_allocation
from rankscope.exceptions import AllocationError
from tests.architectures import build
from tests.profiling.test_architectures import batches

CAPACITY = 8
ARCHITECTURES = ("bert", "vit", "llama", "gpt2")


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 9, 3), nn.Tanh(), nn.Conv2d(9, 8, (2, 3)), nn.Flatten(), nn.Linear(200, 5))


def factors(model: PeftModel) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """A and B of each adapted module."""
    layers = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    return {n: (m.lora_A["default"].weight, m.lora_B["default"].weight) for n, m in layers.items()}


def nested(model: nn.Module, targets: tuple[rs.TargetModule, ...]) -> PeftModel:
    """An adapter of `CAPACITY` everywhere, with random weights, in double precision."""
    largest = rs.RankAllocation(targets, tuple(min(CAPACITY, t.full_rank) for t in targets))
    peft_model = apply_allocation(model, largest).double().eval()
    for a, b in factors(peft_model).values():
        nn.init.normal_(a, std=0.3)
        nn.init.normal_(b, std=0.3)
    return peft_model


def alone(model: nn.Module, allocation: rs.RankAllocation, source: PeftModel) -> PeftModel:
    """A stand-alone adapter of the allocation's ranks with the leading part of the source's weights."""
    peft_model = apply_allocation(model, allocation).double().eval()
    wide = factors(source)
    with torch.no_grad():
        for name, (a, b) in factors(peft_model).items():
            rank = allocation.ranks[name]
            a.copy_(wide[name][0][:rank])
            b.copy_(wide[name][1][:, :rank])
    return peft_model


def drawn(targets: tuple[rs.TargetModule, ...], seed: int) -> rs.RankAllocation:
    ranks = np.random.default_rng(seed).integers(0, CAPACITY + 1, size=len(targets))
    ranks[0] = max(ranks[0], 1)
    return rs.RankAllocation(targets, tuple(min(int(r), t.full_rank) for r, t in zip(ranks, targets, strict=True)))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_prefix_is_the_stand_alone_adapter_of_its_ranks(name: str) -> None:
    targets = rs.find_targets(build(name))
    batch = {key: v.double() if v.is_floating_point() else v for key, v in batches(name)[0].items()}
    wide = nested(build(name), targets)
    before = wide(**batch).logits
    with RankPrefix(wide) as prefix:
        for seed in range(4):
            allocation = drawn(targets, seed)
            prefix.activate(allocation)
            expected = alone(build(name), allocation, wide)(**batch).logits
            torch.testing.assert_close(wide(**batch).logits, expected, rtol=1e-12, atol=1e-13)
            assert not torch.equal(wide(**batch).logits, before)
    assert torch.equal(wide(**batch).logits, before)  # the hooks are gone


@pytest.mark.parametrize("seed", range(4))
def test_convolutions(seed: int) -> None:
    targets = rs.find_targets(convolutions(), ["0", "2", "4"])
    images = torch.randn(2, 3, 8, 9, dtype=torch.float64)
    wide, allocation = nested(convolutions(), targets), drawn(targets, seed)
    RankPrefix(wide).activate(allocation)
    torch.testing.assert_close(wide(images), alone(convolutions(), allocation, wide)(images), rtol=1e-12, atol=1e-13)


def gradients(model: PeftModel, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: (a.grad, b.grad) for name, (a, b) in factors(model).items()}


@pytest.mark.parametrize("seed", range(4))
def test_gradients_reach_the_active_ranks_only_and_are_those_of_the_stand_alone_adapter(seed: int) -> None:
    targets = rs.find_targets(build("bert"))
    batch, wide, allocation = batches("bert")[0], nested(build("bert"), targets), drawn(targets, seed)
    RankPrefix(wide).activate(allocation)
    expected = gradients(alone(build("bert"), allocation, wide), batch)
    for name, (a, b) in gradients(wide, batch).items():
        rank = allocation.ranks[name]
        assert not a[rank:].any()
        assert not b[:, rank:].any()
        if rank:
            torch.testing.assert_close(a[:rank], expected[name][0], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(b[:, :rank], expected[name][1], rtol=1e-9, atol=1e-12)


def test_half_precision_keeps_its_type() -> None:
    targets = rs.find_targets(build("vit"))
    model = nested(build("vit"), targets).bfloat16()
    RankPrefix(model).activate(drawn(targets, 0))
    assert model(pixel_values=torch.zeros(1, 3, 8, 8, dtype=torch.bfloat16)).logits.dtype == torch.bfloat16


def test_more_ranks_than_there_are_are_refused_and_change_nothing() -> None:
    targets = rs.find_targets(build("vit"))
    model = nested(build("vit"), targets)
    prefix = RankPrefix(model)
    images = torch.ones(1, 3, 8, 8, dtype=torch.float64)
    before = model(pixel_values=images).logits
    message = (
        f"`allocation` must stay within the adapter's ranks, but asks for 9 of `{targets[1].name}`, which has 8; "
        "lower it, or train a larger adapter."
    )
    with pytest.raises(AllocationError, match=f"^{re.escape(message)}$"):
        prefix.activate(rs.RankAllocation.from_ranks(targets, {targets[1].name: 9}))
    assert torch.equal(model(pixel_values=images).logits, before)


def test_dora_and_embeddings_are_refused() -> None:
    dora = get_peft_model(build("bert"), LoraConfig(target_modules=["query"], use_dora=True))
    with pytest.raises(
        AllocationError, match=r"^`model` must have plain LoRA .*but `.*query` is DoRA; leave it out\.$"
    ):
        RankPrefix(dora)
    words = get_peft_model(build("bert"), LoraConfig(target_modules=["word_embeddings"]))
    with pytest.raises(AllocationError, match=r"but `.*word_embeddings` is an embedding; leave it out\.$"):
        RankPrefix(words)
