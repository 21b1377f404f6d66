"""Allocations become exactly their ranks in plain PEFT, on every architecture, and come back."""

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, PeftType, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

import rankscope as rs
from rankscope.errors import FileError, ModelError, SettingsError
from rankscope.lora import (
    Resize,
    apply_allocation,
    count_adapter_parameters,
    load_adapter,
    resize_adapters,
    to_lora_config,
)
from tests.architectures import BUILDERS, build


def random_allocation(targets: tuple[rs.TargetModule, ...], seed: int) -> rs.RankAllocation:
    ranks = np.random.default_rng(seed).choice([0, 1, 2, 3, 8], size=len(targets))
    ranks[0] = max(ranks[0], 1)
    return rs.RankAllocation(targets, tuple(min(int(r), t.full_rank) for r, t in zip(ranks, targets, strict=True)))


def built_ranks(model: PeftModel) -> dict[str, int]:
    """Read from the shapes of the factors."""
    layers = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    return {n: m.lora_A["default"].weight.shape[0] for n, m in layers.items()}


def scalings(model: PeftModel) -> dict[str, float]:
    layers = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    return {n: m.scaling["default"] for n, m in layers.items()}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", BUILDERS)
def test_peft_builds_exactly_the_ranks_and_their_cost(name: str, seed: int) -> None:
    allocation = random_allocation(rs.find_targets(build(name)), seed)
    model = apply_allocation(build(name), allocation)
    assert built_ranks(model) == {n: r for n, r in allocation.ranks.items() if r}
    lora = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad)
    assert allocation.parameters == lora == count_adapter_parameters(model)
    assert set(scalings(model).values()) == {2.0}
    assert rs.RankAllocation.from_peft_model(model, allocation.targets) == allocation
    assert rs.RankAllocation.from_lora_config(to_lora_config(allocation), allocation.targets) == allocation


@pytest.mark.parametrize("rslora", [False, True])
def test_scaling_is_constant_over_ranks(rslora: bool) -> None:
    allocation = random_allocation(rs.find_targets(build("llama")), 1)
    model = apply_allocation(build("llama"), allocation, scaling=0.7, use_rslora=rslora)
    assert list(scalings(model).values()) == pytest.approx([0.7] * len(scalings(model)))


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_alpha_gives_pefts_own_scaling(rslora: bool) -> None:
    allocation = random_allocation(rs.find_targets(build("llama")), 1)
    model = apply_allocation(build("llama"), allocation, lora_alpha=16, use_rslora=rslora)
    expected = {n: 16 / (r**0.5 if rslora else r) for n, r in allocation.ranks.items() if r}
    assert scalings(model) == pytest.approx(expected)


def test_saved_config_loads_where_rankscope_is_not(tmp_path: Path) -> None:
    allocation = random_allocation(rs.find_targets(build("llava")), 5)
    allocation.to_lora_config(task_type="CAUSAL_LM").save_pretrained(str(tmp_path))
    code = f"""
import json, sys
sys.path.insert(0, ".")
from peft import LoraConfig, get_peft_model
from tests.architectures import build
model = get_peft_model(build("llava"), LoraConfig.from_pretrained({str(tmp_path)!r}))
ranks = {{n: m.r["default"] for n, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}}
count = sum(p.numel() for p in model.parameters() if p.requires_grad)
assert "rankscope" not in sys.modules
print(json.dumps([ranks, count]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ranks, count = json.loads(done.stdout.splitlines()[-1])
    assert ranks == {n: r for n, r in allocation.ranks.items() if r}
    assert count == allocation.parameters


class Confusing(nn.Module):
    """Names that are tails of other names, and one that a regex would take for another."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.ModuleDict({"fc": nn.Linear(8, 8), "f_": nn.Linear(8, 8)})
        self.vision = nn.ModuleDict({"enc": nn.ModuleDict({"fc": nn.Linear(8, 8)})})
        self.xenc = nn.ModuleDict({"fc": nn.Linear(8, 8)})
        self.encXfc = nn.Linear(8, 8)


