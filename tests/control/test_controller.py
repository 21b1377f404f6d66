"""The controller in a plain loop: the budget at every step, resume to the bit, refusals, and nothing left behind."""

import copy
import io
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import rankscope as rs
from rankscope.control import write_decisions
from rankscope.errors import ModelError, RankscopeError
from rankscope.lora import RankMasks, count_adapter_parameters, masks_on
from tests.control.small_models import BUDGET, LAYERS, START, Net, adamw, batch, control, net, run
from tests.lora.live_models import kinds_model, tokens

TOTAL = 40


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def weights(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if "lora_" in name}


@pytest.mark.parametrize("coarse_fraction", [0.0, 0.5, 1.0])
def test_ranks_move_within_the_budget_and_freeze(coarse_fraction: float) -> None:
    model = net()
    optimizer = adamw(model)
    controller = control(model, optimizer, hysteresis=0.0, min_gain_ratio=0.0, coarse_fraction=coarse_fraction)
    seen = []
    run(model, optimizer, controller, range(TOTAL), after=lambda _: seen.append(controller.allocation.vector))
    assert count_adapter_parameters(model) == controller.allocation.parameters <= BUDGET
    assert all(rs.RankAllocation(controller.allocation.targets, v).parameters <= BUDGET for v in seen)
    assert len(set(seen)) > 1
    assert len(set(seen[19:])) == 1
    assert controller.decisions["step"].tolist() == [4, 8, 12, 16, 20]
    phases = controller.decisions["phase"].tolist()
    assert phases.count("coarse") == {0.0: 0, 0.5: 2, 1.0: 5}[coarse_fraction]
    assert controller.frozen
    assert hooks(model) == 0
    for decision, after in zip(controller.decisions.itertuples(), seen[3:20:4], strict=True):
        assert decision.ranks_after == after
        if decision.phase == "fine" and decision.action == "moved":
            assert decision.batches == 3
            assert np.maximum(np.subtract(decision.ranks_after, decision.ranks_before), 0).sum() == 1


def test_a_controller_that_moves_nothing_changes_nothing() -> None:
    model, other = net(), net()
    optimizer, plain = adamw(model), adamw(other)
    controller = control(model, optimizer, hysteresis=1e12, start=None)
    run(model, optimizer, controller, range(TOTAL))
    other.train()
    for step in range(TOTAL):
        other(**batch(step)).loss.backward()
        plain.step()
        plain.zero_grad()
    assert set(controller.decisions["action"]) == {"kept"}
    assert all(torch.equal(value, weights(other)[name]) for name, value in weights(model).items())


def test_a_with_block_leaves_no_hook_however_it_ends() -> None:
    model = net()
    optimizer = adamw(model)
    with pytest.raises(KeyError), control(model, optimizer) as controller:
        run(model, optimizer, controller, range(6))
        assert hooks(model) > 0
        raise KeyError("in a sampled step")
    assert hooks(model) == len(optimizer._optimizer_step_post_hooks) == 0
    assert controller.frozen


