"""Pretrains the small vision transformer of the ready task `digits-shift` on scikit-learn's digits 0-4.

    python data/digits_vit/build.py

writes `config.json` and `model.safetensors` (1.2 MB) beside this file: a plain transformers `ViTModel`,
6 blocks of hidden size 64, images 8x8, patches 2x2. The digits 5-9 are never seen here; the task adapts to them.
One thread, about half a minute. Neither recipe nor seed was chosen by a result.
"""

from __future__ import annotations

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from transformers import ViTConfig, ViTModel

HERE = Path(__file__).resolve().parent
SEED = 0
EPOCHS = 40
BATCH = 32


def main() -> None:
    """Trains on 80 % of the digits 0-4, prints the accuracy on the other 20 %, and saves the encoder."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    digits = load_digits()
    keep = digits.target < 5
    images = torch.tensor(digits.images[keep] / 8.0 - 1.0, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(digits.target[keep])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED))
    held_out, train = order[: len(order) // 5], order[len(order) // 5 :]

    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=256,
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    encoder = ViTModel(config, add_pooling_layer=False)
    head = nn.Linear(config.hidden_size, 5)
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)
    steps = EPOCHS * (len(train) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps)
    for _ in range(EPOCHS):
        shuffled = train[torch.randperm(len(train))]
        for start in range(0, len(train) - BATCH + 1, BATCH):
            rows = shuffled[start : start + BATCH]
            # One pixel of jitter: so few images are learnt by heart without it.
            shift = tuple(int(v) for v in torch.randint(-1, 2, (2,)))
            pixels = torch.roll(images[rows], shifts=shift, dims=(2, 3))
            loss = nn.functional.cross_entropy(head(encoder(pixels).last_hidden_state[:, 0]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    encoder.eval()
    with torch.no_grad():
        predicted = head(encoder(images[held_out]).last_hidden_state[:, 0]).argmax(-1)
    print(f"accuracy on held-out digits 0-4: {(predicted == labels[held_out]).float().mean():.3f}")
    encoder.save_pretrained(HERE)


if __name__ == "__main__":
    main()
