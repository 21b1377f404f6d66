"""Ready tasks `emoji-scenes` and `digit-scenes`: questions on pictures of four things, for a small vision-language model."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from itertools import product
from logging import getLogger
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rankscope.distributed import batch_device, best_device, computes_in_bfloat16, mixed_precision, placed
from rankscope.errors import TaskError, did_you_mean
from rankscope.files import digest, read_tensors, replacing
from rankscope.tasks.data import cache_folder, data_folder
from rankscope.tasks.pretrained import DTYPES, PretrainedTask, for_dinov2, load_model, load_pretrained
from rankscope.tasks.protocol import Split, check_choice, check_counts

if TYPE_CHECKING:
    from PIL import Image

    from rankscope.tasks.mobile_vlm import MobileLlava, Stage

# What a training input begins with, by the towers that are trained: the outputs of the parts before are computed once.
_STAGES: Mapping[tuple[str, ...], Stage] = {
    ("language",): "image_embeds",
    ("language", "projector"): "image_features",
    ("language", "projector", "vision"): "pixel_values",
}
_CELL = 56  # pixels; a scene is 2 x 2 cells
N_IMAGE_TOKENS = 16
IMAGE_TOKEN = 3  # SmolLM2's unused `<repo_name>`, so that the vocabulary keeps its size


class Scenes(PretrainedTask):
    """Questions on scenes of data/scenes, answered in one word by a `MobileLlava` whose projector was trained on captions.

    An answer is right if it is the likeliest token of all. `evaluate` also gives the accuracy of each kind of question. Frozen
    parts are not in the model: their outputs are computed once and kept in the cache folder.

    Args:
        towers: What is trained: `language`; `language` and `projector`; or these and `vision`.
        test: What the test split is: `test`, or `shift`, scenes in a style that was never trained.
        blind: Whether every picture is blank, to see what the questions alone tell.
        batch_size: Scenes; each has eight questions.
        evaluation_fraction: The share of validation and test scenes that is evaluated.
        dtype: Of the frozen weights, `bfloat16` or `float32`. Default: `bfloat16` on a device that computes in it.
        model: The folder of a `MobileLlava`. Default: DINOv2-small, the projector of data/scenes, SmolLM2-135M-Instruct.
    """

    metric = "accuracy"
    head_modules = ()
    _scenes: str
    _evaluated = 4

    def __init__(
        self,
        *,
        towers: Sequence[str] = ("language",),
        test: str = "test",
        blind: bool = False,
        batch_size: int = 5,
        evaluation_fraction: float = 1.0,
        dtype: str | None = None,
        model: str | Path | None = None,
    ) -> None:
        check_counts(batch_size=batch_size)
        self.towers = tuple(sorted({*towers}))
        if unknown := [tower for tower in towers if tower not in ("language", "projector", "vision")]:
            hint = did_you_mean(unknown[0], ("language", "projector", "vision"), "or vision.")
            raise TaskError(f"`towers` must be of language, projector and vision, but got {unknown[0]!r}; {hint}")
        if self.towers not in _STAGES:
            must = "`towers` must hold all after the first that is trained, of vision, projector, language"
            raise TaskError(f"{must}, but is {', '.join(towers) or 'empty'}; give one of them no budget instead.")
        check_choice(test, ("test", "shift"), name="test")
        check_choice(dtype, (*DTYPES, None), name="dtype")
        dtype = dtype or ("bfloat16" if computes_in_bfloat16(best_device()) else "float32")
        if not 0 < evaluation_fraction <= 1:
            must = f"`evaluation_fraction` must be above 0 and at most 1, but is {evaluation_fraction}"
            raise TaskError(f"{must}; with 1 all scenes are evaluated.")
        self.test, self.blind, self.batch_size, self.dtype, self.model = test, blind, batch_size, dtype, model
        self.evaluation_fraction = float(evaluation_fraction)
        self._table = read_scenes(self._scenes)

    @cached_property
    def folder(self) -> Path:
        """The folder of the model."""
        from rankscope.tasks.mobile_vlm import build_mobile_vlm

        return Path(self.model or build_mobile_vlm(data_folder("scenes") / "projector.safetensors"))

    def fingerprint_data(self) -> str:
        """Return a hash of scenes and questions, and of the weights and the tokenizer that they go through."""
        paths = [path for path in self.folder.iterdir() if path.suffix in (".json", ".safetensors")]
        files = {path.name: path.read_bytes() for path in paths}
        return digest([self.towers, self._table.to_dict("records"), draw_scenes(self._table), files])

    def evaluate(self, model: nn.Module, split: Split = "validation") -> dict[str, float]:
        """Return accuracy, also by kind of question, and mean cross-entropy per answer. The model keeps its mode.

        On the test split, `shift` is the accuracy on scenes of the other style.
        """
        was_training = model.training
        model.eval()
        try:
            if split == "test" and self.test == "shift":
                return self._metrics(model, "shift")
            found = self._metrics(model, split)
            return found if split != "test" else found | {"shift": self._metrics(model, "shift")["accuracy"]}
        finally:
            model.train(was_training)

    @torch.no_grad()
    def _metrics(self, model: nn.Module, part: Any) -> dict[str, float]:
        rows, device = self._rows[part], batch_device(model)
        right, losses = [], []
        for batch in self._batches(part, range(len(rows)), self._evaluated * self.batch_size):
            inputs = {name: value.to(device) for name, value in batch.items()}
            answers = inputs["answers"][inputs["answers"] != -100]
            output = model(**inputs)
            right.append(output.logits.argmax(-1) == answers)
            losses.append(output.loss * len(answers))
        table = pd.DataFrame({"kind": [kind for row in rows for kind in row["kinds"]]})
        table["right"] = torch.cat(right).float().cpu().numpy()
        loss = float(torch.stack(losses).sum()) / len(table)
        by_kind = {str(kind): float(rows.mean()) for kind, rows in table.groupby("kind")["right"]}
        return {"accuracy": float(table["right"].mean()), "loss": loss, **by_kind}

    def _load(self) -> MobileLlava:
        from rankscope.tasks.mobile_vlm import MobileLlava

        model = load_model(MobileLlava, self.folder, fresh="$", dtype=self.dtype)
        if best_device().type == "cpu":  # torch's kernel takes up to four times as long for sequences as short as these
            model.set_attn_implementation("eager")
        return cast("MobileLlava", model)

    @cached_property
    def _loaded(self) -> Any:
        return self._load().without(_STAGES[self.towers])

    @cached_property
    def _rows(self) -> dict[Any, list[dict[str, Any]]]:
        tokenizer = load_pretrained("AutoTokenizer", self.folder)
        tokens = cache(lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
        scenes = self._table.to_dict("records")
        rows: dict[Any, list[dict[str, Any]]] = {split: [] for split in ("train", "validation", "test", "shift")}
        for scene, image in zip(scenes, self._images(), strict=True):
            rows[scene["split"]].append({"image": image, **packed(scene["questions"], tokens)})
        share = self.evaluation_fraction
        return {split: each if split == "train" else each[: ceil(share * len(each))] for split, each in rows.items()}

    def _images(self) -> Tensor:
        """What the model is given of every scene, in the order of the table."""
        stage, images = _STAGES[self.towers], draw_scenes(self._table)
        if self.blind:
            images = torch.full_like(images[:1], 235)
        if stage != "pixel_values":
            model = placed(self._load())
            images = vision_features(model, images)
            if stage == "image_embeds":
                images = _by_parts(model, model.model.multi_modal_projector, images)
        return images.expand(len(self._table), *images.shape[1:])

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        stage, images = _STAGES[self.towers], torch.stack([row["image"] for row in rows])
        fill = {"input_ids": 0, "attention_mask": 0, "segments": 0, "position_ids": 0, "answers": -100}
        columns = {name: [torch.tensor(row[name]) for row in rows] for name in fill}
        batch = {
            name: pad_sequence(column, batch_first=True, padding_value=fill[name]) for name, column in columns.items()
        }
        return batch | {stage: normalised(images) if stage == "pixel_values" else images}


class EmojiScenes(Scenes):
    """Emoji: what is where, how many of a category, is there a thing, what is beside it. `shift`: Twitter's emoji."""

    name = "emoji-scenes"
    _scenes = "emoji"


