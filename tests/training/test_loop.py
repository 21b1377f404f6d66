"""The training loop on the real digits task: it learns, repeats itself, and stops where it must."""

import gc
import re
import weakref
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import BertModel

import rankscope as rs
from rankscope import distributed as devices
from rankscope.errors import RankscopeError, SettingsError, TrainingError
from rankscope.lora import count_adapter_parameters
from rankscope.tasks import Batch, DigitsShift, Task, TextClassification, evaluate
from rankscope.training import AdaLora, Eva, FullFineTuning
from tests.tasks.models import save_bert, sentences


@pytest.fixture
def uniform(digits_profile: rs.Profile, digits_budget: rs.ParameterBudget) -> rs.RankAllocation:
    return rs.allocate("uniform", targets=digits_profile.targets, budget=digits_budget)


def test_it_learns_and_trains_adapters_and_head_only(digits: Task, uniform: rs.RankAllocation) -> None:
    model, result = rs.train(digits, uniform, rs.TrainingSettings(steps=30, learning_rate=0.02))
    before = evaluate(digits, digits.build_model())
    assert result.metrics["accuracy"] > before["accuracy"] + 0.2
    assert result.parameters == count_adapter_parameters(model) == 6_912
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "classifier.modules_to_save" in name for name in trained)
    base = digits.build_model().state_dict()
    frozen = {name.replace(".base_layer", ""): v for name, v in model.get_base_model().state_dict().items()}
    assert all(torch.equal(frozen[n], v) for n, v in base.items() if "classifier" not in n)


def test_a_seed_repeats_and_global_generators_are_left_alone(digits: Task, uniform: rs.RankAllocation) -> None:
    config = rs.TrainingSettings(steps=5, learning_rate=0.01, lora_dropout=0.1)
    state = torch.get_rng_state()
    runs = [rs.train(digits, uniform, config, seed=seed)[1] for seed in (3, 3, 4)]
    assert torch.equal(torch.get_rng_state(), state)
    assert runs[0].metrics == runs[1].metrics
    assert runs[0].metrics["loss"] != runs[2].metrics["loss"]


@pytest.mark.parametrize("strategy", ["uniform", "one-shot"])
def test_a_controller_moves_ranks_within_the_budget(
    digits: Task, digits_profile: rs.Profile, digits_budget: rs.ParameterBudget, strategy: str
) -> None:
    start = rs.allocate(strategy, targets=digits_profile.targets, budget=digits_budget, profile=digits_profile)
    config = rs.TrainingSettings(steps=8, learning_rate=0.01, gradient_accumulation=2)
    controller = rs.ControllerSettings(every=3, freeze_fraction=0.8, samples=2)
    model, result = rs.train(digits, start, config, controller=controller)
    assert result.decisions is not None
    assert result.decisions["step"].tolist() == [3, 6]
    assert result.decisions["batches"].tolist() == [4, 4]
    assert result.decisions["ranks_before"].iloc[0] == start.vector
    final = result.decisions["ranks_after"].iloc[-1]
    assert rs.RankAllocation.from_peft_model(model, start.targets).vector == final
    assert result.parameters == count_adapter_parameters(model) <= digits_budget.limit
    assert start.vector != final or strategy == "one-shot"


def test_a_controller_is_refused_for_what_has_no_ranks_to_move(digits: Task, digits_profile: rs.Profile) -> None:
    method = AdaLora(digits_profile.targets, 1, alpha=32.0)
    message = "`controller` moves an allocation's ranks, but `method` is none; pass an allocation."
    with pytest.raises(TrainingError, match=f"^{re.escape(message)}$"):
        rs.train(digits, method, rs.TrainingSettings(), controller=rs.ControllerSettings())


def test_intermediate_evaluations(digits: Task, uniform: rs.RankAllocation) -> None:
    seen = []
    config = rs.TrainingSettings(steps=7, learning_rate=0.01, evaluate_every=3)
    _, result = rs.train(digits, uniform, config, on_evaluation=lambda step, _: seen.append(step))
    assert seen == list(result.history) == [3, 6, 7]
    assert result.history[7] == result.metrics


def test_gradient_accumulation_equals_a_larger_batch(digits: Task, uniform: rs.RankAllocation) -> None:
    """Two batches of 32 an update give the loss that one batch of 64 gives: the mean of equal means."""
    small, large = rs.load_task("digits-shift"), rs.load_task({"name": "digits-shift", "batch_size": 64})
    results = [
        rs.train(task, uniform, rs.TrainingSettings(steps=3, learning_rate=0.01, gradient_accumulation=n))[1]
        for task, n in ((small, 2), (large, 1))
    ]
    assert results[0].metrics["loss"] == pytest.approx(results[1].metrics["loss"], rel=1e-4)


def test_a_loss_that_is_not_finite_stops_the_run(uniform: rs.RankAllocation) -> None:
    class Broken(type(rs.load_task("digits-shift"))):
        def loss(self, model, batch):
            return super().loss(model, batch) * float("inf")

    message = "the loss must be finite, but is not by step 10 of 20; lower `learning_rate`, now 0.01."
    with pytest.raises(TrainingError, match=f"^{re.escape(message)}$"):
        rs.train(Broken(), uniform, rs.TrainingSettings(steps=20, learning_rate=0.01))


