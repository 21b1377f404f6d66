"""Ranks above the sketch: decisions at rank 64 against those on exact spectra, and the memory bound."""

import logging

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import rankscope as rs
from rankscope.control.signals import full_spectrum
from rankscope.profiling.sketch import Decomposition
from tests.control.small_models import adamw

WIDTH, RANK = 320, 64
NAMES = ["0", "1", "2"]


def gradient(spectrum: np.ndarray, seed: int) -> Tensor:
    """A matrix of these singular values."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q for _ in range(2))
    return left * torch.from_numpy(spectrum).float() @ right


def decisions(spectra: list[np.ndarray], sketch_size: int | None) -> rs.RankController:
    """Two decisions of a run whose modules have gradients of these spectra, the same at every step."""
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in NAMES)
    model = get_peft_model(Apart(layers), LoraConfig(target_modules=[f"layers.{name}" for name in NAMES], r=RANK))
    optimizer = adamw(model, lr=0.0)
    targets = rs.find_targets(model, NAMES)
    controller = rs.RankController(
        model,
        optimizer,
        budget=rs.ParameterBudget.uniform(targets, RANK),
        every=2,
        total_steps=8,
        freeze_fraction=0.5,
        samples=2,
        sketch_size=sketch_size,
    )
    pull = [gradient(spectrum, seed) for seed, spectrum in enumerate(spectra)]
    for _ in range(4):
        loss = sum((output * g.T).sum() for output, g in zip(model(torch.eye(WIDTH)), pull, strict=True))
        loss.backward()
        optimizer.step()
        controller.step(loss)
        optimizer.zero_grad()
    return controller


class Apart(nn.Module):
    """Layers side by side."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


LONG, SHORT = np.linspace(1.0, 0.2, WIDTH), np.r_[np.full(8, 1.2), np.full(WIDTH - 8, 1e-3)]


@pytest.mark.parametrize("sketch_size", [None, 24], ids=["exact", "a sketch of 24 columns"])
def test_ranks_move_to_the_module_that_holds_the_gradient(sketch_size: int | None) -> None:
    """By as many as the exact spectra say, to a twentieth; with 24 columns what is beyond is estimated."""
    controller = decisions([LONG, SHORT, SHORT], sketch_size)
    assert controller.decisions["action"].iloc[0] == "moved"
    ranks = controller.allocation.vector
    assert ranks == pytest.approx((176, 8, 8), abs=9)
    assert sum(ranks) == 3 * RANK
    gains = controller.decisions["gains"].iloc[0]
    tolerance = 1e-3 if sketch_size is None else 0.4  # a small sketch underrates a long spectrum
    assert gains[0] == pytest.approx(LONG[RANK] ** 2, rel=tolerance)


@pytest.mark.parametrize("sketch_size", [None, 24])
@pytest.mark.parametrize("spectrum", [LONG, SHORT], ids=["long", "short"])
def test_ranks_stay_where_all_modules_are_alike(spectrum: np.ndarray, sketch_size: int | None) -> None:
    controller = decisions([spectrum] * 3, sketch_size)
    assert controller.decisions["action"].tolist() == ["kept", "kept"]
    assert controller.allocation.vector == (RANK,) * 3


def test_a_spectrum_goes_to_full_rank_and_holds_the_energy() -> None:
    values = torch.linspace(2.0, 1.0, 20)
    energy = float(values.square().sum()) + 30.0
    found = Decomposition(torch.empty(0), values, torch.empty(0), energy, 0.0)
    spectrum = np.array(full_spectrum(found, 2.0, 0.5, 100))
    assert len(spectrum) == 100
    assert (np.diff(spectrum) <= 1e-9).all()
    np.testing.assert_allclose(spectrum[:20], values.numpy() ** 2 / 8, rtol=1e-6)
    assert spectrum.sum() == pytest.approx(energy / 8, rel=0.02)


def test_the_sketch_follows_the_ranks_within_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = []
    with caplog.at_level(logging.WARNING, logger="rankscope"):
        for rank in (4, 20, 64):
            layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in NAMES)
            model = get_peft_model(Apart(layers), LoraConfig(target_modules=r"layers\..*", r=rank))
            budget = rs.ParameterBudget.uniform(rs.find_targets(model, NAMES), rank)
            sizes.append(rs.RankController(model, adamw(model), budget=budget)._sketch_size)
        assert sizes == [16, 40, 128]
        assert not caplog.records
        monkeypatch.setattr("rankscope.profiling.sketch.SKETCH_BYTES", 2**20)
        weights = sum(p.numel() * 4 for p in model.parameters())
        monkeypatch.setattr("rankscope.profiling.sketch.SKETCH_SHARE", 2**20 / weights)
        small = rs.RankController(model, adamw(model), budget=budget)._sketch_size
    assert small == 2**20 // (2 * 3 * 4 * 5 * WIDTH)
    assert [record.getMessage() for record in caplog.records] == [
        f"the gradient sketches have {small} columns instead of 128, so as to take no more than a quarter of the memory of the "
        "model's weights; singular values beyond are estimated"
    ]
