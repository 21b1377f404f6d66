"""Adapters as files: shrunk by exact truncation, padded without a change of the function."""

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from rankscope.errors import FileError, ModelError, SettingsError
from rankscope.lora import Moments, from_peft_model, measure_moments, pad_adapter, read_adapter, shrink
from tests.lora.live_models import KINDS, Kinds, kinds_model, stir, tokens


def saved(model: PeftModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def loaded(folder: Path, dtype: torch.dtype = torch.float64) -> PeftModel:
    """In plain PEFT, over the same base weights."""
    torch.manual_seed(0)
    return PeftModel.from_pretrained(Kinds().to(dtype), str(folder), autocast_adapter_dtype=False)


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(tokens())


def update(folder: Path, name: str) -> Tensor:
    adapter = read_adapter(folder)
    if name not in adapter.keys:
        return torch.zeros(())
    a, b = adapter.factors(name)
    return adapter.scalings[name] * b @ a


# --- shrink -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True, "target_modules": ["linear"]}])
def test_nothing_is_cut_to_the_bit(tmp_path: Path, options: dict) -> None:
    model = kinds_model(r=3, **options)
    adapter = saved(model, tmp_path / "a")
    found = shrink(adapter, 10**6, tmp_path / "b")
    assert (found.kept, found.after) == (1.0, found.before)
    assert torch.equal(output(loaded(tmp_path / "b")), output(model))
    old, new = read_adapter(adapter).tensors, read_adapter(tmp_path / "b").tensors
    assert all(torch.equal(old[key], new[key]) for key in old | new)


def test_an_adapter_of_a_class_of_ours_is_cut_and_padded(tmp_path: Path) -> None:
    """Its `task_type` names the class, and plain PEFT refuses it."""
    adapter, ours = saved(kinds_model(r=3), tmp_path / "a"), "rankscope.tasks.text.MeanPooledClassifier"
    values = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(values | {"task_type": ours}))
    shrink(adapter, 70, tmp_path / "b")
    pad_adapter(tmp_path / "b", tmp_path / "c")
    for name in "bc":
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["task_type"] == ours


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("rule", ["energy", "threshold", "uniform"])
def test_each_module_gets_the_truncated_svd_of_its_update(tmp_path: Path, rule: str, rslora: bool) -> None:
    adapter = saved(kinds_model(r=3, use_rslora=rslora), tmp_path / "a")
    found = shrink(adapter, 70, tmp_path / "b", rule=rule)
    assert found.after.parameters <= 70
    for name, rank in found.after.ranks.items():
        U, S, Vh = torch.linalg.svd(update(adapter, name), full_matrices=False)
        best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        torch.testing.assert_close(update(tmp_path / "b", name).expand_as(best), best)
        torch.testing.assert_close(torch.tensor(found.energies[name]), S[:3].square())
    model = loaded(tmp_path / "b")
    assert from_peft_model(model) == {name: rank for name, rank in found.after.ranks.items() if rank}


def test_the_best_ranks_of_all_that_the_budget_pays_for(tmp_path: Path) -> None:
    """Against brute force, where costs are equal."""
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(*(nn.Linear(5, 5) for _ in range(3))), LoraConfig(target_modules=["0", "1", "2"], r=3)
    )
    stir(model)
    adapter = saved(model, tmp_path / "a")
    found = shrink(adapter, 40, tmp_path / "b")
    energies = list(found.energies.values())
    best = max(
        sum(float(e[:k].sum()) for e, k in zip(energies, ranks, strict=True))
        for ranks in itertools.product(range(4), repeat=3)
        if 10 * sum(ranks) <= 40
    )
    assert found.kept * sum(float(e.sum()) for e in energies) == pytest.approx(best)


def test_one_threshold_tells_kept_singular_values_from_cut_ones(tmp_path: Path) -> None:
    adapter = saved(kinds_model(r=4), tmp_path / "a")
    found = shrink(adapter, 100, tmp_path / "b", rule="threshold")
    ranks, costs = found.after.ranks, {target.name: target.rank_cost for target in found.before.targets}
    kept = [e[k] for name, e in found.energies.items() for k in range(ranks[name])]
    left = 100 - found.after.parameters
    cut = [e[ranks[name]] for name, e in found.energies.items() if ranks[name] < 4 and costs[name] <= left]
    assert not cut or min(kept) >= max(cut)


