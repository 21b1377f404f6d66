"""Profiles against exact gradients of autograd, and every way in which taking one can go wrong."""

import re
import signal
from collections.abc import Iterator

import numpy as np
import pandas as pd
import peft
import pytest
import torch
from torch import nn

import rankscope as rs
from rankscope.errors import ModelError

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


def test_signal_noise_and_fisher_trace_are_those_of_the_examples(
    model: Body, targets: tuple[rs.TargetModule, ...]
) -> None:
    """Batches of one example: then scatter between batches is scatter between examples, and all of it can be looped over."""
    batches = make_batches(12, size=1)
    found = rs.profile(model, batches, targets=targets, loss_fn=loss_fn)
    for name in ("first", "twice"):
        each = torch.stack([exact_gradients(model, [batch], [name])[name].flatten() for batch in batches])
        pairs = each @ each.T
        n = len(batches)
        signal = float(pairs.sum() - pairs.diagonal().sum()) / (n * (n - 1))
        assert found.column("signal_energy")[name] == pytest.approx(signal, rel=1e-3, abs=1e-6)
        assert found.column("fisher_trace")[name] == pytest.approx(float(pairs.diagonal().mean()), rel=1e-4)
        total = found.column("signal_energy")[name] + found.column("noise_energy")[name]
        assert total == pytest.approx(found.column("gradient_norm")[name] ** 2, rel=1e-5)


def test_large_modules_are_sketched_within_five_per_cent() -> None:
    torch.manual_seed(0)
    model = Body(width=600)
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


def test_each_batch_is_seen_behind_a_head_that_was_trained_on_others(
    model: Body, targets: tuple[rs.TargetModule, ...]
) -> None:
    """Labels are noise: a head that has seen the batches fits them, one that has not does worse than an untrained one."""
    arguments = {"targets": targets, "loss_fn": loss_fn}
    batches = make_batches()
    cold = rs.profile(model, batches, **arguments)
    crossed = rs.profile(model, batches, head=("classifier",), head_steps=50, **arguments)
    fitted = rs.profile(model, batches, head=("classifier",), head_steps=50, head_batches=batches, **arguments)
    assert [found.metadata["head_steps"] for found in (cold, crossed, fitted)] == [0, 50, 50]
    assert fitted.metadata["loss"] < cold.metadata["loss"] < crossed.metadata["loss"]
    each = [
        rs.profile(
            model,
            batches[start::2],
            head=("classifier",),
            head_steps=50,
            head_batches=batches[1 - start :: 2],
            **arguments,
        )
        for start in (0, 1)
    ]
    assert crossed.metadata["loss"] == pytest.approx(np.mean([found.metadata["loss"] for found in each]))


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
        ({"batches": [], "head": ("classifier",)}, "`batches` must hold at least 2 batches, so that signal can be told from noise, but held 0; pass more, or smaller ones."),
        ({"head": ("clasifier",)}, "`head` must name modules of this model, but it has no `clasifier`; check the name."),
        ({"names": ["unused"]}, "the loss must depend on a target module, but depends on none; check `targets` and `loss_fn`."),
        ({"loss_fn": lambda model, batch: loss_fn(model, batch) * float("nan")},
         "the loss must be finite, but is not in 6 of 6 batches (at most 10% are skipped); look at these batches, "
         "or use float32 or bfloat16."),
        ({"loss_fn": lambda model, batch: loss_fn(model, batch) * 0.0},
         "the gradient must not be zero at every target module, but is; check the loss and the labels."),
        ({"loss_fn": lambda model, batch: model(batch["x"])},
         "`loss_fn` must return a scalar tensor, but returned a tensor of shape (10, 4); return one number for the batch."),
        ({"loss_fn": lambda model, batch: batch["x"].sum()},
         "the loss must depend on a target module, but depends on none; check `targets` and `loss_fn`."),
    ],
)  # fmt: skip
def test_bad_input_gets_one_line_and_leaves_no_hooks(model: Body, change: dict, message: str) -> None:
    targets = rs.find_targets(model, change.pop("names", ["first", "twice"]))
    arguments = {"batches": make_batches(), "loss_fn": loss_fn, **change}
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        rs.profile(model, arguments.pop("batches"), targets=targets, **arguments)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_gradient_that_is_not_finite_is_named(model: Body, targets: tuple[rs.TargetModule, ...]) -> None:
    """The loss is finite, its gradient is not: the square root's at zero."""
    message = "the gradient at `first` must be finite, but is not; check the loss, or use float32 or bfloat16."
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        rs.profile(model, make_batches(), targets=targets, loss_fn=lambda m, b: (m(b["x"]) * 0.0).square().sum().sqrt())


def test_unknown_and_unsupported_targets(model: Body) -> None:
    elsewhere = (rs.TargetModule(name="nowhere", in_features=8, out_features=8),)
    with pytest.raises(ModelError, match="but it has no `nowhere`; find them again"):
        rs.profile(model, make_batches(), targets=elsewhere, loss_fn=loss_fn)
    embeddings = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
    only = rs.find_targets(embeddings, ["0"])
    with pytest.raises(ModelError, match="^`targets` must hold a module of kind linear, conv1d, conv2d, but hold none"):
        rs.profile(embeddings, make_batches(), targets=only, loss_fn=loss_fn)


def test_what_is_skipped_is_named_and_recorded(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2), nn.Linear(2, 2))
    batches = [torch.randint(5, (4, 6)) for _ in range(3)]
    targets = rs.find_targets(model, ["0", "1"])
    found = rs.profile(model, batches, targets=targets, loss_fn=lambda m, b: m(b).square().mean())
    assert found.metadata["skipped"] == {"0": "embedding modules cannot be profiled"}
    assert found.table["module"].tolist() == ["1"]
    assert "`0` is left out: embedding modules cannot be profiled" in caplog.text


