"""Profiles of transformers' own architectures against autograd's exact weight gradients."""

import pytest
import torch
from torch import nn

import rankscope as rs
from tests.architectures import build


def batches(name: str) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(3):
        if name == "vit":
            batch = {"pixel_values": torch.randn(4, 3, 8, 8, generator=generator)}
        else:
            batch = {"input_ids": torch.randint(2, 50, (4, 7), generator=generator)}
        if name in ("vit", "bert"):
            batch["labels"] = torch.randint(0, 2, (4,), generator=generator)
        else:
            batch["labels"] = batch["input_ids"]
        found.append(batch)
    return found


def exact(
    model: nn.Module, data: list[dict[str, torch.Tensor]], targets: tuple[rs.TargetModule, ...]
) -> dict[str, torch.Tensor]:
    model.eval()
    model.zero_grad()
    for batch in data:
        (model(**batch).loss / len(data)).backward()
    weights = {t.name: model.get_submodule(t.name).weight.grad for t in targets}
    return {t.name: weights[t.name].T if t.kind == "conv1d" else weights[t.name] for t in targets}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["bert", "vit", "llama", "gpt2", "t5"])
def test_profile_is_that_of_autograd(name: str, checkpointing: bool) -> None:
    model = build(name)
    targets = rs.find_targets(model)
    gradients = exact(model, batches(name), targets)
    model.zero_grad(set_to_none=True)
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable()
    profile = rs.profile(model, batches(name), targets=targets)
    norms, spectra = profile.column("gradient_norm"), profile.spectra(signal=False)
    for target in targets:
        gradient = gradients[target.name]
        assert gradient.shape == (target.out_features, target.in_features)
        assert norms[target.name] == pytest.approx(float(gradient.norm()), rel=1e-3, abs=1e-6)
        values = torch.linalg.svdvals(gradient)[:4]
        torch.testing.assert_close(torch.tensor(spectra[target.name][:4]).float(), values, rtol=1e-3, atol=1e-6)
