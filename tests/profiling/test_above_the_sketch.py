"""Ranks above the sketch: gains and allocations from estimated tails against those of exact spectra."""

import numpy as np
import pytest
import torch
from torch import nn

import rankscope as rs
from rankscope.budget import allocate_marginal
from rankscope.profiling import sketch
from rankscope.profiling.sketch import choose_sketch_size
from rankscope.profiling.statistics import energy_tail

N = 1024
J = np.arange(1, N + 1.0)
SPECTRA = {
    "random": np.sqrt(np.maximum(1.0 - (J - 0.5) / N, 0.0)),
    "flat_power": J**-0.3,
    "power": 3.0 * J**-0.6,
    "steep_power": 20.0 * J**-1.0,
    "exponential": 2.0 * 0.99**J,
    "low_rank": np.where(J <= 40, 4.0, 0.0),
    "plateau": 8.0 * 0.9**J + 0.2 * np.sqrt(1.0 - (J - 1) / N),
}


class Apart(nn.Module):
    """Linear modules side by side, with gradients of known spectra."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.mods = nn.ModuleDict({name: nn.Linear(N, N, bias=False) for name in SPECTRA})
        bases = [torch.linalg.qr(torch.randn(N, N, generator=generator)).Q for _ in range(3)]
        self.deltas = [bases[i % 3] * torch.tensor(s).float() for i, s in enumerate(SPECTRA.values())]
        self.inputs = [bases[(i + 1) % 3].T for i in range(len(SPECTRA))]

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        pairs = zip(self.mods.values(), self.inputs, self.deltas, strict=True)
        return torch.stack([(module(x) * delta.T).sum() for module, x, delta in pairs]).sum()


@pytest.fixture(scope="module")
def profile() -> rs.Profile:
    return rs.profile(Apart(), [torch.ones(1), torch.ones(1)], loss_fn=lambda model, batch: model(batch))


def exact_gains(profile: rs.Profile) -> dict[str, np.ndarray]:
    return {target.name: SPECTRA[target.name.split(".")[1]] ** 2 for target in profile.targets}


def test_spectra_go_to_full_rank_and_keep_the_energy(profile: rs.Profile) -> None:
    assert not profile.table["exact"].any()
    measured = profile.table.set_index("module")["singular_values"].map(np.array)
    for name, values in profile.spectra(signal=False).items():
        assert len(values) == N
        assert (np.diff(values) <= 0).all()
        assert values[:56].tolist() == measured[name].tolist()
        assert (values**2).sum() <= profile.column("gradient_norm")[name] ** 2 * (1 + 1e-6)
        assert profile.spectra(signal=False, length=100)[name].tolist() == values[:100].tolist()
        assert profile.spectra(signal=False, length=20)[name].tolist() == values[:20].tolist()


@pytest.mark.parametrize("rank", [32, 64, 128, 256])
def test_one_shot_follows_exact_spectra_above_the_sketch(profile: rs.Profile, rank: int) -> None:
    targets, gains = profile.targets, exact_gains(profile)
    budget = rs.ParameterBudget.uniform(targets, rank)
    exact = allocate_marginal(targets, gains, budget)
    found = rs.allocate("one-shot", targets=targets, budget=budget, profile=profile)
    uniform = rs.allocate("uniform", targets=targets, budget=budget)

    def captured(allocation: rs.RankAllocation) -> float:
        return sum(float(gains[name][:rank].sum()) for name, rank in allocation.ranks.items())

    best, base = captured(exact), captured(uniform)
    assert captured(found) - base > 0.95 * (best - base)
    assert np.corrcoef(found.vector, exact.vector)[0, 1] > 0.85


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("k", [1, 5, 56, 300, 1023])
def test_the_tail_falls_from_the_last_value_to_the_right_total(spectrum: str, k: int) -> None:
    energies = SPECTRA[spectrum] ** 2
    total = float(energies.sum())
    tail = energy_tail(energies[:k], total, N)
    assert len(tail) == N - k
    assert (np.diff(tail) <= 0).all()
    assert (tail >= 0).all()
    assert tail[0] <= energies[k - 1]
    flat = (N - k) * energies[k - 1]
    assert tail.sum() == pytest.approx(min(total - energies[:k].sum(), flat), rel=1e-6, abs=1e-6 * total)
    assert energy_tail(energies[:k], total, N, k + 1).tolist() == tail[:1].tolist()


@pytest.mark.parametrize("exponent", [0.0, 0.4, 1.0, 2.0, 3.0])
def test_the_tail_of_a_power_law_is_that_power_law(exponent: float) -> None:
    energies = J**-exponent
    tail = energy_tail(energies[:56], float(energies.sum()), N)
    assert tail == pytest.approx(energies[56:], rel=0.01)


@pytest.mark.parametrize(
    ("energies", "total", "expected"),
    [([], 1.0, [0.0] * 4), ([1.0, 0.0], 2.0, [0.0] * 2), ([2.0, 1.0], 3.0, [0.0] * 2), ([2.0, 1.0], 2.9, [0.0] * 2),
     ([2.0, 1.0], 99.0, [1.0] * 2), ([4.0] * 4, 16.0, []), ([0.0] * 2, 0.0, [0.0] * 2)],
)  # fmt: skip
def test_tails_without_anything_to_estimate(energies: list[float], total: float, expected: list[float]) -> None:
    assert energy_tail(np.array(energies), total, 4).tolist() == expected


def test_tails_scale_with_the_energy() -> None:
    energies = SPECTRA["power"][:56] ** 2
    total = float((SPECTRA["power"] ** 2).sum())
    tail = energy_tail(energies, total, N)
    for scale in (1e-200, 1e200):
        assert energy_tail(energies * scale, total * scale, N) == pytest.approx(tail * scale)


def square(n: int, size: int) -> list[rs.TargetModule]:
    return [rs.TargetModule(name=f"m{i}", in_features=size, out_features=size) for i in range(n)]


def test_the_sketch_is_twice_the_mean_rank_and_56_at_least() -> None:
    targets = square(4, 4096)
    for rank, size in ((1, 56), (28, 56), (32, 64), (64, 128), (256, 512), (4096, 4096)):
        limit = rs.ParameterBudget.uniform(targets, rank).limit
        assert choose_sketch_size(targets, limit, weight_bytes=0) == (size, size)
    assert choose_sketch_size(targets, None, weight_bytes=0) == (56, 56)


def test_the_sketch_keeps_to_the_memory_bound() -> None:
    targets = square(224, 4096)  # of a 7B model
    limit = rs.ParameterBudget.uniform(targets, 128).limit
    wanted, size = choose_sketch_size(targets, limit, weight_bytes=2 * 7 * 10**9)
    assert wanted == 256
    assert 5 * 4096 * size * 4 * 224 <= 0.25 * 14e9 < 5 * 4096 * (size + 1) * 4 * 224
    assert choose_sketch_size(square(18_000, 1024), None, weight_bytes=36 * 10**9) == (56, 24)  # 9 GB


def test_a_profile_says_that_the_memory_bound_binds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sketch, "SKETCH_BYTES", 600_000)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(600, 600))
    targets, batches = rs.find_targets(model), [torch.randn(4, 600) for _ in range(2)]
    budget = rs.ParameterBudget.uniform(targets, 40)
    found = rs.profile(model, batches, targets=targets, budget=budget, loss_fn=lambda m, b: m(b).square().mean())
    assert (found.metadata["sketch_wanted"], found.metadata["sketch_size"]) == (80, 50)
    assert len(found.table["singular_values"][0]) == 50
    assert "the gradient sketches have 50 columns instead of 80" in caplog.text