def test_modules_without_a_gradient_are_named_and_zero(model: Body, caplog: pytest.LogCaptureFixture) -> None:
    targets = rs.find_targets(model, ["first", "unused"])
    found = rs.profile(model, make_batches(), targets=targets, loss_fn=loss_fn)
    assert found.metadata["without_gradient"] == ["unused"]
    assert found.column("gradient_norm")["unused"] == 0
    assert "1 of 2 modules got no gradient and count as zero, as `unused`" in caplog.text


def test_batches_without_a_finite_loss_are_skipped_and_counted(
    model: Body, targets: tuple[rs.TargetModule, ...]
) -> None:
    good = make_batches(5)
    bad = {**good[0], "x": torch.full_like(good[0]["x"], float("nan"))}
    found = rs.profile(model, [*good[:2], bad, *good[2:]], targets=targets, loss_fn=loss_fn, max_skipped=0.2)
    clean = rs.profile(model, good, targets=targets, loss_fn=loss_fn)
    assert found.metadata["skipped_batches"] == 1
    assert found.metadata["batches"] == 5
    for name in ("first", "twice"):
        assert found.spectra()[name].tolist() == clean.spectra()[name].tolist()
    pd.testing.assert_frame_equal(found.table, clean.table, rtol=1e-4)


def test_it_stops_when_the_leading_values_stop_moving(model: Body, targets: tuple[rs.TargetModule, ...]) -> None:
    batches = make_batches(4) * 50
    found = rs.profile(model, batches, targets=targets, loss_fn=loss_fn, tolerance=0.05)
    assert 4 < found.metadata["batches"] < 60
    never = rs.profile(model, batches, targets=targets, loss_fn=loss_fn, tolerance=0.0)
    assert never.metadata["batches"] == 200


def test_interrupted_profile_keeps_what_it_has_if_asked(model: Body, targets: tuple[rs.TargetModule, ...]) -> None:
    def interrupt(index: int, _loss: float) -> None:
        if index == 3:
            signal.raise_signal(signal.SIGINT)

    arguments = {"targets": targets, "loss_fn": loss_fn, "on_batch": interrupt}
    found = rs.profile(model, make_batches(20), keep_partial=True, **arguments)
    assert found.metadata["interrupted"]
    assert found.metadata["batches"] == 4
    whole = rs.profile(model, make_batches(20)[:4], targets=targets, loss_fn=loss_fn)
    pd.testing.assert_frame_equal(found.table, whole.table)
    with pytest.raises(KeyboardInterrupt):
        rs.profile(model, make_batches(20), **arguments)


def test_directions_are_the_leading_singular_vectors(model: Body, targets: tuple[rs.TargetModule, ...]) -> None:
    batches = make_batches(6)
    found = rs.profile(model, batches, targets=targets, loss_fn=loss_fn, keep_directions=3)
    u, values, v = torch.linalg.svd(exact_gradients(model, batches, ["first"])["first"], full_matrices=False)
    left, right = (torch.from_numpy(side) for side in found.directions("first"))
    assert left.shape == (3, 12)
    assert right.shape == (3, 8)
    torch.testing.assert_close((left @ u[:, :3]).abs(), torch.eye(3), atol=1e-3, rtol=0)
    rebuilt = left.T @ torch.diag(values[:3]) @ right  # the signs of both sides belong together
    torch.testing.assert_close(rebuilt, u[:, :3] @ torch.diag(values[:3]) @ v[:3], atol=1e-5, rtol=0)
    with pytest.raises(ModelError, match="must hold directions of `first`, but does not"):
        rs.profile(model, batches, targets=targets, loss_fn=loss_fn).directions("first")


@pytest.mark.parametrize("wrap", ["peft", "compiled"])
def test_wrapped_models_give_the_profile_of_the_model_inside(
    model: Body, targets: tuple[rs.TargetModule, ...], wrap: str
) -> None:
    plain = rs.profile(model, make_batches(), targets=targets, loss_fn=loss_fn)
    if wrap == "compiled":
        wrapped = torch.compile(model)
    else:
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["first", "twice"]))
    found = rs.profile(wrapped, make_batches(), targets=targets, loss_fn=loss_fn)
    assert found.table["weight_norm"].tolist() == pytest.approx(plain.table["weight_norm"].tolist())
    for name in ("first", "twice"):
        assert found.spectra()[name] == pytest.approx(plain.spectra()[name], rel=1e-4)


def test_padding_does_not_count_in_the_inputs_features() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 1))
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    batches = [{"x": torch.randn(2, 4, 6), "attention_mask": mask} for _ in range(3)]

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return (model(batch["x"]).squeeze(-1) * batch["attention_mask"]).sum()

    rows = torch.cat([batch["x"][mask.bool()] for batch in batches]).double()
    found = rs.profile(model, batches, loss_fn=loss)
    assert found.column("activation_moment")["0"] == pytest.approx(float(rows.square().sum(1).mean()), rel=1e-5)
    variance = float(rows.var(0, correction=0).sum())
    assert found.column("activation_variance")["0"] == pytest.approx(variance, rel=1e-4)


def test_an_empty_loader_for_the_head_is_named(model: Body, targets: tuple[rs.TargetModule, ...]) -> None:
    with pytest.raises(ModelError, match="check `head_batches`"):
        rs.profile(model, make_batches(4), targets=targets, loss_fn=loss_fn, head=("first",), head_batches=[])