@pytest.mark.parametrize("where", ["loss", "evaluate", "on_step"])
def test_a_run_that_raises_leaves_no_hook_on_the_model(uniform: rs.RankAllocation, where: str) -> None:
    class Mine(DigitsShift):
        n_losses = 0

        def build_model(self) -> nn.Module:
            self.model = super().build_model()
            return self.model

        def loss(self, model: nn.Module, batch: Batch) -> Tensor:
            self.n_losses += 1
            assert (where, self.n_losses) != ("loss", 3)
            return super().loss(model, batch)

        def evaluate(self, model: nn.Module, split: str = "validation") -> dict[str, float]:
            raise AssertionError

    def on_step(step: int) -> None:
        assert (where, step) != ("on_step", 3)

    task, options = Mine(), {"controller": {"every": 5}, "on_step": on_step}
    with pytest.raises(AssertionError) as caught:
        rs.train(task, uniform, rs.TrainingSettings(steps=20, learning_rate=0.01, evaluate_every=3), **options)
    assert caught.tb  # which keeps the run's objects, as in a notebook
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in task.model.modules())


def test_bad_settings_are_named() -> None:
    with pytest.raises(SettingsError, match=r"^`learning_rate`: input should be greater than 0, but got 0\.$"):
        rs.TrainingSettings(learning_rate=0)


def test_the_head_may_have_a_rate_of_its_own(digits: Task, uniform: rs.RankAllocation) -> None:
    def moved(**rates: float) -> tuple[float, float]:
        model, _ = rs.train(digits, uniform, rs.TrainingSettings(steps=3, **rates))
        b = max(float(p.detach().abs().max()) for n, p in model.named_parameters() if "lora_B" in n)
        head = model.get_base_model().classifier.modules_to_save["default"].weight.detach()
        return b, float((head - digits.build_model().classifier.weight.detach()).abs().max())

    adapters, head = moved(learning_rate=1e-9, head_learning_rate=0.02)
    assert adapters < 1e-8 < 1e-2 < head
    adapters, head = moved(learning_rate=0.02, head_learning_rate=1e-9)
    assert head < 1e-6 < 1e-2 < adapters
    assert moved(learning_rate=0.02) == moved(learning_rate=0.02, head_learning_rate=0.02)


def test_a_rate_for_a_head_that_is_not_there_is_refused(uniform: rs.RankAllocation) -> None:
    class Headless(DigitsShift):
        head_modules = ()  # type: ignore[assignment]

    with pytest.raises(TrainingError, match="^`head_learning_rate` needs a task with a head, but `digits-shift` has"):
        rs.train(Headless(), uniform, rs.TrainingSettings(steps=1, head_learning_rate=0.02))
    with pytest.raises(SettingsError, match="^`head_learning_rate`: input should be greater than 0, but got 0"):
        rs.TrainingSettings(head_learning_rate=0)


# --- precision, memory, processes ------------------------------------------------------------------------------


@pytest.fixture
def mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU with bfloat16."""
    monkeypatch.setattr(devices, "mixed_dtype", lambda device: torch.bfloat16)


@pytest.mark.usefixtures("mixed")
@pytest.mark.parametrize("name", ["uniform", "controller", "AdaLoRA", "EVA", "full"])
def test_a_model_is_freed_without_the_garbage_collector(digits: Task, uniform: rs.RankAllocation, name: str) -> None:
    targets = uniform.targets
    method = {"AdaLoRA": AdaLora(targets, 2, alpha=32.0), "EVA": Eva(targets, 1), "full": FullFineTuning()}
    controller = rs.ControllerSettings(every=3, freeze_fraction=0.8, samples=2) if name == "controller" else None
    config = rs.TrainingSettings(steps=10, learning_rate=0.01)
    gc.collect()
    gc.disable()
    try:
        model, _ = rs.train(digits, method.get(name, uniform), config, controller=controller)
        alive = [weakref.ref(each) for each in (*model.modules(), *model.parameters())]
        del model, _
        assert not [ref() for ref in alive if ref() is not None]
    finally:
        gc.enable()


@pytest.mark.usefixtures("mixed")
def test_mixed_precision_learns_as_float32_does(digits: Task, uniform: rs.RankAllocation) -> None:
    model, result = rs.train(digits, uniform, rs.TrainingSettings(steps=30, learning_rate=0.02))
    assert result.metrics["accuracy"] > evaluate(digits, digits.build_model())["accuracy"] + 0.2
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_weights_in_bfloat16_are_trained_in_float32(tmp_path: Path) -> None:
    folder = save_bert(tmp_path)
    BertModel.from_pretrained(folder).bfloat16().save_pretrained(folder)
    task = TextClassification(folder, sentences(), pooling="model")
    targets = rs.find_targets(task.build_model())
    allocation = rs.allocate("uniform", targets=targets, budget=rs.ParameterBudget.uniform(targets, 1))
    during = []

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        during.append({p.dtype for p in model.parameters() if p.requires_grad})
        return TextClassification.loss(task, model, batch)

    task.loss = loss
    model, result = rs.train(task, allocation, rs.TrainingSettings(steps=2))
    assert during == [{torch.float32}] * 2
    after = {p.dtype for name, p in model.named_parameters() if "lora_" not in name}
    assert after == {torch.bfloat16}
    assert evaluate(task, model) == pytest.approx(result.metrics, rel=0.02)


def test_an_accelerator_of_the_caller_is_left_alone(digits: Task, uniform: rs.RankAllocation) -> None:
    AcceleratorState._reset_state(True)
    mine = Accelerator(mixed_precision="bf16")
    rs.train(digits, uniform, rs.TrainingSettings(steps=1))
    assert Accelerator().mixed_precision == mine.mixed_precision == "bf16"
    AcceleratorState._reset_state(True)


def test_a_launcher_that_does_not_say_which_process_this_is_is_refused(
    digits: Task, uniform: rs.RankAllocation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        RankscopeError,
        match="^WORLD_SIZE is 2, but RANK and LOCAL_RANK do not say which process this is; start it by torchrun",
    ):
        rs.train(digits, uniform, rs.TrainingSettings(steps=1))