def test_new_ranks_start_along_the_gradient() -> None:
    model = net(r=1)
    optimizer = adamw(model)
    controller = control(model, optimizer, budget=rs.ParameterBudget(2 * BUDGET), start=None)
    run(model, optimizer, controller, range(4))
    ranks = controller.allocation.ranks
    grown = next(name for name, rank in ranks.items() if rank > 1)
    layer = model.get_base_model().get_submodule(grown)
    a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    torch.testing.assert_close(a[1:].norm(dim=1), torch.full((ranks[grown] - 1,), 3**-0.5))
    assert torch.linalg.vector_norm(b[:, 1:]) == 0
    torch.testing.assert_close(a[1:] @ a[:1].T, torch.zeros(ranks[grown] - 1, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("stop", [1, 3, 4, 10, 15, 20, 23, 30])
def test_resume_to_the_bit(stop: int) -> None:
    """Stopped after any step, also inside a sampled stretch, and gone on from the states alone."""

    def fresh() -> tuple[PeftModel, torch.optim.Optimizer, rs.RankController]:
        model = net(lora_dropout=0.0)
        optimizer = adamw(model)
        return model, optimizer, control(model, optimizer, start="uniform")

    model, optimizer, controller = fresh()
    run(model, optimizer, controller, range(TOTAL))

    first, opt, moving = fresh()
    run(first, opt, moving, range(stop))
    file = io.BytesIO()
    torch.save([moving.state_dict(), first.state_dict(), opt.state_dict()], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    second, opt, moving = fresh()
    moving.load_state_dict(states[0])
    second.load_state_dict(states[1])
    opt.load_state_dict(states[2])
    run(second, opt, moving, range(stop, TOTAL))
    pd.testing.assert_frame_equal(moving.decisions, controller.decisions)
    assert weights(second).keys() == weights(model).keys()
    assert all(torch.equal(value, weights(second)[name]) for name, value in weights(model).items())


def test_micro_batches_count_and_clipping_does_not_matter() -> None:
    """Two halves of a batch an optimizer step, gradients clipped or not."""
    decisions, parts = [], 2
    for clip in (None, 0.01):
        model = net()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        controller = control(model, optimizer)
        model.train()
        for step in range(4):
            b = batch(step)
            for part in range(parts):
                (model(**{k: v.tensor_split(parts)[part] for k, v in b.items()}).loss / parts).backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            controller.step()
            optimizer.zero_grad()
        assert controller.decisions["batches"].tolist() == [3 * parts]
        decisions.append(controller.decisions)
    pd.testing.assert_frame_equal(*decisions)


def test_no_decision_on_gradients_that_are_not_finite(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    optimizer = adamw(model)
    controller = control(model, optimizer, total_steps=8)
    model.train()
    with caplog.at_level(logging.INFO, logger="rankscope"):
        for step in range(4):
            (model(**batch(step)).loss * float("nan")).backward()
            optimizer.zero_grad()
            controller.step()
    (decision,) = controller.decisions.itertuples()
    assert (decision.action, decision.batches, decision.broken) == ("skipped", 0, 3)
    assert "step 4: skipped, no finite gradient to decide on; 0 ranks went elsewhere" in caplog.text
    assert controller.allocation.vector == START


def test_nothing_moves_where_too_little_is_gained() -> None:
    model = net()
    optimizer = adamw(model)
    controller = control(model, optimizer, hysteresis=0.0, min_gain_ratio=100.0)
    run(model, optimizer, controller, range(TOTAL))
    assert controller.allocation.vector == START
    assert set(controller.decisions["action"]) == {"kept"}
    assert set(controller.decisions["reason"]) == {"nothing is worth moving"}
    assert set(controller.decisions["batches"]) == {3}  # each decision looks at gradients of its own


def test_a_scaled_loss_gives_the_same_decisions() -> None:
    """Under a GradScaler the hooks see scaled gradients; the scale, a power of two, is divided out to the bit."""
    decisions = []
    for scaled in (False, True):
        model = net()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=scaled)
        controller = control(model, optimizer, scaler=scaler)
        model.train()
        for step in range(20):
            scaler.scale(model(**batch(step)).loss).backward()
            scaler.step(optimizer)
            scaler.update()
            controller.step()
            optimizer.zero_grad()
        decisions.append(controller.decisions)
    assert "moved" in set(decisions[0]["action"])
    columns = ["step", "action", "ranks_after"]
    pd.testing.assert_frame_equal(decisions[0][columns], decisions[1][columns])


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}, {"lora_dropout": 0.1}], ids=str)
def test_other_kinds_of_lora(options: dict[str, Any], tmp_path: Path) -> None:
    """Ranks move, scaling is as it was (rank-stabilised: by the root of the rank), and plain PEFT loads the result."""
    model = net(**options)
    optimizer = adamw(model)
    scaling = model.get_base_model().first.scaling["default"]
    controller = control(model, optimizer)
    run(model, optimizer, controller, range(TOTAL))
    assert "moved" in set(controller.decisions["action"])
    ranks = controller.allocation.ranks
    adapted = [getattr(model.get_base_model(), name) for name in LAYERS if ranks[name]]
    assert [layer.scaling["default"] for layer in adapted] == pytest.approx([scaling] * len(adapted))
    model.save_pretrained(str(tmp_path))
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Net(), str(tmp_path)).eval()
    assert torch.equal(loaded(**batch(0)).logits, model.eval()(**batch(0)).logits)


def test_a_compiled_model_gets_masks() -> None:
    model = net(r=4)
    optimizer = adamw(model)
    compiled = torch.compile(model, backend="eager")
    controller = control(compiled, optimizer)
    compiled.train()
    for step in range(TOTAL):
        compiled(**batch(step))["loss"].backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    assert isinstance(controller.masks, RankMasks)
    assert "moved" in set(controller.decisions["action"])
    assert controller.allocation.parameters <= BUDGET


