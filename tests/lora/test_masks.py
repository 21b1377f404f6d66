"""Masked ranks compute, train and save as adapters that are truly resized."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import nn

import rankscope as rs
from rankscope.errors import ModelError
from rankscope.lora import RankMasks, Resize, masks_on, resize_adapters
from tests.lora.live_models import kinds_model, layers, tokens, train_step, trainable

CAPACITY = 5
MASKABLE = ("linear", "transposed", "convolution")
plans = st.dictionaries(st.sampled_from(MASKABLE), st.integers(0, CAPACITY), max_size=3)


def masked_model(dtype: torch.dtype = torch.float64, **options) -> PeftModel:
    return kinds_model(dtype, r=CAPACITY, target_modules=list(MASKABLE), **options)


def resizes(plan: dict[str, int], present: dict[str, int], seed: int) -> list[Resize]:
    """With directions, so that a masked model and a resized one grow alike."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {"linear": 6, "transposed": 8, "convolution": 12}
    return [
        Resize(
            name=name,
            rank=rank,
            directions=torch.randn(rank - present[name], inputs[name], generator=generator, dtype=torch.float64)
            if rank > present[name]
            else None,
        )
        for name, rank in plan.items()
    ]


@given(st.lists(plans, min_size=1, max_size=5), st.sampled_from(["adamw", "sgd"]))
@settings(max_examples=20, deadline=None)
def test_trains_as_a_resized_twin(sequence: list[dict[str, int]], name: str) -> None:
    make = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    }[name]
    model, twin = masked_model(), masked_model()
    masks = RankMasks(model)
    optimizer, other = make(trainable(model)), make(trainable(twin))
    step = 0
    for plan in sequence:
        # Adam counts steps: of a module that sleeps not, of one whose components are all masked it does.
        plan = {n: max(rank, 1) if name == "adamw" else rank for n, rank in plan.items()}
        if not any((dict(masks.ranks) | plan).values()):
            continue
        asked = resizes(plan, dict(masks.ranks), step)
        masks.resize(asked, optimizer)
        resize_adapters(twin, other, asked)
        assert dict(masks.ranks) == dict(rs.RankAllocation.from_peft_model(twin).ranks)
        for _ in range(3):
            step += 1
            assert train_step(model, optimizer, step) == pytest.approx(train_step(twin, other, step), rel=1e-9)
    torch.testing.assert_close(model(tokens()), twin(tokens()), rtol=1e-8, atol=1e-10)


def test_no_directions_are_needed_to_shrink() -> None:
    masks = RankMasks(masked_model())
    masks.resize([Resize(name="linear", rank=2, directions=torch.empty(0, 6))])
    assert masks.ranks["linear"] == 2


def test_inactive_components_stay_at_nothing() -> None:
    model = masked_model()
    masks = RankMasks(model)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.01, weight_decay=0.1)
    for step in range(3):
        train_step(model, optimizer, step)
    masks.resize([Resize(name=name, rank=2) for name in MASKABLE], optimizer)
    rows = {n: layer.lora_A["default"].weight.detach().clone() for n, layer in layers(model)}
    for step in range(5):
        train_step(model, optimizer, step)
    for name, layer in layers(model):
        off = [i for i in range(CAPACITY) if i not in masks.active[name]]
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert not b[:, off].any()
        assert not a.grad[off].any()
        assert not b.grad[:, off].any()
        torch.testing.assert_close(
            a[off], rows[name][off] * (1 - 0.01 * 0.1) ** 5
        )  # decay alone; drawn anew when switched on
        assert not optimizer.state[a]["exp_avg"][off].any()
        assert not optimizer.state[b]["exp_avg"][:, off].any()
        assert a[list(masks.active[name])].ne(rows[name][list(masks.active[name])]).any()


def test_switching_on_leaves_the_function_and_starts_afresh() -> None:
    model = masked_model()
    masks = RankMasks(model, {"linear": 2, "convolution": 1})
    optimizer = torch.optim.AdamW(trainable(model), lr=0.01)
    train_step(model, optimizer, 0)
    before, present = model(tokens()), masks.active["linear"]
    rows = torch.randn(2, 6)
    masks.resize([Resize(name="linear", rank=4, directions=rows), Resize(name="convolution", rank=3)], optimizer)
    assert torch.equal(model(tokens()), before)
    born = [index for index in masks.active["linear"] if index not in present]
    weight = model.get_base_model().linear.lora_A["default"].weight
    assert torch.equal(weight[born], rows.double())
    assert not optimizer.state[weight]["exp_avg_sq"][born].any()
    train_step(model, optimizer, 1)
    assert model.get_base_model().linear.lora_B["default"].weight[:, born].any()


