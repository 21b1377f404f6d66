"""Scenes: their data, the packing of questions, cached against live features, and the tiny model's training and reload."""

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoTokenizer, Dinov2Config, LlamaConfig, LlavaConfig

import rankscope as rs
from rankscope.errors import TaskError
from rankscope.tasks.mobile_vlm import LightProjector, MobileLlava, packed_mask
from rankscope.tasks.scenes import (
    IMAGE_TOKEN,
    N_IMAGE_TOKENS,
    EmojiScenes,
    draw_scenes,
    normalised,
    packed,
    read_scenes,
)
from tests.tasks.models import save_tokenizer

TOWERS = (["language"], ["projector", "language"], ["vision", "projector", "language"])
KINDS = {"emoji": {"where", "count", "exist", "beside"}, "digits": {"where", "sum", "largest", "compare"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model of the same kind, whose tokenizer has a token for every word of the questions."""
    tables = [read_scenes(name) for name in KINDS]
    asked = [each for table in tables for row in table["questions"] for each in row]
    words = {
        word for each in asked for text in (each["question"], each["answer"]) for word in re.findall(r"\w+|\?", text)
    }
    vocabulary = ["[PAD]", "[UNK]", "[BOS]", "<image>", "Answer", ":", *sorted(words)]
    folder = tmp_path_factory.mktemp("scenes") / "model"
    save_tokenizer(folder, vocabulary)
    vision = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=112)
    language = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=len(vocabulary), tie_word_embeddings=True, bos_token_id=2, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    sizes = {"image_token_index": IMAGE_TOKEN, "image_seq_length": N_IMAGE_TOKENS, "vision_feature_layer": -1}
    model = MobileLlava(LlavaConfig(vision_config=vision, text_config=language, **sizes))
    for parameter in model.parameters():  # layer scales and embeddings start so small that nothing would be seen
        nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def scenes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`emoji-scenes` and `digit-scenes` on the tiny model in float32, with six scenes a split."""
    few = {name: read_scenes(name).groupby("split").head(6).reset_index(drop=True) for name in KINDS}
    monkeypatch.setattr("rankscope.tasks.scenes.read_scenes", few.get)
    monkeypatch.setenv("RANKSCOPE_CACHE", str(tmp_path / "cache"))
    options = {"model": str(folder), "dtype": "float32", "batch_size": 3}
    return lambda name="emoji-scenes", **more: rs.load_task({"name": name, **options, **more})


@pytest.mark.parametrize("name", KINDS)
def test_scenes_are_disjoint_and_every_answer_is_true(name: str) -> None:
    from sklearn.datasets import load_digits

    table, targets = read_scenes(name), load_digits().target
    assert table["split"].value_counts().to_dict() == {"train": 1600, "validation": 160, "test": 320, "shift": 320}
    assert not table["things"].map(tuple).duplicated().any()
    assert table.groupby("style")["split"].unique().map(list).map(len).tolist() == [3, 1] if name == "emoji" else [1, 3]
    if name == "digits":
        used = {split: set(itertools.chain(*rows["things"])) for split, rows in table.groupby("split")}
        assert not used["train"] & used["validation"]
        assert not (used["train"] | used["validation"]) & (used["test"] | used["shift"])
    glyphs = pd.read_parquet("data/scenes/glyphs.parquet").drop_duplicates("name").set_index("name")["category"]
    for scene in table.to_dict("records"):
        things = scene["things"].tolist()
        assert max(scene["sizes"].astype(int) + np.maximum(scene["lefts"], scene["tops"])) <= 56
        assert sorted(each["kind"] for each in scene["questions"]) == sorted([*KINDS[name]] * 2)
        values = things if name == "emoji" else targets[things].tolist()
        for each in scene["questions"]:
            assert each["answer"] == answer(each["question"].rstrip("?"), values, glyphs), each


NUMBERS = (  # noqa: SIM905
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen"
).split()
PLACES = {"top left": 0, "top right": 1, "bottom left": 2, "bottom right": 3}


def answer(question: str, values: list[Any], category: pd.Series) -> str:
    """The answer, read off the question's words."""
    grid = np.array(values, dtype=object).reshape(2, 2)
    part = {"top": grid[0], "bottom": grid[1], "left": grid[:, 0], "right": grid[:, 1], "overall": grid.flatten()}
    words = question.split()
    if match := re.fullmatch("What (digit )?is (top|bottom) (left|right)", question):
        value = values[PLACES[f"{match[2]} {match[3]}"]]
        return NUMBERS[value] if match[1] else value
    if match := re.fullmatch("How many (.*)", question):
        return NUMBERS[sum(category[value] == match[1] for value in values)]
    if question.startswith("Is there"):
        return "yes" if words[-1] in values else "no"
    if question.startswith("What is beside"):
        (row,) = [list(row) for row in grid if words[-1] in row]
        return next(value for value in row if value != words[-1])
    if question.startswith("Sum"):
        return NUMBERS[sum(part[words[3]])]
    if question.startswith("Largest"):
        return NUMBERS[max(part[words[-1]])]
    first, second = re.fullmatch("Is (.*) larger than (.*)", question).groups()
    return "yes" if values[PLACES[first]] > values[PLACES[second]] else "no"


def test_answers_are_single_tokens_and_pictures_show_the_things() -> None:
    table = read_scenes("emoji").head(2)
    images = draw_scenes(table)
    assert images.shape == (2, 3, 112, 112)
    assert images.dtype == torch.uint8
    for scene, image in zip(table.to_dict("records"), images, strict=True):
        paint = (image != torch.tensor(scene["background"])[:, None, None]).any(0)
        for place in range(4):
            size, left, top = (int(scene[name][place]) for name in ("sizes", "lefts", "tops"))
            cell = paint[56 * (place // 2) :, 56 * (place % 2) :][:56, :56].clone()
            assert cell[top : top + size, left : left + size].float().mean() > 0.2
            cell[top : top + size, left : left + size] = False
            assert not cell.any()


def test_packed_questions_do_not_see_each_other(folder: Path) -> None:
    """A packed sequence gives every answer the logits that plain LLaVA gives the question alone."""
    model = MobileLlava.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    questions = read_scenes("emoji")["questions"][0]
    row = packed(questions, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
    batch = {name: torch.tensor([row[name]]) for name in row if name != "kinds"}
    pixels = torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        together = model(**batch, pixel_values=pixels).logits
        for each, logits in zip(questions, together, strict=True):
            ids = tokenizer(f"{each['question']} Answer:", add_special_tokens=False)["input_ids"]
            alone = torch.tensor([[IMAGE_TOKEN] * N_IMAGE_TOKENS + ids])
            torch.testing.assert_close(logits, model(input_ids=alone, pixel_values=pixels).logits[0, -1])
    assert packed_mask(torch.tensor([[0, 1, 1, 2]]))[0, 0].tolist() == [
        [True, False, False, False], [True, True, False, False], [True, True, True, False], [True, False, False, True],
    ]  # fmt: skip


def test_cached_and_live_features_agree(scenes: Any) -> None:
    """The outputs of frozen parts are those that the parts would give, before the vision tower's last norm."""
    losses, metrics = [], []
    for towers in TOWERS:
        task = scenes(towers=towers)
        model = task.build_model()
        (first, *_) = task.train_batches(0)
        losses.append(task.loss(model, first))
        metrics.append(task.evaluate(model))
        assert (model.model.vision_tower is None) == ("vision" not in towers)
        assert (model.model.multi_modal_projector is None) == ("projector" not in towers)
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[1], losses[2])
    assert metrics[0] == pytest.approx(metrics[2], rel=1e-4)
    live = task.build_model().eval()
    pixels = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        theirs = torch.stack(live.get_image_features(pixels).pooler_output)
        torch.testing.assert_close(live.model.multi_modal_projector(live.patch_features(pixels)), theirs)


def test_towers_are_targets(scenes: Any) -> None:
    found = [rs.find_targets(scenes(towers=towers).build_model()) for towers in TOWERS]
    assert [len(targets) for targets in found] == [14, 16, 28]
    assert {target.tower for target in found[0]} == {"model"}
    assert {target.tower for target in found[2]} == {"vision", "projector", "language"}
    assert {target.name for target in found[0]} < {target.name for target in found[2]}


def test_metrics_by_kind_shift_and_blind(scenes: Any) -> None:
    task = scenes()
    model = task.build_model()
    metrics = task.evaluate(model, "test")
    assert set(metrics) == {"accuracy", "loss", "shift"} | KINDS["emoji"]
    assert metrics["accuracy"] == pytest.approx(np.mean([metrics[kind] for kind in KINDS["emoji"]]))
    right, losses = [], []
    for row in task._rows["test"]:
        batch = task._collate([row])
        output = model(**batch)
        right += (output.logits.argmax(-1) == batch["answers"][batch["answers"] != -100]).tolist()
        losses.append(float(output.loss.detach()))
    assert metrics["accuracy"] == pytest.approx(np.mean(right))
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    shifted = scenes(test="shift")
    assert shifted.evaluate(model, "test")["accuracy"] == metrics["shift"]
    assert shifted.evaluate(model, "test")["loss"] != metrics["loss"]
    assert shifted.evaluate(model) == task.evaluate(model)
    part = scenes(evaluation_fraction=0.4)
    assert {split: len(rows) for split, rows in part._rows.items()} == dict.fromkeys(part._rows, 3) | {"train": 6}
    blind = scenes(blind=True)
    images = torch.stack([row["image"] for rows in blind._rows.values() for row in rows])
    assert torch.equal(images, images[:1].expand_as(images))


@pytest.mark.parametrize("towers", TOWERS)
def test_a_trained_adapter_loads_in_plain_peft(scenes: Any, folder: Path, tmp_path: Path, towers: list[str]) -> None:
    """On the whole model, from pictures and one question at a time, it answers as the training's model does."""
    task = scenes("digit-scenes", towers=towers)
    targets = rs.find_targets(task.build_model())
    uniform = rs.allocate("uniform", targets=targets, budget=rs.ParameterBudget.uniform(targets, 2))
    model, result = rs.train(task, uniform, steps=3, learning_rate=0.05)
    assert result.parameters == uniform.parameters
    assert set(result.metrics) == {"accuracy", "loss"} | KINDS["digits"]
    rs.training.save_adapter(model, task, tmp_path / "adapter")
    plain = PeftModel.from_pretrained(MobileLlava.from_pretrained(folder), tmp_path / "adapter").eval()
    rows, base = task._rows["test"], scenes("digit-scenes", towers=TOWERS[2])
    with torch.no_grad():
        trained = model.eval()(**task._collate(rows)).logits
        reloaded = plain(**base._collate(base._rows["test"])).logits
    torch.testing.assert_close(trained, reloaded, rtol=1e-3, atol=1e-4)


def test_a_profile_reaches_every_target(scenes: Any) -> None:
    task = scenes(towers=TOWERS[2])
    profile = rs.tasks.profile_task(task, n_batches=2)
    assert len(profile.targets) == 28
    assert (profile.table["gradient_norm"] > 0).all()


def test_the_projector_is_local_and_saved(folder: Path, tmp_path: Path) -> None:
    """A token depends on the patches within three of its own, and a changed projector comes back from disk."""
    projector = LightProjector(4, 6)
    features = torch.randn(1, 64, 4)
    changed = features.clone()
    changed[0, 0] += 1  # the top left patch
    moved = (projector(features) - projector(changed)).abs().sum(-1)[0].unflatten(0, (4, 4)) > 1e-6
    assert moved.nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    model = MobileLlava.from_pretrained(folder)
    nn.init.normal_(model.model.multi_modal_projector.local.weight)
    model.save_pretrained(tmp_path)
    again = MobileLlava.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"towers": ["language", "visoin"]}, "`towers` must be of language, projector and vision, but got 'visoin'; did you mean 'vision'?"),
        ({"towers": ["language", "vision"]}, "`towers` must hold all after the first that is trained, of vision, projector, language, "
         "but is language, vision; give one of them no budget instead."),
        ({"towers": "language"}, "`towers` of task 'emoji-scenes' must be a list, but got 'language'."),
        ({"test": "shifted"}, "`test` must be test or shift, but got 'shifted'."),
        ({"dtype": "float16"}, "`dtype` must be bfloat16 or float32 or null, but got 'float16'."),
        ({"evaluation_fraction": 0}, "`evaluation_fraction` must be above 0 and at most 1, but is 0; with 1 all scenes are evaluated."),
        ({"batch_size": 0}, "`batch_size` must be a whole number from 1 to 2,147,483,647, but got 0."),
    ],
)  # fmt: skip
def test_bad_options(scenes: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=f"^{re.escape(message)}$"):
        scenes(**options)


