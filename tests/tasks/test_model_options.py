"""How the generic tasks load their models: precision, quantisation, checkpointing, code of the model's own."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from transformers import LlamaConfig, LlamaForCausalLM

import rankscope as rs
from rankscope.errors import SettingsError, TaskError
from rankscope.tasks import (
    CausalLM,
    Chat,
    ImageClassification,
    ImageTextToText,
    TextClassification,
    TokenClassification,
    evaluate,
    pretrained,
    profile_task,
)
from rankscope.training import save_adapter
from tests.refusals import refused
from tests.tasks.models import WORDS, save_bert, save_llama, save_tokenizer, sentences
from tests.tasks.test_chat import chats, save_chat_model
from tests.tasks.test_images import pictures, save_classifier
from tests.tasks.test_sequences import tagged
from tests.tasks.vision_models import questions, save_family


def save_wide(folder: Path) -> Path:
    """Wide enough for blocks of 64 weights, of which 4-bit formats keep one scale."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), pad_token_id=0, **sizes)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
@pytest.mark.parametrize("kind", [CausalLM, TextClassification])
def test_adapters_of_quantised_models_in_plain_peft(kind: Any, quantization: str, tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    options = {"quantization": quantization}
    task = kind(save_wide(tmp_path / "model"), sentences(), dtype="bfloat16", batch_size=4, model_options=options)
    model = task.build_model()
    layer = bitsandbytes.nn.Linear4bit if quantization == "4bit" else bitsandbytes.nn.Linear8bitLt
    assert sum(isinstance(module, layer) for module in model.modules()) == 14
    head = model.lm_head if kind is CausalLM else model.score
    assert type(head) is torch.nn.Linear
    targets = rs.find_targets(model)
    taken = profile_task(task, n_batches=2)
    budget = rs.ParameterBudget.uniform(targets, 1)
    allocation = rs.allocate("one-shot", targets=targets, budget=budget, profile=taken)
    before = evaluate(task, model)
    trained, result = rs.train(task, allocation, steps=1, learning_rate=0.05)
    assert dict(result.metrics) != before
    assert evaluate(task, task.build_model()) == before  # a run trains a copy
    save_adapter(trained, task, tmp_path / "adapter")
    kept = json.loads((tmp_path / "adapter" / "model_kwargs.json").read_text())
    if "id2label" in kept:
        kept["id2label"] = {int(code): label for code, label in kept["id2label"].items()}
    loader = AutoPeftModelForCausalLM if kind is CausalLM else AutoPeftModelForSequenceClassification
    again = loader.from_pretrained(tmp_path / "adapter", **kept)
    for module in again.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # an inference kernel, exact to 1 %
            module.support_avx512bf16_for_cpu = False
    assert evaluate(task, again) == dict(result.metrics)


def test_a_quantised_mean_pooled_encoder(tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    options = {"quantization": "4bit"}
    task = TextClassification(save_bert(tmp_path), sentences(), pooling="mean", batch_size=4, model_options=options)
    model = task.build_model()
    assert isinstance(model.bert.encoder.layer[0].attention.self.query, bitsandbytes.nn.Linear4bit)
    assert type(model.classifier) is torch.nn.Linear
    assert evaluate(task, model)["loss"] > 0


def test_fresh_heads_are_not_quantised(tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    options = {"quantization": "4bit"}
    task = ImageClassification(save_classifier("ViT", tmp_path / "vit"), pictures(), model_options=options)
    vit = task.build_model()
    assert isinstance(vit.vit.layers[0].mlp.fc1, bitsandbytes.nn.Linear4bit)
    tags = TokenClassification(save_wide(tmp_path / "llama"), tagged(), model_options=options).build_model()
    assert (type(vit.classifier), type(tags.score)) == (torch.nn.Linear, torch.nn.Linear)
    assert evaluate(task, vit)["loss"] > 0


def test_quantisation_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    task = CausalLM(save_llama(tmp_path), sentences(), model_options={"quantization": "8bit"})
    refused(
        "`quantization: 8bit` needs the package bitsandbytes, but it is not installed; install rankscope[quantized].",
        task.build_model,
    )


@pytest.mark.parametrize("kind", ["text", "chat", "images"])
def test_gradient_checkpointing_changes_nothing_but_memory(kind: str, tmp_path: Path) -> None:
    def build(**options: Any) -> Any:
        if kind == "text":
            return TextClassification(save_llama(tmp_path), sentences(), batch_size=4, model_options=options)
        if kind == "chat":
            return Chat(save_chat_model(tmp_path), chats(), batch_size=4, model_options=options)
        return ImageTextToText(save_family("llava", tmp_path), questions(), batch_size=3, model_options=options)

    found = []
    for checkpointing in (False, True):
        task = build(gradient_checkpointing=checkpointing)
        targets = rs.find_targets(task.build_model())
        taken = profile_task(task, n_batches=2)
        allocation = rs.allocate("uniform", targets=targets, budget=rs.ParameterBudget.uniform(targets, 1))
        model, result = rs.train(task, allocation, steps=2, learning_rate=0.05)
        assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules()) == checkpointing
        found.append((taken.column("gradient_norm"), result.metrics))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-3)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)


