"""The controller under what people train with: GradScaler, checkpointing, accelerate, torch.compile, DoRA, half precision."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import rankscope as rs
from rankscope.errors import ModelError
from rankscope.lora import count_adapter_parameters
from tests.architectures import build
from tests.control.small_models import BUDGET, Net, adamw, batch, control, net, run
from tests.lora.test_optimizer import EVERY
from tests.lora.test_resize import quantised

TOTAL = 40


def still(model: nn.Module) -> torch.optim.SGD:
    """An optimizer that moves nothing, so that runs see the same gradients."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)


# --- loss scaling --------------------------------------------------------------------------------------------------


def scaled_run(scale: float | None, dtype: torch.dtype, make: Callable[..., Any] = still, steps: int = 8) -> Any:
    """A loop with autocast and, with a scale, a GradScaler."""
    model = net()
    optimizer = make(model)
    scaler = torch.amp.GradScaler("cpu", enabled=scale is not None, init_scale=scale or 1.0, growth_interval=1000)
    controller = control(model, optimizer, scaler=scaler, total_steps=2 * steps, rank_change="resize")
    model.train()
    for step in range(steps):
        with torch.autocast("cpu", dtype):
            loss = model(**batch(step)).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        controller.step()
        optimizer.zero_grad()
    return controller


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_grad_scaler_changes_no_decision(dtype: torch.dtype) -> None:
    plain, scaled = scaled_run(None, dtype), scaled_run(1024.0, dtype)
    assert "moved" in set(scaled.decisions["action"])
    for name in ("ranks_after", "batches", "action"):
        assert scaled.decisions[name].tolist() == plain.decisions[name].tolist()
    for ours, theirs in zip(scaled.decisions["gains"], plain.decisions["gains"], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0.05, atol=1e-6)


def test_steps_that_overflow_are_left_out() -> None:
    """A scale that is far too large is halved, step by step, until gradients are finite."""
    controller = scaled_run(2.0**26, torch.float16, adamw, steps=16)
    found = controller.decisions
    assert found["broken"].iloc[0] > 0
    assert found["action"].iloc[0] == "skipped"
    assert found["broken"].iloc[-1] == found["broken"].iloc[-2]
    assert found["batches"].iloc[-1] == 3
    assert "moved" in set(found["action"])


# --- gradient checkpointing ----------------------------------------------------------------------------------------


def llama_run(reentrant: bool | None) -> tuple[list[float], pd.DataFrame]:
    """A real transformers model; None: not checkpointed."""
    torch.manual_seed(0)
    model = build("llama")
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2, lora_alpha=4, task_type="CAUSAL_LM"))
    optimizer = adamw(model)
    controller = rs.RankController(
        model,
        optimizer,
        budget=rs.ParameterBudget(count_adapter_parameters(model)),
        every=3,
        total_steps=9,
        freeze_fraction=1.0,
        samples=2,
        hysteresis=0.0,
        min_gain_ratio=0.0,
    )
    generator = torch.Generator().manual_seed(0)
    losses = []
    model.train()
    for _ in range(9):
        ids = torch.randint(0, model.config.vocab_size, (2, 12), generator=generator)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, controller.decisions


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    (losses, decisions), (expected, plain) = llama_run(reentrant), llama_run(None)
    assert "moved" in set(decisions["action"])
    assert decisions["ranks_after"].tolist() == plain["ranks_after"].tolist()
    assert decisions["batches"].tolist() == plain["batches"].tolist()
    assert losses == pytest.approx(expected, rel=1e-4)


# --- accelerate ----------------------------------------------------------------------------------------------------


