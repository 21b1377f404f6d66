"""Ranks change in a live model: same function, same trajectory of what stays, same parameters after plain PEFT loads them."""

import copy
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn

import rankscope as rs
from rankscope.errors import ModelError
from rankscope.lora import Resize, count_adapter_parameters, resize_adapters
from tests.lora.live_models import (
    KINDS,
    Kinds,
    digits_vit,
    kinds_model,
    layers,
    ranks,
    stir,
    tokens,
    train_step,
    trainable,
)

ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-15, torch.bfloat16: 1e-2}
full_ranks = {"table": 6, "linear": 6, "transposed": 8, "convolution": 5}
plans = st.fixed_dictionaries({}, optional={name: st.integers(0, full) for name, full in full_ranks.items()})


def resizes(plan: dict[str, int]) -> list[Resize]:
    return [Resize(name=name, rank=rank) for name, rank in plan.items()]


def reloaded(model: PeftModel, base: nn.Module, folder: Path) -> PeftModel:
    model.save_pretrained(str(folder))
    return PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=False)


@given(
    st.sampled_from(sorted(ROUNDING, key=str)),
    st.dictionaries(st.sampled_from(KINDS), st.integers(0, 3)),
    st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_growing_leaves_the_function(dtype: torch.dtype, more: dict[str, int], dora: bool) -> None:
    model = kinds_model(dtype, use_dora=dora).eval()
    before = model(tokens())
    deltas = {name: layer.get_delta_weight("default") for name, layer in layers(model)}
    resize_adapters(model, None, resizes({name: 2 + added for name, added in more.items()}))
    assert ranks(model) == {name: 2 + more.get(name, 0) for name in KINDS}
    for name, layer in layers(model):
        assert torch.equal(layer.get_delta_weight("default"), deltas[name])
        a, b = factors_of(layer)
        assert all(row.any() or column.any() for row, column in zip(a.flatten(1), b.flatten(1).T, strict=True))
    # Every added product is 0; what remains is the order in which a kernel sums.
    torch.testing.assert_close(model(tokens()), before, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


def factors_of(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    if "default" in layer.lora_embedding_A:
        return layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


@given(st.lists(plans, min_size=1, max_size=5), st.sampled_from(["drop", "svd"]), st.booleans(), st.booleans())
@settings(max_examples=30, deadline=None)
def test_plain_peft_loads_what_any_sequence_leaves(
    tmp_path_factory: pytest.TempPathFactory, sequence: list[dict[str, int]], shrink: str, dora: bool, rslora: bool
) -> None:
    model = kinds_model(use_dora=dora, use_rslora=rslora).eval()
    base = copy.deepcopy(kinds_model().unload())
    expected = dict.fromkeys(KINDS, 2)
    for step, plan in enumerate(sequence):
        if not any((expected | plan).values()):
            continue
        resize_adapters(model, None, resizes(plan), shrink=shrink)
        expected |= plan
        stir(model, step)
    assert ranks(model) == expected
    other = reloaded(model, base, tmp_path_factory.mktemp("adapter")).eval()
    assert set(dict(layers(other))) == {name for name, rank in expected.items() if rank}
    torch.testing.assert_close(other(tokens()), model(tokens()), rtol=1e-14, atol=1e-14)
    scalings = [layer.scaling["default"] for _, layer in layers(other)]
    assert scalings == pytest.approx([2 * 2**0.5 if rslora else 2.0] * len(scalings), rel=1e-14)


def test_patterns_are_exact_where_scalings_differ(tmp_path: Path) -> None:
    """PEFT's own way, one alpha for all, gives each rank another scaling: modules then share a rank and not an alpha."""
    model = kinds_model(lora_alpha=6, rank_pattern={"linear": 3}).eval()
    resize_adapters(model, None, resizes({"linear": 2, "table": 4}))
    assert {name: layer.scaling["default"] for name, layer in layers(model)} == {
        "table": 3.0,
        "linear": 2.0,
        "transposed": 3.0,
        "convolution": 3.0,
    }
    other = reloaded(model, kinds_model().unload(), tmp_path).eval()
    assert {name: layer.scaling["default"] for name, layer in layers(other)} == {
        name: layer.scaling["default"] for name, layer in layers(model)
    }
    torch.testing.assert_close(other(tokens()), model(tokens()))


def test_a_module_sleeps_at_rank_0_and_wakes() -> None:
    model = kinds_model()
    optimizer = torch.optim.AdamW(trainable(model), lr=0.01)
    train_step(model, optimizer, 0)
    inner = model.get_base_model().linear.lora_A["default"]
    calls = []
    inner.register_forward_hook(lambda *_: calls.append(1))
    bare = kinds_model()
    bare.load_state_dict(model.state_dict())
    bare.get_base_model().linear = bare.get_base_model().linear.base_layer

    resize_adapters(model, optimizer, resizes({"linear": 0}))
    torch.testing.assert_close(model(tokens()), bare(tokens()))
    assert not any("linear.lora" in name or "dormant" in name for name in model.state_dict())
    assert ranks(model)["linear"] == 0
    assert [tuple(p.shape) for p in optimizer.param_groups[0]["params"]] == [tuple(p.shape) for p in trainable(model)]
    model.load_state_dict(model.state_dict())
    train_step(model, optimizer, 1)
    assert not calls

    before = model(tokens())
    resize_adapters(model, optimizer, resizes({"linear": 3}))
    torch.testing.assert_close(model(tokens()), before)
    assert model.get_base_model().linear.lora_A["default"] is inner
    assert calls
    train_step(model, optimizer, 2)
    assert model.get_base_model().linear.lora_B["default"].weight.any()
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in trainable(model)}


def test_an_optimizer_made_while_modules_sleep_has_the_same_order() -> None:
    """As on resume: ranks are restored first, the optimizer is built, and its saved state loads by position."""
    model = kinds_model(use_dora=True)
    order = [name for name, _ in model.named_parameters() if "lora_" in name]
    optimizer = torch.optim.AdamW(trainable(model))
    resize_adapters(model, optimizer, resizes({"linear": 0, "convolution": 0, "table": 5}))
    fresh = torch.optim.AdamW(trainable(model))
    old, new = (o.param_groups[0]["params"] for o in (optimizer, fresh))
    assert [id(p) for p in old] == [id(p) for p in new]
    resize_adapters(model, None, resizes({"linear": 2, "convolution": 2}))
    assert [name for name, _ in model.named_parameters() if "lora_" in name] == order


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"lora_bias": True, "target_modules": ["linear", "convolution"]}]
)
def test_magnitude_and_bias_are_neutral_after_sleep(options: dict) -> None:
    model = kinds_model(**options).eval()
    names = list(ranks(model))
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(1.3)
    resize_adapters(model, None, resizes(dict.fromkeys(names[1:], 0)))
    resize_adapters(model, None, resizes(dict.fromkeys(names[1:], 2)))
    resize_adapters(model, None, resizes({names[0]: 0}))
    torch.testing.assert_close(model(tokens()), kinds_model().unload()(tokens()))