def test_moments_are_those_of_what_goes_through(tmp_path: Path) -> None:
    """Of a linear module, computed by hand; nothing of the model changes."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 6)).double(), LoraConfig(target_modules=["0"], r=2))
    stir(model)
    before = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    batches = [torch.randn(5, 4, dtype=torch.float64) for _ in range(3)]
    found = measure_moments(model, batches, lambda model, batch: model(batch).pow(3).sum())
    assert {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()} == before
    assert model.training
    assert not model.base_model.model[0]._forward_hooks
    layer = model.base_model.model[0]
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    rows = torch.cat(batches) @ a.T
    deltas = torch.cat([3 * model.eval()(batch).pow(2) for batch in batches]).double() @ b
    torch.testing.assert_close(found["0"].inputs, rows.T @ rows / 15)
    torch.testing.assert_close(found["0"].gradients, deltas.T @ deltas / 3, rtol=1e-4, atol=1e-4)


def test_padding_is_left_out() -> None:
    model = kinds_model()
    masked = {"tokens": tokens(), "attention_mask": torch.tensor([[1, 0]] * 7)}
    found = measure_moments(model, [masked], lambda model, batch: model(batch["tokens"]).sum(), gradients=False)
    a = model.base_model.model.linear.lora_A["default"].weight.detach()
    rows = model.base_model.model.table(tokens())[:, 0] @ a.T
    torch.testing.assert_close(found["linear"].inputs, (rows.T @ rows / 7).detach())
    assert found["linear"].gradients is None


@pytest.mark.parametrize("gradients", [False, True])
def test_weighted_cuts_lose_least_of_the_output(tmp_path: Path, gradients: bool) -> None:
    """What is lost, tr(G D C D^T), is the energy cut, and the optimum by dense matrix roots."""
    generator = torch.Generator().manual_seed(3)
    model = get_peft_model(
        nn.Sequential(nn.Linear(6, 5)).double(), LoraConfig(target_modules=["0"], r=4), autocast_adapter_dtype=False
    )
    stir(model)
    adapter = saved(model, tmp_path / "a")
    x = torch.randn(50, 6, generator=generator, dtype=torch.float64) * torch.tensor([9.0, 5, 1, 1, 0.3, 0.1])
    g = torch.randn(50, 5, generator=generator, dtype=torch.float64) * torch.tensor([0.1, 1, 7, 2, 1])
    C, G = x.T @ x / 50, g.T @ g / 50 if gradients else torch.eye(5, dtype=torch.float64)
    a, b = read_adapter(adapter).factors("0")
    moments = {"0": Moments(a @ C @ a.T, b.T @ G @ b if gradients else None)}
    found = shrink(adapter, 22, tmp_path / "b", moments=moments)
    assert found.after.ranks["0"] == 2
    lost = update(adapter, "0") - update(tmp_path / "b", "0")
    assert torch.trace(G @ lost @ C @ lost.T).item() == pytest.approx(found.energies["0"][2:].sum(), rel=1e-6)
    root_c, root_g = torch.linalg.cholesky(C), torch.linalg.cholesky(G)
    S = torch.linalg.svdvals(root_g.T @ update(adapter, "0") @ root_c)
    torch.testing.assert_close(torch.tensor(found.energies["0"]), S[:4].square())


def test_dora_keeps_rank_1_everywhere_and_saved_modules_are_copied(tmp_path: Path) -> None:
    options = {"target_modules": ["linear", "transposed"], "modules_to_save": ["head"]}
    adapter = saved(kinds_model(r=3, use_dora=True, **options), tmp_path / "a")
    with pytest.raises(SettingsError, match="`budget` must cover"):
        shrink(adapter, 20, tmp_path / "b")
    found = shrink(adapter, 36, tmp_path / "b")
    assert all(rank >= 1 for rank in found.after.ranks.values())
    old, new = read_adapter(adapter).tensors, read_adapter(tmp_path / "b").tensors
    others = [key for key in old if "lora_A" not in key and "lora_B" not in key]
    assert sum("magnitude" in key for key in others) == 2
    assert any(".head." in key for key in others)
    assert all(torch.equal(old[key], new[key]) for key in others)
    loaded(tmp_path / "b")


@pytest.mark.parametrize(
    ("parameters", "options", "message"),
    [
        (13, {}, "`parameters` must pay for one rank at least (14 parameters, of the smallest module), but got 13."),
        (50, {"rule": "best"}, "`rule` must be among energy, threshold, uniform, but got 'best'."),
    ],
)
def test_what_cannot_be_shrunk_so(tmp_path: Path, parameters: int, options: dict, message: str) -> None:
    adapter = saved(kinds_model(), tmp_path / "a")
    with pytest.raises(SettingsError, match=re.escape(message)):
        shrink(adapter, parameters, tmp_path / "b", **options)
    assert not (tmp_path / "b").exists()


def test_an_update_of_zero_and_moments_of_another_adapter(tmp_path: Path) -> None:
    model = kinds_model()
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "embedding_A" in name:
            parameter.data.zero_()
    with pytest.raises(ModelError, match="must change the model to be shrunk, but its update is zero"):
        shrink(saved(model, tmp_path / "a"), 50, tmp_path / "b")
    adapter = saved(kinds_model(), tmp_path / "c")
    with pytest.raises(ModelError, match="`moments` must hold every module of the adapter, but lack `convolution`"):
        shrink(adapter, 50, tmp_path / "b", moments={})
    eye = {name: Moments(torch.eye(3)) for name in KINDS}
    with pytest.raises(ModelError, match=re.escape("must be of shape (2, 2), but are of shape (3, 3)")):
        shrink(adapter, 50, tmp_path / "b", moments=eye)


def test_a_folder_that_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="must be an adapter's folder, but has no adapter_config.json"):
        read_adapter(tmp_path)
    adapter = saved(kinds_model(), tmp_path / "a")
    config = json.loads((adapter / "adapter_config.json").read_text())
    for change, error, message in (
        ({"peft_type": "IA3"}, ModelError, "must hold a LoRA adapter, but `peft_type` is 'IA3'"),
        ({"r": 5}, FileError, "has rank 2 in the weights and 5 in adapter_config.json"),
        ({"r": "a"}, FileError, "must hold a LoRA config, but cannot be read"),
        ({"init_lora_weights": "pissa"}, ModelError, "'pissa' takes a part off them"),
        ({"target_parameters": ["experts.gate_up_proj"]}, ModelError, "also adapts parameters (fused experts)"),
    ):
        (adapter / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(error, match=re.escape(message)):
            read_adapter(adapter)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(FileError, match="must be new or an adapter's folder, but holds other files"):
        shrink(adapter, 50, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(FileError, match=re.escape("holds no weights (adapter_model.safetensors); train it first")):
        read_adapter(adapter)


# --- pad ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"rank_pattern": {"linear": 5}},
        {"rank_pattern": {"linear": 5}, "use_rslora": True},  # scalings differ, by no power of two
        {"alpha_pattern": {"transposed": 3}, "r": 9},
        {"rank_pattern": {"linear": 5}, "use_dora": True, "target_modules": ["linear", "transposed"]},
    ],
)
def test_padding_leaves_the_function(tmp_path: Path, options: dict) -> None:
    model = kinds_model(**options)
    found = pad_adapter(saved(model, tmp_path / "a"), tmp_path / "b")
    padded = loaded(tmp_path / "b")
    torch.testing.assert_close(output(padded), output(model), rtol=1e-12, atol=1e-12)
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    largest = max(from_peft_model(model).values())
    assert (found.largest, found.rank) == (largest, 8 if largest <= 8 else 16)
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == (
        found.rank,
        {},
        {},
        False,
    )
    assert set(from_peft_model(padded).values()) == {found.rank}
    assert found.not_in_vllm == (("DoRA",) if options.get("use_dora") else ())


def test_padding_half_precision_rescales_in_float32(tmp_path: Path) -> None:
    model = kinds_model(torch.bfloat16, target_modules=["linear", "transposed"], alpha_pattern={"linear": 3})
    pad_adapter(saved(model, tmp_path / "a"), tmp_path / "b")
    kinds = {
        key.split(".")[-3]: value.dtype
        for key, value in read_adapter(tmp_path / "b").tensors.items()
        if "lora_B" in key
    }
    assert kinds == {"linear": torch.float32, "transposed": torch.bfloat16}


def test_a_rank_above_all_that_vllm_takes(tmp_path: Path) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"], r=513))
    with pytest.raises(ModelError, match="must be at most 512 for vLLM, but is 513"):
        pad_adapter(saved(model, tmp_path / "a"), tmp_path / "b")
