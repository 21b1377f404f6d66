"""Stage I: trains the projector alone, vision tower and language model frozen, into `projector.safetensors`.

    python data/scenes/train.py [--out data/scenes/projector.safetensors] [--steps 500 100]

Both data sets' training scenes are used, without their questions. First each token is drawn to the word embedding of the thing
in its cell, for which the language model need not run; then the language model is to name the four things in reading order.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

from rankscope.distributed import seeded
from rankscope.tasks.mobile_vlm import LightProjector, MobileLlava, assembled
from rankscope.tasks.pretrained import load_pretrained, smollm2
from rankscope.tasks.scenes import IMAGE_TOKEN, N_IMAGE_TOKENS, draw_scenes, read_scenes, vision_features

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def words_of(table: pd.DataFrame) -> list[list[str]]:
    """The words for the four things of each scene."""
    target = load_digits().target
    return [[each if isinstance(each, str) else DIGITS[target[each]] for each in row] for row in table["things"]]


def captions(words: Tensor, tokenizer: Any) -> dict[str, Tensor]:
    """Batches of `<image> Picture: dog, shirt, pig, bicycle`, of which the four words are to be predicted."""
    prompt = [IMAGE_TOKEN] * N_IMAGE_TOKENS + tokenizer(" Picture:", add_special_tokens=False)["input_ids"]
    (comma,) = tokenizer(",", add_special_tokens=False)["input_ids"]
    ids = torch.full((len(words), len(prompt) + 6), comma)
    ids[:, : len(prompt)] = torch.tensor(prompt)
    ids[:, len(prompt) :: 2] = words[:, :3]
    answers = torch.full_like(ids, -100)
    answers[:, len(prompt) - 1 :: 2] = words
    return {"input_ids": ids, "answers": answers}


def train(model: MobileLlava, features: Tensor, words: Tensor, tokenizer: Any, n_steps: tuple[int, int]) -> None:
    """Train the projector, in float32, in place."""
    projector = model.model.multi_modal_projector.float()
    model.requires_grad_(False)
    model.model.language_model.set_attn_implementation("eager")  # faster on sequences as short as these
    projector.requires_grad_(True)
    embeddings = model.get_input_embeddings().weight.float()
    cell = torch.tensor([0, 0, 1, 1] * 2 + [2, 2, 3, 3] * 2)  # of each token
    for name, steps, size, rate in (("words", n_steps[0], 32, 3e-3), ("captions", n_steps[1], 16, 1e-3)):
        optimizer = torch.optim.AdamW(projector.parameters(), lr=rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
        started, losses = time.process_time(), []
        for step in range(steps):
            rows = torch.randint(len(words), (size,))
            with torch.autocast("cpu", torch.bfloat16):
                if name == "words":
                    wanted = embeddings[words[rows][:, cell]]
                    loss = nn.functional.mse_loss(projector(features[rows]).float(), wanted) / embeddings.var()
                else:
                    loss = model(image_features=features[rows], **captions(words[rows], tokenizer)).loss
            loss.backward()
            nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(float(loss.detach()))
            if (step + 1) % 20 == 0:
                spent = f"CPU {time.process_time() - started:.0f} s"
                print(f"{name}, step {step + 1}: loss {sum(losses[-20:]) / 20:.3f}, {spent}", flush=True)


def main() -> None:
    """Trains and writes the projector."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "projector.safetensors")
    parser.add_argument("--steps", type=int, nargs=2, default=(500, 100))
    arguments = parser.parse_args()
    tokenizer = load_pretrained("AutoTokenizer", smollm2())
    with seeded(0):
        fresh = LightProjector(384, 576)
        model = assembled(fresh.state_dict())
        scale = float(model.get_input_embeddings().weight.detach().float().std())
        nn.init.constant_(model.model.multi_modal_projector.norm.weight, scale)
        tables = [read_scenes(name) for name in ("emoji", "digits")]
        features = [
            vision_features(model, draw_scenes(table))[(table["split"] == "train").to_numpy()] for table in tables
        ]
        words = [words_of(table[table["split"] == "train"]) for table in tables]
        ids = [
            [tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in row]
            for part in words
            for row in part
        ]
        train(model, torch.cat(features), torch.tensor(ids), tokenizer, tuple(arguments.steps))
    weights = {name: value.to(torch.bfloat16) for name, value in model.model.multi_modal_projector.state_dict().items()}
    save_file(weights, arguments.out, metadata={"format": "pt"})
    print(f"wrote {arguments.out}: {sum(value.numel() for value in weights.values()):,} parameters")


if __name__ == "__main__":
    main()
