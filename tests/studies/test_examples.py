"""The full MobileVLM recipe: its configuration and studies at full size in a dry run, and both stages on a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from rankscope.cli import app
from rankscope.tasks.mobile_vlm import MobileLlava
from studies.examples import mobile_vlm_full as recipe
from tests.tasks.vision_models import SMALL, TEXT, png, tokenizer

EXAMPLES = Path("studies/examples")
SCRIPT = EXAMPLES / "mobile_vlm_full.py"


def test_the_configuration_is_what_the_script_writes(tmp_path: Path) -> None:
    recipe.write_config(tmp_path)
    kept, written = (json.loads((folder / "config.json").read_text()) for folder in (EXAMPLES / "mobile_vlm", tmp_path))
    assert {**kept, "transformers_version": ""} == {**written, "transformers_version": ""}


@pytest.mark.parametrize(("name", "rows", "batch"), [("full", 663_298, 128), ("stage1", 556_128, 256)])
def test_each_stage_passes_a_dry_run(name: str, rows: int, batch: int) -> None:
    result = CliRunner().invoke(app, ["train", str(EXAMPLES / f"mobile_vlm_{name}.yaml"), "--dry-run", "--json"])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["batch_size"] * found["gradient_accumulation"] == batch
    assert found["rows"] - batch < rows <= found["rows"]  # one epoch
    weights = {row["tower"]: row["weights"] for row in found["towers"]}
    assert weights["vision"] == 303_507_456  # CLIP ViT-L/14-336, as published
    assert weights["language"] == 1_364_297_728 + 64 * 2 * 2048  # MobileLLaMA-1.4B, and 64 more words
    modules = {row["tower"]: row["modules"] for row in found["towers"]}
    assert modules == (
        {"vision": 138, "projector": 2, "language": 168}
        if name == "full"
        else {"vision": 0, "projector": 2, "language": 0}
    )
    assert found["memory"]["total"] < 64e9  # fits a GPU of 80 GB


STAGE = """
task: {type: image-text-to-text, model: start, data: rows.parquet, image_folder: images, columns: {messages: conversations},
       text_only: true, batch_size: 2, max_length: 200}
targets: TARGETS
budget: {uniform_rank: 1}
training: {steps: STEPS, gradient_accumulation: 2, learning_rate: 1.0e-2}
"""


@pytest.mark.slow
def test_both_stages_on_two_processes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(**SMALL, image_size=8, patch_size=4)).save_pretrained(tmp_path / "clip")
    CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}).save_pretrained(
        tmp_path / "clip"
    )
    LlamaForCausalLM(LlamaConfig(**TEXT)).save_pretrained(tmp_path / "llama")
    tokenizer().save_pretrained(tmp_path / "llama")
    recipe.assemble(str(tmp_path / "clip"), str(tmp_path / "llama"), tmp_path / "start")

    (tmp_path / "images").mkdir()
    rows = []
    for index in range(24):
        colour = ("red", "green", "blue")[index % 3]
        (tmp_path / "images" / f"{index}.png").write_bytes(png(colour, (9 + index, 12)))
        turns = [{"from": "human", "value": "<image>\nwhich colour?"}, {"from": "gpt", "value": colour}]
        rows.append({"id": str(index), "image": f"{index}.png", "conversations": turns})
    rows.append({"id": "24", "conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    recipe.prepare(tmp_path / "rows.json", tmp_path / "rows.parquet", 3)
    assert pd.read_parquet(tmp_path / "rows.parquet")["split"].value_counts().to_dict() == {
        "train": 19,
        "validation": 3,
        "test": 3,
    }

    projector, everywhere = (
        r".*multi_modal_projector\..*",
        r".*(language_model|multi_modal_projector|vision_tower.*layers\.0\.).*",
    )
    (tmp_path / "one.yaml").write_text(STAGE.replace("TARGETS", projector).replace("STEPS", "3"))
    (tmp_path / "two.yaml").write_text(
        STAGE.replace("TARGETS", everywhere).replace("STEPS", "12") + 'controller: {mode: "on", every: 2}'
    )
    for stage, model, folder in (("one", "start", "first"), ("two", "first", "second")):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "--standalone",
            SCRIPT.resolve(),
            "train",
        ]
        command += [tmp_path / f"{stage}.yaml", tmp_path / folder, "--model", tmp_path / model]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]

    before, after = _weights(tmp_path / "start"), _weights(tmp_path / "first")
    moved = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert moved == {name for name in before if "multi_modal_projector" in name}
    adapted = PeftModel.from_pretrained(MobileLlava.from_pretrained(tmp_path / "first"), tmp_path / "second")
    assert any("vision_tower" in name and "lora_B" in name for name, _ in adapted.named_parameters())


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")
