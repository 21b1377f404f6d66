"""Every field of a `LoraConfig`: ranks move and plain PEFT loads the same function, or one line says why not."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import KasaConfig, LoraConfig, PeftModel, VeloraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import rankscope as rs
from rankscope.errors import ModelError, RankscopeError
from rankscope.lora import RankMasks, Resize, apply_allocation, resize_adapters
from tests.lora.live_models import stir

TOKENS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(3))
NAMES = ["q_proj", "v_proj", "down_proj"]
QUERY = "model.layers.0.self_attn.q_proj"


def base(*, dtype: torch.dtype = torch.float32, tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tied)).to(dtype)


def wrapped(model: nn.Module | None = None, *, adapter: str = "default", **options: object) -> PeftModel:
    config = LoraConfig(**{"r": 4, "target_modules": NAMES, "task_type": "CAUSAL_LM"} | options)
    return get_peft_model(base() if model is None else model, config, adapter_name=adapter)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, controller: rs.RankController | None = None) -> None:
    loss = model.train()(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    optimizer.step()
    if controller is not None:
        controller.step(loss)
    optimizer.zero_grad()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def outputs(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=TOKENS).logits.detach()


def loaded(model: PeftModel, fresh: nn.Module, folder: Path, adapter: str = "default") -> PeftModel:
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(fresh, folder if adapter == "default" else folder / adapter)


def moved(model: PeftModel, adapter: str = "default") -> PeftModel:
    """Trained, resized up, down, to 0 and back, and trained between."""
    optimizer = adamw(model)
    first, second, third, fourth = list(rs.RankAllocation.from_peft_model(model, adapter_name=adapter).ranks)[:4]
    for ranks in ({first: 7, second: 0, third: 2}, {second: 3}, {fourth: 0}):
        train(model, optimizer)
        asked = [Resize(name=name, rank=rank) for name, rank in ranks.items()]
        resize_adapters(model, optimizer, asked, adapter_name=adapter)
    train(model, optimizer)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {"r": 64, "target_modules": ["gate_proj", "up_proj", "down_proj", "q_proj"]},
        {"use_rslora": True, "alpha_pattern": {"q_proj": 17}},
        {"use_dora": True, "use_rslora": True},
        {"lora_bias": True},
        *({"init_lora_weights": init} for init in (False, "gaussian", "eva", "orthogonal")),
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"layers_to_transform": [0, 1], "layers_pattern": "layers"},
        {"exclude_modules": r".*1.*q_proj"},
        {"rank_pattern": {"q_proj": 8, r"layers\.1.*": 2}, "alpha_pattern": {"v_proj": 3}},
        {"target_modules": ["embed_tokens", "q_proj", "v_proj", "lm_head"]},
        {"trainable_token_indices": [1, 2]},
        {"layer_replication": [[0, 2], [0, 2]]},
        {"target_parameters": ["self_attn.o_proj.weight"]},
        {"adapter": "my adapter-1"},
    ],
    ids=str,
)
def test_plain_peft_loads_the_same_function(options: dict, tmp_path: Path) -> None:
    model = moved(wrapped(**options), adapter := options.get("adapter", "default"))
    again = loaded(model, base(), tmp_path, adapter)
    assert torch.equal(outputs(again), outputs(model))
    adapted = {
        name: rank
        for name, rank in rs.RankAllocation.from_peft_model(model, adapter_name=adapter).ranks.items()
        if rank
    }
    assert dict(rs.RankAllocation.from_peft_model(again).ranks) == adapted


def test_plain_peft_loads_the_same_function_in_bf16_and_with_tied_modules(tmp_path: Path) -> None:
    half = moved(wrapped(base(dtype=torch.bfloat16)))
    assert torch.equal(outputs(loaded(half, base(dtype=torch.bfloat16), tmp_path / "half")), outputs(half))
    tied = moved(wrapped(base(tied=True), ensure_weight_tying=True, modules_to_save=["embed_tokens"]))
    assert torch.equal(outputs(loaded(tied, base(tied=True), tmp_path / "tied")), outputs(tied))


CHANGED_BASE = (
    "`init_lora_weights` must leave the base weights as they are where ranks change, but {!r} takes a part off them; use "
    "True, 'gaussian' or 'eva'."
)
BIAS = (
    '`bias` must be "none" for modules to have rank 0 while they train, but is {!r}, and PEFT would lose their biases; '
    "keep rank 1 at least."
)
VARIANT = f"the adapter of `{QUERY}` must be plain LoRA or DoRA, but it is of variant {{}}LinearVariant."


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"init_lora_weights": i}, CHANGED_BASE.format(i)) for i in ("pissa", "pissa_niter_2", "olora", "OLoRA")),
        *(({"bias": bias}, BIAS.format(bias)) for bias in ("all", "lora_only")),
        ({"alora_invocation_tokens": [5]}, VARIANT.format("ALora")),
        ({"velora_config": VeloraConfig()}, VARIANT.format("Velora")),
        ({"kasa_config": KasaConfig()}, VARIANT.format("Kasa")),
    ],
    ids=str,
)
def test_what_cannot_move_is_refused_and_left_as_it_was(options: dict, message: str) -> None:
    model = wrapped(**options)
    for refused in (
        lambda: resize_adapters(model, None, [Resize(name=QUERY, rank=0)]),
        lambda: RankMasks(model, {QUERY: 0}),
        lambda: apply_allocation(base(), rs.RankAllocation(rs.find_targets(base(), NAMES), (2, 0) * 3), dormant=True, **options),
    ):  # fmt: skip
        with pytest.raises(ModelError) as error:
            refused()
        assert str(error.value) == message or "must be plain LoRA or DoRA for its ranks to change" in str(error.value)
    assert set(rs.RankAllocation.from_peft_model(model).vector) == {4}


def test_tied_adapters_are_refused() -> None:
    model = wrapped(base(tied=True), ensure_weight_tying=True, target_modules=["embed_tokens", "q_proj"])
    message = (
        "adapters must have factors of their own for their ranks to change, but `ensure_weight_tying` ties those of "
        "['lm_head']; adapt other modules only."
    )
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        resize_adapters(model, None, [Resize(name=QUERY, rank=2)])


@pytest.mark.parametrize("options", [{"init_lora_weights": "pissa"}, {"bias": "all"}, {"bias": "lora_only"}], ids=str)
def test_modules_of_rank_0_are_plain_lora_where_nothing_moves(options: dict, tmp_path: Path) -> None:
    allocation = rs.RankAllocation(rs.find_targets(base(), NAMES), (2, 0, 3, 4, 0, 1))
    model = apply_allocation(base(), allocation, **options)
    train(model, adamw(model))
    assert torch.equal(outputs(loaded(model, base(), tmp_path)), outputs(model))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_the_controller_keeps_modules_whose_bias_is_trained(bias: str, tmp_path: Path) -> None:
    model = wrapped(bias=bias)
    controller = _controlled(model, rs.ParameterBudget(rs.RankAllocation.from_peft_model(model).parameters))
    assert "moved" in set(controller.decisions["action"])
    assert min(controller.allocation.vector) == 1
    assert torch.equal(outputs(loaded(model, base(), tmp_path)), outputs(model))


def test_masked_magnitudes_stay_under_the_controller() -> None:
    model = wrapped(use_dora=True)
    start = rs.RankAllocation(rs.RankAllocation.from_peft_model(model).targets, (1,) * 6)
    budget = rs.ParameterBudget(start.parameters)
    assert min(_controlled(model, budget, rank_change="mask", start=start).allocation.vector) == 1


def _controlled(model: PeftModel, budget: rs.ParameterBudget, **options: object) -> rs.RankController:
    optimizer = adamw(model)
    controller = rs.RankController(
        model,
        optimizer,
        budget=budget,
        every=2,
        total_steps=12,
        freeze_fraction=0.9,
        samples=2,
        hysteresis=0.0,
        min_gain_ratio=0.0,
        **options,
    )
    for _ in range(12):
        train(model, optimizer, controller)
    return controller


# --- configs, ranks above the full one, wrappers ------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_a_shared_config_is_never_written_to(masked: bool, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=NAMES)
    model = get_peft_model(base(), config)
    model.add_adapter("ref", config)  # as TRL's trainers do
    before = config.to_dict()
    if masked:
        RankMasks(model, {QUERY: 1}, adapter_name="default").save_pretrained(tmp_path)
    else:
        resize_adapters(model, None, [Resize(name=QUERY, rank=7)], adapter_name="default")
    assert config.to_dict() == before
    model.set_adapter("ref")
    stir(model)
    type(model).save_pretrained(model, tmp_path)
    assert torch.equal(outputs(PeftModel.from_pretrained(base(), tmp_path / "ref")), outputs(model))


def test_ranks_above_the_full_one_are_read_cut_and_controlled(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = wrapped(r=40)
    present = rs.RankAllocation.from_peft_model(model)
    assert set(present.vector) == {40}
    assert present.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert rs.RankAllocation.from_lora_config(model.peft_config["default"], rs.find_targets(base())).ranks[QUERY] == 40
    assert rs.RankAllocation.from_json(present.to_json(tmp_path / "a.json")) == present
    assert set(rs.RankAllocation.from_peft_model(apply_allocation(base(), present)).vector) == {40}
    optimizer = adamw(model)
    train(model, optimizer)
    before = outputs(model)
    rs.RankController(model, optimizer, budget=rs.ParameterBudget(present.parameters), every=2, total_steps=12)
    assert set(rs.RankAllocation.from_peft_model(model).vector) == {32}
    torch.testing.assert_close(outputs(model), before)
    assert (
        "6 modules had ranks above their smaller side (`model.layers.0.self_attn.q_proj`: 40 above 32), which no update "
        "needs: cut to it, they compute the same, and what that saves can go to others"
    ) in caplog.text


def test_which_of_several_active_adapters_is_asked() -> None:
    model = wrapped()
    model.add_adapter("b", LoraConfig(r=3, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "b"])
    message = "`adapter_name` must say which of the active adapters ['default', 'b'] is meant, but is None."
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        rs.RankAllocation.from_peft_model(model)
    assert set(rs.RankAllocation.from_peft_model(model, adapter_name="b").vector) == {3}


def test_adapters_of_other_ranks_are_combined(tmp_path: Path) -> None:
    model = wrapped()
    model.add_adapter("b", LoraConfig(r=3, target_modules=NAMES))
    resize_adapters(model, None, [Resize(name=QUERY, rank=6)], adapter_name="default")
    stir(model)
    model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "both", combination_type="cat")
    model.set_adapter("both")
    assert rs.RankAllocation.from_peft_model(model).ranks[QUERY] == 9


def test_multihead_attention_is_refused() -> None:
    net = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "linear": nn.Linear(8, 8)})
    message = "`model` must carry adapters on modules of one weight, but `attention` is an nn.MultiheadAttention; adapt others."
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        rs.RankAllocation.from_peft_model(get_peft_model(net, LoraConfig(target_modules=["attention", "linear"])))


def test_an_adapter_deleted_while_modules_sleep_can_be_added_again() -> None:
    model = wrapped()
    model.add_adapter("other", LoraConfig(r=3, target_modules=NAMES))
    resize_adapters(model, None, [Resize(name=QUERY, rank=0)], adapter_name="other")
    model.delete_adapter("other")
    model.add_adapter("other", LoraConfig(r=3, target_modules=NAMES))
    assert set(rs.RankAllocation.from_peft_model(model, adapter_name="other").vector) == {3}


def test_an_adapter_that_is_loaded_to_be_trained_is_resized_on(tmp_path: Path) -> None:
    allocation = rs.RankAllocation(rs.find_targets(base(), NAMES), (2, 0, 3, 4, 0, 1))
    apply_allocation(base(), allocation, dormant=True).save_pretrained(tmp_path / "a")
    model = moved(PeftModel.from_pretrained(base(), tmp_path / "a", is_trainable=True))
    assert torch.equal(outputs(loaded(model, base(), tmp_path / "b")), outputs(model))


@pytest.mark.parametrize(
    "compiled",
    ["whole", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("in place", "blocks in place"))],
)
def test_compiled_bases(compiled: str, tmp_path: Path) -> None:
    model = base()
    if compiled == "whole":
        model = torch.compile(model, backend="eager")
    for block in {"whole": [], "in place": [model], "blocks in place": list(model.model.layers)}[compiled]:
        block.compile(backend="eager")
    allocation = rs.RankAllocation(rs.find_targets(model, NAMES), (2, 0, 3, 4, 0, 1))
    adapted = moved(apply_allocation(model, allocation, dormant=True))
    assert torch.equal(outputs(loaded(adapted, base(), tmp_path)), outputs(adapted))


def _wrapped_blocks(model: nn.Module) -> nn.Module:
    layers = (model.get_base_model() if isinstance(model, PeftModel) else model).model.layers
    for i in range(len(layers)):
        layers[i] = torch.compile(layers[i], backend="eager")
    return model


def _offloaded(model: nn.Module) -> nn.Module:
    from accelerate import cpu_offload

    return cpu_offload(model, execution_device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_wrapped_blocks, "blocks must be compiled in place, but `model.layers.0` is wrapped by `torch.compile`, whose name PEFT would save; call its `compile()` instead."),
        (_offloaded, f"the weights of `{QUERY}` must be in memory"),
    ],
)  # fmt: skip
def test_blocks_in_wrappers_and_offloaded_weights_are_refused(
    change: Callable[[nn.Module], nn.Module], message: str
) -> None:
    allocation = rs.RankAllocation(rs.find_targets(base(), NAMES), (2,) * 6)
    for refused in (
        lambda: apply_allocation(change(base()), allocation),
        lambda: resize_adapters(change(wrapped()), None, [Resize(name=QUERY, rank=2)]),
    ):
        with pytest.raises(RankscopeError, match=f"^{re.escape(message)}"):
            refused()