def test_names_are_anchored_and_escaped() -> None:
    targets = rs.find_targets(Confusing())
    allocation = rs.RankAllocation.from_ranks(targets, {"enc.fc": 3, "enc.f_": 1})
    assert built_ranks(apply_allocation(Confusing(), allocation)) == {"enc.fc": 3, "enc.f_": 1}
    both = rs.RankAllocation.from_ranks(targets, {"enc.fc": 3, "vision.enc.fc": 2, "encXfc": 1, "xenc.fc": 4})
    assert apply_allocation(Confusing(), both) is not None
    assert built_ranks(apply_allocation(Confusing(), both)) == {n: r for n, r in both.ranks.items() if r}


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "down_proj"], "r": 3, "rank_pattern": {"layers.1.self_attn.q_proj": 5}},
        {"target_modules": r".*mlp\..*proj", "r": 2, "rank_pattern": {"up_proj": 4, "1.mlp.up_proj": 7}},
        {"target_modules": "all-linear", "r": 2, "rank_pattern": {r"layers\.0\..*": 1}},
        {"target_modules": ["q_proj", "v_proj"], "r": 2, "exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "r": 2, "layers_to_transform": [1]},
    ],
)
def test_from_lora_config_reads_as_peft_builds(options: dict) -> None:
    targets = rs.find_targets(build("llama"))
    ranks = built_ranks(get_peft_model(build("llama"), LoraConfig(**options)))
    assert {
        n: r for n, r in rs.RankAllocation.from_lora_config(LoraConfig(**options), targets).ranks.items() if r
    } == ranks


def test_each_adapter_of_a_model_has_its_ranks() -> None:
    targets = rs.find_targets(build("vit"))
    one, two = random_allocation(targets, 1), random_allocation(targets, 2)
    model = apply_allocation(build("vit"), one)
    model.add_adapter("second", to_lora_config(two))
    assert rs.RankAllocation.from_peft_model(model, targets) == one
    assert rs.RankAllocation.from_peft_model(model, targets, adapter_name="second") == two
    assert set(rs.RankAllocation.from_peft_model(model).ranks.values()) == {r for r in one.vector if r}


@pytest.mark.parametrize("name", BUILDERS)
def test_modules_of_rank_0_sleep_and_can_wake(name: str) -> None:
    allocation = random_allocation(rs.find_targets(build(name)), 3)
    model = apply_allocation(build(name), allocation, dormant=True)
    assert (
        rs.RankAllocation.from_peft_model(model)
        == rs.RankAllocation.from_peft_model(model, allocation.targets)
        == allocation
    )
    assert allocation.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert rs.RankAllocation.from_lora_config(model.peft_config["default"], allocation.targets) == allocation
    everywhere = {n: max(r, 1) for n, r in allocation.ranks.items()}
    resize_adapters(model, None, [Resize(name=n, rank=r) for n, r in everywhere.items()])
    assert dict(rs.RankAllocation.from_peft_model(model, allocation.targets).ranks) == everywhere
    assert set(scalings(model).values()) == {2.0}


def test_sleeping_modules_need_one_scaling() -> None:
    allocation = random_allocation(rs.find_targets(build("vit")), 3)
    message = "`dormant` needs one scaling at every rank, which `lora_alpha` is not; pass `scaling`."
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
        apply_allocation(build("vit"), allocation, dormant=True, lora_alpha=16)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(4, 6, (3, 2))
        self.square = nn.Conv2d(4, 8, 3)
        self.grouped = nn.Conv2d(4, 8, 3, groups=2)
        self.table = nn.Embedding(20, 6)


@pytest.mark.parametrize("name", ["plain", "square", "table"])
def test_convolutions_and_embeddings_cost_what_peft_builds(name: str) -> None:
    targets = rs.find_targets(Convolutions(), [name])
    allocation = rs.RankAllocation(targets, (2,))
    model = get_peft_model(Convolutions(), to_lora_config(allocation))
    assert allocation.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count_adapter_parameters(model) == allocation.parameters


def test_grouped_convolutions_are_no_targets() -> None:
    with pytest.raises(ModelError, match="'grouped' matches none"):
        rs.find_targets(Convolutions(), ["grouped"])


def test_what_cannot_become_a_config(caplog: pytest.LogCaptureFixture) -> None:
    targets = rs.find_targets(build("vit"))
    allocation = random_allocation(targets, 0)
    for kwargs, message in [
        ({"r": 4}, "`r` follows from the allocation and cannot be passed as well; leave it out."),
        ({"scaling": 2.0, "lora_alpha": 8}, "`scaling` and `lora_alpha` exclude each other; leave one out."),
    ]:
        with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
            allocation.to_lora_config(**kwargs)
    nothing = rs.RankAllocation.from_ranks(targets, {})
    with pytest.raises(
        SettingsError, match=r"^`allocation` must give at least one module a rank above 0 to become a LoRA config\.$"
    ):
        nothing.to_lora_config()
    with caplog.at_level(logging.WARNING, logger="rankscope"):
        allocation.to_lora_config(use_dora=True)
    assert f"`use_dora` adds trainable parameters to the {allocation.parameters:,} of the allocation" in caplog.text


