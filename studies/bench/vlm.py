"""Both stages of the small vision-language model: stage I trains the projector, stage II LoRA of uniform rank 8.

    python studies/bench/vlm.py --out studies/results/vlm.json

Prints accuracy by kind of question on test scenes and on scenes of another style, and the control with blank pictures. Claims:
stage II reaches .60 on emoji scenes; a step takes at most 1.5 s of CPU time on one thread; the saved adapter, loaded in plain
PEFT on the whole model, gives the same answers from pictures, one question at a time. Finished trainings are kept in
out/bench/vlm, so that an interrupted benchmark resumes. `--quick`: the shipped projector, ten steps, and no claim on accuracy.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _harness import Claim, plain, run_benchmark
from peft import PeftModel

import rankscope as rs
from rankscope.files import read_json, write_json
from rankscope.tasks.mobile_vlm import MobileLlava, build_mobile_vlm
from rankscope.tasks.scenes import IMAGE_TOKEN, N_IMAGE_TOKENS, draw_scenes, normalised, read_scenes
from rankscope.training import save_adapter

SCENES = Path(__file__).parents[2] / "data" / "scenes"
KEPT = Path("out") / "bench" / "vlm"
STEPS, RANK, RATE = 150, 8, 1e-3
ACCURACY, STEP_SECONDS, SAME = 0.60, 1.5, 0.98


def measure(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """Stage I, then stage II on both data sets, with pictures and without."""
    torch.set_num_threads(1)
    if quick:
        rows = stage_two("emoji-scenes", SCENES / "projector.safetensors", 10, blind=False)
    else:
        projector = KEPT / "projector.safetensors"
        if not projector.exists():
            KEPT.mkdir(parents=True, exist_ok=True)
            subprocess.run([sys.executable, SCENES / "train.py", "--out", projector], check=True)
        rows = []
        for name, blind in (
            ("emoji-scenes", False),
            ("emoji-scenes", True),
            ("digit-scenes", False),
            ("digit-scenes", True),
        ):
            file = KEPT / f"{name}{'-blind' if blind else ''}.json"
            if not file.exists():
                write_json(file, {"rows": plain(stage_two(name, projector, STEPS, blind=blind))})
            rows += read_json(file, what="rows")["rows"]
    trained = next(row for row in rows if row["split"] == "test" and row["steps"])
    claims = [
        Claim.at_most("CPU seconds of a step of stage II", trained["step_seconds"], STEP_SECONDS),
        Claim.at_least("share of equal answers in plain PEFT", trained["same_answers"], SAME),
        Claim.at_least("accuracy on emoji scenes after stage II", trained["accuracy"], ACCURACY),
    ]
    return rows, claims[:2] if quick else claims


def stage_two(name: str, projector: Path, steps: int, *, blind: bool) -> list[dict[str, Any]]:
    """Uniform LoRA in the language model: a row for each split, before the training and after it."""
    model = str(build_mobile_vlm(projector))
    task, shifted = (rs.load_task({"name": name, "model": model, "blind": blind, "test": t}) for t in ("test", "shift"))
    about: dict[str, Any] = {"task": name, "blind": blind}
    base = task.build_model()
    rows = [] if blind else [{**about, "split": "test", "steps": 0, **task.evaluate(base, "test")}]
    targets = rs.find_targets(base)
    uniform = rs.allocate("uniform", targets=targets, budget=rs.ParameterBudget.uniform(targets, RANK))
    times: list[float] = []
    trained, result = rs.train(
        task, uniform, steps=steps, learning_rate=RATE, on_step=lambda step: times.append(time.process_time())
    )
    about |= {"steps": steps, "parameters": result.parameters}
    about["step_seconds"] = (times[-1] - times[0]) / (len(times) - 1)
    for each in (task,) if blind else (task, shifted):
        rows.append({**about, "split": each.test, **each.evaluate(trained, "test")})
    if not blind:
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(trained, task, Path(folder) / "adapter")
            plain_model = PeftModel.from_pretrained(whole(model), Path(folder) / "adapter")
        rows[1]["same_answers"] = same_answers(task, trained, plain_model)
    return rows


def whole(folder: str) -> MobileLlava:
    """The model with its vision tower, as plain transformers loads it."""
    return MobileLlava.from_pretrained(folder, dtype=torch.bfloat16)


@torch.no_grad()
def same_answers(task: Any, trained: Any, whole_model: PeftModel, n_scenes: int = 20) -> float:
    """The share of test questions to which both give the same answer: packed and cached, and one by one from pictures."""
    rows = task._rows["test"][:n_scenes]
    packed = trained.eval()(**task._collate(rows)).logits.argmax(-1).tolist()
    table = read_scenes(task._scenes)
    table = table[table["split"] == "test"].head(n_scenes)
    alone = []
    for pixels, row in zip(normalised(draw_scenes(table)), rows, strict=True):
        for segment in sorted({*row["segments"]} - {0}):
            ids = [token for token, mine in zip(row["input_ids"], row["segments"], strict=True) if mine == segment]
            ids = torch.tensor([[IMAGE_TOKEN] * N_IMAGE_TOKENS + ids])
            logits = whole_model.eval()(input_ids=ids, pixel_values=pixels[None].to(torch.bfloat16)).logits
            alone.append(int(logits[0, -1].argmax()))
    return sum(a == b for a, b in zip(packed, alone, strict=True)) / len(alone)


if __name__ == "__main__":
    run_benchmark(measure, __doc__ or "")
