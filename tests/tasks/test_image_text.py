"""The image-text-to-text task: tiny models of each family, answers only in the loss, and data as users have it."""

import json
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from peft import AutoPeftModel, PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText
from transformers.models.smolvlm import processing_smolvlm

import rankscope as rs
from rankscope.errors import TaskError
from rankscope.tasks import ImageTextToText, fingerprint_task, profile_task
from rankscope.tasks.conversations import open_image
from rankscope.training import AdaLora, save_adapter
from tests.refusals import refused
from tests.tasks.answer_metrics import check_answer_metrics
from tests.tasks.models import save_llama
from tests.tasks.vision_models import FAMILIES, ID, png, questions, save_family, save_rows

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
CLIP = ATTENTION | {"fc1", "fc2"}
QWEN = {"qkv_proj", "o_proj"}
ROLES = {  # of vision tower and projector; the language models have the same
    "llava": (CLIP, {"linear_1", "linear_2"}),
    "mobile-vlm": (CLIP, {"point_1", "point_2"}),
    "idefics3": (CLIP, {"proj"}),
    "smolvlm": (CLIP, {"proj"}),
    "paligemma": (CLIP, {"linear"}),
    "qwen2-vl": (QWEN | {"fc1", "fc2"}, {"mlp_0", "mlp_2"}),
    "qwen2.5-vl": (QWEN | {"gate_proj", "up_proj", "down_proj"}, {"mlp_0", "mlp_2"}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where models are saved once for all tests."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def model(folders: Path) -> Callable[[str], Path]:
    return lambda name: folders / name if (folders / name).exists() else save_family(name, folders / name)


@pytest.fixture(autouse=True)
def _counts_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolVLM's processor asks for the package num2words, which it needs for videos only."""
    if processing_smolvlm.num2words is None:
        monkeypatch.setattr(processing_smolvlm, "num2words", str)


@pytest.fixture
def llava(model) -> Path:
    return model("llava")


def learned(task: ImageTextToText, batch: dict[str, torch.Tensor]) -> list[str]:
    """The text of each row whose tokens are in the loss."""
    decode = task.processor.tokenizer.decode
    return [decode(labels[labels != -100]) for labels in batch["labels"]]


def in_order(task: ImageTextToText, split: str = "train") -> dict[str, torch.Tensor]:
    """All rows of a split in one batch."""
    n = len(task._examples[split])
    return next(iter(task._batches(split, range(n), n)))


# --- families --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_from_its_targets_to_plain_peft(model, name: str, tmp_path: Path) -> None:
    task = ImageTextToText(model(name), questions(), batch_size=3)
    targets = rs.find_targets(task.build_model())
    found = {tower: {t.role for t in targets if t.tower == tower} for tower in ("vision", "projector", "language")}
    gated = ATTENTION | {"gate_proj", "up_proj", "down_proj"}
    assert found == {"vision": ROLES[name][0], "projector": ROLES[name][1], "language": gated}
    assert {target.block for target in targets if target.tower == "language"} == {0, 1}

    taken = profile_task(task, n_batches=2)
    budget = rs.ParameterBudget.uniform(targets, 1)
    trained, result = rs.train(task, rs.allocate("one-shot", targets=targets, budget=budget, profile=taken), steps=1)
    assert set(result.metrics) == {"token_accuracy", "exact_match", "loss"}
    assert 0 < result.parameters <= budget.limit
    before = task.build_model().eval()
    with torch.no_grad():
        batch = in_order(task, "validation")
        expected = trained.eval()(**batch).logits
        assert not torch.equal(expected, before(**batch).logits)  # the step moved the adapters
        save_adapter(trained, task, tmp_path / "adapter")
        base = AutoModelForImageTextToText.from_pretrained(model(name))
        loaded = [PeftModel.from_pretrained(base, tmp_path / "adapter")]
        readme = (tmp_path / "adapter" / "README.md").read_text()
        if name == "mobile-vlm":  # PEFT imports no class of users on its own
            assert "Build the base model, a `tests.tasks.vision_models.Mobile`" in readme
        else:
            assert "AutoPeftModel.from_pretrained(folder)" in readme
            loaded.append(AutoPeftModel.from_pretrained(tmp_path / "adapter"))
        for adapted in loaded:
            torch.testing.assert_close(adapted.eval()(**batch).logits, expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_is_the_models_own_and_metrics_those_of_single_rows(model, name: str) -> None:
    task = ImageTextToText(model(name), questions(), batch_size=4)
    check_answer_metrics(task)


def test_a_model_learns_answers_that_only_the_image_tells(llava: Path) -> None:
    rows = questions(12)
    task = ImageTextToText(llava, rows, batch_size=12)
    network = task.build_model().train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for step in range(60):
        loss = task.loss(network, next(iter(task.train_batches(step))))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    metrics = task.evaluate(network, "test")
    assert metrics["exact_match"] > 0.9
    assert metrics["token_accuracy"] > 0.9


def test_adalora_where_modules_are_outside_the_loss(llava: Path) -> None:
    task = ImageTextToText(llava, questions(), batch_size=3)  # LLaVA does not use its vision tower's last layer
    targets = rs.find_targets(task.build_model())
    _, result = rs.train(task, AdaLora(targets, 2, 32.0), steps=10)
    assert result.allocation.parameters > 0


# --- answers ---------------------------------------------------------------------------------------------------

ANSWERS = {
    "llava": " blue</s>",
    "mobile-vlm": " blue</s>",
    "idefics3": " blue<end_of_utterance>",
    "smolvlm": " blue<end_of_utterance>",
    "paligemma": "blue</s>",
    "qwen2-vl": "blue<|im_end|>",
    "qwen2.5-vl": "blue<|im_end|>",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_only_answers_and_the_tokens_that_end_them_are_learned(model, name: str) -> None:
    task = ImageTextToText(model(name), questions())
    batch = in_order(task)
    assert learned(task, batch) == [ANSWERS[name].replace("blue", colour) for colour in ("red", "green", "blue")] * 2
    assert (batch["labels"][batch["labels"] != -100] == batch["input_ids"][batch["labels"] != -100]).all()


MULTI = {
    "llava": " red USER: and the hue? ASSISTANT: warm</s>",
    "idefics3": " red<end_of_utterance>\nUser: and the hue?<end_of_utterance>\nAssistant: warm<end_of_utterance>",
    "qwen2-vl": "red<|im_end|>\n<|im_start|>user\nand the hue?<|im_end|>\n<|im_start|>assistant\nwarm<|im_end|>",
}
LEARNED = {
    "llava": " red warm</s>",
    "idefics3": " red<end_of_utterance> warm<end_of_utterance>",
    "qwen2-vl": "red<|im_end|>warm<|im_end|>",
}


def conversation(*turns: str, image: bytes | None = png("red"), llava: bool = False) -> dict[str, object]:
    roles, keys = (["human", "gpt"], ("from", "value")) if llava else (["user", "assistant"], ("role", "content"))
    messages = [dict(zip(keys, (roles[index % 2], turn), strict=True)) for index, turn in enumerate(turns)]
    return {"image": image, "messages": messages}


def splits(*rows: dict[str, object]) -> pd.DataFrame:
    """These rows to train, and one more each to validate and to test."""
    more = [conversation("which?", "red", image=png("red", (20, 20 + index))) for index in range(2)]
    names = ["train"] * len(rows) + ["validation", "test"]
    return pd.DataFrame([*rows, *more]).assign(split=names)


@pytest.mark.parametrize("name", MULTI)
@pytest.mark.parametrize("form", ["plain", "parts", "llava"])
def test_every_answer_of_a_conversation_is_learned(model, name: str, form: str) -> None:
    row = conversation("which colour?", "red", "and the hue?", "warm", "and what follows is not learned")
    if form == "parts":
        row["messages"] = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in row["messages"]]
        row["messages"][0]["content"].insert(0, {"type": "image"})
    elif form == "llava":
        row = conversation("<image>\nwhich colour?", "red", "and the hue?", "warm", llava=True)
    task = ImageTextToText(model(name), splits(row))
    batch = in_order(task)
    text = task.processor.tokenizer.decode(batch["input_ids"][0])
    assert MULTI[name] in text
    assert "which colour?" in text
    assert learned(task, batch) == [LEARNED[name]]


def test_several_images_and_their_places(model) -> None:
    images = [png("red", (10, 10)), png("blue", (30, 10))]
    row = conversation("left <image> or right <image>?", "left", "and now?", "right")
    row["image"] = images
    task = ImageTextToText(model("qwen2-vl"), splits(row))
    batch = in_order(task)
    assert batch["image_grid_thw"].shape == (2, 3)
    text = task.processor.tokenizer.decode(batch["input_ids"][0]).replace("<|image_pad|>", "")
    assert "left <|vision_start|><|vision_end|> or right <|vision_start|><|vision_end|>?" in text
    assert learned(task, batch) == ["left<|im_end|>right<|im_end|>"]
    row["image"] = images[:1]
    refused(
        "each row must have as many images as places for them, but row 1 has 1 and 2; correct it.",
        lambda: ImageTextToText(model("qwen2-vl"), splits(row)),
    )


def test_an_image_after_an_answer_moves_no_label(model) -> None:
    row = conversation("<image>which?", "red", "<image>and this?", "blue")
    row["image"] = [png("red", (10, 10)), png("blue", (40, 10))]
    for name, expected in (
        ("idefics3", " red<end_of_utterance> blue<end_of_utterance>"),
        ("qwen2-vl", "red<|im_end|>blue<|im_end|>"),
    ):
        task = ImageTextToText(model(name), splits(row))
        assert learned(task, in_order(task)) == [expected]


# --- rows and images -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_rows_from_files(llava: Path, tmp_path: Path, suffix: str) -> None:
    if suffix == "parquet":
        save_rows(questions(), tmp_path / "rows.parquet")
    else:
        save_rows(questions(), tmp_path / "rows.jsonl")
        if suffix == "csv":
            pd.read_json(tmp_path / "rows.jsonl", lines=True).to_csv(tmp_path / "rows.csv", index=False)
    spec = {"type": "image-text-to-text", "model": str(llava), "data": f"rows.{suffix}"}
    task = rs.load_task(spec, base_dir=tmp_path)
    inside = ImageTextToText(llava, questions())
    torch.testing.assert_close(in_order(task), in_order(inside))


def test_llavas_own_files(llava: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    rows = []
    for index in range(8):
        (tmp_path / "images" / f"{index}.jpg").write_bytes(png("red", (10, 10 + index)))
        turns = [{"from": "human", "value": "<image>\nwhich?"}, {"from": "gpt", "value": "red"}]
        rows.append({"id": str(index), "image": f"{index}.jpg", "conversations": turns})
    rows.append({"id": "8", "conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]})
    (tmp_path / "chat.json").write_text(json.dumps(rows))
    spec = {"type": "image-text-to-text", "model": str(llava), "data": "chat.json", "image_folder": "images",
            "columns": {"messages": "conversations"}, "text_only": True}  # fmt: skip
    task = rs.load_task(spec, base_dir=tmp_path)
    assert sum(len(rows) for rows in task._examples.values()) == 9
    assert "loss" in task.evaluate(task.build_model())
    refused(
        "the column 'image' must hold an image in every row, but 1 of 9 have none, as row 9; drop them, or set `text_only: true`.",
        lambda: rs.load_task({**spec, "text_only": False}, base_dir=tmp_path),
    )


@pytest.mark.parametrize("name", ["llava", "idefics3", "qwen2.5-vl"])
def test_batches_with_and_without_images(model, name: str) -> None:
    rows = [conversation("which?", "red"), conversation("hello", "hi there", image=None), conversation("so?", "blue")]
    task = ImageTextToText(model(name), splits(*rows), text_only=True)
    network = task.build_model().eval()
    batch = in_order(task)
    with torch.no_grad():
        logits = network(**batch).logits
        for index, row in enumerate(task._examples["train"]):
            inputs = task._inputs(row)
            alone = network(**inputs).logits[0]
            torch.testing.assert_close(logits[index, : len(alone)], alone, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_images_of_any_mode_and_size(model, name: str) -> None:
    rows = []
    for index, mode in enumerate(["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "F"]):
        image = Image.fromarray(np.full((4 + 3 * index, 30 - 3 * index, 3), 90, np.uint8))
        if mode == "I;16":
            image = Image.fromarray(np.full((9, 9), 90 * 256, np.uint16))
        elif mode != "RGB":
            image = image.convert(mode)
        rows.append({"image": image, "question": f"which {mode}?", "answer": "gray"})
    table = pd.DataFrame(rows * 2).assign(split=["train"] * 9 + ["validation"] * 9)
    table["question"] += table["split"]
    table = pd.concat([table, table.tail(1).assign(split="test", question="and?")])
    task = ImageTextToText(model(name), table)
    assert task.evaluate(task.build_model(), "train")["loss"] > 0
    assert not task._skipped["train"]


def test_sixteen_bits_are_not_clipped_and_photographs_stand_upright() -> None:
    deep = Image.fromarray(np.full((5, 5), 90 * 256, np.uint16))
    assert np.asarray(open_image(deep, Path())).max() == 90
    turned = Image.new("RGB", (8, 4))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.info["exif"] = exif.tobytes()
    assert open_image(turned, Path()).size in ((4, 8), (8, 4))


def test_images_that_cannot_be_read_are_skipped_counted_and_bounded(
    llava: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_rows(questions(12), tmp_path / "rows.jsonl")
    (tmp_path / "003.png").write_bytes(png("red")[:60])
    (tmp_path / "007.png").unlink()
    task = ImageTextToText(llava, tmp_path / "rows.jsonl", batch_size=4, max_skipped=0.2)
    with caplog.at_level(logging.WARNING, logger="rankscope"):
        sizes = [len(batch["labels"]) for batch in task.train_batches(0)]
        assert sizes == [4, 4, 2]  # the next takes a skipped row's place
        assert [len(batch["labels"]) for batch in task.train_batches(1)] == [4, 4, 2]
    assert len(caplog.records) == 1
    assert re.fullmatch(
        r"skipped 2 of 12 rows in 'train', as row (4 \(`003.png` cannot be read: .*\)|8 \(there is no file `007.png` in .*\))",
        caplog.messages[0],
    )
    rows = task.dataset("train")
    assert len(rows) == 12
    assert learned(task, task.collate([rows[3], rows[4], rows[11]])) == [" green</s>", " green</s>", " blue</s>"]
    few = ImageTextToText(llava, tmp_path / "rows.jsonl", max_skipped=0.1)
    must = r"at most 0\.1 of the rows may be skipped \(`max_skipped`\), but 2 of 12 in 'train' already, as row \d \(.*\); repair or drop them\."
    with pytest.raises(TaskError, match=f"^{must}$"):
        list(few.train_batches(0))


def test_a_question_longer_than_the_context(llava: Path) -> None:
    rows = questions(4)
    rows.loc[1, "question"] = "what " * 200
    task = ImageTextToText(llava, rows, max_length=60)
    found = "row 2 (its question takes 1,022 tokens, and `max_length` leaves 60)"
    must = "at most 0.05 of the rows may be skipped (`max_skipped`)"
    refused(
        f"{must}, but 1 of 4 in 'train' already, as {found}; repair or drop them.", lambda: list(task.train_batches(0))
    )
    few = ImageTextToText(llava, questions(), max_length=8, max_skipped=1.0)
    with pytest.raises(
        TaskError, match=r"^the data must have rows that can be used in every split, but 'train' has none, as row"
    ):
        list(few.train_batches(0))


def test_an_answer_of_one_token_that_fits_is_no_long_question(model) -> None:
    row = conversation("which?", "x", "and then? " * 20, "y")
    task = ImageTextToText(model("llava"), splits(row), max_length=40)
    assert learned(task, in_order(task)) == [" x"]


def test_long_answers_are_cut_and_long_images_are_not(llava: Path) -> None:
    rows = questions(4)
    rows.loc[0, "answer"] = "red " * 100
    task = ImageTextToText(llava, rows, max_length=50)
    batch = in_order(task)
    assert batch["input_ids"].shape == (4, 50)
    assert (batch["input_ids"] == ID["<image>"]).sum() == 16
    assert task.evaluate(task.build_model(), "train")["loss"] > 0


def test_rows_with_one_image_are_in_one_split_and_rows_that_repeat_are_kept_once(llava: Path) -> None:
    rows = questions(10).drop(columns="split")
    more = rows.assign(question="which hue?")
    task = ImageTextToText(llava, pd.concat([rows, more, rows]))
    found = {split: {row.images for row in rows} for split, rows in task._examples.items()}
    assert sum(len(rows) for rows in task._examples.values()) == 60
    assert sorted(len(images) for images in found.values()) == [4, 5, 21]
    assert not found["train"] & (found["validation"] | found["test"])


def test_fingerprints_follow_rows_images_and_templates(llava: Path, tmp_path: Path) -> None:
    save_rows(questions(), tmp_path / "rows.jsonl")

    def data() -> str:
        return ImageTextToText(llava, tmp_path / "rows.jsonl").fingerprint_data()

    first = data()
    assert data() == first
    (tmp_path / "004.png").write_bytes(png("green", (13, 13)))
    second = data()
    assert second != first
    text = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(text.replace("which colour?", "what colour?", 1))
    assert data() not in (first, second)
    facts = fingerprint_task(ImageTextToText(llava, tmp_path / "rows.jsonl", max_length=99))
    assert facts["task"]["max_length"] == 99
    assert facts["weights"] == fingerprint_task(ImageTextToText(llava, questions()))["weights"]


def test_a_hub_data_set_of_one_split_is_split_here(llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = questions(10).drop(columns="split")
    parts = {"owner/colours": {"train": SimpleNamespace(to_pandas=lambda: rows)}}
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=parts.__getitem__))
    task = ImageTextToText(llava, "owner/colours")
    assert sorted(len(rows) for rows in task._examples.values()) == [4, 5, 21]


# --- mistakes --------------------------------------------------------------------------------------------------


def test_processors_that_cannot_serve(tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        save_family("llava", tmp_path / name)
        return tmp_path / name

    bare = copy("bare")
    (bare / "processor_config.json").unlink()
    with pytest.raises(TaskError, match="bare` must"):
        ImageTextToText(bare, questions()).build_model()

    untold = copy("untold")
    (untold / "chat_template.jinja").unlink()
    refused(
        f"`{untold}` must have a processor with a chat template, but LlavaProcessor has none; save it with one, as "
        "`chat_template`.",
        lambda: ImageTextToText(untold, questions()).build_model(),
    )

    def change(folder: Path, file: str, **values: object) -> Path:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        return folder

    unknown = change(copy("unknown"), "processor_config.json", image_token="<picture>")
    refused(
        f"`{unknown}` must have a processor with an image token, but the tokenizer of LlavaProcessor lacks '<picture>'; add it "
        "to the tokenizer, and save the processor.",
        lambda: ImageTextToText(unknown, questions()).build_model(),
    )
    finer = ImageTextToText(change(copy("finer"), "processor_config.json", patch_size=2), questions())
    refused(
        "the processor must give each image as many tokens as the model gives it features, but does not (Image features and "
        "image tokens do not match, tokens: 96, features: 768); correct its `patch_size` or the like.",
        lambda: finer.evaluate(finer.build_model()),
    )
    text = save_llama(tmp_path / "llama")
    refused(
        f"`{text}` must have a processor for images and texts, but has only TokenizersBackend; save it there with "
        "save_pretrained.",
        lambda: ImageTextToText(text, questions()).build_model(),
    )
    other = change(copy("other"), "config.json", image_token_id=9)
    refused(
        f"`{other}` must have one image token, but its config.json has token 9, and its processor {ID['<image>']} "
        "('<image>'); save model and processor that belong together.",
        lambda: ImageTextToText(other, questions()).build_model(),
    )


def test_a_package_that_a_processor_needs(model, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model("smolvlm")
    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    refused(
        f"`{folder}` must have a processor that loads, but has none: Package `num2words` is required to run SmolVLM processor. "
        "Install it with `pip install num2words`.",
        lambda: ImageTextToText(folder, questions()).build_model(),
    )


ROW = conversation("which?", "red")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "https://a.b/c.png"}, "images must be paths or bytes, but row 1 holds the address 'https://a.b/c.png'; "
         "download it first."),
        ({"image": 3.5}, "images must be paths or bytes, but row 1 holds 3.5; convert it."),
        ({"messages": "which? red"}, "messages must be a list, but row 1 holds 'which? red'; convert it."),
        ({"messages": [{"role": "bot", "content": "x"}]}, "messages must have a role among human, gpt, system, user, assistant, "
         "but row 1 holds {'role': 'bot', 'content': 'x'}; correct it."),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "each row must hold a question, then an answer, but row 1 does "
         "not; drop it."),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "the content of a message must be a text, or a list "
         "of parts of type text or image, but row 1 holds [{'type': 'video'}]; convert it."),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_read(row: dict[str, object], message: str) -> None:
    refused(message, lambda: ImageTextToText("anything", splits({**ROW, **row})))


def test_columns_and_options_that_are_wrong(model) -> None:
    rows = questions()
    refused(
        "the data must have a column 'messages', or 'question' and 'answer', but has image, text, answer, split; rename them, or "
        "set `columns`.",
        lambda: ImageTextToText("anything", rows.rename(columns={"question": "text"})),
    )
    refused(
        "the DataFrame must have a column 'image', but has none; did you mean 'images'?",
        lambda: ImageTextToText("anything", rows.rename(columns={"image": "images"})),
    )
    refused(
        "`columns` takes no key `img`; did you mean 'image'?",
        lambda: ImageTextToText("x", rows, columns={"img": "image"}),
    )
    refused("`max_skipped` must be a share from 0 to 1, but got 5.", lambda: ImageTextToText("x", rows, max_skipped=5))
    refused(
        "`image_folder` must be a folder, but `nowhere` is none; check the path.",
        lambda: ImageTextToText("x", rows, image_folder="nowhere"),
    )
    refused(
        "`columns` of task type 'image-text-to-text' must be a mapping or null, but got 'image'.",
        lambda: rs.load_task({"type": "image-text-to-text", "model": "x", "data": "y.csv", "columns": "image"}),
    )
    several = splits(conversation("which?", "red", "and?", "blue"))
    refused(
        "each row must hold one question and one answer for PaliGemmaProcessor, but row 1 holds other turns; split it into rows.",
        lambda: ImageTextToText(model("paligemma"), several).build_model(),
    )
