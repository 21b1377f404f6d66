"""Discovery: which modules, and their tower, block and role, on every architecture."""

import copy
import re
from collections.abc import Callable, Iterator

import pytest
import torch
from accelerate import cpu_offload
from peft import IA3Config, LoraConfig, PeftMixedModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

import rankscope as rs
from rankscope.errors import ModelError
from rankscope.targets import TargetModule, find_targets, fingerprint_targets, fused_experts
from tests.architectures import ARCHITECTURES, ATTENTION, BUILDERS, build

CLIP_ORDER = ["k_proj", "v_proj", "q_proj", "o_proj"]
GATED = ["gate_proj", "up_proj", "down_proj"]


def stack(tower: str, roles: list[str], n_blocks: int = 2) -> list[tuple[str, int | None, str]]:
    return [(tower, block, role) for block in range(n_blocks) for role in roles]


EXPECTED = {
    "bert": [*stack("model", [*ATTENTION, "fc1", "fc2"]), ("model", None, "pooler")],
    "bert-mlm": stack("model", [*ATTENTION, "fc1", "fc2"]),
    "vit": stack("model", [*ATTENTION, "fc1", "fc2"]),
    "llama": stack("model", [*ATTENTION, *GATED]),
    "gpt2": stack("model", ["qkv_proj", "o_proj", "fc1", "fc2"]),
    "clip": [
        *stack("language", [*CLIP_ORDER, "fc1", "fc2"]),
        *stack("vision", [*CLIP_ORDER, "fc1", "fc2"]),
        ("projector", None, "visual_projection"),
        ("projector", None, "text_projection"),
    ],
    "llava": [
        *stack("vision", [*CLIP_ORDER, "fc1", "fc2"]),
        ("projector", None, "linear_1"),
        ("projector", None, "linear_2"),
        *stack("language", [*ATTENTION, *GATED]),
    ],
    "t5": [
        *stack("encoder", [*ATTENTION, "fc1", "fc2"]),
        *stack("decoder", [*ATTENTION, *[f"cross_{role}" for role in ATTENTION], "fc1", "fc2"]),
    ],
}


@pytest.mark.parametrize("name", BUILDERS)
def test_tower_block_and_role_of_every_target(name: str) -> None:
    assert [(t.tower, t.block, t.role) for t in find_targets(build(name))] == EXPECTED[name]


@pytest.mark.parametrize("name", BUILDERS)
def test_shapes_are_the_modules_own_and_order_is_the_models(name: str) -> None:
    model = build(name)
    found = find_targets(model)
    modules = dict(model.named_modules())
    for target in found:
        weight = modules[target.name].weight
        shape = tuple(weight.shape) if target.kind == "linear" else tuple(weight.T.shape)
        assert (target.out_features, target.in_features) == shape
    names = [t.name for t in found]
    assert names == [n for n in modules if n in set(names)]


LAYERS = [f"model.layers.{block}.{part}" for block in range(2) for part in ("self_attn.q_proj", "mlp.up_proj")]
OPTIONS: list[dict] = [
    {"target_modules": "all-linear"},
    {"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"},
    {"target_modules": "all-linear", "exclude_modules": ["q_proj", "query", "c_attn"]},
    {"target_modules": r".*\.1\..*(q_proj|query|c_attn|SelfAttention\.q|wo|fc1)"},
    {"target_modules": ["q_proj", "query", "c_attn", "q"], "layers_to_transform": [0]},
    {
        "target_modules": ["q_proj", "query", "c_attn", "q"],
        "layers_to_transform": 1,
        "layers_pattern": ["layers", "layer"],
    },
    {"target_modules": [*LAYERS, *(f"unused_{i}" for i in range(20))], "layers_to_transform": [1]},
    {"target_modules": "all-linear", "modules_to_save": ["fc1", "mlp", "intermediate"]},
    {},
]