class DigitScenes(Scenes):
    """scikit-learn's digits: which is where, sums of rows, the largest, comparisons. `shift`: dark ink on light paper.

    The vision tower, trained on photos, hardly tells digits apart.
    """

    name = "digit-scenes"
    _scenes = "digits"


def packed(questions: Sequence[Mapping[str, str]], tokens: Callable[[str], list[int]]) -> dict[str, Any]:
    """Return one sequence with the image's tokens and all questions on it, whose positions each follow the image's."""
    ids, segments, answers = [IMAGE_TOKEN] * N_IMAGE_TOKENS, [0] * N_IMAGE_TOKENS, [-100] * N_IMAGE_TOKENS
    positions = list(range(N_IMAGE_TOKENS))
    for segment, each in enumerate(questions, start=1):
        (answer,), prompt = tokens(f" {each['answer']}"), tokens(f"{each['question']} Answer:")
        ids += prompt
        segments += [segment] * len(prompt)
        positions += range(N_IMAGE_TOKENS, N_IMAGE_TOKENS + len(prompt))
        answers += [-100] * (len(prompt) - 1) + [answer]
    columns = {"input_ids": ids, "segments": segments, "position_ids": positions, "answers": answers}
    return columns | {"attention_mask": [1] * len(ids), "kinds": [each["kind"] for each in questions]}