@pytest.mark.parametrize("dora", [False, True])
def test_saves_true_ranks_for_plain_peft(tmp_path: Path, dora: bool) -> None:
    model = masked_model(use_dora=dora).eval()
    masks = RankMasks(model, {"linear": 1, "transposed": 3, "convolution": 1 if dora else 0})
    before = model(tokens())
    config = copy.deepcopy(model.peft_config["default"])
    masks.save_pretrained(tmp_path / "true")
    model.save_pretrained(str(tmp_path / "model's"))
    PeftModel.save_pretrained(model, str(tmp_path / "capacity"))
    assert model.peft_config["default"] == config
    true = {n: r for n, r in masks.ranks.items() if r}
    for folder, expected in (("true", true), ("model's", true), ("capacity", dict.fromkeys(MASKABLE, CAPACITY))):
        base = kinds_model(target_modules=list(MASKABLE)).unload()
        other = PeftModel.from_pretrained(base, str(tmp_path / folder), autocast_adapter_dtype=False).eval()
        assert dict(rs.RankAllocation.from_peft_model(other).ranks) == expected
        torch.testing.assert_close(other(tokens()), before, rtol=1e-13, atol=1e-13)


def test_a_copy_saves_itself(tmp_path: Path) -> None:
    model = masked_model()
    RankMasks(model, {"linear": 2})
    twin = copy.deepcopy(model)
    masks_on(twin).resize([Resize(name="linear", rank=1)])
    twin.save_pretrained(str(tmp_path))
    base = kinds_model(target_modules=list(MASKABLE)).unload()
    assert rs.RankAllocation.from_peft_model(PeftModel.from_pretrained(base, str(tmp_path))).ranks["linear"] == 1
    assert masks_on(model).ranks["linear"] == 2


def test_compresses_in_place_with_the_optimizer() -> None:
    model = masked_model()
    masks = RankMasks(model)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.01)
    train_step(model, optimizer, 0)
    masks.resize([Resize(name="linear", rank=2), Resize(name="convolution", rank=0)], optimizer)
    train_step(model, optimizer, 1)
    expected, before = dict(masks.ranks), model(tokens())
    linear = model.get_base_model().linear
    moments = optimizer.state[linear.lora_A["default"].weight]["exp_avg"][list(masks.active["linear"])]
    masks.compress(optimizer)
    assert dict(rs.RankAllocation.from_peft_model(model).ranks) == expected
    torch.testing.assert_close(model(tokens()), before)
    assert torch.equal(optimizer.state[linear.lora_A["default"].weight]["exp_avg"], moments)
    assert not list(model.get_base_model().linear.named_buffers())
    assert masks_on(model) is None
    assert not linear.lora_A["default"]._forward_hooks
    train_step(model, optimizer, 2)


def test_masks_come_back_with_a_checkpoint() -> None:
    model, fresh = masked_model(), masked_model(seed=4)
    masks = RankMasks(model)
    masks.resize([Resize(name="linear", rank=2), Resize(name="convolution", rank=0)])
    other = RankMasks(fresh)
    other.restore(masks.active)
    fresh.load_state_dict(model.state_dict())
    assert other.active == masks.active
    torch.testing.assert_close(fresh(tokens()), model(tokens()))


def test_half_precision_stays_half() -> None:
    model = masked_model(torch.float32)
    RankMasks(model, {"linear": 2})
    seen = []
    for _, layer in layers(model):
        layer.lora_A["default"].register_forward_hook(lambda _m, _i, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens())
    assert set(seen) == {torch.bfloat16}


def test_a_compiled_model_is_not_compiled_again() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list) -> object:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = masked_model()
    masks = RankMasks(model)
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.01)
    train_step(compiled, optimizer, 0)
    train_step(compiled, optimizer, 0)
    first = len(graphs)
    for rank in (2, 4, 1):
        masks.resize([Resize(name=name, rank=rank) for name in MASKABLE], optimizer)
        train_step(compiled, optimizer, rank)
    assert len(graphs) == first > 0
    torch.testing.assert_close(compiled(tokens()), model(tokens()))


def refuses(asked: list[Resize], message: str, masks: RankMasks) -> None:
    before = masks.active
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        masks.resize(asked)
    assert masks.active == before