def test_accumulation_in_accelerates_loop() -> None:
    """Against a loop by hand: the same ranks, losses and weights."""
    model = net()
    optimizer = adamw(model)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(model, optimizer)
    controller = control(model, optimizer)
    model.train()
    for micro in range(2 * TOTAL):
        with accelerator.accumulate(model):
            accelerator.backward(model(**halves(micro)).loss)
            optimizer.step()
            if accelerator.sync_gradients:
                controller.step()
            optimizer.zero_grad()

    twin = net()
    other = adamw(twin)
    by_hand = control(twin, other)
    twin.train()
    for step in range(TOTAL):
        for part in range(2):
            (twin(**halves(2 * step + part)).loss / 2).backward()
        other.step()
        by_hand.step()
        other.zero_grad()
    assert "moved" in set(controller.decisions["action"])
    assert controller.decisions["batches"].tolist() == [6] * 5
    pd.testing.assert_frame_equal(controller.decisions, by_hand.decisions)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def halves(micro: int) -> dict[str, torch.Tensor]:
    return {name: value.tensor_split(2)[micro % 2] for name, value in batch(micro // 2).items()}


# --- torch.compile -------------------------------------------------------------------------------------------------


def test_a_compiled_model_is_masked_and_seen() -> None:
    torch._dynamo.reset()
    controllers = []
    for compiled in (False, True):
        model = net(r=4)
        optimizer = still(model)
        runs = torch.compile(model, backend="eager") if compiled else model
        controller = control(runs, optimizer, rank_change="auto" if compiled else "mask")
        run(runs, optimizer, controller, range(8))
        controllers.append(controller)
    controller.close()
    with pytest.raises(
        ModelError, match=r"^the controller must be open to step, but was closed after step 8; make a new"
    ):
        run(runs, optimizer, controller, range(8, 12))
    eager, compiled = (controller.decisions for controller in controllers)
    assert controllers[1].masks is not None
    assert compiled["batches"].tolist() == [3, 3]
    assert "moved" in set(compiled["action"])
    assert compiled["ranks_after"].tolist() == eager["ranks_after"].tolist()


@pytest.mark.parametrize("how", ["blocks in place", "in place", "inside PEFT"])
def test_compiled_in_parts_or_in_place(tmp_path: Path, how: str) -> None:
    """Every sampled step is seen, and the adapter loads into a model that is not compiled."""
    torch._dynamo.reset()
    model = net(r=4)
    base = model.get_base_model()
    if how == "blocks in place":
        base.second.compile(backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    else:
        model.base_model.model = torch.compile(base, backend="eager")
    optimizer = adamw(model)
    controller = control(model, optimizer)
    run(model, optimizer, controller, range(20))
    assert controller.masks is not None
    assert controller.decisions["batches"].tolist() == [3] * 5
    assert "moved" in set(controller.decisions["action"])
    model.save_pretrained(str(tmp_path))
    torch.manual_seed(0)
    plain = PeftModel.from_pretrained(Net(), str(tmp_path)).eval()
    assert count_adapter_parameters(plain) == controller.allocation.parameters
    torch.testing.assert_close(plain(**batch(0)).logits, model.eval()(**batch(0))["logits"], rtol=1e-5, atol=1e-5)


# --- gradients of any size -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [2.0**80, 2.0**-80])
def test_gradients_whose_squares_leave_float32(scale: float) -> None:
    """The same decisions; the first sampled step, which shows the size, is left out."""
    found = []
    for factor in (1.0, scale):
        model = net()
        optimizer = still(model)
        controller = control(model, optimizer)
        model.train()
        for step in range(20):
            if factor == 1.0 and step == 1:
                controller._window.close()  # left out here as well
            loss = model(**batch(step)).loss * factor
            loss.backward()
            optimizer.step()
            controller.step(loss)
            optimizer.zero_grad()
        found.append(controller.decisions)
    plain, scaled = found
    assert scaled["broken"].tolist() == [0] * 5
    assert "moved" in set(scaled["action"])
    for name in ("action", "batches", "ranks_after", "predicted"):
        assert scaled[name].tolist() == plain[name].tolist()
    ratio = np.divide(scaled["gains"].iloc[0], plain["gains"].iloc[0])
    np.testing.assert_array_equal(ratio, np.full(4, scale**2))


# --- optimizers and bases ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(EVERY))
def test_every_optimizer_whose_state_is_carried(name: str) -> None:
    """Its rate follows its scheduler, whatever is resized."""
    model = net()
    optimizer = EVERY[name]([p for p in model.parameters() if p.requires_grad])
    rate = optimizer.param_groups[0]["lr"]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    controller = control(model, optimizer)
    seen = []

    def follow(step: int) -> None:
        seen.append(optimizer.param_groups[0]["lr"])
        scheduler.step()

    losses = run(model, optimizer, controller, range(TOTAL), after=follow)
    assert "moved" in set(controller.decisions["action"])
    assert np.isfinite(losses).all()
    assert seen == pytest.approx([rate / (1 + step) for step in range(TOTAL)])
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in parameters]


def test_a_base_in_4_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(quantised(4), LoraConfig(target_modules=["0", "2"], r=3, lora_alpha=6))
    optimizer = adamw(model)
    start = rs.RankAllocation(rs.find_targets(model, ["0", "2"]), (5, 1))
    options = {
        "budget": rs.ParameterBudget(6 * 128),
        "every": 4,
        "samples": 4,
        "total_steps": 16,
        "freeze_fraction": 1.0,
    }
    controller = rs.RankController(model, optimizer, start=start, hysteresis=0.0, min_gain_ratio=0.0, **options)
    x, y = (torch.randn(32, 64, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    model.train()
    for _ in range(16):
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        controller.step(loss)
        optimizer.zero_grad()
    assert "moved" in set(controller.decisions["action"])
    assert count_adapter_parameters(model) == controller.allocation.parameters <= 6 * 128
    model.eval().save_pretrained(str(tmp_path))
    plain = PeftModel.from_pretrained(quantised(4), str(tmp_path)).eval()
    with torch.no_grad():  # where a gradient passes, the base is computed another way
        torch.testing.assert_close(plain(x), model(x))


# --- forms of LoRA and dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"use_dora": True}, torch.float32),
        ({"use_rslora": True}, torch.float32),
        ({"lora_bias": True}, torch.float32),
        ({}, torch.bfloat16),
    ],
    ids=["dora", "rank-stabilised", "bias", "bfloat16"],
)
@pytest.mark.parametrize("mode", ["resize", "mask"])
def test_other_forms_move_and_load_in_plain_peft(
    tmp_path: Path, options: dict[str, Any], dtype: torch.dtype, mode: str
) -> None:
    model = net(r=2 if mode == "resize" else 4, **options).to(dtype)
    scaling = next(layer.scaling["default"] for layer in model.modules() if hasattr(layer, "scaling"))
    optimizer = adamw(model)
    controller = control(model, optimizer, rank_change=mode)

    def cast(step: int) -> dict[str, torch.Tensor]:
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch(step).items()}

    model.train()
    for step in range(TOTAL):
        model(**cast(step)).loss.backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    assert "moved" in set(controller.decisions["action"])
    assert controller.allocation.parameters <= BUDGET
    model.save_pretrained(str(tmp_path))
    torch.manual_seed(0)
    plain = PeftModel.from_pretrained(Net().to(dtype), str(tmp_path), autocast_adapter_dtype=False).eval()
    assert count_adapter_parameters(plain) == controller.allocation.parameters
    scalings = [layer.scaling["default"] for layer in plain.modules() if hasattr(layer, "scaling")]
    assert scalings == pytest.approx([scaling] * len(scalings))
    model.eval()
    tolerance = 0 if mode == "resize" else 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(plain(**cast(0)).logits, model(**cast(0)).logits, rtol=tolerance, atol=tolerance)