def test_precision_and_attention(tmp_path: Path) -> None:
    task = ImageTextToText(
        save_family("llava", tmp_path),
        questions(),
        model_options={"dtype": "bfloat16", "attn_implementation": "eager", "device_map": "cpu"},
    )
    model = task.build_model()
    assert (model.dtype, model.config._attn_implementation) == (torch.bfloat16, "eager")
    assert task.model_kwargs == {"dtype": "bfloat16"}
    spec = {"type": "image-text-to-text", "model": str(tmp_path), "data": "rows.parquet", "name": "mine"}
    questions().to_parquet(tmp_path / "rows.parquet")
    task = rs.load_task({**spec, "dtype": "bfloat16"}, base_dir=tmp_path)
    assert (task.name, task.dtype, task.model_options.dtype) == ("mine", "bfloat16", "bfloat16")


def test_the_revision_goes_into_adapters(tmp_path: Path) -> None:
    task = CausalLM(save_llama(tmp_path), sentences(), model_options={"revision": "main"})
    targets = rs.find_targets(task.build_model())
    allocation = rs.allocate("uniform", targets=targets, budget=rs.ParameterBudget.uniform(targets, 1))
    model, _ = rs.train(task, allocation, steps=1)
    save_adapter(model, task, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["revision"] == "main"


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own_llama"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_a_model_runs_only_if_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_llama(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own_llama",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE)
    refused(
        f"`{folder}` must be a model of transformers' own code, but holds code that would run here; if you trust it, set "
        "`model_options: {trust_remote_code: true}`.",
        CausalLM(folder, sentences()).build_model,
    )
    trusting = CausalLM(folder, sentences(), model_options={"trust_remote_code": True})
    assert type(trusting.build_model()).__name__ == "OwnModel"
    assert trusting.model_kwargs == {"trust_remote_code": True}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantisation": "4bit"}, "unknown key `quantisation`; did you mean `quantization`?"),
        ({"quantization": "3bit"}, "`quantization`: input should be '4bit' or '8bit', but got '3bit'."),
        ({"trust_remote_code": "yes"}, "`trust_remote_code`: input should be a valid boolean, but got 'yes'."),
    ],
)
def test_options_that_are_wrong(options: dict[str, Any], message: str) -> None:
    refused(message, lambda: CausalLM("x", sentences(), model_options=options), SettingsError)


def test_options_that_do_not_fit(tmp_path: Path) -> None:
    folder = save_llama(tmp_path)
    refused(
        "`dtype` is given twice, by itself and in `model_options`; leave out one.",
        lambda: CausalLM(folder, sentences(), dtype="float32", model_options={"dtype": "bfloat16"}),
    )
    split = {
        "model.embed_tokens": "cpu",
        "model.layers": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "disk",
    }
    with pytest.raises(TaskError, match=r"^`device_map` must put the model on one device, .* cpu, disk; name one"):
        CausalLM(folder, sentences(), model_options={"device_map": split}).build_model()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"attn_implementation": "flash_attention_9"},
            "`attn_implementation` must work with this model on this machine, but 'flash_attention_9' does not: "
            'Specified `attn_implementation="flash_attention_9"` is not supported; install what it lacks, or leave it out, '
            "which lets transformers choose.",
        ),
        pytest.param(
            {"attn_implementation": "flash_attention_2"},
            "`attn_implementation` must work with this model on this machine, but 'flash_attention_2' does not: "
            "the package for FlashAttention2 doesn't seem to be installed; install what it lacks, or leave it out, which "
            "lets transformers choose.",
            marks=pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash-attn is installed"),
        ),
        pytest.param(
            {"device_map": "cuda:1"},
            "`device_map` must name a device of this machine, but 'cuda:1' is none: Torch not compiled with CUDA enabled; "
            "leave it out for the best one.",
            marks=pytest.mark.skipif(torch.backends.cuda.is_built(), reason="torch has CUDA"),
        ),
    ],
)
def test_options_that_the_machine_lacks(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    folder = save_llama(tmp_path)
    refused(message, CausalLM(folder, sentences(), model_options=options).build_model)
