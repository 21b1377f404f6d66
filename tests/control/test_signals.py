"""The window against gradients that autograd computes whole: micro-batches, scaling, checkpointing, evaluation, NaN."""

import gc
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import rankscope as rs
from rankscope.control.signals import GradientWindow, Signals, noise_of_mean
from rankscope.lora import LiveAdapter
from rankscope.profiling.statistics import split_energy
from tests.control.small_models import LAYERS, batch, net


def window(model: PeftModel, *, compiled: bool = False) -> GradientWindow:
    return GradientWindow(model, rs.find_targets(model, LAYERS), sketch_size=16, seed=0, compiled=compiled)


def measured(window: GradientWindow, model: PeftModel) -> Signals:
    layers = LiveAdapter(model).modules
    found = window.measure({name: tuple(f.detach() for f in layer.factors) for name, layer in layers.items()})
    assert found.batches
    return found


def gradients(model: PeftModel, batches: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean gradient of each base weight."""
    weights = {name: module.layer.base_layer.weight for name, module in LiveAdapter(model).modules.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    found = [torch.autograd.grad(model(**b).loss, list(weights.values())) for b in batches]
    for weight in weights.values():
        weight.requires_grad_(False)
    return {name: sum(each) / len(batches) for name, each in zip(weights, zip(*found, strict=True), strict=True)}


def shape(found: Signals) -> np.ndarray:
    """What all ranks are worth, free of the common share of signal."""
    return np.concatenate([s.worth for s in found.modules])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_the_spectrum_is_that_of_the_mean_gradient(checkpointing: bool, scale: float) -> None:
    """Two steps of two micro-batches, the loss scaled, an evaluation in between: equal to four whole gradients."""
    model = net(checkpointing=checkpointing)
    model.train()
    seen = window(model)
    for step in range(2):
        seen.watch(scale)
        for part in range(2):
            (model(**batch(2 * step + part)).loss * scale).backward()
            model.eval()
            model(**batch(7))
            model.train()
        seen.end_step()
        model(**batch(6)).loss.backward()  # a step that is not sampled
    found = measured(seen, model)
    assert found.batches == 4
    expected = gradients(model, [batch(i) for i in range(4)])
    shares = []
    for signals in found.modules:
        spectrum = torch.linalg.svdvals(expected[signals.target.name]).square().numpy()
        got = np.array(signals.worth)
        keep = spectrum[: len(got)] > 1e-6 * spectrum[0]
        shares.append(got[0] / spectrum[0])
        np.testing.assert_allclose(got[keep], shares[-1] * spectrum[: len(got)][keep], rtol=1e-3)
        assert signals.rank == 2
    assert all(0.0 <= share <= 1.0 + 1e-6 for share in shares)


def test_what_batches_agree_on_is_signal() -> None:
    shares = []
    for distinct in (1, 8):
        model = net()
        model.train()
        seen = window(model)
        for step in range(8):
            seen.watch()
            model(**batch(step % distinct)).loss.backward()
            seen.end_step()
        shares.append(measured(seen, model).signal_share)
    assert shares[0] == pytest.approx(1.0, abs=1e-5)
    assert shares[1] < 0.9


def test_a_step_that_is_not_finite_is_left_out_and_counted() -> None:
    model = net()
    model.train()
    clean, mixed = window(model), window(model)
    for step, factor in enumerate((1.0, float("inf"), 1.0)):
        for seen in (clean, mixed):
            if seen is clean and factor != 1.0:
                continue
            seen.watch()
            (model(**batch(step)).loss * factor).backward()
            seen.end_step()
    assert (clean.broken, mixed.broken) == (0, 1)
    np.testing.assert_array_equal(shape(measured(clean, model)), shape(measured(mixed, model)))


def test_nothing_seen_is_no_signal_and_no_hook_stays() -> None:
    model = net()
    seen = window(model)
    layers = LiveAdapter(model).modules
    assert seen.measure({name: layer.factors for name, layer in layers.items()}).batches == 0

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    assert hooks() == 0
    seen.watch()
    assert hooks() == 6
    seen.close()
    seen.watch()
    seen.end_step()
    assert hooks() == 0


def test_a_step_that_is_never_ended_leaves_nothing_behind() -> None:
    """As when the training loop raises within it: compiled models would run eagerly from then on."""
    model = net()
    seen = window(model, compiled=True)
    seen.watch()
    assert torch._dynamo.eval_frame._stance.stance == "force_eager"
    del seen
    gc.collect()
    assert torch._dynamo.eval_frame._stance.stance == "default"
    assert not model._forward_pre_hooks


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        raise KeyError("backward")


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_pass_that_raises_leaves_no_hook_and_its_step_does_not_count(where: str) -> None:
    model = net()
    model.train()
    seen, clean = window(model, compiled=True), window(model)
    seen.watch()
    model(**batch(0)).loss.backward()  # an accumulated batch, which goes with its step
    fourth = model.get_base_model().fourth
    plain = fourth.forward
    with pytest.raises(KeyError), pytest.MonkeyPatch.context() as patch:
        patch.setattr(fourth, "forward", (lambda x: {}[x]) if where == "forward" else (lambda x: Fails.apply(plain(x))))
        model(**batch(1)).loss.backward()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch._dynamo.eval_frame._stance.stance == "default"
    seen.end_step()
    for each in (seen, clean):
        each.watch()
        model(**batch(2)).loss.backward()
        each.end_step()
    np.testing.assert_array_equal(shape(measured(seen, model)), shape(measured(clean, model)))


def test_the_state_goes_on_where_it_was() -> None:
    model = net()
    model.train()
    first, second = window(model), window(model)
    for step in range(4):
        if step == 2:
            second.load_state_dict(first.state_dict())
        for seen in (first, second) if step >= 2 else (first,):
            seen.watch()
            model(**batch(step)).loss.backward()
            seen.end_step()
    np.testing.assert_array_equal(shape(measured(first, model)), shape(measured(second, model)))


def test_bfloat16() -> None:
    model, half = net(), net().bfloat16()
    found = []
    for each, dtype in ((model, torch.float32), (half, torch.bfloat16)):
        each.train()
        seen = window(each)
        for step in range(4):
            b = batch(step)
            seen.watch()
            each(x=b["x"].to(dtype), labels=b["labels"]).loss.backward()
            seen.end_step()
        found.append(measured(seen, each))
    for exact, rough in zip(found[0].modules, found[1].modules, strict=True):
        assert rough.worth[0] == pytest.approx(exact.worth[0], rel=0.1)


def test_the_noise_of_a_mean_is_the_u_statistic() -> None:
    rng = np.random.default_rng(0)
    gradients_ = rng.normal(size=(5, 30)) + 0.5
    energy = np.array([np.square(gradients_.mean(axis=0)).sum()])
    squares = np.array([np.square(gradients_).sum(axis=1).mean()])
    pairs = [gradients_[i] @ gradients_[j] for i in range(5) for j in range(5) if i != j]
    assert energy - noise_of_mean(energy, squares, 1 / 5) == pytest.approx(np.mean(pairs))
    split = split_energy(float(energy[0]), float(squares[0]) * 5, [1.0] * 5)
    assert noise_of_mean(energy, squares, 1 / 5) == pytest.approx(split.noise)


class Residual(nn.Module):
    """The input of one module changes in place afterwards, as plain LoRA allows where it casts its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, in_place: bool) -> Tensor:
        x = self.first(x)
        y = self.second(x)
        x = x.add_(1.0) if in_place else x + 1.0
        return self.last(x + y)


def test_inputs_that_change_in_place_are_copied() -> None:
    """From the step on that follows the one in which it shows, which is left out."""
    found = []
    for in_place in (True, False):
        torch.manual_seed(0)
        model = get_peft_model(
            Residual().bfloat16(), LoraConfig(target_modules=["first", "second", "last"], r=2)
        ).train()
        seen = GradientWindow(model, rs.find_targets(model), sketch_size=16, seed=0)
        for step in range(3):
            if step or in_place:
                seen.watch()
            x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step)).bfloat16()
            model(x, in_place).square().mean().backward()
            seen.end_step()
        found.append(measured(seen, model))
    assert found[0].batches == found[1].batches == 2
    np.testing.assert_array_equal(shape(found[0]), shape(found[1]))