def test_magnitudes_are_kept_by_other_resizes() -> None:
    model = kinds_model(use_dora=True)
    magnitudes = {n: p for n, p in model.named_parameters() if "magnitude" in n}
    resize_adapters(model, None, resizes({"linear": 4, "table": 1, "convolution": 3}))
    assert {n: p for n, p in model.named_parameters() if "magnitude" in n} == magnitudes


def test_directions_become_rows() -> None:
    model = kinds_model()
    directions = torch.randn(2, 12, dtype=torch.float64)
    before = model(tokens())
    resize_adapters(model, None, [Resize(name="convolution", rank=4, directions=directions)])
    weight = model.get_base_model().convolution.lora_A["default"].weight
    assert torch.equal(weight[2:], directions.reshape(2, 3, 2, 2))
    rows = torch.randn(1, 11)
    resize_adapters(model, None, [Resize(name="table", rank=3, directions=rows)])
    assert torch.equal(model.get_base_model().table.lora_embedding_A["default"][2:], rows.double())
    torch.testing.assert_close(model(tokens()), before)


def test_a_generator_decides_what_is_drawn() -> None:
    def grown(seed: int) -> torch.Tensor:
        model = kinds_model()
        torch.manual_seed(torch.seed())
        resize_adapters(model, None, resizes({"linear": 4, "table": 4}), generator=torch.Generator().manual_seed(seed))
        return torch.cat([p.flatten() for p in trainable(model)])

    assert torch.equal(grown(1), grown(1))
    assert not torch.equal(grown(1), grown(2))


