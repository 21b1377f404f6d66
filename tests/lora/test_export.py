"""Each export gives exactly the allocation's ranks in its consumer: PEFT itself, or the consumer's documented rules."""

import json
import re
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from torch import nn

import rankscope as rs
from rankscope.errors import SettingsError
from rankscope.lora import from_peft_model
from tests.architectures import build


def allocation(name: str = "llama") -> rs.RankAllocation:
    """Ranks 0, 1, 2, 3 and 8 in turn."""
    targets = rs.find_targets(build(name))
    return rs.RankAllocation(targets, tuple(min((1, 0, 3, 8, 2)[i % 5], t.full_rank) for i, t in enumerate(targets)))


def built(config: LoraConfig, model: nn.Module) -> tuple[dict[str, int], set[float]]:
    """Ranks and scalings that PEFT gives."""
    wrapped = get_peft_model(model, config)
    layers = [module for module in wrapped.modules() if hasattr(module, "lora_A")]
    return from_peft_model(wrapped), {layer.scaling["default"] for layer in layers}


def expected(given: rs.RankAllocation) -> dict[str, int]:
    return {name: rank for name, rank in given.ranks.items() if rank}


def test_peft_reads_its_own_config(tmp_path: Path) -> None:
    given = allocation()
    (tmp_path / "adapter_config.json").write_text(rs.export(given, "peft", scaling=1.5))
    config = LoraConfig.from_pretrained(str(tmp_path))
    assert built(config, build("llama")) == (expected(given), {1.5})


def test_axolotl_builds_the_ranks() -> None:
    """By the fields of its schema and its call of LoraConfig (src/axolotl/utils/schemas/peft.py, loaders/adapter.py, v0.19)."""
    given = allocation()
    cfg = yaml.safe_load(rs.export(given, "axolotl", modules_to_save=["lm_head"]))
    assert (cfg["adapter"], type(cfg["lora_r"]), type(cfg["lora_alpha"])) == ("lora", int, int)
    assert isinstance(cfg["lora_target_modules"], str)
    for pattern in ("lora_rank_pattern", "lora_alpha_pattern"):
        assert all(type(key) is str and type(value) is int and value > 0 for key, value in cfg[pattern].items())
    config = LoraConfig(
        r=cfg["lora_r"], lora_alpha=cfg["lora_alpha"], target_modules=cfg["lora_target_modules"], target_parameters=[],
        lora_dropout=cfg["lora_dropout"], modules_to_save=cfg["lora_modules_to_save"], exclude_modules=None, bias="none",
        task_type="CAUSAL_LM", rank_pattern=cfg["lora_rank_pattern"], alpha_pattern=cfg["lora_alpha_pattern"],
    )  # fmt: skip
    assert built(config, build("llama")) == (expected(given), {2.0})
    with pytest.raises(SettingsError, match="must give whole numbers as alpha .* for axolotl, but gives 0.5"):
        rs.export(given, "axolotl", scaling=0.5)


@pytest.mark.parametrize("underscored", [False, True])
def test_kohya_finds_each_rank(underscored: bool) -> None:
    """By the rules of networks/lora_anima.py (fullmatch of the name) and lora_flux.py (search in the name with underscores)."""
    given = allocation()
    values = tomllib.loads(rs.export(given, "kohya"))
    (argument,) = values["network_args"]
    key, _, pairs = argument.partition("=")
    assert (key, values["network_alpha"]) == ("network_reg_dims", 0)  # 0: alpha is the rank
    dims = {pair.split("=", 1)[0].strip(): int(pair.split("=", 1)[1]) for pair in pairs.split(",")}

    def rank(name: str) -> int:
        text = f"lora_unet.{name}".replace(".", "_") if underscored else name
        match = re.search if underscored else re.fullmatch
        return next((dim for regex, dim in dims.items() if match(regex, text)), values["network_dim"])

    assert {target.name: rank(target.name) for target in given.targets} == dict(given.ranks)
    assert rank("somewhere.else") == rank("model.layers.10.self_attn.q_proj") == 0
    with pytest.raises(SettingsError, match="`scaling` must be 1 for kohya, .* but got 2; leave it out"):
        rs.export(given, "kohya", scaling=2.0)
    with pytest.raises(SettingsError, match="kohya trains adapters only, so that `head` cannot be saved"):
        rs.export(given, "kohya", modules_to_save=["head"])


def test_unsloth_passes_all_on_to_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its `get_peft_model` gives LoraConfig the arguments that it does not know (unsloth/models/llama.py)."""
    given, seen = allocation(), {}

    def get(
        model: nn.Module, r: int, target_modules: list[str], lora_alpha: int, lora_dropout: float, **kwargs
    ) -> LoraConfig:
        assert type(r) is int
        seen["config"] = LoraConfig(
            r=r, target_modules=list(target_modules), lora_alpha=lora_alpha, lora_dropout=lora_dropout, **kwargs
        )
        return model

    fake = SimpleNamespace(FastLanguageModel=SimpleNamespace(get_peft_model=get))
    monkeypatch.setitem(sys.modules, "unsloth", fake)
    exec(rs.export(given, "unsloth"), {"model": None})
    assert built(seen["config"], build("llama")) == (expected(given), {2.0})
    with pytest.raises(SettingsError, match="unsloth trains only embed_tokens and lm_head in full, but got `score`"):
        rs.export(given, "unsloth", modules_to_save=["score"])


def test_trl_takes_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """The snippet as it is, up to TRL's trainer, which wraps the model by `get_peft_model(model, peft_config)`."""
    trl = pytest.importorskip("trl")
    given, seen = allocation(), {}
    monkeypatch.setattr(trl, "SFTTrainer", lambda model, **kwargs: seen.update(kwargs), raising=False)
    exec(rs.export(given, "trl"), {"model": None, "args": None, "train_dataset": None})
    assert seen["peft_config"].task_type == "CAUSAL_LM"  # what SFTTrainer trains
    assert built(seen["peft_config"], build("llama")) == (expected(given), {2.0})


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("llama-factory", "LLaMA-Factory has one `lora_rank` for all modules and cannot train ranks by module; "
         "train with one of these, then `rankscope export ADAPTER --padded` gives its modules one rank."),
        ("ms-swift", "ms-swift has one `lora_rank` for all modules"),
        ("axolot", "`to` must name a tool that rankscope exports to, but got 'axolot'; did you mean 'axolotl'?"),
    ],
)  # fmt: skip
def test_what_cannot_be_exported(to: str, message: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(message)):
        rs.export(allocation(), to)


@pytest.mark.parametrize("to", ["peft", "axolotl", "kohya", "unsloth", "trl"])
def test_ranks_of_zero_only(to: str) -> None:
    targets = allocation().targets
    with pytest.raises(SettingsError, match="`allocation` must give at least one module a rank above 0"):
        rs.export(rs.RankAllocation(targets, (0,) * len(targets)), to)


def test_the_json_is_what_save_lora_config_writes(tmp_path: Path) -> None:
    from rankscope.lora import save_lora_config

    path = save_lora_config(allocation().to_lora_config(lora_dropout=0.0, modules_to_save=None), tmp_path / "c.json")
    assert json.loads(path.read_text()) == json.loads(rs.export(allocation(), "peft"))
