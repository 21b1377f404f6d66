"""Gradient energy by image and text tokens, against autograd through two copies of each weight, one for each kind of token."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration
from typer.testing import CliRunner

import rankscope as rs
from rankscope.cli import app
from rankscope.errors import ModelError
from rankscope.plotting import plot_modalities
from rankscope.profiling import group_energy
from rankscope.targets import base_modules
from tests.architectures import build

IMAGE = 40  # the image token; 16 of them an image


def llava(**text: int) -> nn.Module:
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlavaConfig(
        text_config={"model_type": "llama", "vocab_size": 60, "num_key_value_heads": 2, **small, **text},
        vision_config={"model_type": "clip_vision_model", "image_size": 16, "patch_size": 4, **small},
        image_token_index=IMAGE,
    )
    return LlavaForConditionalGeneration(config).eval()


def batches(n: int = 4, size: int = 3) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(1)
    found = []
    for _ in range(n):
        words = torch.randint(1, IMAGE, (size, 9), generator=g)
        ids = torch.cat([words[:, :3], torch.full((size, 16), IMAGE), words[:, 3:]], dim=1)
        labels = ids.masked_fill(ids == IMAGE, -100)
        pixels = torch.randn(size, 3, 16, 16, generator=g)
        found.append(
            {"input_ids": ids, "labels": labels, "pixel_values": pixels, "attention_mask": ids.new_ones(ids.shape)}
        )
    return found


class Two(nn.Module):
    """A linear module with one copy of its weight for image tokens, and one for others."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.image, self.text = (nn.Parameter(linear.weight.detach().clone()) for _ in range(2))
        self.bias, self.chosen = linear.bias, torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        one, other = x @ self.image.T, x @ self.text.T
        found = torch.where(self.chosen[..., None], one, other)
        return found if self.bias is None else found + self.bias


def exact_parts(seen: list[dict[str, Tensor]], masks: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The mean gradient over examples that image tokens make, and that others make, of each module of the language model."""
    model = llava().requires_grad_(False)
    names = [t.name for t in rs.find_targets(model) if t.tower == "language"]
    twos = {}
    for name in names:
        owner, _, last = name.rpartition(".")
        twos[name] = Two(model.get_submodule(name))
        setattr(model.get_submodule(owner), last, twos[name])
    total = sum(len(mask) for mask in masks)
    for batch, mask in zip(seen, masks, strict=True):
        for two in twos.values():
            two.chosen = mask
        (model(**batch).loss * len(mask) / total).backward()
    return {name: (two.image.grad, two.text.grad) for name, two in twos.items()}


def test_the_parts_are_autograds() -> None:
    seen = batches()
    found = rs.profile(llava(), seen).table.set_index("module")
    expected = exact_parts(seen, [batch["input_ids"] == IMAGE for batch in seen])
    assert len(expected) == 14
    for name, (image, text) in expected.items():
        assert found.loc[name, "image_energy"] == pytest.approx(float(image.square().sum()), rel=1e-4, abs=1e-12)
        assert found.loc[name, "text_energy"] == pytest.approx(float(text.square().sum()), rel=1e-4)
        whole = found.loc[name, "gradient_norm"] ** 2
        cross = whole - found.loc[name, "image_energy"] - found.loc[name, "text_energy"]
        assert cross == pytest.approx(2 * float((image * text).sum()), rel=1e-3, abs=1e-5 * whole)
    others = found[found["tower"] != "language"]
    assert {"vision", "projector"} == set(others["tower"])
    assert others[["image_energy", "text_energy"]].isna().all(axis=None)


def test_sketches_estimate_them() -> None:
    """With sketches instead of whole gradients: the estimates' mean over seeds is right, and each is near."""
    model, seen = llava(hidden_size=128, intermediate_size=256), batches()
    exact = rs.profile(model, seen).table.query("tower == 'language'")
    assert exact["exact"].all()
    ratios = []
    for seed in range(6):
        found = rs.profile(model, seen, sketch_size=8, seed=seed).table.query("tower == 'language'")
        assert not found["exact"].any()
        ratios.append(
            found[["image_energy", "text_energy"]].to_numpy() / exact[["image_energy", "text_energy"]].to_numpy()
        )
    logs = np.log(np.array(ratios)[:, exact["image_energy"].to_numpy() > 0])
    assert abs(float(np.median(logs))) < 0.1
    assert np.median(np.abs(logs)) < 0.35  # 32 buckets


@pytest.mark.parametrize("key", ["image_mask", "mm_token_type_ids"])
def test_a_batch_may_tell_itself(key: str) -> None:
    """Here only the second half of an image counts as image; the batch's own word goes before the configuration's."""
    seen = batches()
    masks = [(batch["input_ids"] == IMAGE) & (torch.arange(25) >= 11) for batch in seen]
    own = [{**batch, key: mask.long()} for batch, mask in zip(seen, masks, strict=True)]

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(**{name: each for name, each in batch.items() if name != key}).loss

    found = rs.profile(llava(), own, loss_fn=loss).table.set_index("module")
    for name, (image, text) in exact_parts(seen, masks).items():
        assert found.loc[name, "image_energy"] == pytest.approx(float(image.square().sum()), rel=1e-4, abs=1e-12)
        assert found.loc[name, "text_energy"] == pytest.approx(float(text.square().sum()), rel=1e-4)


def test_without_image_tokens_there_are_no_columns(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, IMAGE, (2, 8), generator=g) for _ in range(3)]
    texts = [{"input_ids": each, "labels": each} for each in ids]
    for model in (llava(), build("llama")):
        found = rs.profile(model, texts)
        assert not found.tells_modalities
        assert "image" not in group_energy(found)
        assert "image_tokens" not in found.metadata
        assert not rs.read_profile(found.to_parquet(tmp_path / "p.parquet")).tells_modalities
        with pytest.raises(
            ModelError, match=r"^the profile must tell image tokens from others, but its batches had none; "
        ):
            plot_modalities(found)