def test_decisions_are_written(tmp_path: Path) -> None:
    model = net()
    optimizer = adamw(model)
    controller = control(model, optimizer)
    run(model, optimizer, controller, range(TOTAL))
    write_decisions(controller.decisions, tmp_path / "decisions.parquet")
    written = pd.read_parquet(tmp_path / "decisions.parquet")
    assert written["step"].tolist() == [4, 8, 12, 16, 20]
    assert written["modules"].iloc[0].tolist() == [t.name for t in controller.allocation.targets]
    assert written["ranks_after"].iloc[-1].tolist() == list(controller.allocation.vector)
    assert list(tmp_path.iterdir()) == [tmp_path / "decisions.parquet"]


# --- starts and masks ----------------------------------------------------------------------------------------------


def test_it_starts_from_an_allocation_or_a_strategy() -> None:
    for start, expected in (("uniform", (2, 2, 2, 2)), ("mine", (0, 3, 2, 0))):
        model = net()
        optimizer = adamw(model)
        if start == "mine":
            start = rs.RankAllocation(rs.find_targets(model, LAYERS), (0, 3, 2, 0))
        controller = control(model, optimizer, start=start)
        assert controller.allocation.vector == expected
        run(model, optimizer, controller, range(TOTAL))
        assert count_adapter_parameters(model) <= BUDGET


@pytest.mark.parametrize("mode", ["resize", "mask"])
def test_copies_and_pickles_at_any_step_change_nothing(mode: str) -> None:
    """Copies train, too; they feed nothing to the controller, carry none of its hooks and, masked, have masks of their own."""
    found = []
    for copying in (False, True):
        model = net(r=4)
        optimizer = adamw(model)
        controller = control(model, optimizer, rank_change=mode)

        def copy_and_train(_: int, model: PeftModel = model, copying: bool = copying) -> None:
            if not copying:
                return
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
                twin(**batch(99)).loss.backward()
                assert masks_on(twin) is None or masks_on(twin).live.model is twin

        run(model, optimizer, controller, range(20), after=copy_and_train)
        found.append(controller)
    pd.testing.assert_frame_equal(found[0].decisions, found[1].decisions)
    assert "moved" in set(found[0].decisions["action"])


def test_masks_make_the_same_decisions_as_resizing() -> None:
    found = []
    for mode, r in (("resize", 2), ("mask", 4)):
        model = net(r=r)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        controller = control(model, optimizer, rank_change=mode, start="uniform", max_rank=4)
        run(model, optimizer, controller, range(4))
        found.append(controller.allocation)
    assert found[0].vector == found[1].vector
    assert isinstance(controller.masks, RankMasks)
    assert dict(controller.masks.ranks) == dict(found[1].ranks)


def test_masked_resume_to_the_bit() -> None:
    def fresh() -> tuple[PeftModel, torch.optim.Optimizer, rs.RankController]:
        model = net(r=4)
        optimizer = adamw(model)
        return model, optimizer, control(model, optimizer, rank_change="mask", start="uniform")

    model, optimizer, controller = fresh()
    run(model, optimizer, controller, range(10))
    states = copy.deepcopy([controller.state_dict(), model.state_dict(), optimizer.state_dict()])
    second, opt, moving = fresh()
    for part, state in zip((moving, second, opt), states, strict=True):
        part.load_state_dict(state)
    for parts in ((model, optimizer, controller), (second, opt, moving)):
        run(*parts, range(10, TOTAL))
    pd.testing.assert_frame_equal(moving.decisions, controller.decisions)
    assert all(torch.equal(value, weights(second)[name]) for name, value in weights(model).items())


def test_what_cannot_be_watched_keeps_its_rank() -> None:
    """The embedding's adapter counts against the budget, and stays."""
    model = kinds_model(torch.float32)
    optimizer = adamw(model)
    budget = rs.ParameterBudget(rs.RankAllocation.from_peft_model(model).parameters)
    controller = rs.RankController(
        model,
        optimizer,
        budget=budget,
        every=3,
        total_steps=9,
        freeze_fraction=1.0,
        samples=3,
        hysteresis=0.0,
        min_gain_ratio=0.0,
    )
    for step in range(9):
        loss = model(tokens(step)).square().mean()
        loss.backward()
        optimizer.step()
        controller.step(loss)
        optimizer.zero_grad()
    assert controller.allocation.ranks["table"] == 2
    assert controller.allocation.parameters <= budget.limit
    assert "moved" in set(controller.decisions["action"])
    assert controller.decisions["gains"].map(lambda gains: np.isnan(gains[0])).all()


