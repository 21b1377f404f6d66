"""Profiles against exact gradients of autograd, and every way in which taking one can go wrong."""

import re
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import rankscope as rs
from rankscope.exceptions import ProfileError

Batch = dict[str, torch.Tensor]


class Body(nn.Module):
    """Two linear layers, one of them called twice, and a head."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.first = nn.Linear(8, width)
        self.twice = nn.Linear(width, width)
        self.unused = nn.Linear(3, 3)
        self.classifier = nn.Linear(width, 4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(x))
        for _ in range(2):
            hidden = torch.tanh(self.twice(hidden))
        return self.classifier(self.dropout(hidden))


def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["labels"])


def make_batches(n: int = 6, size: int = 10, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {"x": torch.randn(size, 8, generator=generator), "labels": torch.randint(4, (size,), generator=generator)}
        for _ in range(n)
    ]


@pytest.fixture
def model() -> Body:
    torch.manual_seed(0)
    return Body()


@pytest.fixture
def targets(model: Body) -> tuple[rs.TargetModule, ...]:
    return rs.find_targets(model, ["first", "twice"])


def exact_gradients(model: nn.Module, batches: list[Batch], names: list[str]) -> dict[str, torch.Tensor]:
    """Of the mean loss over all examples, by autograd."""
    model.eval()
    model.zero_grad()
    sizes = [len(batch["labels"]) for batch in batches]
    for batch, size in zip(batches, sizes, strict=True):
        (loss_fn(model, batch) * size / sum(sizes)).backward()
    gradients = {name: model.get_submodule(name).weight.grad.clone() for name in names}
    model.zero_grad()
    return gradients


def test_spectra_and_norms_are_those_of_the_exact_gradient(model: Body, targets: tuple[rs.TargetModule, ...]) -> None:
    batches = [*make_batches(5), *make_batches(1, size=4, seed=9)]  # the last one is ragged
    found = rs.profile(model, batches, targets=targets, loss_fn=loss_fn)
    for name, gradient in exact_gradients(model, batches, ["first", "twice"]).items():
        exact = torch.linalg.svdvals(gradient)
        values = torch.tensor(found.spectra(signal=False)[name], dtype=torch.float32)
        torch.testing.assert_close(values, exact, rtol=1e-4, atol=1e-6)
        assert found.column("gradient_norm")[name] == pytest.approx(float(gradient.norm()), rel=1e-4)


def test_signal_and_noise_sum_to_the_energy_and_halves_decide(
    model: Body, targets: tuple[rs.TargetModule, ...]
) -> None:
    batches = make_batches(6)
    found = rs.profile(model, batches, targets=targets, loss_fn=loss_fn)
    even, odd = (exact_gradients(model, batches[start::2], ["first"])["first"] for start in (0, 1))
    assert found.column("signal_energy")["first"] == pytest.approx(float((even * odd).sum()), abs=1e-6)
    total = found.column("signal_energy")["first"] + found.column("noise_energy")["first"]
    assert total == pytest.approx(found.column("gradient_norm")["first"] ** 2, rel=1e-5)


def test_large_modules_are_sketched_within_five_per_cent() -> None:
    torch.manual_seed(0)
    model = Body(width=300)
    targets = rs.find_targets(model, ["twice"])
    batches = make_batches(4, size=40)
    found = rs.profile(model, batches, targets=targets, loss_fn=loss_fn)
    exact = torch.linalg.svdvals(exact_gradients(model, batches, ["twice"])["twice"])[:4]
    assert not found.table["exact"].any()
    torch.testing.assert_close(torch.tensor(found.spectra(signal=False)["twice"][:4]).float(), exact, rtol=0.05, atol=0)


def test_model_is_left_as_it_was(model: Body, targets: tuple[rs.TargetModule, ...]) -> None:
    model.train()
    model.dropout.eval()
    model.first.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rs.profile(model, make_batches(), targets=targets, loss_fn=loss_fn, head=("classifier",), head_steps=3)
    assert {n: m.training for n, m in model.named_modules()} == {n: n != "dropout" for n, _ in model.named_modules()}
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {"first.weight"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_frozen_model_gives_the_same_profile(model: Body, targets: tuple[rs.TargetModule, ...]) -> None:
    free = rs.profile(model, make_batches(), targets=targets, loss_fn=loss_fn)
    frozen = rs.profile(model.requires_grad_(False), make_batches(), targets=targets, loss_fn=loss_fn)
    assert free.spectra()["first"].tolist() == frozen.spectra()["first"].tolist()


def test_warm_head_changes_the_gradient_and_is_recorded(model: Body, targets: tuple[rs.TargetModule, ...]) -> None:
    cold = rs.profile(model, make_batches(), targets=targets, loss_fn=loss_fn)
    warm = rs.profile(model, make_batches(), targets=targets, loss_fn=loss_fn, head=("classifier",), head_steps=50)
    assert cold.metadata["head_steps"] == 0
    assert warm.metadata["head_steps"] == 50
    assert warm.metadata["loss"] < cold.metadata["loss"]


def test_one_pass_iterators_are_accepted(model: Body, targets: tuple[rs.TargetModule, ...]) -> None:
    def once() -> Iterator[Batch]:
        yield from make_batches(4)

    found = rs.profile(model, once(), targets=targets, loss_fn=loss_fn, head=("classifier",), head_steps=6)
    assert found.metadata["batches"] == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": []}, "`batches` must hold at least 2 batches, so that signal can be told from noise, but held 0; "
                          "pass more, or smaller ones."),
        ({"batches": make_batches(1)}, "`batches` must hold at least 2 batches, so that signal can be told from noise, "
                                       "but held 1; pass more, or smaller ones."),
        ({"batches": [], "head": ("classifier",)}, "`batches` must hold at least 2 batches, but held none; check the data."),
        ({"head": ("clasifier",)}, "`head` must name modules of this model, but it has no `clasifier`; check the name."),
        ({"names": ["first", "unused"]}, "`unused` must get a gradient from the loss, but got none; drop it from `targets`."),
        ({"loss_fn": lambda model, batch: loss_fn(model, batch) * float("nan")},
         "the loss must be finite, but is nan on batch 0; look at that batch, or use float32."),
        ({"loss_fn": lambda model, batch: loss_fn(model, batch) * 0.0},
         "the gradient must not be zero at every target module, but is; check the loss and the labels."),
        ({"loss_fn": lambda model, batch: model(batch["x"])},
         "`loss_fn` must return a scalar tensor, but returned Tensor; do the batches have labels?"),
        ({"loss_fn": lambda model, batch: batch["x"].sum()},
         "the loss must depend on a target module, but depends on none; check `targets` and `loss_fn`."),
    ],
)  # fmt: skip
def test_bad_input_gets_one_line_and_leaves_no_hooks(model: Body, change: dict, message: str) -> None:
    targets = rs.find_targets(model, change.pop("names", ["first", "twice"]))
    arguments = {"batches": make_batches(), "loss_fn": loss_fn, **change}
    with pytest.raises(ProfileError, match=f"^{re.escape(message)}$"):
        rs.profile(model, arguments.pop("batches"), targets=targets, **arguments)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_gradient_that_is_not_finite_is_named(model: Body, targets: tuple[rs.TargetModule, ...]) -> None:
    """The loss is finite, its gradient is not: the square root's at zero."""
    message = "the gradient at `first` must be finite, but is not; check the loss, or use float32."
    with pytest.raises(ProfileError, match=f"^{re.escape(message)}$"):
        rs.profile(model, make_batches(), targets=targets, loss_fn=lambda m, b: (m(b["x"]) * 0.0).square().sum().sqrt())


def test_unknown_and_unsupported_targets(model: Body) -> None:
    elsewhere = (rs.TargetModule(name="nowhere", in_features=8, out_features=8),)
    with pytest.raises(ProfileError, match="but it has no `nowhere`; find them again"):
        rs.profile(model, make_batches(), targets=elsewhere, loss_fn=loss_fn)
    convolution = nn.Sequential(nn.Conv2d(1, 2, 3))
    with pytest.raises(ProfileError, match="`0` must be a linear module to be profiled, but is a conv2d; drop it"):
        rs.profile(convolution, make_batches(), targets=rs.find_targets(convolution, ["0"]), loss_fn=loss_fn)
