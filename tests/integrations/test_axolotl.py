"""The plugin's hooks in the order in which axolotl calls them (cli/config.py, loaders/model.py, core/builders/base.py)."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import rankscope as rs
from rankscope.errors import SettingsError
from rankscope.integrations.axolotl import RankscopeArgs, RankscopePlugin
from rankscope.lora import from_peft_model
from tests.architectures import build


class Cfg(dict):
    """As axolotl's DictDefault: attributes are keys, missing ones None."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


@pytest.fixture
def allocation(tmp_path: Path) -> rs.RankAllocation:
    targets = rs.find_targets(build("llama"))
    given = rs.RankAllocation(targets, tuple((1, 0, 3, 2)[i % 4] for i in range(len(targets))))
    given.to_json(tmp_path / "allocation.json")
    return given


def yaml_of(tmp_path: Path, **more: Any) -> Cfg:
    return Cfg(adapter="lora", rankscope=Cfg(allocation=str(tmp_path / "allocation.json"), **more))


def wrapped(plugin: RankscopePlugin, cfg: Cfg) -> Any:
    """The model after axolotl's `_build_peft_lora_config` and `get_peft_model`."""
    model = build("llama")
    plugin.pre_lora_load(cfg, model)
    config = LoraConfig(
        r=cfg.lora_r, lora_alpha=cfg.lora_alpha, target_modules=cfg.lora_target_modules, target_parameters=[],
        rank_pattern=cfg.lora_rank_pattern, alpha_pattern=cfg.lora_alpha_pattern, bias="none", task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(model, config)


def test_the_yaml_is_filled_and_builds_the_ranks(allocation: rs.RankAllocation, tmp_path: Path) -> None:
    plugin, cfg = RankscopePlugin(), yaml_of(tmp_path)
    plugin.register(cfg)
    assert plugin.get_input_args() == "rankscope.integrations.axolotl.RankscopeArgs"
    assert RankscopeArgs(rankscope=dict(cfg.rankscope)).rankscope == cfg.rankscope
    model = wrapped(plugin, cfg)
    assert from_peft_model(model) == {name: rank for name, rank in allocation.ranks.items() if rank}
    assert plugin.add_callbacks_post_trainer(cfg, None) == []


def test_a_controller_runs_inside_the_trainer(allocation: rs.RankAllocation, tmp_path: Path) -> None:
    plugin, cfg = RankscopePlugin(), yaml_of(tmp_path, controller={"every": 2, "samples": 1, "freeze_fraction": 1.0})
    plugin.register(cfg)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 50, (8, 6))]
    arguments = TrainingArguments(
        str(tmp_path / "out"),
        max_steps=6,
        per_device_train_batch_size=2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
    )
    trainer = Trainer(wrapped(plugin, cfg), arguments, train_dataset=rows)
    for callback in plugin.add_callbacks_post_trainer(cfg, trainer):
        trainer.add_callback(callback)
    trainer.train()
    (found,) = [each for each in trainer.callback_handler.callbacks if isinstance(each, rs.RankControllerCallback)]
    assert found.controller.last_decision is not None
    assert sum(from_peft_model(trainer.model).values()) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rankscope": None}, "the axolotl YAML must have a section `rankscope` with its plugin"),
        ({"rankscope": {"allocation": "x", "controler": True}}, "unknown key `controler`; did you mean `controller`?"),
        ({"adapter": None}, "`adapter` must be lora or qlora for `rankscope`, but is None."),
        ({"lora_r": 8}, "`lora_r` follows from `rankscope.allocation`; leave it out."),
        ({"lora_target_linear": True}, "`lora_target_linear` follows from `rankscope.allocation`; leave it out."),
        ({"peft_use_rslora": True}, "`peft_use_rslora` must be off"),
    ],
)
def test_what_the_yaml_must_not_say(allocation: rs.RankAllocation, tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(message)):
        RankscopePlugin().register(Cfg(yaml_of(tmp_path) | change))


def test_an_allocation_of_another_model(allocation: rs.RankAllocation, tmp_path: Path) -> None:
    plugin, cfg = RankscopePlugin(), yaml_of(tmp_path)
    plugin.register(cfg)
    with pytest.raises(SettingsError, match="must be for this model, but GPT2LMHeadModel has no module"):
        plugin.pre_lora_load(cfg, build("gpt2"))