def adapted_by_peft(name: str, options: dict) -> set[str] | None:
    """What PEFT builds under the names of the base model; None where it refuses the config."""
    base = {n for n, _ in build(name).named_modules()}
    try:
        wrapped = get_peft_model(build(name), LoraConfig(**copy.deepcopy(options))).get_base_model()
    except (TypeError, ValueError):
        return None
    return {n for n, module in wrapped.named_modules() if isinstance(module, LoraLayer)} & base


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_lora_config_selects_what_peft_adapts(name: str, options: dict) -> None:
    options = options | ({"task_type": "SEQ_CLS"} if name == "bert" else {})
    adapted, config = adapted_by_peft(name, options), LoraConfig(**copy.deepcopy(options))
    if not adapted:
        with pytest.raises(ModelError, match="^`selection` must [^\n]*$"):
            find_targets(build(name), config)
        return
    targets = find_targets(build(name), config)
    assert {t.name for t in targets} == adapted
    assert config.to_dict() == LoraConfig(**copy.deepcopy(options)).to_dict()
    if "target_modules" in options:
        assert set(rs.RankAllocation.from_lora_config(config, targets).ranks.values()) == {8}


def test_configs_that_peft_refuses() -> None:
    for config, message in [
        (LoraConfig(target_modules=["self_attn"]), "`selection` must be a config that PEFT can apply, but LoRA does not adapt a LlamaAttention, which `model.layers.0.self_attn` is; name the modules inside it."),
        (LoraConfig(target_modules=["absent"]), "`selection` must select linear modules, convolutions or embeddings of LlamaForCausalLM, but PEFT adapts none; check `target_modules`, `exclude_modules`, `layers_to_transform` and `modules_to_save`."),
        (LoraConfig(target_modules="x{99999999999}"), "`selection` must be a config that PEFT can apply, but the repetition number is too large"),
        (IA3Config(target_modules=["q_proj"]), "`selection` must be a peft.LoraConfig, but is a IA3Config; name the modules."),
    ]:  # fmt: skip
        with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
            find_targets(build("llama"), config)
    with pytest.raises(ModelError, match="incompatible with Mamba-based models"):
        find_targets(ARCHITECTURES["mamba"].build(), LoraConfig(target_modules=["out_proj"]))


def test_from_lora_config_needs_named_target_modules() -> None:
    message = "`config` must name its `target_modules`, but leaves them to PEFT's default for the model's architecture; set them to [t.name for t in find_targets(model, config)]."
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        rs.RankAllocation.from_lora_config(LoraConfig(task_type="CAUSAL_LM"), find_targets(build("llama")))


def test_all_linear_leaves_the_output_embedding_out_also_without_a_model() -> None:
    model = build("llama")
    targets = find_targets(model, [*(target.name for target in find_targets(model)), "lm_head"])
    ranks = rs.RankAllocation.from_lora_config(LoraConfig(target_modules="all-linear", r=4), targets).ranks
    assert (ranks["lm_head"], set(ranks.values())) == (0, {0, 4})


def test_a_list_selects_by_last_parts_as_peft_does() -> None:
    names = ["q_proj", "layers.1.mlp.down_proj"]
    wrapped = get_peft_model(build("llama"), LoraConfig(target_modules=names)).get_base_model()
    adapted = {n for n, module in wrapped.named_modules() if isinstance(module, LoraLayer)}
    assert {t.name for t in find_targets(build("llama"), names)} == adapted
    assert len(adapted) == 3


@pytest.mark.parametrize("name", BUILDERS)
def test_a_peft_model_gives_the_targets_of_its_base(name: str) -> None:
    targets = find_targets(build(name))
    wrapped = get_peft_model(build(name), LoraConfig(target_modules=[t.name for t in targets]))
    assert find_targets(wrapped) == targets


def compiled_blocks(model: nn.Module) -> nn.Module:
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(layer, backend="eager")
    return model


def sharded(model: nn.Module) -> nn.Module:
    policy = ModuleWrapPolicy({type(model.model.layers[0])})
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))


def checkpointed(model: nn.Module) -> nn.Module:
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = checkpoint_wrapper(layer)
    return model


def adapted(model: nn.Module) -> nn.Module:
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"]))


