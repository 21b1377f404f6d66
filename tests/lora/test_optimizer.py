"""An optimizer goes on after a resize as if what stayed had never been touched."""

import copy
import re

import bitsandbytes
import pytest
import torch
import transformers
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from rankscope.errors import ModelError
from rankscope.lora import Resize, resize_adapters
from tests.lora.live_models import OptimizerFactory, kinds_model, tokens, train_step, trainable

ADAM: dict[str, OptimizerFactory] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "bitsandbytes-32": lambda p: bitsandbytes.optim.AdamW(p, lr=0.01),
}
ADAFACTOR: dict[str, OptimizerFactory] = {
    "torch-adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "transformers-adafactor": lambda p: transformers.Adafactor(p, lr=0.01, relative_step=False, scale_parameter=False),
    "transformers-adafactor-momentum": lambda p: transformers.Adafactor(
        p, lr=0.01, beta1=0.9, relative_step=False, scale_parameter=False
    ),
}
EVERY = ADAM | ADAFACTOR


def separate_loss(a: torch.Tensor, b: torch.Tensor, seed: int) -> torch.Tensor:
    """Terms of single components only, so that what happens to one cannot reach another."""
    generator = torch.Generator().manual_seed(seed)
    target_a, target_b = (torch.randn(n, generator=generator, dtype=a.dtype) for n in (a.shape[1], len(b)))
    return (a - target_a).square().sum() + (b * target_b[:, None]).sin().sum()


def separate_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    linear = model.get_base_model().linear
    a, b = linear.lora_A["default"].weight, linear.lora_B["default"].weight
    optimizer.zero_grad()
    separate_loss(a, b, seed).backward()
    optimizer.step()