def test_gradients_are_carried() -> None:
    model = kinds_model()
    model(tokens()).square().sum().backward()
    linear = model.get_base_model().linear
    a, b = linear.lora_A["default"].weight.grad, linear.lora_B["default"].weight.grad
    resize_adapters(model, None, resizes({"linear": 3}))
    assert torch.equal(linear.lora_A["default"].weight.grad[:2], a)
    assert torch.equal(linear.lora_B["default"].weight.grad[:, :2], b)
    assert not linear.lora_A["default"].weight.grad[2:].any()


@pytest.mark.parametrize("shrink", ["drop", "svd"])
def test_carried_gradients_are_the_gradients_at_the_new_place(shrink: str) -> None:
    """Where nothing is lost: rank 4 of which two columns of B are zero, so that both ways keep the function."""
    model = kinds_model(r=4)
    model.get_base_model().linear.lora_B["default"].weight.data[:, 2:] = 0
    model(tokens()).square().sum().backward()
    resize_adapters(model, None, resizes({"linear": 2}), shrink=shrink)
    carried = [p.grad.clone() for p in trainable(model)]
    model.zero_grad()
    model(tokens()).square().sum().backward()
    for old, parameter in zip(carried, trainable(model), strict=True):
        torch.testing.assert_close(old, parameter.grad)


def test_both_ways_to_shrink_lose_little_and_svd_least() -> None:
    """On every module of a real ViT, with random factors whose components fall off in size."""
    model = get_peft_model(digits_vit(), LoraConfig(target_modules="all-linear", r=4, lora_alpha=8))
    stir(model)
    for _, layer in layers(model):
        layer.lora_A["default"].weight.data *= torch.logspace(0, -1.5, 4)[:, None]
    deltas = {name: layer.get_delta_weight("default").detach() for name, layer in layers(model)}
    losses = {}
    for shrink in ("drop", "svd"):
        twin = copy.deepcopy(model)
        resize_adapters(twin, None, [Resize(name=name, rank=2) for name in deltas], shrink=shrink)
        losses[shrink] = {
            name: (
                torch.linalg.norm(layer.get_delta_weight("default") - deltas[name]) / torch.linalg.norm(deltas[name])
            ).item()
            for name, layer in layers(twin)
        }
    assert all(losses["svd"][name] <= losses["drop"][name] * (1 + 1e-4) for name in deltas)
    for name, delta in deltas.items():
        singular = torch.linalg.svdvals(delta)
        assert losses["svd"][name] == pytest.approx((singular[2:].norm() / singular.norm()).item(), rel=1e-3)


def test_parameter_count_and_config_follow_on_a_real_model(tmp_path: Path) -> None:
    targets = rs.find_targets(digits_vit())
    model = get_peft_model(digits_vit(), LoraConfig(target_modules=[t.name for t in targets], r=1, lora_alpha=2)).eval()
    plan = {target.name: index % 4 for index, target in enumerate(targets)}
    resize_adapters(model, None, resizes(plan))
    allocation = rs.RankAllocation.from_ranks(targets, plan)
    assert rs.RankAllocation.from_peft_model(model, targets) == allocation
    assert count_adapter_parameters(model) == allocation.parameters == sum(p.numel() for p in trainable(model))
    assert rs.RankAllocation.from_lora_config(model.peft_config["default"], targets) == allocation
    stir(model)
    pixels = torch.rand(2, *(model.config.num_channels, model.config.image_size, model.config.image_size))
    other = reloaded(model, digits_vit(), tmp_path).eval()
    torch.testing.assert_close(other(pixels).logits, model(pixels).logits, rtol=0, atol=0)


