"""The plugin's hooks in the order in which axolotl calls them (cli/config.py, loaders/model.py, core/builders/base.py)."""

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import rankscope as rs
from rankscope.errors import SettingsError, TaskError
from rankscope.integrations.axolotl import RankscopeArgs, RankscopePlugin
from rankscope.lora import from_peft_model
from tests.architectures import build
from tests.refusals import refused


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


def test_a_controller_keeps_loras_kernels_off(allocation: rs.RankAllocation, tmp_path: Path) -> None:
    """They multiply by A and B past the modules, where the controller's hooks are; axolotl turns them on where they are unset."""
    kernels = ("lora_qkv_kernel", "lora_o_kernel", "lora_mlp_kernel", "lora_embedding_kernel")
    still, moving = yaml_of(tmp_path), yaml_of(tmp_path, controller=True)
    for cfg in (still, moving):
        RankscopePlugin().register(cfg)
    assert [moving.get(key) for key in kernels] == [False] * 4
    assert [still.get(key) for key in kernels] == [None] * 4
    asked = yaml_of(tmp_path, controller=True)
    asked["lora_mlp_kernel"] = True
    with pytest.raises(
        SettingsError,
        match=r"^`rankscope\.controller` must see the adapters' gradients, but `lora_mlp_kernel` computes them past the modules; ",
    ):
        RankscopePlugin().register(asked)


def test_the_profile_runs_though_kernels_took_the_projections_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As axolotl 0.19's `patch_self_attn_lora` does before the model loads, and mends only after the adapters are there."""
    kernels = ModuleType("axolotl.monkeypatch.lora_kernels")
    kernels.original_apply_qkv_optional_v = lambda self, x: (self.q_proj(x), self.k_proj(x), self.v_proj(x))
    kernels.original_apply_o = lambda self, x: self.o_proj(x)
    package = ModuleType("axolotl.monkeypatch")
    package.lora_kernels = kernels
    monkeypatch.setitem(sys.modules, "axolotl.monkeypatch", package)
    attention = type(build("llama").model.layers[0].self_attn)
    whole = attention.forward

    def cut(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        q, k, v = self.apply_qkv(hidden_states)  # raises an AttributeError where nothing was put back
        assert q.shape[-1] == self.q_proj.out_features
        assert k.shape == v.shape
        assert self.apply_o(q).shape == hidden_states.shape
        return whole(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(attention, "_original_forward", "its source", raising=False)
    monkeypatch.setattr(attention, "forward", cut)
    plugin, _, (_, model) = on_the_spot(tmp_path, monkeypatch, ROWS)
    assert plugin._allocation is not None
    assert not hasattr(model.model.layers[0].self_attn, "apply_qkv")


def on_the_spot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: Any, **more: Any) -> tuple[Any, Cfg, Any]:
    """Plugin, YAML and model after `load_datasets` and `pre_lora_load`; axolotl's own loader gives `rows`."""
    loaders = ModuleType("axolotl.common.datasets")
    loaders.load_datasets = lambda cfg: SimpleNamespace(train_dataset=rows, eval_dataset=None, total_num_steps=1)
    monkeypatch.setitem(sys.modules, "axolotl", ModuleType("axolotl"))
    monkeypatch.setitem(sys.modules, "axolotl.common", ModuleType("axolotl.common"))
    monkeypatch.setitem(sys.modules, "axolotl.common.datasets", loaders)
    section = Cfg({"budget": Cfg(uniform_rank=2), "strategy": "one-shot", "profile": Cfg(n_batches=4)} | more)
    plugin = RankscopePlugin()
    cfg = Cfg(adapter="lora", rankscope=section, micro_batch_size=2, output_dir=str(tmp_path / "out"), seed=3)
    plugin.register(cfg)
    assert not cfg.lora_r
    assert plugin.load_datasets(cfg, preprocess=True) is None
    data = plugin.load_datasets(cfg)
    model = build("llama")
    plugin.pre_lora_load(cfg, model)
    return plugin, cfg, (data, model)


ROWS = [
    {"input_ids": [7 + i % 3, 5, 9, 4][: 3 + i % 2], "labels": [-100, -100, 9, 4][: 3 + i % 2], "length": 3}
    for i in range(12)
]


@pytest.mark.parametrize("rows", [ROWS, iter(ROWS)], ids=["list", "stream"])
def test_it_profiles_on_the_spot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: Any) -> None:
    plugin, cfg, (data, model) = on_the_spot(tmp_path, monkeypatch, rows, controller=True)
    assert data.train_dataset is rows
    config = LoraConfig(
        r=cfg.lora_r, lora_alpha=cfg.lora_alpha, target_modules=cfg.lora_target_modules, target_parameters=[],
        rank_pattern=cfg.lora_rank_pattern, alpha_pattern=cfg.lora_alpha_pattern, bias="none", task_type="CAUSAL_LM",
    )  # fmt: skip
    kept = rs.RankAllocation.from_json(tmp_path / "out" / "rankscope" / "allocation.json")
    assert from_peft_model(get_peft_model(model, config)) == {name: rank for name, rank in kept.ranks.items() if rank}
    targets = rs.find_targets(build("llama"))
    budget = rs.ParameterBudget.uniform(targets, 2)
    found = rs.read_profile(tmp_path / "out" / "rankscope" / "profile.parquet")
    assert found.metadata["batches"] == 4
    if not isinstance(rows, list):  # which are taken in their order
        short, long = ({"input_ids": [0], "labels": [-100], "mask": [0]}, {"input_ids": [], "labels": [], "mask": []})
        full = [
            {key: row.get(key, [1] * len(row["labels"])) + more[key] for key in more}
            for row, more in zip(ROWS, [short, long] * 6, strict=True)
        ]
        pairs = [[full[i], full[i + 1]] for i in range(0, 8, 2)]
        batches = [{key: torch.tensor([row[key] for row in pair]) for key in short} for pair in pairs]
        batches = [{**batch, "attention_mask": batch.pop("mask")} for batch in batches]
        expected = rs.profile(build("llama"), batches, targets=targets, budget=budget)
        assert found.column("gradient_norm") == pytest.approx(expected.column("gradient_norm"), rel=1e-4)
    assert kept == rs.allocate("one-shot", targets=targets, budget=budget, profile=found, seed=3)
    assert plugin._allocation == kept