def some_texts() -> list[dict[str, Tensor]]:
    """Two batches with images, and two without."""
    seen = batches()
    for place in (2, 3):
        words = seen[place]["input_ids"].masked_fill(seen[place]["input_ids"] == IMAGE, 7)
        seen[place] = {"input_ids": words, "labels": words, "attention_mask": torch.ones_like(words)}
    return seen


def test_texts_among_images_count_as_text() -> None:
    seen = some_texts()
    found = rs.profile(llava(), seen).table.set_index("module")
    masks = [batch["input_ids"] == IMAGE for batch in seen]
    for name, (image, text) in exact_parts(seen, masks).items():
        assert found.loc[name, "image_energy"] == pytest.approx(float(image.square().sum()), rel=1e-4, abs=1e-12)
        assert found.loc[name, "text_energy"] == pytest.approx(float(text.square().sum()), rel=1e-4)


@pytest.fixture
def profile() -> rs.Profile:
    return rs.profile(llava(), batches())


def test_a_file_keeps_them_and_a_plot_shows_them(profile: rs.Profile, tmp_path: Path) -> None:
    again = rs.read_profile(profile.to_parquet(tmp_path / "profile.parquet"))
    assert again.table.columns.equals(profile.table.columns)
    assert again.table[["image_energy", "text_energy"]].equals(profile.table[["image_energy", "text_energy"]])
    assert again.metadata["image_tokens"] == 4 * 3 * 16
    groups = group_energy(profile).set_index(["tower", "role"])["image"]
    assert groups["vision"].isna().all()
    language = profile.table.query("tower == 'language' and role == 'q_proj'")
    image, text = language["image_energy"].sum(), language["text_energy"].sum()
    assert groups["language", "q_proj"] == pytest.approx(image / (image + text))
    axis, *_ = plot_modalities(profile, figure=Figure())
    first = language.iloc[0]
    share = first["image_energy"] / (first["image_energy"] + first["text_energy"])
    assert axis.texts[0].get_text() == f"{share:.0%}"


def test_checkpointing_and_peft_see_the_same(profile: rs.Profile) -> None:
    from peft import LoraConfig, get_peft_model

    checkpointed, adapted = llava(), get_peft_model(llava(), LoraConfig(r=1, target_modules=["q_proj", "down_proj"]))
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpointed.train()
    columns = ["image_energy", "text_energy"]
    for model in (checkpointed, adapted):
        found = rs.profile(model, batches(), targets=profile.targets)
        assert np.allclose(found.table[columns], profile.table[columns], rtol=1e-4, equal_nan=True)
        assert dict(base_modules(model)).keys() >= set(found.table["module"])


TASK = """
from tests.profiling.test_modalities import batches, llava


class Task:
    name, metric = "seen", "score"

    def build_model(self):
        return llava()

    def train_batches(self, seed):
        yield from batches()

    def loss(self, model, batch):
        return model(**batch).loss

    def evaluate(self, model, split):
        return {"score": 0.0, "loss": 0.0}
"""


def test_the_command_tells_and_draws_them(tmp_path: Path) -> None:
    study, out = tmp_path / "seen.yaml", tmp_path / "out"
    (tmp_path / "task.py").write_text(TASK)
    study.write_text("task: task.py:Task\nbudget: {uniform_rank: 1}\n")
    result = CliRunner().invoke(app, ["profile", str(study), "--out", str(out), "--allow-code"])
    assert result.exit_code == 0, result.output
    assert re.search(r"^image tokens, 64% of all, have \d+% of the gradient energy of the modules that see both, each part's",
                     result.stdout, flags=re.MULTILINE)  # fmt: skip
    assert re.search(r"│ language.*│ +\d+% │$", result.stdout, flags=re.MULTILINE)
    assert re.search(r"│ vision.*│ +- │$", result.stdout, flags=re.MULTILINE)
    assert (out / "modalities.png").stat().st_size > 5_000
    result = CliRunner().invoke(app, ["profile", str(study), "--out", str(out), "--allow-code", "--json"])
    groups = json.loads(result.stdout)["groups"]
    assert {group["tower"] for group in groups if group["image"] is None} == {"vision", "projector"}

    (tmp_path / "task.py").write_text(TASK.replace("from batches()", "from ({**b, 'image_mask': b['input_ids'] < 0} for b in batches())")
                                      .replace("(**batch)", "(**{k: v for k, v in batch.items() if k != 'image_mask'})"))  # fmt: skip
    assert CliRunner().invoke(app, ["profile", str(study), "--out", str(out), "--allow-code"]).exit_code == 0
    assert not (out / "modalities.png").exists()