def test_loads_where_rankscope_is_not_installed(tmp_path: Path) -> None:
    model = kinds_model().eval()
    resize_adapters(model, None, resizes({"linear": 0, "convolution": 4, "table": 1}))
    stir(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    torch.save(kinds_model().unload(), tmp_path / "base.pt")
    torch.save(model(tokens()), tmp_path / "outputs.pt")
    (tmp_path / "live_models.py").write_text(
        "import torch\nfrom torch import Tensor, nn\nfrom transformers.pytorch_utils import Conv1D\n\n\n"
        + inspect.getsource(Kinds)
    )
    code = f"""
import sys, torch
sys.path.insert(0, {str(tmp_path)!r})
sys.modules["rankscope"] = None
import live_models
sys.modules["tests.lora.live_models"] = live_models
from peft import PeftModel
base = torch.load("base.pt", weights_only=False)
model = PeftModel.from_pretrained(base, "adapter", autocast_adapter_dtype=False).eval()
tokens = torch.randint(0, 11, (7, 2), generator=torch.Generator().manual_seed(0))
torch.testing.assert_close(model(tokens), torch.load("outputs.pt"), rtol=0, atol=0)
print("same")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip().endswith("same"), done.stderr


def test_merging_and_unloading_work_while_modules_sleep() -> None:
    model = kinds_model().eval()
    resize_adapters(model, None, resizes({"linear": 0, "table": 3}))
    before = model(tokens())
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(tokens()), before)
    with model.disable_adapter():
        torch.testing.assert_close(model(tokens()), kinds_model().unload()(tokens()))


def test_one_of_several_adapters() -> None:
    model = kinds_model()
    model.add_adapter("other", LoraConfig(target_modules=["linear"], r=2))
    before = {n: p for n, p in model.named_parameters() if ".other" in n}
    resize_adapters(model, None, resizes({"linear": 0}), adapter_name="default")
    resize_adapters(model, None, resizes({"linear": 5}), adapter_name="default")
    assert {n: p for n, p in model.named_parameters() if ".other" in n} == before
    assert dict(rs.RankAllocation.from_peft_model(model, adapter_name="other").ranks) == {"linear": 2}
    assert ranks(model)["linear"] == 5


def test_a_compiled_model_is_recompiled() -> None:
    model = kinds_model().eval()
    compiled = torch.compile(model, backend="eager")
    compiled(tokens())
    resize_adapters(compiled, None, resizes({"linear": 0, "transposed": 4, "table": 1}))
    torch.testing.assert_close(compiled(tokens()), model(tokens()))
    stir(model)
    torch.testing.assert_close(compiled(tokens()), model(tokens()))


def quantised(bits: int) -> nn.Module:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Tanh(), nn.Linear(64, 64, bias=False))
    for index in (0, 2):
        weight = model[index].weight.data
        if bits == 8:
            model[index] = bitsandbytes.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
            model[index].weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        else:
            model[index] = bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
            model[index].weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    model = model.to("cpu")  # quantises
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = bits == 8, bits == 4  # as transformers marks what it loads
    return model


@pytest.mark.parametrize(("bits", "dora"), [(8, False), (4, False), (4, True)])  # DoRA on 8 bits: PEFT's fails on a CPU
def test_quantised_bases(tmp_path: Path, bits: int, dora: bool) -> None:
    model = get_peft_model(quantised(bits), LoraConfig(target_modules=["0", "2"], r=3, use_dora=dora)).eval()
    stir(model)
    x = torch.randn(5, 64)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.01)
    model(x).square().mean().backward()
    optimizer.step()
    before = model(x)
    resize_adapters(model, optimizer, resizes({"0": 6, "2": 4}))
    torch.testing.assert_close(model(x), before)
    resize_adapters(model, optimizer, resizes({"0": 0, "2": 2}), shrink="svd")
    model(x).square().mean().backward()
    optimizer.step()
    model.save_pretrained(str(tmp_path))
    other = PeftModel.from_pretrained(quantised(bits), str(tmp_path)).eval()
    torch.testing.assert_close(other(x), model(x))
    before = model(x)
    resize_adapters(model, optimizer, resizes({"0": 5}))
    torch.testing.assert_close(model(x), before)


def test_gradient_checkpointing_goes_on_between_steps() -> None:
    targets = rs.find_targets(digits_vit())
    losses = {}
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(digits_vit(), LoraConfig(target_modules=[t.name for t in targets], r=2)).train()
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW(trainable(model), lr=0.01)
        pixels = torch.rand(4, model.config.num_channels, model.config.image_size, model.config.image_size)
        history = []
        for step in range(4):
            optimizer.zero_grad()
            loss = model(pixel_values=pixels, labels=torch.arange(4)).loss
            loss.backward()
            optimizer.step()
            history.append(loss)  # a graph that is kept alive holds the old parameters
            plan = {target.name: (index + step) % 4 for index, target in enumerate(targets)}
            resize_adapters(model, optimizer, resizes(plan), generator=torch.Generator().manual_seed(step))
        losses[checkpointing] = [loss.item() for loss in history]
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    assert losses[True][-1] < losses[True][0]


# --- what is refused, and changes nothing ---------------------------------------------------------------------------


def snapshot(model: PeftModel, optimizer: torch.optim.Optimizer) -> tuple:
    state = {id(p): {k: id(v) for k, v in s.items()} for p, s in optimizer.state.items()}
    config = model.peft_config["default"].to_dict()
    return [(n, id(p), p.shape) for n, p in model.named_parameters()], state, str(config), ranks(model)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            [Resize(name="linear", rank=3), Resize(name="linea", rank=1)],
            "`resizes` must name modules that carry the adapter, but 'linea' does not; did you mean 'linear'?",
        ),
        (
            [Resize(name="linear", rank=3), Resize(name="head", rank=1)],
            "`resizes` must name modules that carry the adapter, but 'head' does not; adapt it when the model is wrapped.",
        ),
        ([Resize(name="linear", rank=3)] * 2, "`resizes` must name each module once, but names `linear` twice."),
        (
            [Resize(name="table", rank=3), Resize(name="linear", rank=7)],
            "the rank of `linear` must be a whole number between 0 and 6, but got 7.",
        ),
        ([Resize(name="linear", rank=-1)], "the rank of `linear` must be a whole number between 0 and 6, but got -1."),
        (
            [Resize(name="linear", rank=2.5)],
            "the rank of `linear` must be a whole number between 0 and 6, but got 2.5.",
        ),
        (
            [Resize(name="linear", rank=3, directions=torch.ones(2, 6))],
            "`directions` of `linear` must be of shape (1, 6), one row for each added rank, but are of shape (2, 6).",
        ),
        (
            [Resize(name="linear", rank=1, directions=torch.ones(1, 6))],
            "`directions` of `linear` must be of shape (0, 6), one row for each added rank, but are of shape (1, 6).",
        ),
        (
            [Resize(name="linear", rank=2, directions=torch.ones(1, 6))],
            "`directions` of `linear` must be of shape (0, 6), one row for each added rank, but are of shape (1, 6).",
        ),
        (
            [Resize(name="linear", rank=3, directions=torch.zeros(1, 6))],
            "`directions` of `linear` must be finite and without a row of zeros; leave them out to draw.",
        ),
        (
            [Resize(name="linear", rank=3, directions=torch.full((1, 6), torch.nan))],
            "`directions` of `linear` must be finite and without a row of zeros; leave them out to draw.",
        ),
        (
            [Resize(name=name, rank=0) for name in KINDS],
            "`resizes` must leave at least one module a rank above 0; PEFT has no adapter without modules.",
        ),
    ],
)
def test_bad_resizes_change_nothing(asked: list[Resize], message: str) -> None:
    model = kinds_model()
    optimizer = torch.optim.AdamW(trainable(model))
    train_step(model, optimizer, 0)
    before = snapshot(model, optimizer)
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        resize_adapters(model, optimizer, asked)
    assert snapshot(model, optimizer) == before


@pytest.mark.parametrize("shrink", ["drop", "svd"])
def test_factors_that_are_not_finite_are_not_shrunk(shrink: str) -> None:
    model = kinds_model()
    model.get_base_model().linear.lora_B["default"].weight.data[0, 0] = torch.nan
    message = "the factors of `linear` must be finite to be shrunk, but are not; go back to a checkpoint."
    refuses(model, message, shrink=shrink)
    assert ranks(model)["linear"] == 2


def refuses(model: nn.Module, message: str, name: str = "linear", **options: object) -> None:
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        resize_adapters(model, None, [Resize(name=name, rank=1)], **options)


def test_bad_models_are_refused() -> None:
    refuses(Kinds(), "`model` must be a peft.PeftModel, but is a Kinds; wrap it with get_peft_model.")
    refuses(kinds_model(), "`shrink` must be among ['drop', 'svd'], but got 'best'.", shrink="best")
    merged = kinds_model()
    merged.merge_adapter()
    refuses(merged, "adapters must not be merged, but ['default'] are in `linear`; unmerge first.")
    two = kinds_model()
    two.add_adapter("other", LoraConfig(target_modules=["linear"]))
    refuses(two, "`adapter_name` must say which of the adapters ['default', 'other'] is meant, but is None.")
    refuses(
        two, "`adapter_name` must be among the model's adapters ['default', 'other'], but got 'x'.", adapter_name="x"
    )
    tied = kinds_model()
    tied.get_base_model().transposed.lora_A["default"].weight = tied.get_base_model().linear.lora_A["default"].weight
    with pytest.raises(
        ModelError, match=r"^adapters must have factors of their own, but `transposed` shares them with `linear`\.$"
    ):
        resize_adapters(tied, None, resizes({"linear": 1, "transposed": 1}))


def test_other_kinds_of_adapters_are_refused() -> None:
    loha = get_peft_model(Kinds(), LoHaConfig(target_modules=["linear"]))
    refuses(loha, "adapter 'default' must be LoRA for its ranks to change, but is LOHA.")
    adalora = get_peft_model(Kinds(), AdaLoraConfig(target_modules=["linear"], total_step=10))
    refuses(adalora, "adapter 'default' must be LoRA for its ranks to change, but is ADALORA.")
    mica = get_peft_model(Kinds(), LoraConfig(target_modules=["linear"], r=2, init_lora_weights="mica"))
    refuses(mica, "the adapter of `linear` must be plain LoRA or DoRA, but it is of variant MiCALinearVariant.")
    grouped = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
    grouped = get_peft_model(grouped, LoraConfig(target_modules=["0"], r=2))
    refuses(grouped, "the adapter of `0` must be plain LoRA or DoRA, but it is on a convolution with groups.", name="0")


def test_zero_3_is_refused_with_the_reason() -> None:
    model = kinds_model()
    model.get_base_model().linear.lora_A["default"].weight.ds_id = 3  # how DeepSpeed marks what it partitions
    refuses(
        model,
        "the adapter's parameters must be whole in this process, but DeepSpeed ZeRO-3 partitions them and keeps its own flat "
        "copies; use DDP or FSDP2 with masked ranks (RankMasks), or one process.",
    )
