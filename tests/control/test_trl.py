"""The callback in TRL's trainers, where trl is installed: ranks move, resuming ends the same, plain PEFT loads the result."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import rankscope as rs
from rankscope.lora import count_adapter_parameters
from tests.architectures import build
from tests.control.trainers import controller_of, ends_the_same

WORDS = ["the", "a", "cat", "dog", "bird", "sees", "hears", "likes", "small", "red", "old", "house", "tree"]


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=32
    )


def sft(folder: Path) -> Any:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    sentences = [f"the {a} cat {b} the {c} dog" for a in WORDS[8:11] for b in WORDS[5:8] for c in WORDS[8:11]]
    arguments = trl.SFTConfig(
        output_dir=str(folder),
        max_steps=12,
        per_device_train_batch_size=4,
        learning_rate=0.02,
        save_steps=5,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        max_length=32,
    )
    config = LoraConfig(target_modules="all-linear", r=2, lora_alpha=4, task_type="CAUSAL_LM")
    budget = rs.ParameterBudget.uniform(rs.find_targets(build("llama"), "all-linear"), 2)
    moves: dict[str, Any] = {
        "every": 3,
        "freeze_fraction": 0.8,
        "samples": 2,
        "hysteresis": 0.0,
        "min_gain_ratio": 0.0,
    }
    return trl.SFTTrainer(
        model=build("llama"),
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"text": sentences}),
        processing_class=tokenizer(),
        peft_config=config,  # TRL wraps the model by itself
        callbacks=[rs.RankControllerCallback(budget=budget, **moves)],
    )


@pytest.mark.slow
def test_sft(tmp_path: Path) -> None:
    whole = sft(tmp_path / "whole")
    whole.train()
    controller = controller_of(whole)
    assert controller.decisions["step"].tolist() == [3, 6, 9]
    assert "moved" in set(controller.decisions["action"])
    assert any("ranks/moved" in entry for entry in whole.state.log_history)
    resumed = sft(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    ends_the_same(resumed, whole)
    whole.save_model(str(tmp_path / "adapter"))
    plain = PeftModel.from_pretrained(build("llama"), str(tmp_path / "adapter")).eval()
    assert count_adapter_parameters(plain) == count_adapter_parameters(whole.model) == controller.allocation.parameters
    assert rs.RankAllocation.from_peft_model(plain).ranks == {n: r for n, r in controller.allocation.ranks.items() if r}
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, whole.model.eval()(ids).logits)


def dpo(folder: Path, *, bind: bool) -> Any:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    rows = {
        "prompt": [f"the {adjective} cat" for adjective in WORDS[8:11]] * 8,
        "chosen": [f" sees the {word}" for word in WORDS[:8]] * 3,
        "rejected": [" hears a tree"] * 24,
    }
    torch.manual_seed(0)
    model = get_peft_model(build("llama"), LoraConfig(target_modules="all-linear", r=2, task_type="CAUSAL_LM"))
    arguments = trl.DPOConfig(
        output_dir=str(folder),
        max_steps=15,
        per_device_train_batch_size=4,
        learning_rate=2e-3,
        save_strategy="no",
        logging_steps=5,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    budget = rs.ParameterBudget(count_adapter_parameters(model))
    free = {"hysteresis": 0.0, "min_gain_ratio": 0.0}
    callback = rs.RankControllerCallback(
        budget=budget, every=5, freeze_fraction=0.8, samples=2, **free, adapter_name="default"
    )
    run = trl.DPOTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tokenizer(),
        callbacks=[callback],
    )
    if bind:
        callback.bind(run)
    return run


@pytest.mark.slow
def test_dpo_saves_both_adapters(tmp_path: Path) -> None:
    """TRL adds a frozen reference adapter with the config of the first; plain PEFT loads both."""
    run = dpo(tmp_path, bind=True)
    run.train()
    assert controller_of(run).decisions["action"].iloc[0] == "moved"
    assert sorted(run.model.peft_config) == ["default", "ref"]

    run.model.save_pretrained(str(tmp_path))
    ids = torch.arange(3, 15)[None]
    for name, folder in (("default", tmp_path), ("ref", tmp_path / "ref")):
        plain = PeftModel.from_pretrained(build("llama"), str(folder), adapter_name=name).eval()
        run.model.eval().set_adapter(name)
        with torch.no_grad():
            torch.testing.assert_close(plain(ids).logits, run.model(ids).logits)