def read_scenes(scenes: str) -> pd.DataFrame:
    """Return the table of all `emoji` or `digits` scenes, see data/scenes/build.py."""
    return pd.read_parquet(data_folder("scenes") / f"{scenes}.parquet")


def draw_scenes(table: pd.DataFrame) -> Tensor:
    """Return the pictures of scenes, (n_scenes, 3, 112, 112) of bytes."""
    from PIL import Image

    pictures, canvases = _pictures(), []
    for scene in table.to_dict("records"):
        background = 255 - scene["background"] if scene["style"] == "light ink" else scene["background"]
        canvas = Image.new("RGB", (2 * _CELL, 2 * _CELL), tuple(background.tolist()))
        for place, thing in enumerate(scene["things"]):
            left, top, size = (int(scene[name][place]) for name in ("lefts", "tops", "sizes"))
            picture = pictures[scene["style"], thing].resize((size, size), Image.Resampling.BICUBIC)
            canvas.paste(picture, (_CELL * (place % 2) + left, _CELL * (place // 2) + top), picture)
        canvases.append(np.array(canvas))
    return torch.from_numpy(np.stack(canvases)).permute(0, 3, 1, 2)


def _pictures() -> dict[tuple[str, Any], Image.Image]:
    """The pictures of all things, with alpha, by style and thing: emoji, and scikit-learn's digits in two inks."""
    from PIL import Image
    from sklearn.datasets import load_digits

    table = pd.read_parquet(data_folder("scenes") / "glyphs.parquet").to_dict("records")
    found = {(row["style"], row["name"]): Image.open(io.BytesIO(row["png"])).convert("RGBA") for row in table}
    alphas = (load_digits().images / 16 * 255).astype(np.uint8)
    inks = {"light ink": (255, 255, 255), "dark ink": (0, 0, 0)}
    for (style, ink), (index, alpha) in product(inks.items(), enumerate(alphas)):
        found[style, index] = Image.new("RGB", alpha.shape, ink)
        found[style, index].putalpha(Image.fromarray(alpha))
    return found


def vision_features(model: MobileLlava, images: Tensor) -> Tensor:
    """Return what the vision tower makes of images, (n, patches, width), from the cache folder if it did so before."""
    key = digest([images, dict(model.model.vision_tower.state_dict())])
    path = cache_folder() / f"scene-features-{key}.safetensors"
    if not path.is_file():
        getLogger(__name__).warning("computing the features of %d pictures into %s, once", len(images), path)
        features = _by_parts(model, model.patch_features, images)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            save_file({"features": features}, temporary)
    return read_tensors(path, what="features of scenes")["features"]


def normalised(pixels: Tensor) -> Tensor:
    """Return pixels (n, 3, height, width), 0 to 255, with the mean and deviation of DINOv2's training images."""
    return for_dinov2(pixels.float() / 255)


@torch.no_grad()
def _by_parts(model: nn.Module, part: Callable[[Tensor], Tensor], inputs: Tensor, size: int = 32) -> Tensor:
    """What a part of the model makes of inputs, which are pictures if they are whole numbers."""
    device, outputs = batch_device(model), []
    with mixed_precision(model):
        for each in inputs.split(size):
            values = each if each.is_floating_point() else normalised(each)
            outputs.append(part(values.to(device)).cpu())
    return torch.cat(outputs)