def test_plain_peft_loads_the_result(tmp_path: Path) -> None:
    model = net()
    optimizer = adamw(model)
    run(model, optimizer, control(model, optimizer), range(TOTAL))
    model.save_pretrained(str(tmp_path))
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Net(), str(tmp_path))
    model.eval()
    loaded.eval()
    assert torch.equal(loaded(**batch(0)).logits, model(**batch(0)).logits)


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"budget": rs.ParameterBudget(BUDGET - 1), "start": None},
            f"`budget` must cover the ranks to begin with ({BUDGET} parameters), but got {BUDGET - 1}; raise it, or pass `start`.",
        ),
        (
            {"every": 40},
            "`every` must leave a decision before the ranks freeze at step 20 of 40, but got 40; lower it, or raise `freeze_fraction`.",
        ),
        (
            {"freeze_fraction": 0.0},
            "`freeze_fraction`: input should be greater than 0, but got 0.0.",
        ),
        ({"samples": 0}, "`samples`: input should be greater than 0, but got 0."),
        (
            {"budget": "5000"},
            "`budget` must be ParameterBudget | int, but got '5000'; see `help(rankscope.RankController)`.",
        ),
        ({"scaler": True}, "`scaler` must be a torch.amp.GradScaler, but is a bool."),
        ({"sketch_size": 0}, "`sketch_size`: input should be greater than or equal to 2, but got 0."),
        ({"seed": -1}, "`seed`: input should be greater than or equal to 0, but got -1."),
        (
            {"start": {"first": 2}},
            "`start` must be RankAllocation | str | None, but got {'first': 2}; `rankscope.allocate` gives it.",
        ),
        (
            {"start": rs.RankAllocation(rs.find_targets(net(), LAYERS), (0,) * 4)},
            "`start` must give at least one module a rank, but gives none; raise one.",
        ),
        ({"rank_change": "masks"}, "`rank_change`: input should be 'auto', 'resize' or 'mask', but got 'masks'."),
        (
            {"start": rs.RankAllocation((rs.TargetModule(name="other", in_features=8, out_features=8),), (1,))},
            "`start` must give ranks to adapted modules only, but gives `other` some; adapt it as well.",
        ),
    ],
)
def test_bad_settings_change_nothing(options: dict[str, Any], message: str) -> None:
    model = net()
    before, optimizer = weights(model), adamw(model)
    with pytest.raises(RankscopeError, match=f"^{re.escape(message)}$"):
        control(model, optimizer, **options)
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    assert hooks(model) == len(optimizer._optimizer_step_post_hooks) == 0


def test_a_start_that_fails_takes_the_masks_off_again() -> None:
    """DoRA's magnitude cannot be masked, which is found when masks are on and ranks are set."""
    model = net(r=4, use_dora=True)
    optimizer = adamw(model)
    message = "the masked rank of `first` must be at least 1, for its bias or DoRA magnitude stays, but got 0."
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        start = rs.RankAllocation(rs.find_targets(model, LAYERS), (0, 1, 1, 1))
        control(model, optimizer, rank_change="mask", start=start)
    assert masks_on(model) is None
    assert hooks(model) == len(optimizer._optimizer_step_post_hooks) == 0
    assert not list(model.buffers())


def test_a_frozen_adapter_is_refused(tmp_path: Path) -> None:
    """What PeftModel.from_pretrained loads is, unless it is told otherwise."""
    net().save_pretrained(str(tmp_path))
    for trainable in (False, True):
        model = PeftModel.from_pretrained(Net(), str(tmp_path), is_trainable=trainable)
        optimizer = torch.optim.AdamW(model.parameters())
        if trainable:
            run(model, optimizer, control(model, optimizer), range(4))
            continue
        message = (
            "adapter 'default' must be trained, but its parameters are frozen; load it with is_trainable=True, or make it the "
            "active one (`set_adapter`)."
        )
        with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
            control(model, optimizer)