def linear_factors(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    linear = model.get_base_model().linear
    return linear.lora_A["default"].weight.detach(), linear.lora_B["default"].weight.detach()


@given(
    st.sampled_from(sorted(ADAM)),
    st.integers(0, 4),
    st.lists(st.integers(2, 6), min_size=1, max_size=4),
    st.integers(1, 3),
)
@settings(max_examples=25, deadline=None)
def test_untouched_components_move_as_in_a_twin(name: str, before: int, sequence: list[int], between: int) -> None:
    """The twin is never resized; its two components have the largest norms, so that they always stay."""
    model, twin = (kinds_model(target_modules=["linear"]) for _ in range(2))
    for each in (model, twin):
        for factor in linear_factors(each):
            factor.mul_(100)
    optimizer, other = (EVERY[name](trainable(each)) for each in (model, twin))
    step = 0
    for rank in [2, *sequence]:
        resize_adapters(model, optimizer, [Resize(name="linear", rank=rank)])
        for _ in range(before if step == 0 else between):
            for each, its in ((model, optimizer), (twin, other)):
                separate_step(each, its, step)
            step += 1
    (a, b), (twin_a, twin_b) = linear_factors(model), linear_factors(twin)
    torch.testing.assert_close(a[:2], twin_a, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(b[:, :2], twin_b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untouched_components_move_to_the_bit_in_lower_precision(dtype: torch.dtype) -> None:
    model, twin = (kinds_model(dtype, target_modules=["linear"], r=4) for _ in range(2))
    optimizer, other = (torch.optim.AdamW(trainable(each), lr=0.01) for each in (model, twin))
    for step in range(3):
        separate_step(model, optimizer, step)
        separate_step(twin, other, step)
    a, b = linear_factors(model)
    keep = sorted(torch.argsort(-(a.float().norm(dim=1) * b.float().norm(dim=0)))[:3].tolist())
    resize_adapters(model, optimizer, [Resize(name="linear", rank=3)])
    for step in range(3, 6):
        separate_step(model, optimizer, step)
        separate_step(twin, other, step)
    (a, b), (twin_a, twin_b) = linear_factors(model), linear_factors(twin)
    assert torch.equal(a, twin_a[keep])
    assert torch.equal(b, twin_b[:, keep])


@pytest.mark.parametrize("name", EVERY)
def test_training_goes_on_with_every_optimizer_through_every_kind_of_resize(name: str) -> None:
    model = kinds_model(torch.float32)
    optimizer = EVERY[name](trainable(model))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    rates = []
    for step, plan in enumerate(
        [{}, {"linear": 0, "table": 3}, {"convolution": 5}, {"linear": 4, "transposed": 1}, {}]
    ):
        before = [p.clone() for p in trainable(model)]
        groups = [len(group["params"]) for group in optimizer.param_groups]
        resize_adapters(
            model, optimizer, [Resize(name=n, rank=r) for n, r in plan.items()], shrink=("drop", "svd")[step % 2]
        )
        assert [len(group["params"]) for group in optimizer.param_groups] == groups
        assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in trainable(model)]
        assert set(map(id, optimizer.state)) <= set(map(id, trainable(model)))
        before = [p.clone() for p in trainable(model)]
        train_step(model, optimizer, step)
        still = [torch.equal(old, new) for old, new in zip(before, trainable(model), strict=True) if new.numel()]
        assert sum(still) <= len(plan)  # the other factor of one that has just woken gets no gradient yet
        assert all(torch.isfinite(p).all() for p in trainable(model))
        rates.append(scheduler.get_last_lr()[0])
        scheduler.step()
    assert rates == pytest.approx([rates[0] / (1 + step) for step in range(5)])


@pytest.mark.parametrize("name", ADAFACTOR)
@pytest.mark.parametrize("module", ["linear", "convolution"])
@pytest.mark.parametrize("rank", [2, 5])
def test_adafactor_estimates_of_what_stays_are_the_same(name: str, module: str, rank: int) -> None:
    """Its second moment is a product of two means, one of them over the ranks: both must follow."""
    model = kinds_model(r=4)
    optimizer = ADAFACTOR[name](trainable(model))
    for step in range(3):
        train_step(model, optimizer, step)
    layer = getattr(model.get_base_model(), module)
    names = ("row_var", "col_var") if "torch" in name else ("exp_avg_sq_row", "exp_avg_sq_col")

    def estimate(parameter: nn.Parameter) -> torch.Tensor:
        row, col = (optimizer.state[parameter][n] for n in names)
        if "torch" not in name:
            row, col = row.unsqueeze(-1), col.unsqueeze(-2)
        return row @ col / row.mean(dim=-2, keepdim=True)

    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    kept = sorted(torch.argsort(-(a.flatten(1).norm(dim=1) * b.flatten(1).norm(dim=0)))[:rank].tolist())
    before = estimate(a)[kept], estimate(b)[:, kept]
    resize_adapters(model, optimizer, [Resize(name=module, rank=rank)])
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(estimate(a)[: len(kept)], before[0])
    torch.testing.assert_close(estimate(b)[:, : len(kept)], before[1])


@pytest.mark.parametrize("factory", [bitsandbytes.optim.Adam8bit, bitsandbytes.optim.AdamW8bit])
def test_moments_in_8_bits_are_carried(factory: type) -> None:
    model = nn.Sequential(nn.Linear(1200, 600, bias=False))
    model = get_peft_model(model, LoraConfig(target_modules=["0"], r=4))
    optimizer = factory(trainable(model), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        for parameter in trainable(model):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    a, b = trainable(model)
    assert optimizer.state[a]["state1"].dtype == torch.uint8
    old = {digit: dense_moment(optimizer.state[a], digit) for digit in "12"}

    for rank in (6, 9, 2):  # B holds fewer than 4,096 values at rank 6, and its moments 32 bits
        a, b = trainable(model)
        norms = a.norm(dim=1) * b.norm(dim=0)
        kept = torch.sort(torch.argsort(-norms)[:rank]).values
        old = {digit: dense_moment(optimizer.state[a], digit) for digit in "12"}
        resize_adapters(model, optimizer, [Resize(name="0", rank=rank)])
        a, b = trainable(model)
        for digit in "12":
            new = dense_moment(optimizer.state[a], digit)
            step = old[digit].abs().max() / 50
            torch.testing.assert_close(new[: len(kept)], old[digit][kept], rtol=0.1, atol=step.item())
            assert (new[len(kept) :].abs() <= step).all()
        assert optimizer.state[a]["step"] == 4
        assert optimizer.state[b]["state1"].dtype == (torch.uint8 if b.numel() >= 4096 else torch.float32)
    for parameter in trainable(model):
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in trainable(model))
    fresh = factory(trainable(model), lr=1e-3)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def dense_moment(state: dict, digit: str) -> torch.Tensor:
    moment = state[f"state{digit}"]
    if moment.dtype != torch.uint8:
        return moment
    return bitsandbytes.functional.dequantize_blockwise(
        moment, absmax=state[f"absmax{digit}"], code=state[f"qmap{digit}"], blocksize=256
    )


def test_state_is_saved_and_loaded_over_sleep() -> None:
    model = kinds_model()
    optimizer = torch.optim.AdamW(trainable(model), lr=0.01)
    train_step(model, optimizer, 0)
    resize_adapters(model, optimizer, [Resize(name="linear", rank=0), Resize(name="table", rank=4)])
    train_step(model, optimizer, 1)
    twin = copy.deepcopy(model)
    fresh = torch.optim.AdamW(trainable(twin), lr=0.01)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its in ((model, optimizer), (twin, fresh)):
        resize_adapters(each, its, [Resize(name="linear", rank=2)], generator=torch.Generator().manual_seed(0))
        for step in range(2, 5):
            train_step(each, its, step)
    for ours, theirs in zip(trainable(model), trainable(twin), strict=True):
        assert torch.equal(ours, theirs)


def test_groups_keep_their_settings_and_places() -> None:
    model = kinds_model()
    first, *rest = trainable(model)
    stranger = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([{"params": [first], "lr": 0.5}, {"params": [stranger, *rest], "weight_decay": 0.3}])
    train_step(model, optimizer, 0)
    resize_adapters(model, optimizer, [Resize(name=name, rank=3) for name in ("table", "linear", "convolution")])
    first, *rest = trainable(model)
    one, two = optimizer.param_groups
    assert one["lr"] == 0.5
    assert [id(p) for p in one["params"]] == [id(first)]
    assert two["weight_decay"] == 0.3
    assert [id(p) for p in two["params"]] == [id(p) for p in (stranger, *rest)]


def test_accelerates_wrapper_is_taken_off() -> None:
    model = kinds_model(torch.float32)
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare_optimizer(torch.optim.AdamW(trainable(model)))
    train_step(model, optimizer, 0)
    resize_adapters(model, optimizer, [Resize(name="linear", rank=5)])
    train_step(model, optimizer, 1)
    assert optimizer.state[model.get_base_model().linear.lora_A["default"].weight]["step"] == 2


def test_gradient_clipping_and_scaling_pass_over_sleeping_parameters() -> None:
    model = kinds_model(torch.float32)
    optimizer = torch.optim.AdamW(trainable(model))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    resize_adapters(model, optimizer, [Resize(name="linear", rank=0)])
    for step in range(2):
        optimizer.zero_grad()
        scaler.scale(model(tokens(step)).square().mean()).backward()
        scaler.unscale_(optimizer)
        assert nn.utils.clip_grad_norm_(trainable(model), 0.1) > 0
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.state[model.get_base_model().table.lora_embedding_A["default"]]["step"] == 2


# --- what is refused ------------------------------------------------------------------------------------------------


def refused(model: nn.Module, optimizer: torch.optim.Optimizer, message: str) -> None:
    before = [id(p) for p in trainable(model)]
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        resize_adapters(model, optimizer, [Resize(name="linear", rank=3), Resize(name="table", rank=1)])
    assert [id(p) for p in trainable(model)] == before


def test_a_foreign_optimizer_is_refused() -> None:
    refused(
        kinds_model(),
        torch.optim.AdamW(trainable(kinds_model())),
        "`optimizer` must own the adapter's parameters, but lacks 4 of the 4 to be resized; "
        "pass the one that trains this model, or None.",
    )


def test_an_unknown_optimizer_is_refused() -> None:
    model = kinds_model()
    optimizer = torch.optim.NAdam(trainable(model))
    train_step(model, optimizer, 0)
    refused(
        model,
        optimizer,
        "`optimizer` must be one whose state can be carried (SGD, Adam, AdamW, Adafactor (torch's and transformers') and "
        "bitsandbytes' Adam and AdamW), but is NAdam; use one of these.",
    )


class Extra(torch.optim.AdamW):
    """Keeps a tensor of its own beside Adam's."""


def test_state_of_unknown_meaning_is_refused() -> None:
    model = kinds_model()
    optimizer = Extra(trainable(model))
    train_step(model, optimizer, 0)
    for state in optimizer.state.values():
        state["slow"] = torch.ones(3)
    refused(
        model,
        optimizer,
        "`optimizer` must hold state of known meaning, but Extra holds 'slow' as well; "
        "use one of SGD, Adam, AdamW, Adafactor (torch's and transformers') and bitsandbytes' Adam and AdamW.",
    )


# --- moments after an SVD -------------------------------------------------------------------------------------------


def test_mixed_moments_serve_better_than_none_after_an_svd() -> None:
    """Moments mixed by the SVD's matrices against the moments of a twin that was trained at the new place all along."""
    errors = {"mixed": 0.0, "reset": 0.0}
    for seed in range(5):
        model = kinds_model(r=4, target_modules=["linear"], seed=seed)
        optimizer = torch.optim.AdamW(trainable(model), lr=0.0)  # still, so that the moments of the new place are known
        reference = copy.deepcopy(model)
        resize_adapters(reference, None, [Resize(name="linear", rank=2)], shrink="svd")
        other = torch.optim.AdamW(trainable(reference), lr=0.0)
        for step in range(30):
            train_step(model, optimizer, step)
            train_step(reference, other, step)
        resize_adapters(model, optimizer, [Resize(name="linear", rank=2)], shrink="svd")
        for ours, theirs in zip(trainable(model), trainable(reference), strict=True):
            mixed, truth = (o.state[p]["exp_avg_sq"].sqrt() for o, p in ((optimizer, ours), (other, theirs)))
            errors["mixed"] += (torch.linalg.norm(mixed - truth) / torch.linalg.norm(truth)).item()
            errors["reset"] += 1.0
    assert errors["mixed"] < 0.6 * errors["reset"]
