"""Discovery: which modules, and their tower, block and role, on every architecture."""

import re

import pytest
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from rankscope.exceptions import TargetError
from rankscope.targets import TargetModule, find_targets, fingerprint_targets, name_block, name_role
from tests.architectures import BUILDERS, build

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
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


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.1\..*(q_proj|query|c_attn|SelfAttention\.q|wo|fc1)"},
        {"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"},
    ],
    ids=["all-linear", "regex", "excluded"],
)
def test_a_lora_config_selects_what_peft_adapts(name: str, options: dict) -> None:
    task = {"task_type": "SEQ_CLS"} if name in ("bert", "vit") else {}
    config = LoraConfig(**options, **task)
    wrapped = get_peft_model(build(name), config).get_base_model()
    adapted = {n for n, module in wrapped.named_modules() if isinstance(module, LoraLayer)}
    if options["target_modules"] == "all-linear":
        ours = {t.name for t in find_targets(build(name), "all-linear")}
        adapted = {n for n in adapted if not n.startswith(("cls.", "classifier", "lm_head"))}
        assert adapted <= ours
        assert ours - adapted == ({n for n in ours if ".0." in n} if "exclude_modules" in options else set())
    else:
        assert {t.name for t in find_targets(build(name), LoraConfig(**options))} == adapted


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


def test_heads_embeddings_and_tied_modules_only_when_asked_for() -> None:
    model = build("llama")
    assert "lm_head" not in {t.name for t in find_targets(model)}
    assert "lm_head" in {t.name for t in find_targets(model, include=["heads"])}
    assert [t.name for t in find_targets(model, ["lm_head"])] == ["lm_head"]
    embedding = find_targets(model, ["embed_tokens"], include=["embeddings"])[0]
    assert (embedding.kind, embedding.in_features, embedding.out_features) == ("embedding", 50, 32)

    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    assert [t.name for t in find_targets(tied)] == ["1"]
    assert [t.name for t in find_targets(tied, include=["tied"])] == ["0", "1", "2"]
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
        ([], '`selection` must name at least one module, but is empty; pass "all-linear" for all.'),
        (".*lm_head", "`selection` must match a module that may carry an adapter, but '.*lm_head' matches only heads in LlamaForCausalLM; pass `include=['heads']` to adapt them all the same."),
    ],
)  # fmt: skip
def test_mistakes_name_near_misses(selection: object, message: str) -> None:
    with pytest.raises(TargetError, match=f"^{re.escape(message)}$"):
        find_targets(build("llama"), selection)


def test_unknown_include() -> None:
    with pytest.raises(
        TargetError, match=re.escape("`include` must be among ('heads', 'embeddings', 'tied'), but got ['head'].")
    ):
        find_targets(build("llama"), include=["head"])


@pytest.mark.parametrize(
    ("name", "block", "role"),
    [
        ("transformer.blocks.7.attn.Wqkv", 7, "qkv_proj"),
        ("gpt_neox.layers.3.attention.dense", 3, "o_proj"),
        ("gpt_neox.layers.3.mlp.dense_4h_to_h", 3, "fc2"),
        ("distilbert.transformer.layer.2.ffn.lin1", 2, "fc1"),
        ("model.layers.4.block_sparse_moe.experts.1.w2", 4, "down_proj"),
        ("model.mm_projector.2", None, "2"),
        ("encoder.layer.0.attention.attention.query", 0, "q_proj"),
        ("encoder.layer.0.attention.output.dense", 0, "o_proj"),
        ("decoder.layers.5.encoder_attn.v_proj", 5, "cross_v_proj"),
    ],
)
def test_names_of_other_architectures(name: str, block: int | None, role: str) -> None:
    assert (name_block(name), name_role(name)) == (block, role)


def test_fingerprint_sees_names_and_shapes_but_not_order() -> None:
    one, two = (TargetModule(name=n, in_features=4, out_features=8) for n in "ab")
    assert fingerprint_targets([one, two]) == fingerprint_targets([two, one])
    wider = TargetModule(name="b", in_features=4, out_features=9)
    assert fingerprint_targets([one, two]) != fingerprint_targets([one, wider])
