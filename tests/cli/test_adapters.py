"""`rankscope export` and `rankscope shrink` on a real adapter of the digits task."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import rankscope as rs
from rankscope.lora import apply_allocation, load_adapter, read_adapter
from rankscope.tasks import evaluate
from rankscope.training import save_adapter
from tests.cli.terminal import invoke

STUDY = "task: digits-shift\nbudget: {uniform_rank: 1}\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a study, an allocation and an adapter of uniform rank 2 whose factors are random."""
    folder = tmp_path_factory.mktemp("adapters")
    (folder / "study.yaml").write_text(STUDY)
    task = rs.load_task("digits-shift")
    targets = rs.find_targets(task.build_model())
    uniform = rs.allocate("uniform", targets=targets, budget=rs.ParameterBudget.uniform(targets, 2))
    uniform.to_json(folder / "allocation.json")
    torch.manual_seed(0)
    model = apply_allocation(task.build_model(), uniform, modules_to_save=list(task.head_modules))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.02 * torch.randn_like(parameter)
    save_adapter(model, task, folder / "adapter")
    return folder


def test_shrink_by_a_study(folder: Path) -> None:
    status, text, _ = invoke("shrink", folder / "adapter", "--parameters", 2_000, "--study", folder / "study.yaml")
    assert status == 0, text
    assert "of the energy is kept (by inputs and gradients)" in text
    assert "validation: accuracy " in text
    out = folder / "adapter-shrunk"
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "allocation.json",
        "ranks.png",
        "shrink.json",
        "README.md",
    } == {path.name for path in out.iterdir()}
    report = json.loads((out / "shrink.json").read_text())
    assert 1_800 < report["parameters"]["after"] <= 2_000
    assert f"13,824 -> {report['parameters']['after']:,} parameters" in text
    card = (out / "README.md").read_text()
    assert (
        f"## Ranks\n\n{report['parameters']['after']:,} adapter parameters. Made from the adapter `adapter`.\n" in card
    )
    assert "## Shrunk from 13,824 parameters" in card
    assert ("How to load it" in card, card.count("## Ranks"), "| modules |" in card) == (True, 1, False)
    allocation = rs.RankAllocation.from_json(out / "allocation.json")
    assert report["ranks"] == dict(allocation.ranks)
    assert {name: rank for name, rank in allocation.ranks.items() if rank} == read_adapter(out).ranks
    task = rs.load_task("digits-shift")
    assert evaluate(task, load_adapter(task.build_model(), out)) == report["metrics"]["after"]


def test_shrink_without_data_prints_json(folder: Path) -> None:
    out = folder / "cut"
    status, text, _ = invoke("shrink", folder / "adapter", "--parameters", 99_999, "--out", out, "--json")
    assert status == 0
    found = json.loads(text)
    assert (found["energy_kept"], found["weighed_by"], found["metrics"]) == (1.0, "weights", {})
    assert found["parameters"] == {"before": 13_824, "after": 13_824}


def test_export_to_a_file_and_to_the_terminal(folder: Path) -> None:
    status, text, hint = invoke("export", folder / "allocation.json", "--to", "axolotl")
    assert (status, yaml.safe_load(text)["lora_r"]) == (0, 2)
    assert hint == "put these keys into the axolotl YAML, and leave `lora_target_linear` out\n"
    written = folder / "axolotl.yaml"
    assert invoke("export", folder, "--to", "axolotl", "--out", written)[1] == f"wrote {written}\n"
    assert written.read_text() == text
    status, text, _ = invoke(
        "export", folder / "adapter", "--to", "peft"
    )  # of an adapter: ranks, scaling, saved modules
    assert (status, json.loads(text)["lora_alpha"], json.loads(text)["modules_to_save"]) == (0, 4, ["classifier"])


def test_export_padded(folder: Path) -> None:
    status, text, _ = invoke("export", folder / "adapter", "--padded", "--out", folder / "padded")
    assert status == 0
    assert "the largest rank is 2; every module now has rank 8" in text
    assert "--max-lora-rank 8" in text
    assert "vLLM does not load `modules_to_save`, which this adapter has; merge it for vLLM" in text
    task = rs.load_task("digits-shift")
    before, after = (evaluate(task, load_adapter(task.build_model(), folder / name)) for name in ("adapter", "padded"))
    assert after == pytest.approx(before, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "."], "one of --to TOOL and --padded must be given, and not both; see `rankscope export --help`."),
        (["export", "none", "--to", "peft"], "`none` must hold an allocation, but there is no such file; check the path."),
        (["shrink", "none", "--parameters", "5"],
         "`none` must be an adapter's folder, but there is no such folder; check the path."),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(arguments: list[str], message: str) -> None:
    status, _, errors = invoke(*arguments)
    assert (status, errors) == (2, f"rankscope: {message}\n")


def test_a_study_s_folder_in_place_of_its_adapter(folder: Path, tmp_path: Path) -> None:
    """`allocate` writes an adapter's config there, without weights."""
    (tmp_path / "adapter_config.json").write_text("{}")
    must = f"rankscope: `{tmp_path}` must be an adapter's folder, but holds no weights (adapter_model.safetensors); "
    status, _, errors = invoke("shrink", tmp_path, "--parameters", 8)
    assert (status, errors) == (2, f"{must}train it first, as `rankscope train` does.\n")
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    for command in (["shrink", tmp_path, "--parameters", 8], ["export", tmp_path, "--padded"]):
        status, _, errors = invoke(*command)
        assert (status, errors) == (2, f"{must}did you mean `{tmp_path / 'adapter'}`?\n")


def test_an_adapter_of_another_model(folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from torch import nn

    get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"])).save_pretrained(tmp_path)
    status, _, errors = invoke("shrink", tmp_path, "--parameters", 8, "--study", folder / "study.yaml")
    assert (status, errors.count("\n")) == (2, 1)
    assert "must hold an adapter of this model, but cannot be loaded" in errors