def test_what_is_refused() -> None:
    masks = RankMasks(masked_model())
    refuses(
        [Resize(name="linear", rank=1), Resize(name="convolution", rank=6)],
        "the rank of `convolution` must be a whole number between 0 and 5, but got 6.",
        masks,
    )
    refuses(
        [Resize(name="linear", rank=1)] * 2, "`resizes` must name each module once, but names `linear` twice.", masks
    )
    refuses(
        [Resize(name="linear", rank=1), Resize(name="convolutio", rank=3)],
        "`resizes` must name modules that carry the adapter, but 'convolutio' does not; did you mean 'convolution'?",
        masks,
    )
    refuses(
        [Resize(name="linear", rank=5, directions=torch.ones(1, 6))],
        "`directions` of `linear` must be of shape (0, 6), one row for each added rank, but are of shape (1, 6).",
        masks,
    )
    with pytest.raises(
        ModelError, match=r"^masked ranks must be of linear or convolution layers, but `table` is an embedding\.$"
    ):
        RankMasks(kinds_model())
    with pytest.raises(
        ModelError,
        match=r"^`model` must not carry rank masks yet, but carries those of adapter 'default'; go on with them \(masks_on\), or "
        r"`compress` them\.$",
    ):
        RankMasks(masks.live.model)
    model = masked_model()
    with pytest.raises(ModelError, match=r"^the rank of `linear` must be a whole number between 0 and 5, but got 6\.$"):
        RankMasks(model, {"linear": 6})
    assert not any(module._forward_hooks for module in model.modules())
    refuses(
        [Resize(name="linear", rank=0)],
        "the masked rank of `linear` must be at least 1, for its bias or DoRA magnitude stays, but got 0.",
        RankMasks(masked_model(use_dora=True)),
    )
    masks.resize([Resize(name=name, rank=0) for name in MASKABLE])
    with pytest.raises(
        ModelError,
        match=r"^at least one module must have a rank above 0 to be saved; PEFT has no adapter without modules\.$",
    ):
        masks.save_pretrained("nowhere")
    with pytest.raises(
        ModelError, match=r"^`active` must name exactly the modules that are masked; it is of another model\.$"
    ):
        masks.restore({"linear": [0]})


# --- several processes ----------------------------------------------------------------------------------------------

WORKER = """
import sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from rankscope.lora import RankMasks, Resize, resize_adapters
from rankscope.errors import ModelError
from tests.lora.live_models import tokens, trainable
from tests.lora.test_masks import MASKABLE, masked_model

mode, folder = sys.argv[1:]
dist.init_process_group("gloo")
me = dist.get_rank()
model = masked_model(torch.float32)
masks = RankMasks(model, {"linear": 3})
try:
    resize_adapters(model, torch.optim.AdamW(trainable(model)), [Resize(name="linear", rank=1)])
except ModelError as error:
    assert "must run in one process, but there are 2" in str(error), error
else:
    raise AssertionError("not refused")
if mode == "ddp":
    wrapped = DistributedDataParallel(model)
else:
    from torch.distributed.fsdp import fully_shard
    fully_shard(model)
    wrapped = model
optimizer = torch.optim.AdamW(trainable(model), lr=0.01)
torch.manual_seed(100 + me)  # processes draw differently
for step, plan in enumerate([{}, {"linear": 5, "convolution": 0}, {"convolution": 2, "transposed": 1}, {"transposed": 4}]):
    masks.resize([Resize(name=n, rank=r) for n, r in plan.items()], optimizer)
    for i in range(3):
        optimizer.zero_grad()
        wrapped(tokens(10 * (3 * step + i) + me)).square().mean().backward()
        optimizer.step()
whole = torch.cat([p.detach().full_tensor().flatten() if hasattr(p, "full_tensor") else p.detach().flatten() for p in trainable(model)])
both = [torch.empty_like(whole) for _ in range(2)]
dist.all_gather(both, whole)
assert torch.equal(*both), "processes have diverged"
masks.save_pretrained(folder)
output = wrapped(tokens(0)).detach()
if me == 0:
    torch.save((output, dict(masks.ranks), whole), folder + "/outputs.pt")
if mode == "ddp":  # one process's masks are tampered with
    masks.restore(masks.active if me == 0 else {**masks.active, "linear": (0,)})
    try:
        masks.resize([Resize(name="linear", rank=2)], optimizer)
    except ModelError as error:
        assert str(error) == (
            "the masks must be the same on every process, but process 1 differs from process 0; "
            "start all from the same checkpoint and seed."
        ), error
    else:
        raise AssertionError("not noticed")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_two_processes_switch_alike(tmp_path: Path, mode: str) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    folder = tmp_path / "adapter"
    folder.mkdir()
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--master-port=0",
        "--rdzv-backend=c10d",
    ]
    command += ["--rdzv-endpoint=localhost:0", str(tmp_path / "worker.py"), mode, str(folder)]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-4000:]
    output, ranks, _ = torch.load(folder / "outputs.pt")
    base = kinds_model(torch.float32, target_modules=list(MASKABLE)).unload()
    other = PeftModel.from_pretrained(base, str(folder)).eval()
    assert (
        dict(rs.RankAllocation.from_peft_model(other).ranks)
        == ranks
        == {"linear": 5, "transposed": 4, "convolution": 2}
    )
    torch.testing.assert_close(other(tokens(0)), output, rtol=1e-5, atol=1e-6)


def test_a_model_wrapped_for_several_processes_is_refused() -> None:
    class FullyShardedDataParallel(nn.Module):
        """Told by its name: FSDP1 itself needs a process group to be made."""

    with pytest.raises(
        ModelError,
        match=r"^`model` must be a peft\.PeftModel, but is wrapped in FullyShardedDataParallel, which fixes parameters "
        r"when it wraps; mask ranks instead \(RankMasks, made before wrapping\)\.$",
    ):
        resize_adapters(FullyShardedDataParallel(), None, [])