@pytest.fixture
def one_process() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: torch.compile(model, backend="eager"),
        lambda model: torch.compile(DistributedDataParallel(model), backend="eager"),
        lambda model: DistributedDataParallel(adapted(model)),
        lambda model: adapted(torch.compile(model, backend="eager")),
        lambda model: adapted(compiled_blocks(model)),
        lambda model: PeftMixedModel(model, LoraConfig(target_modules=["q_proj"])),
        nn.DataParallel,
        compiled_blocks,
        sharded,
        checkpointed,
        cpu_offload,
    ],
    ids="compiled compiled-ddp ddp-peft peft-compiled peft-blocks mixed dp blocks fsdp checkpointed offloaded".split(),  # noqa: SIM905
)
def test_wrappers_leave_no_trace_in_names(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = wrap(build("llama"))
    targets = find_targets(model)
    assert targets == find_targets(build("llama"))
    assert len(find_targets(model, LoraConfig(target_modules=["q_proj"]))) == 2
    ids = torch.randint(3, 50, (2, 7))
    profile = rs.profile(model, [{"input_ids": ids, "labels": ids}] * 2, targets=targets)
    assert min(profile.column("gradient_norm").values()) > 0


def test_names_that_peft_uses_too_are_names_of_a_models_own_modules() -> None:
    names = ["base_layer", "lora_A", "module", "default"]
    model = nn.ModuleDict({name: nn.Sequential(nn.Linear(4, 4)) for name in names})
    for selection in ("all-linear", LoraConfig(target_modules=["0"])):
        assert [target.name for target in rs.find_targets(model, selection)] == [f"{name}.0" for name in names]


def test_what_modules_to_save_trains_is_no_target() -> None:
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp", "lm_head"])
    model = get_peft_model(build("llama"), config)
    assert [t.role for t in find_targets(model)] == ATTENTION * 2
    message = "`selection` must match a module that may carry an adapter, but ('up_proj',) matches only modules like `model.layers.0.mlp.up_proj`, where PEFT trains the module itself (`modules_to_save`); select others."
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        find_targets(model, ["up_proj"])


class Odd(nn.Module):
    """Linear modules where an adapter does nothing or cannot be."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.fast = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.slow = nn.TransformerEncoderLayer(8, 2, 16)
        self.empty = nn.Linear(8, 0)


def test_idle_modules_are_no_targets(caplog: pytest.LogCaptureFixture) -> None:
    assert [t.name for t in find_targets(Odd())] == ["fine", "slow.linear1", "slow.linear2"]
    assert [t.name for t in find_targets(Odd(), ["fine", "out_proj"])] == ["fine"]
    assert "`attention.out_proj` is no target: MultiheadAttention reads its weight without calling it" in caplog.text
    for name, reason in [
        ("linear1", None),
        ("attention.out_proj", "MultiheadAttention reads its weight without calling it"),
        ("empty", "the module has no weights (a width of 0)"),
    ]:
        if reason is None:
            assert [t.name for t in find_targets(Odd(), [name])] == ["slow.linear1"]
        else:
            with pytest.raises(
                ModelError, match=re.escape(f"matches only modules like `{name}`, where {reason}; select others.")
            ):
                find_targets(Odd(), [name])


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("mamba", "x_proj dt_proj out_proj"),
        ("mamba2", "out_proj"),
        ("jamba", "dt_proj"),
        ("falcon-h1", "out_proj"),
        ("wavlm", "q_proj k_proj v_proj out_proj"),
        ("wav2vec2-xvector", "kernel"),
        ("llama4", "router"),
        ("siglip", "attention.out_proj"),
    ],
)
def test_modules_that_transformers_reads_by_weight(name: str, left_out: str) -> None:
    model = ARCHITECTURES[name].build()
    there = {n for n, module in model.named_modules() if isinstance(module, nn.Linear)}
    missing = {n for n in there - {t.name for t in find_targets(model)} if "head" not in n.split(".")[0]}
    assert set(left_out.split()) <= {".".join(n.split(".")[-len(left_out.split(".")) :]) for n in missing}


def test_experts_are_told_from_other_weights_of_three_dimensions() -> None:
    assert fused_experts(ARCHITECTURES["wav2vec2"].build()) == []  # a weight-normed convolution
    assert fused_experts(nn.Sequential(nn.Bilinear(3, 4, 5), nn.Conv1d(3, 4, 5))) == []
    mixtral = ARCHITECTURES["mixtral"].build()
    experts = [
        f"model.layers.{block}.mlp.experts.{part}" for block in range(2) for part in ("gate_up_proj", "down_proj")
    ]
    assert fused_experts(mixtral) == experts
    config = LoraConfig(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    assert fused_experts(get_peft_model(mixtral, config)) == experts


def test_models_without_linear_modules() -> None:
    message = '`selection` must name the convolutions of ResNetForImageClassification, which has no linear modules outside its head, but is "all-linear"; pass a regex or a list.'
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        find_targets(ARCHITECTURES["resnet"].build())
    message = "`selection` must match a module that may carry an adapter, but 'all-linear' matches none in Sequential, which has no linear modules; name others."
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        find_targets(nn.Sequential(nn.Tanh()))


def test_shapes_need_no_weights() -> None:
    with torch.device("meta"):
        found = [find_targets(build(name)) for name in ("gpt2", "llama")]
    assert found == [find_targets(build(name)) for name in ("gpt2", "llama")]


@pytest.mark.parametrize(
    "selection",
    [1, None, 2.5, b"q_proj", {"q_proj": 1}, [1], [["q_proj"]], [""], "", (), nn.Identity(), [b"q"], "(.+)+q_prox"],
)
def test_bad_selections_are_one_line(selection: object) -> None:
    with pytest.raises(ModelError, match=r"^`selection` must [^\n]{20,250}$"):
        find_targets(build("llama"), selection)


def test_heads_embeddings_and_tied_modules_only_when_named_in_full() -> None:
    model = build("llama")
    assert "lm_head" not in {t.name for t in find_targets(model)}
    assert [t.name for t in find_targets(model, ["lm_head"])] == ["lm_head"]
    with pytest.raises(ModelError, match="matches only embeddings in LlamaForCausalLM; name them in full"):
        find_targets(model, ["embed_tokens"])
    embedding = find_targets(model, ["model.embed_tokens"])[0]
    assert (embedding.kind, embedding.in_features, embedding.out_features) == ("embedding", 50, 32)

    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    assert [t.name for t in find_targets(tied)] == ["1"]
    assert [t.name for t in find_targets(tied, ["0", "1", "2"])] == ["0", "1", "2"]
    assert [t.name for t in find_targets(tied, ["2", "1"])] == ["1", "2"]


def test_one_tower_of_several_keeps_its_name() -> None:
    assert {t.tower for t in find_targets(build("llava"), r".*language_model.*(q|v)_proj")} == {"language"}


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (["q_prj"], "`selection` must match modules of the model, but 'q_prj' matches none; did you mean 'q_proj', 'v_proj', 'o_proj'."),
        (["q_proj", "up_prj"], "`selection` must match modules of the model, but 'up_prj' matches none; did you mean 'up_proj', 'v_proj', 'q_proj'."),
        ("q_proj", "`selection` must match modules of the model, but 'q_proj' matches none; a string is a regex for the whole name, so pass ['q_proj']."),
        ("(", "`selection` must be a valid regex, but '(' is not: missing ), unterminated subpattern at position 0."),
        ([], '`selection` must be "all-linear", a regex, a list of names or a peft.LoraConfig, but is []; pass "all-linear" for all.'),
        (".*lm_head", "`selection` must match a module that may carry an adapter, but '.*lm_head' matches only heads in LlamaForCausalLM; name them in full to adapt them all the same."),
    ],
)  # fmt: skip
def test_mistakes_name_near_misses(selection: object, message: str) -> None:
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        find_targets(build("llama"), selection)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "gpt2"}, "`model` must be a torch module, but is 'gpt2'; load it first."),
    ],
)
def test_other_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        find_targets(**{"model": nn.Linear(2, 2)} | arguments)


def test_fingerprint_sees_names_and_shapes_but_not_order() -> None:
    one, two = (TargetModule(name=n, in_features=4, out_features=8) for n in "ab")
    assert fingerprint_targets([one, two]) == fingerprint_targets([two, one])
    wider = TargetModule(name="b", in_features=4, out_features=9)
    assert fingerprint_targets([one, two]) != fingerprint_targets([one, wider])
