"""The estimate of memory, beside what autograd keeps and what parameters and optimizer hold; and `train --dry-run`."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import rankscope as rs
from rankscope.cli import app
from rankscope.lora import apply_allocation
from rankscope.tasks import ImageTextToText, outline_task
from rankscope.training import describe_towers, estimate_memory
from tests.tasks.models import save_llama
from tests.tasks.vision_models import questions, save_family


def kept_bytes(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> int:
    """What a forward pass keeps for the backward one, parameters apart."""
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("name", ["llava", "mobile-vlm", "idefics3"])
@pytest.mark.parametrize(("tower", "block"), [(None, None), ("language", None), ("language", 1)])
def test_activations_are_about_what_autograd_keeps(tmp_path: Path, name: str, tower: str, block: int) -> None:
    rows = questions().assign(question="which colour has this? " * 6)
    task = ImageTextToText(save_family(name, tmp_path), rows, batch_size=4)
    model, batch = task.build_model(), next(iter(task.train_batches(0)))
    targets = [t for t in rs.find_targets(model) if tower in (None, t.tower) and block in (None, t.block)]
    allocation = rs.allocate("uniform", targets=targets, budget=rs.ParameterBudget.uniform(targets, 2))
    length = batch["input_ids"].shape[1]
    found = estimate_memory(model, allocation, batch_size=4, max_length=length)
    measured = kept_bytes(apply_allocation(model, allocation, scaling=2.0).train(), batch)
    assert 0.6 < (found["activations"] + found["logits"]) / measured < 1.6


def test_weights_adapters_gradients_and_moments(tmp_path: Path) -> None:
    task = ImageTextToText(save_family("llava", tmp_path), questions(), batch_size=2)
    targets = rs.find_targets(task.build_model())
    allocation = rs.allocate("uniform", targets=targets, budget=rs.ParameterBudget.uniform(targets, 2))
    found = estimate_memory(task.build_model(), allocation, batch_size=2, max_length=50)
    model = apply_allocation(task.build_model(), allocation, scaling=2.0)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    task.loss(model, next(iter(task.train_batches(0)))).backward()
    optimizer.step()
    moments = [v for state in optimizer.state.values() for v in state.values() if v.ndim]
    adapters = sum(p.nbytes for p in trained)
    # The last layer of the vision tower gives LLaVA nothing, so its adapters have neither gradients nor moments.
    idle = sum(p.nbytes for p in trained if p.grad is None)
    assert found["adapters"] == adapters
    assert found["gradients"] == sum(p.grad.nbytes for p in trained if p.grad is not None) + idle
    assert found["optimizer"] == sum(moment.nbytes for moment in moments) + 2 * idle
    assert found["weights"] == sum(p.nbytes for p in model.parameters()) - adapters


def test_an_outline_has_the_models_targets_and_no_weights(tmp_path: Path) -> None:
    for name in ("llava", "qwen2.5-vl"):
        save_family(name, tmp_path / name)
        outline = outline_task({"type": "image-text-to-text", "model": name, "data": "gone.json"}, base_dir=tmp_path)
        assert all(p.is_meta for p in outline.model.parameters())
        assert (outline.batch_size, outline.max_length) == (8, 2048)
        model = ImageTextToText(tmp_path / name, questions()).build_model()
        targets = rs.find_targets(model)
        assert rs.find_targets(outline.model) == targets
        allocation = rs.allocate("uniform", targets=targets, budget=rs.ParameterBudget.uniform(targets, 1))
        towers = describe_towers(outline.model, allocation)
        assert [row["tower"] for row in towers] == ["vision", "projector", "language"]
        assert sum(row["weights"] for row in towers) == sum(p.numel() for p in model.parameters())
        assert sum(row["parameters"] for row in towers) == allocation.parameters


STUDY = """
task: {type: image-text-to-text, model: model, data: gone.json, image_folder: gone, batch_size: 16, max_length: 100}
targets: .*language_model.*
budget: {uniform_rank: 4}
training: {steps: 50, gradient_accumulation: 2, learning_rate: [1e-4, 5e-4]}
"""


def dry_run(study: Path, *arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["train", str(study), "--dry-run", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_a_dry_run_needs_a_configuration_only(tmp_path: Path) -> None:
    save_family("llava", tmp_path / "whole")
    (tmp_path / "model").mkdir()
    shutil.copy(tmp_path / "whole" / "config.json", tmp_path / "model")
    study = tmp_path / "full.yaml"
    study.write_text(STUDY)
    status, text, _ = dry_run(study)
    assert status == 0
    assert "full: LlavaForConditionalGeneration, weights in float32; budget 4,096 parameters, here uniform" in text
    assert "50 steps of 2 x 16 rows = 1,600 rows of at most 100 tokens; learning rate 0.0001, 0.0005" in text
    status, text, _ = dry_run(study, "--json")
    found = json.loads(text)
    assert {row["tower"]: row["parameters"] for row in found["towers"]} == {
        "vision": 0,
        "projector": 0,
        "language": 4096,
    }
    assert found["memory"]["optimizer"] == 8 * 4096
    assert found["memory"]["total"] == sum(size for what, size in found["memory"].items() if what != "total")
    assert not (tmp_path / "out").exists()

    study.write_text(STUDY.replace("model: model", "model: gone"))
    assert dry_run(study)[0] == 2
    study.write_text("task: digits-shift\nbudget: {uniform_rank: 1}")
    status, _, error = dry_run(study)
    assert (status, error) == (
        2,
        "rankscope: a dry run must have a generic task (`task.type` among sequence-classification, causal-lm, chat, sequence-to-sequence, token-classification, image-classification, image-text-to-text), "
        "whose model is known by its configuration, but got 'digits-shift'; leave out --dry-run.\n",
    )


def test_a_dry_run_of_texts_and_of_the_wrong_kind(tmp_path: Path) -> None:
    save_llama(tmp_path / "llama")
    study = tmp_path / "texts.yaml"
    text = "task: {type: KIND, model: llama, data: gone.csv}\nbudget: {uniform_rank: 1}"
    for kind in ("causal-lm", "sequence-classification"):
        study.write_text(text.replace("KIND", kind))
        status, printed, _ = dry_run(study, "--json")
        assert status == 0
        assert [row["tower"] for row in json.loads(printed)["towers"]] == ["model"]
    study.write_text(text.replace("KIND", "image-text-to-text"))
    status, _, error = dry_run(study)
    assert status == 2
    assert error.startswith(
        f"rankscope: `{tmp_path}/llama` must be the configuration of a model that AutoModelForImageText"
    )
    assert error.count("\n") == 1
