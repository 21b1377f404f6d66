"""A user's whole way over transformers' architectures: targets, profile, PEFT, live resize, save, plain reload."""

import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import rankscope as rs
from rankscope.lora import Resize, count_adapter_parameters, resize_adapters
from tests.architectures import ARCHITECTURES, Architecture, build, loss_of, tensors_of


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_every_step_of_the_way(architecture: Architecture, tmp_path: Path) -> None:
    model, batches = architecture.build(), [architecture.batch(seed) for seed in range(2)]
    targets = rs.find_targets(model, architecture.selection)
    check_names(architecture, targets)

    profile = rs.profile(model, batches, targets=targets, loss_fn=loss_of)
    assert all(math.isfinite(value) for value in profile.column("gradient_norm").values())
    assert all(np.isfinite(values).all() for values in profile.spectra().values())

    allocation = random_ranks(targets)
    peft_model = get_peft_model(model, allocation.to_lora_config()).eval()
    trained = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    assert trained == allocation.parameters == count_adapter_parameters(peft_model)
    assert rs.RankAllocation.from_peft_model(peft_model, targets) == allocation

    walk(peft_model, allocation, batches[0])
    outputs = run(peft_model, batches[0])
    peft_model.save_pretrained(str(tmp_path))
    reloaded = PeftModel.from_pretrained(architecture.build(), str(tmp_path)).eval()
    for ours, theirs in zip(outputs, run(reloaded, batches[0]), strict=True):
        torch.testing.assert_close(theirs, ours)


def check_names(architecture: Architecture, targets: tuple[rs.TargetModule, ...]) -> None:
    roles: dict[str, list[str]] = defaultdict(list)
    for target in targets:
        if target.role not in roles[target.tower]:
            roles[target.tower].append(target.role)
    assert {tower: sorted(found) for tower, found in roles.items()} == {
        tower: sorted(wanted) for tower, wanted in architecture.roles.items()
    }
    assert len({(t.tower, t.block, t.role) for t in targets}) == len(targets)


def random_ranks(targets: tuple[rs.TargetModule, ...]) -> rs.RankAllocation:
    ranks = np.random.default_rng(0).integers(0, 4, size=len(targets))
    ranks[:2] = np.maximum(ranks[:2], 1)
    return rs.RankAllocation(targets, tuple(min(int(r), t.full_rank) for r, t in zip(ranks, targets, strict=True)))


def walk(model: PeftModel, allocation: rs.RankAllocation, batch: dict[str, Tensor]) -> None:
    """Ranks up, down, to 0 and up again; growing leaves the function as it is."""
    stir(model)
    some = [target for target, rank in zip(allocation.targets, allocation.vector, strict=True) if rank][1:4]

    def resize(rank: int) -> None:
        resize_adapters(model, None, [Resize(name=t.name, rank=min(rank, t.full_rank)) for t in some])

    before = run(model, batch)
    resize(4)
    for ours, theirs in zip(before, run(model, batch), strict=True):
        torch.testing.assert_close(theirs, ours)
    for rank in (1, 0, 2):
        resize(rank)
    stir(model)


def stir(model: nn.Module) -> None:
    """Weights of adapters that are none of them zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def run(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        torch.manual_seed(0)
        return tensors_of(model(**batch))


# --- profiles against autograd ------------------------------------------------------------------------------------


def exact(model: nn.Module, data: list[dict[str, Tensor]], targets: tuple[rs.TargetModule, ...]) -> dict[str, Tensor]:
    model.eval()
    model.zero_grad()
    for batch in data:
        (model(**batch).loss / len(data)).backward()
    weights = {t.name: model.get_submodule(t.name).weight.grad for t in targets}
    return {t.name: weights[t.name].T if t.kind == "conv1d" else weights[t.name] for t in targets}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["bert", "vit", "llama", "gpt2", "t5"])
def test_profile_is_that_of_autograd(name: str, checkpointing: bool) -> None:
    model, batches = build(name), few_batches(name)
    targets = rs.find_targets(model)
    gradients = exact(model, batches, targets)
    model.zero_grad(set_to_none=True)
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable()
    profile = rs.profile(model, batches, targets=targets)
    norms, spectra = profile.column("gradient_norm"), profile.spectra(signal=False)
    for target in targets:
        gradient = gradients[target.name]
        assert gradient.shape == (target.out_features, target.in_features)
        assert norms[target.name] == pytest.approx(float(gradient.norm()), rel=1e-3, abs=1e-6)
        values = torch.linalg.svdvals(gradient)[:4]
        torch.testing.assert_close(torch.tensor(spectra[target.name][:4]).float(), values, rtol=1e-3, atol=1e-6)


def few_batches(name: str) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(3):
        if name == "vit":
            batch = {"pixel_values": torch.randn(4, 3, 8, 8, generator=generator)}
        else:
            batch = {"input_ids": torch.randint(2, 50, (4, 7), generator=generator)}
        batch["labels"] = (
            torch.randint(0, 2, (4,), generator=generator) if name in ("vit", "bert") else batch["input_ids"]
        )
        found.append(batch)
    return found
