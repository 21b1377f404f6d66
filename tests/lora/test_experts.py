"""Mixture-of-experts models, whose names PEFT rewrites, and adapters on their fused experts."""

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import rankscope as rs
from rankscope.errors import ModelError, SettingsError
from rankscope.lora import (
    Resize,
    apply_allocation,
    count_adapter_parameters,
    resize_adapters,
    restore_ranks,
    save_ranks,
    wrap_with_adalora,
    wrap_with_eva,
)
from tests.architectures import build
from tests.lora.live_models import stir

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
    "vocab_size": 60, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
FAMILIES: dict[str, dict] = {
    "mixtral": {"num_local_experts": 2},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "qwen3_moe": EXPERTS | {"mlp_only_layers": [0]},
    "glm4_moe": EXPERTS | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "olmoe": EXPERTS,
}
SHARED: dict[str, dict] = {"qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 16}}  # its gate has one output


def tiny(family: str) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SIZES, **(FAMILIES | SHARED)[family])
    return transformers.AutoModelForCausalLM.from_config(config)


def outputs(model: nn.Module) -> torch.Tensor:
    tokens = torch.randint(3, 60, (2, 10), generator=torch.Generator().manual_seed(1))
    return model.eval()(input_ids=tokens).logits.detach()


def saved_and_loaded(model: PeftModel, base: nn.Module, folder: Path) -> torch.Tensor:
    model.save_pretrained(folder)
    return outputs(PeftModel.from_pretrained(base, folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_builds_the_ranks_and_loads_them_again(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    targets = rs.find_targets(model)
    some = rs.RankAllocation(targets, tuple(i % 3 for i in range(len(targets))))
    assert count_adapter_parameters(get_peft_model(copy.deepcopy(model), some.to_lora_config())) == some.parameters
    adapted = apply_allocation(copy.deepcopy(model), some, dormant=True)
    others = {t.name: (i + 1) % 3 for i, t in enumerate(targets)}
    resize_adapters(adapted, None, [Resize(name=name, rank=rank) for name, rank in others.items()])
    stir(adapted)
    assert torch.equal(saved_and_loaded(adapted, model, tmp_path), outputs(adapted))


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_on_fused_experts_stay_as_they_are(family: str, tmp_path: Path) -> None:
    model = get_peft_model(tiny(family), LoraConfig(r=2, target_modules="all-linear"))
    ranks = rs.RankAllocation.from_peft_model(model).ranks
    assert not any("experts" in name for name in ranks)
    fused = {n: p.shape for n, p in model.named_parameters() if ".experts." in n and "lora_" in n}
    resize_adapters(model, None, [Resize(name=name, rank=(5, 0, 3)[i % 3]) for i, name in enumerate(ranks)])
    assert fused
    assert {n: p.shape for n, p in model.named_parameters() if n in fused} == fused
    stir(model)
    assert torch.equal(saved_and_loaded(model, tiny(family), tmp_path), outputs(model))
    save_ranks(model, tmp_path)
    again = get_peft_model(tiny(family), LoraConfig(r=2, target_modules="all-linear"))
    restore_ranks(again, tmp_path)
    assert rs.RankAllocation.from_peft_model(again) == rs.RankAllocation.from_peft_model(model)


def test_experts_and_linear_modules_are_controlled_apart() -> None:
    config = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    model = get_peft_model(tiny("mixtral"), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    budget = rs.ParameterBudget(rs.RankAllocation.from_peft_model(model).parameters)
    controller = rs.RankController(model, optimizer, budget=budget, every=2, total_steps=8, freeze_fraction=0.9)
    tokens = torch.randint(3, 60, (2, 10), generator=torch.Generator().manual_seed(1))
    for _ in range(8):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        controller.step(loss)
        optimizer.zero_grad()
    assert len(controller.decisions) == 3
    assert set(controller.allocation.ranks) == set(rs.RankAllocation.from_peft_model(model).ranks)
    experts = get_peft_model(
        tiny("mixtral"), LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"])
    )
    message = (
        "`model` must carry a LoRA adapter 'default', but has none on modules, only on parameters such as "
        "`model.layers.0.mlp.experts.down_proj`; it has ['default']."
    )
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        rs.RankAllocation.from_peft_model(experts)


def test_what_peft_takes_for_experts_is_no_target_and_refused() -> None:
    model = tiny("qwen3_moe")
    dense = "model.layers.0.mlp.gate_proj"
    assert isinstance(model.get_submodule(dense), nn.Linear)
    assert dense not in {t.name for t in rs.find_targets(model)}
    target = rs.TargetModule(name=dense, in_features=32, out_features=48)
    message = (
        f"the allocation must leave out `{dense}` (1 such), whose name PEFT takes for the fused experts of "
        "Qwen3MoeForCausalLM; give it rank 0."
    )
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
        apply_allocation(model, rs.RankAllocation((target,), (2,)))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model, targets, batches: wrap_with_eva(model, targets, batches, rank=2, scaling=2.0, rho=1.0),
        lambda model, targets, _: wrap_with_adalora(
            model, targets, rank=1, initial_rank=2, alpha=8.0, steps=100, settled=0.7
        ),
    ],
)
def test_peers_adapt_the_targets_only(wrap: Callable) -> None:
    model = tiny("mixtral")
    targets = rs.find_targets(model, r"model\.layers\.0\..*[qo]_proj")
    tokens = torch.randint(3, 60, (4, 10), generator=torch.Generator().manual_seed(1))
    wrapped = wrap(model, targets, [{"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}])
    adapted = {n.split(".lora_A")[0] for n, p in wrapped.named_parameters() if ".lora_A" in n}
    assert adapted == {f"base_model.model.{target.name}" for target in targets}


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])  # whose shared expert gets flat inputs
def test_eva_saves_its_ranks_for_plain_peft(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    tokens = torch.randint(3, 60, (4, 10), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}]
    wrapped = wrap_with_eva(model, rs.find_targets(model), batches, rank=2, scaling=2.0)
    assert len(set(rs.RankAllocation.from_peft_model(wrapped).vector)) > 1
    stir(wrapped)
    assert torch.equal(saved_and_loaded(wrapped, tiny(family), tmp_path), outputs(wrapped))


def test_eva_of_an_encoder_and_a_decoder() -> None:
    """Labels of another length than the tokens are what the decoder reads."""
    model, tokens = build("t5"), torch.randint(3, 50, (4, 10), generator=torch.Generator().manual_seed(1))
    wrapped = wrap_with_eva(
        model,
        rs.find_targets(model),
        [{"input_ids": tokens, "labels": tokens[:, :6].contiguous()}],
        rank=2,
        scaling=2.0,
    )
    assert len(set(rs.RankAllocation.from_peft_model(wrapped).vector)) > 1


def test_eva_names_targets_without_inputs() -> None:
    model = build("llava")
    tokens = torch.randint(3, 50, (4, 10), generator=torch.Generator().manual_seed(1))
    targets = rs.find_targets(model)
    name, n = next(t.name for t in targets), sum(t.tower != "language" for t in targets)
    message = (
        f"EVA needs the inputs of every target module, but the first batch does not reach `{name}` ({n} such); leave it out "
        "of the targets, or give batches that do."
    )
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        wrap_with_eva(model, targets, [{"input_ids": tokens}], rank=2, scaling=2.0)
    assert not any(module._forward_hooks or hasattr(module, "lora_A") for module in model.modules())