@pytest.mark.parametrize("key", ["ranks", "step", "decisions", "window", "losses", "sketch", "moved_at"])
@pytest.mark.parametrize("value", [None, 3, "x", [1], {"x": 1}], ids=repr)
def test_a_damaged_state_changes_nothing(key: str, value: Any) -> None:
    model = net()
    optimizer = adamw(model)
    controller = control(model, optimizer)
    run(model, optimizer, controller, range(6))
    state = controller.state_dict()
    if (key, value) in (("step", 3), ("losses", [1]), ("moved_at", {"x": 1})):
        return  # could be another run's
    with pytest.raises(ModelError, match=r"^the (ranks in the )?controller's state must "):
        controller.load_state_dict(state | {key: value})
    with pytest.raises(ModelError, match=rf"^the controller's state must be .*\(KeyError: '{key}'\); it was edited"):
        controller.load_state_dict({name: entry for name, entry in state.items() if name != key})
    after = controller.state_dict()
    assert {name: after[name] for name in ("step", "ranks", "sketch", "losses")} == {
        name: state[name] for name in ("step", "ranks", "sketch", "losses")
    }


def test_a_state_says_which_modules_the_model_lacks() -> None:
    """As where the adapter was loaded by PEFT, which knows no module of rank 0."""
    state = control(model := net(), adamw(model)).state_dict()
    config = LoraConfig(target_modules=LAYERS[1:], r=2)
    other = get_peft_model(Net(), config)
    controller = rs.RankController(other, adamw(other), budget=rs.ParameterBudget(BUDGET))
    message = (
        "the controller's state must be of this model's adapted modules, but `first` is in the state only (1 such); wrap the base "
        "model as for the first run, since PeftModel.from_pretrained leaves modules of rank 0 out."
    )
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        controller.load_state_dict(state)


def test_models_and_optimizers_that_cannot_be_controlled() -> None:
    merged, several = net(), net()
    merged.merge_adapter()
    several.add_adapter("second", several.peft_config["default"])
    for name, parameter in (partitioned := net()).named_parameters():
        if "lora_" in name:
            parameter.ds_id = 0  # how DeepSpeed marks what ZeRO-3 partitions
    cases: list[tuple[Any, type[Exception], str]] = [
        (
            partitioned,
            ModelError,
            "the adapter's parameters must be whole in this process, but DeepSpeed ZeRO-3 partitions them and keeps its own flat "
            "copies; use DDP or FSDP2 with masked ranks (RankMasks), or one process.",
        ),
        (Net(), ModelError, "`model` must be a peft.PeftModel, but is a Net; wrap it with get_peft_model."),
        (merged, ModelError, "adapters must not be merged, but ['default'] are in `first`; unmerge first."),
        (
            several,
            ModelError,
            "`adapter_name` must say which of the adapters ['default', 'second'] is meant, but is None.",
        ),
    ]
    for model, kind, message in cases:
        with pytest.raises(kind, match=f"^{re.escape(message)}$"):
            control(model, adamw(model))
        assert hooks(model) == 0
    message = "`optimizer` must own the adapter's parameters, but lacks 8 of 8; build it from the PEFT model's parameters, after wrapping."
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        control(net(), adamw(net()))


def test_an_optimizer_of_an_unknown_kind_is_refused_at_once() -> None:
    """And not at the first move, in the midst of a run."""
    model = net()
    message = (
        "`optimizer` must be one whose state can be carried (SGD, Adam, AdamW, Adafactor (torch's and transformers') and "
        "bitsandbytes' Adam and AdamW), but is NAdam; use one of these."
    )
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        control(model, torch.optim.NAdam(p for p in model.parameters() if p.requires_grad))
    assert hooks(model) == 0


def test_states_of_others_are_refused() -> None:
    model = net()
    controller = control(model, adamw(model))
    state = controller.state_dict()
    for change, message in (
        ({"schema": 0}, "the controller's state must have schema 2, but has 0."),
        ({"targets": "?"}, "the controller's state must be of this model's adapted modules, but is of others."),
        (
            {"active": {}},
            "the controller's state must be of mode 'resize', but is of mode 'mask'; pass rank_change='mask'.",
        ),
    ):
        with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
            controller.load_state_dict(state | change)
    model = net(r=4)
    masked = control(model, adamw(model), rank_change="mask")
    message = "the controller's state must be of mode 'mask', but is of mode 'resize'; pass rank_change='resize' and use one process."
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        masked.load_state_dict(state)
    message = (
        "`model` must not carry rank masks to be controlled in mode 'resize', but carries those of adapter 'default'; `compress` "
        "them, or go on in mode 'mask'."
    )
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        control(model, adamw(model), rank_change="resize")