def test_a_strategy_without_a_profile_loads_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, cfg, (data, _) = on_the_spot(tmp_path, monkeypatch, None, strategy="uniform")
    assert data is None
    assert cfg.lora_r == 2
    assert not (tmp_path / "out" / "rankscope" / "profile.parquet").exists()


def test_rows_that_cannot_be_profiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    must = "`rankscope.budget` must profile on tokenised rows of axolotl's training set, but "
    refused(
        f"{must}they hold messages; allocate first, with `rankscope profile`.",
        lambda: on_the_spot(tmp_path, monkeypatch, [{"messages": []}]),
        TaskError,
    )
    refused(
        f"{must}this way to run axolotl has not loaded them through its plugins; use `axolotl train`.",
        lambda: on_the_spot(tmp_path, monkeypatch, None),
        TaskError,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rl": "dpo"}, "`rankscope.budget` must profile on supervised rows, but `rl` is dpo; allocate with"),
        ({"deepspeed": "z3.json"}, "`rankscope.budget` must profile a whole model, but `deepspeed` shards it; allocate with"),
        ({"lora_r": 8}, "`lora_r` follows from `rankscope.budget`; leave it out."),
        ({"lora_model_dir": "x"}, "`lora_model_dir` already has ranks, and `rankscope.budget` makes others; leave one out."),
        ({"rankscope": {"budget": {"uniform_rank": 1}, "allocation": "x"}}, "give either `allocation` or `budget`."),
        ({"rankscope": {"controller": True}}, "give either `allocation` or `budget`."),
    ],
)  # fmt: skip
def test_what_the_yaml_must_not_say_on_the_spot(change: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(message)):
        RankscopePlugin().register(Cfg({"adapter": "lora", "rankscope": Cfg(budget=Cfg(uniform_rank=1))} | change))


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