def test_models_that_do_not_fit() -> None:
    allocation = random_allocation(rs.find_targets(build("vit")), 0)
    with pytest.raises(
        SettingsError,
        match=r"^`allocation` must be for this model, but LlamaForCausalLM has no module 'vit\.layers\.0\.",
    ):
        apply_allocation(build("llama"), allocation)
    with pytest.raises(
        ModelError, match=r"^`model` must be a peft\.PeftModel, but is a ViTForImageClassification; wrap it"
    ):
        rs.RankAllocation.from_peft_model(build("vit"))
    with pytest.raises(
        ModelError, match=r"^`adapter_name` must be among the model's adapters \['default'\], but got 'other'\.$"
    ):
        rs.RankAllocation.from_peft_model(apply_allocation(build("vit"), allocation), adapter_name="other")
    with pytest.raises(ModelError, match=r"^adapter 'default' must be LoRA for its ranks to change, but is ADALORA\.$"):
        rs.RankAllocation.from_peft_model(get_peft_model(build("vit"), ADALORA))
    with pytest.raises(
        SettingsError, match=r"^`model` must be a base model, but is a PeftModel already; pass `model\.unload\(\)`\.$"
    ):
        apply_allocation(apply_allocation(build("vit"), allocation), allocation)
    with pytest.raises(
        SettingsError, match=r"^`config` must adapt at least one of the 12 target modules, but adapts none\.$"
    ):
        rs.RankAllocation.from_lora_config(LoraConfig(target_modules=["nothing"]), allocation.targets)


def test_a_wrapped_peft_model_is_read() -> None:
    allocation = random_allocation(rs.find_targets(build("vit")), 0)
    model = torch.compile(apply_allocation(build("vit"), allocation), backend="eager")
    assert rs.RankAllocation.from_peft_model(model, allocation.targets) == allocation


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_pattern": ["a"]}, "`rank_pattern` must be a mapping from regexes to ranks, but got ['a']."),
        ({"r": "8"}, "the rank of `table` must be a whole number, but got '8'."),
    ],
)
def test_ranks_that_a_config_cannot_mean(options: dict, message: str) -> None:
    targets = rs.find_targets(Convolutions(), ["table"])
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
        rs.RankAllocation.from_lora_config(LoraConfig(target_modules=["table"], **options), targets)


def test_one_pattern_for_each_distinct_rank() -> None:
    targets = tuple(
        rs.TargetModule(name=f"layers.{i}.{role}", in_features=32, out_features=32, role=role)
        for i in range(300)
        for role in ("q", "v", "o")
    )
    ranks = np.random.default_rng(0).integers(0, 21, size=len(targets))
    allocation = rs.RankAllocation(targets, tuple(ranks.tolist()))
    config = allocation.to_lora_config()
    assert len(config.rank_pattern) == len(config.alpha_pattern) == 19
    assert rs.RankAllocation.from_lora_config(config, targets) == allocation
    old = {f"^{re.escape(name)}": rank for name, rank in allocation.ranks.items()}  # one for each module, as before
    config.rank_pattern = old
    assert rs.RankAllocation.from_lora_config(config, targets) == allocation


ADALORA = AdaLoraConfig(target_modules=["q_proj"], init_r=4, target_r=2, total_step=10)


def test_adapters_of_other_kinds_load(tmp_path: Path) -> None:
    get_peft_model(build("vit"), ADALORA).save_pretrained(tmp_path)
    assert load_adapter(build("vit"), tmp_path).peft_config["default"].peft_type == PeftType.ADALORA


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"r": ["a"]}, "TypeError: "),
        ({"bias": []}, "AttributeError: "),
        ({"target_modules": ["nothing"]}, "NoMatchingPeftModuleError: "),
        ({"target_modules": ["square"]}, "ModelError: "),
    ],
)
def test_adapters_that_cannot_be_loaded(change: dict, reason: str, tmp_path: Path) -> None:
    get_peft_model(Convolutions(), LoraConfig(target_modules=["plain", "square"])).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FileError) as error:
        load_adapter(Convolutions(), tmp_path)
    assert str(error.value).startswith(
        f"`{tmp_path}` must hold an adapter of this model, but cannot be loaded ({reason}"
    )
    path.write_text("{}")
    message = f"`{path}` must hold an adapter's config, but has no `peft_type`; save the adapter again."
    with pytest.raises(FileError, match=f"^{re.escape(message)}$"):
        load_adapter(Convolutions(), tmp_path)