@pytest.mark.slow
def test_searched_and_compared_like_any_other_task(scenes: Any) -> None:
    """Every kind of method trains it: controller, EVA, AdaLoRA, and full fine-tuning among them."""
    task = scenes(towers=TOWERS[2])
    profile = rs.tasks.profile_task(task, n_batches=2)
    budget = rs.ParameterBudget.uniform(profile.targets, 1)
    training = {"steps": 12, "learning_rate": 0.01}
    found = rs.search(task, budget=budget, profile=profile, n_trials=3, confirm_fraction=0.4, training=training)
    assert found.best_allocation.parameters <= budget.limit
    methods = ["uniform", "one-shot", "controller", "eva", "adalora", "full"]
    options = {"budget": budget, "profile": profile, "training": training, "seeds": range(1), "n_tuning_seeds": 1}
    runs = rs.compare(task, methods, **options).runs
    assert {*runs["method"]} == {*methods}


@pytest.mark.slow
def test_the_real_model_and_its_projector() -> None:
    """DINOv2-small, SmolLM2 and the trained projector: where an emoji is, its word is the nearest of all 24."""
    task = rs.load_task({"name": "emoji-scenes", "towers": TOWERS[2]})
    model = task.build_model().eval()
    costs = dict.fromkeys(("vision", "projector", "language"), 0)
    for target in rs.find_targets(model):
        costs[target.tower] += target.rank_cost
    assert costs == {"vision": 82_944, "projector": 2_112, "language": 305_280}
    scenes, tokenizer = (
        read_scenes("emoji").query("split == 'test'").head(32),
        AutoTokenizer.from_pretrained(task.folder),
    )
    words = sorted(set(itertools.chain(*read_scenes("emoji")["things"])))
    ids = tokenizer([f" {word}" for word in words], add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(torch.tensor(ids))[:, 0].float()
        pixels = normalised(draw_scenes(scenes)).to(torch.bfloat16)
        tokens = torch.stack(model.get_image_features(pixels).pooler_output).float()
    cells = tokens.unflatten(1, (2, 2, 2, 2)).mean((2, 4)).flatten(1, 2)  # of 2 x 2 tokens
    nearest = torch.cdist(cells, embeddings).argmin(-1)
    named = [
        words[i] == thing
        for row, things in zip(nearest, scenes["things"], strict=True)
        for i, thing in zip(row, things, strict=True)
    ]
    assert np.mean(named) > 0.9  # by chance .04


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_default_dtype_is_what_the_device_computes_in(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankscope.tasks.scenes.computes_in_bfloat16", lambda device: dtype == "bfloat16")
    assert EmojiScenes().dtype == dtype
    assert EmojiScenes(dtype="bfloat16").dtype == "bfloat16"
