"""PEFT's methods beside LoRA: AdaLoRA ends at its budget of ranks, and any other adapter trains at its own size."""

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import rankscope as rs
from rankscope.errors import ModelError, SettingsError
from rankscope.lora import ia3_config, load_adapter, vera_config
from rankscope.tasks import Task, evaluate
from rankscope.training import AdaLora, PeftAdapter, save_adapter
from tests.architectures import BUILDERS, build


def test_adalora_ends_at_its_mean_rank(digits: Task, digits_profile: rs.Profile) -> None:
    method = AdaLora(digits_profile.targets, 2, alpha=32.0)
    model, result = rs.train(digits, method, rs.TrainingSettings(steps=20, learning_rate=0.02))
    assert result.allocation is not None
    assert sum(result.allocation.vector) == 2 * len(digits_profile.targets)
    assert max(result.allocation.vector) <= method.initial_rank == 3
    assert result.parameters == result.allocation.parameters
    alive = {
        name.split(".lora_E")[0].removeprefix("base_model.model."): int(torch.count_nonzero(value))
        for name, value in model.named_parameters()
        if "lora_E" in name
    }
    assert alive == dict(result.allocation.ranks)


def test_ranks_settle_as_early_as_asked(digits: Task, digits_profile: rs.Profile) -> None:
    usual, early = (AdaLora(digits_profile.targets, 2, alpha=32.0, settled=share) for share in (0.7, 0.4))
    assert (usual.variant, early.variant) == ("alpha 32, 100% of ranks", "alpha 32, 100% of ranks, settled at 40%")
    kept = 2 * len(digits_profile.targets)
    for method, over in ((usual, True), (early, False)):
        model: Any = method.adapt(digits.build_model(), digits, rs.TrainingSettings(steps=20), seed=0)
        budget, _ = model.base_model.rankallocator.budget_schedule(8)
        assert (budget > kept) is over


def test_too_short_a_run_is_refused(digits: Task, digits_profile: rs.Profile) -> None:
    message = "`steps` must be at least 10 for AdaLoRA, but got 9; train longer."
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        rs.train(digits, AdaLora(digits_profile.targets, 2, alpha=32.0), rs.TrainingSettings(steps=9))


# --- any adapter of PEFT ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "parameters", "trained"),
    [
        ("vera", 36 * 16 + 3_456, "vera_lambda_"),  # a vector of r and one of the outputs for each module
        ("ia3", 6 * (4 * 64 + 256 + 256), "ia3_l"),  # of the last module of each MLP the inputs
        (peft.LoraConfig(r=1, target_modules=["q_proj", "v_proj"], use_dora=True), 12 * (64 + 64 + 64), "lora_"),
        (peft.LoHaConfig(r=1, target_modules=["q_proj"], modules_to_save=["layernorm"]), None, "hada_"),
    ],
)
def test_an_adapter_trains_at_its_own_size_and_loads_in_plain_peft(
    digits: Task, digits_profile: rs.Profile, tmp_path: Path, kind: Any, parameters: int | None, trained: str
) -> None:
    made = {"vera": lambda: vera_config(digits_profile.targets, 16), "ia3": lambda: ia3_config(digits_profile.targets)}
    config = made[kind]() if isinstance(kind, str) else kind
    before = config.to_dict()
    model, result = rs.train(digits, PeftAdapter(config, "mine"), rs.TrainingSettings(steps=20, learning_rate=0.1))
    assert config.to_dict() == before
    assert result.metrics["accuracy"] > evaluate(digits, digits.build_model())["accuracy"] + 0.1
    adapters = {n: p for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in n}
    assert adapters
    assert all(trained in name for name in adapters)
    assert result.allocation is None
    if parameters is not None:
        assert result.parameters == sum(p.numel() for p in adapters.values()) == parameters
    save_adapter(model, digits, tmp_path / "adapter")
    plain = peft.PeftModel.from_pretrained(digits.build_model(), tmp_path / "adapter")
    for loaded in (plain, load_adapter(digits.build_model(), tmp_path / "adapter")):
        assert evaluate(digits, loaded, "test") == evaluate(digits, model, "test")


def test_adalora_as_a_plain_config_masks_its_ranks(digits: Task) -> None:
    config = peft.AdaLoraConfig(
        init_r=3, target_r=1, tinit=2, tfinal=5, deltaT=1, total_step=20, target_modules=["q_proj"]
    )
    model, _ = rs.train(digits, PeftAdapter(config, "AdaLoRA"), rs.TrainingSettings(steps=20, learning_rate=0.02))
    assert sum(map(sum, model.peft_config["default"].rank_pattern.values())) == 6


@pytest.mark.parametrize("name", BUILDERS)
def test_configs_of_vera_and_ia3_adapt_the_targets_only(name: str) -> None:
    found = rs.find_targets(build(name))
    for targets in (found[1:], found[:1]):
        for config in (vera_config(targets, 8), ia3_config(targets)):
            wrapped = peft.get_peft_model(build(name), config)
            layers = wrapped.get_base_model().named_modules()
            adapted = {name for name, layer in layers if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer)}
            assert adapted == {target.name for target in targets}
            factors = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
            last = [t.role in ("fc2", "down_proj") for t in targets]
            scaled = [t.in_features if inputs else t.out_features for t, inputs in zip(targets, last, strict=True)]
            assert factors == (sum(scaled) if config.peft_type == "IA3" else sum(8 + t.out_features for t in targets))


def test_what_is_no_adapter_of_peft_is_refused(digits: Task) -> None:
    settings = rs.TrainingSettings(steps=1)
    for config, message in (
        ("VeRA", "`config` must be a peft.PeftConfig, but is a str."),
        (
            peft.IA3Config(target_modules=["embeddings"], feedforward_modules=[]),
            "`config` must be a config that PEFT can apply, but Target module",
        ),
    ):
        with pytest.raises(ModelError, match=f"^{re.escape(message)}"):
            rs.train(digits, PeftAdapter(config, "mine"), settings)
    table = rs.TargetModule(name="table", in_features=8, out_features=8, kind="embedding")
    with pytest.raises(
        SettingsError, match="^VeRA needs linear modules, but none of the 1 targets is one; leave it out"
    ):
        vera_config([table], 8)
