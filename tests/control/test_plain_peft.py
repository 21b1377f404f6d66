"""An adapter that the controller trained, loaded by plain PEFT where rankscope is not installed."""

import subprocess
import sys
from pathlib import Path

import torch

from rankscope.tasks import Task
from tests.control.trainers import Rows, controller_of, trainer

WITHOUT = """
import sys, torch
sys.modules["rankscope"] = None
from peft import PeftModel
base = torch.load("base.pt", weights_only=False)
model = PeftModel.from_pretrained(base, "adapter").eval()
with torch.no_grad():
    torch.testing.assert_close(model(pixel_values=torch.load("images.pt")).logits, torch.load("logits.pt"), rtol=0, atol=0)
print("same")
"""


def test_what_it_trained_loads_where_rankscope_is_not_installed(digits: Task, tmp_path: Path) -> None:
    run = trainer(digits, tmp_path / "run", save_strategy="no")
    run.train()
    assert "moved" in set(controller_of(run).decisions["action"])
    run.model.save_pretrained(str(tmp_path / "adapter"))
    images = Rows(digits).images[:16]
    with torch.no_grad():
        torch.save(run.model.eval()(pixel_values=images).logits, tmp_path / "logits.pt")
    torch.save(images, tmp_path / "images.pt")
    torch.save(digits.build_model(), tmp_path / "base.pt")
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip().endswith("same"), done.stderr
