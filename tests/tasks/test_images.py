"""The image classification task: each family end to end, folders and tables, and images that cannot be read."""

import json
import logging
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import transformers
from peft import AutoPeftModel

import rankscope as rs
from rankscope.errors import TaskError
from rankscope.tasks import ImageClassification, evaluate, fingerprint_task, outline_task, profile_task
from rankscope.training import save_adapter
from tests.refusals import refused
from tests.tasks.vision_models import COLOURS, png

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
FAMILIES = {
    "ViT": SMALL | {"intermediate_size": 64},
    "Dinov2": SMALL,
    "Swin": {
        "image_size": 16,
        "patch_size": 4,
        "embed_dim": 16,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 2,
    },
    "ConvNext": {"num_stages": 2, "hidden_sizes": [16, 32], "depths": [1, 1], "image_size": 16},
}


def save_classifier(name: str, folder: Path, n_labels: int = 7) -> Path:
    """A model for other classes than the data's, as those of the hub are."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**FAMILIES[name], num_labels=n_labels)
    getattr(transformers, f"{name}ForImageClassification")(config).save_pretrained(folder)
    side = FAMILIES[name]["image_size"]
    transformers.ViTImageProcessorPil(size={"height": side, "width": side}).save_pretrained(folder)
    return folder


def pictures(n: int = 6) -> pd.DataFrame:
    """`n` images a split, of different sizes; the label is the colour."""
    splits = ("train", "validation", "test")
    rows = [
        {"image": png(colour := list(COLOURS)[i % 3], (9 + i, 12)), "label": colour, "split": splits[i // n]}
        for i in range(3 * n)
    ]
    return pd.DataFrame(rows)


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    return save_classifier("ViT", tmp_path / "vit")


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_from_the_profile_to_plain_peft(name: str, tmp_path: Path) -> None:
    task = ImageClassification(save_classifier(name, tmp_path / "model"), pictures(), batch_size=3)
    assert task.head_modules == ("classifier",)
    model = task.build_model()
    assert model.config.id2label == {0: "blue", 1: "green", 2: "red"}
    targets = rs.find_targets(model)
    taken = profile_task(task, n_batches=2)
    budget = rs.ParameterBudget.uniform(targets, 1)
    trained, result = rs.train(task, rs.allocate("one-shot", targets=targets, budget=budget, profile=taken), steps=1)
    assert set(result.metrics) == {"accuracy", "loss"}
    assert result.metrics["loss"] != evaluate(task, model)["loss"]
    save_adapter(trained, task, tmp_path / "adapter")
    options = json.loads((tmp_path / "adapter" / "model_kwargs.json").read_text())
    options["id2label"] = {int(code): label for code, label in options["id2label"].items()}
    again = AutoPeftModel.from_pretrained(tmp_path / "adapter", **options)
    assert evaluate(task, again) == pytest.approx(dict(result.metrics), rel=1e-5)


def test_the_fresh_head_is_the_same_and_a_fitting_one_too(vit: Path, tmp_path: Path) -> None:
    heads = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        heads.append(ImageClassification(vit, pictures()).build_model().classifier.weight)
    assert torch.equal(*heads)
    config = json.loads((vit / "config.json").read_text())
    (vit / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    refused(
        f"`{vit}` must hold weights of the shapes that its config.json says, but 'vit.layers.0.mlp.fc1.bias' has another; save "
        "the model again.",
        ImageClassification(vit, pictures()).build_model,
    )


def test_metrics_are_those_of_single_images_and_a_model_learns(vit: Path) -> None:
    task = ImageClassification(vit, pictures(12), batch_size=6)
    network = task.build_model()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for step in range(20):
        for batch in task.train_batches(step):
            task.loss(network.train(), batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    metrics = task.evaluate(network, "test")
    assert network.training
    assert metrics["accuracy"] == 1
    with torch.no_grad():
        network.eval()
        losses = [network(**task._inputs(row)).loss.item() for row in task._examples["test"]]
    assert metrics["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


# --- data ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("splits", [False, True])
def test_a_folder_of_folders(vit: Path, tmp_path: Path, splits: bool) -> None:
    rows = pictures()
    for index, row in enumerate(rows.to_dict("records")):
        split = {"validation": "val"}.get(row["split"], row["split"])
        folder = tmp_path / "data" / (split if splits else "") / row["label"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index}.png").write_bytes(row["image"])
    (tmp_path / "data" / "notes.txt").write_text("hello")
    spec = {"type": "image-classification", "model": "vit", "data": "data", "dtype": "bfloat16"}
    task = rs.load_task(spec, base_dir=tmp_path)
    assert task.classes == ["blue", "green", "red"]
    counts = {split: len(each) for split, each in task._examples.items()}
    assert counts == ({"train": 6, "validation": 6, "test": 6} if splits else {"train": 13, "validation": 2, "test": 3})
    assert task.build_model().dtype == torch.bfloat16
    assert set(task.evaluate(task.build_model())) == {"accuracy", "loss"}
    before = fingerprint_task(task)["data"]
    next((tmp_path / "data").rglob("*.png")).write_bytes(png("red", (30, 30)))
    assert fingerprint_task(task)["data"] != before
    (tmp_path / "data" / "stray.png").write_bytes(png("red"))
    stray = rf"^`{tmp_path}/data` must hold a folder of images for each class, but `stray\.png` is in none; move it\.$"
    with pytest.raises(TaskError, match=stray):
        rs.load_task(spec, base_dir=tmp_path)
    (tmp_path / "empty").mkdir()
    refused(
        f"`{tmp_path}/empty` must hold a folder of images for each class, but holds no images; check the path.",
        lambda: ImageClassification(vit, tmp_path / "empty"),
    )


@pytest.mark.parametrize("form", ["bytes", "hub", "paths"])
def test_tables(vit: Path, tmp_path: Path, form: str) -> None:
    rows = pictures().rename(columns={"label": "colour"})
    if form == "hub":
        rows["image"] = [{"bytes": image, "path": None} for image in rows["image"]]
    elif form == "paths":
        (tmp_path / "images").mkdir()
        for index, image in enumerate(rows["image"]):
            (tmp_path / "images" / f"{index}.png").write_bytes(image)
        rows["image"] = [f"{index}.png" for index in range(len(rows))]
    rows.to_parquet(tmp_path / "rows.parquet")
    spec: dict[str, Any] = {"type": "image-classification", "model": "vit", "data": "rows.parquet"}
    spec |= {"columns": {"label": "colour"}, "image_folder": "images" if form == "paths" else "."}
    batch = next(iter(rs.load_task(spec, base_dir=tmp_path).train_batches(0)))
    expected = next(iter(ImageClassification(vit, pictures()).train_batches(0)))
    torch.testing.assert_close(batch, expected)


def test_images_that_cannot_be_read_are_skipped_counted_and_bounded(
    vit: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = pictures(10)
    rows.at[3, "image"] = rows["image"][3][:40]
    task = ImageClassification(vit, rows, batch_size=4, max_skipped=0.1)
    with caplog.at_level(logging.WARNING):
        assert sum(len(batch["labels"]) for batch in task.train_batches(0)) == 9
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("skipped 1 of 10 rows in 'train', as row 4 (its image cannot be read: ")
    with pytest.raises(
        TaskError,
        match=r"^at most 0\.05 of the rows may be skipped \(`max_skipped`\), but 1 of 10 in 'train' already, as row 4 \(.*\); "
        r"repair or drop them\.$",
    ):
        list(ImageClassification(vit, rows).train_batches(0))


def test_mistakes(vit: Path, tmp_path: Path) -> None:
    rows = pictures()
    two = rows.assign(image=[[image, image] for image in rows["image"]])
    refused(
        "each row must hold one image, but row 1 holds 2; correct or drop it.", lambda: ImageClassification(vit, two)
    )
    refused("`label` must hold at least 2 classes, but holds 1; check the column.",
            lambda: ImageClassification(vit, rows.assign(label="a")))  # fmt: skip
    refused("the DataFrame must have a column 'image', but has none; did you mean 'images'?",
            lambda: ImageClassification(vit, rows.rename(columns={"image": "images"})))  # fmt: skip
    config = json.loads((vit / "config.json").read_text())
    torch.manual_seed(0)
    gray = transformers.ViTForImageClassification(transformers.ViTConfig(**{**FAMILIES["ViT"], "num_channels": 1}))
    gray.save_pretrained(vit)
    refused(f"`{vit}` must take images of 3 channels, but takes 1; take another model.",
            ImageClassification(vit, rows).build_model)  # fmt: skip
    assert config["num_channels"] == 3


@pytest.mark.parametrize("name", FAMILIES)
def test_a_dry_run_needs_no_data(name: str, tmp_path: Path) -> None:
    save_classifier(name, tmp_path / "model")
    spec = {"type": "image-classification", "model": "model", "data": "gone", "batch_size": 4}
    outline = outline_task(spec, base_dir=tmp_path)
    assert all(p.is_meta for p in outline.model.parameters())
    assert (outline.batch_size, outline.max_length) == (4, (FAMILIES[name]["image_size"] // 4) ** 2 + 1)
