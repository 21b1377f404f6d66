"""Both stages of the small vision-language model: stage I trains the projector, stage II LoRA of uniform rank 8.

    python studies/bench/vlm.py --out studies/results/vlm.json

Prints accuracy by kind of question on test scenes and on scenes of another style, and the control with blank pictures. Claims:
stage II reaches .60 on emoji scenes; a step takes at most 1.5 s of CPU time on one thread; the saved adapter, loaded in plain
PEFT on the whole model in float32, gives the same answers from pictures, one question at a time. Finished trainings are kept in
out/bench/vlm, so that an interrupted benchmark resumes. `--quick`: the shipped projector, ten steps, a tenth of the scenes to
evaluate on, and no claim on accuracy.
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
ACCURACY, STEP_SECONDS = 0.60, 1.5


def measure(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """Stage I, then stage II on both data sets, with pictures and without."""
    torch.set_num_threads(1)
    if quick:
        rows = stage_two("emoji-scenes", SCENES / "projector.safetensors", 10, blind=False, fraction=0.1)
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
    same = min(row["same_answers_float32"] for row in rows if "same_answers_float32" in row)
    claims = [
        Claim.at_most("CPU seconds of a step of stage II", trained["step_seconds"], STEP_SECONDS),
        Claim.at_least("share of equal answers in plain PEFT, float32", same, 1.0),
        Claim.at_least("accuracy on emoji scenes after stage II", trained["accuracy"], ACCURACY),
    ]
    return rows, claims[:2] if quick else claims


def stage_two(name: str, projector: Path, steps: int, *, blind: bool, fraction: float = 1.0) -> list[dict[str, Any]]:
    """Uniform LoRA in the language model: a row for each split, before the training and after it."""
    model = str(build_mobile_vlm(projector))
    options = {"name": name, "model": model, "blind": blind, "evaluation_fraction": fraction}
    task, shifted = (rs.load_task({**options, "test": split}) for split in ("test", "shift"))
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
            for dtype in ("bfloat16", "float32"):
                rows[1] |= agreement(task, trained, Path(folder) / "adapter", dtype)
    return rows


@torch.no_grad()
def agreement(task: Any, trained: Any, adapter: Path, dtype: str, n_scenes: int = 20) -> dict[str, float]:
    """How plain PEFT on the whole model answers test questions, one by one from pictures, beside the trained model's packed way.

    In float32 the packed way goes through the reloaded model too, with the embeddings of all pictures computed before. By dtype:
    the share of equal answers; the root mean square of the difference between the two ways' logits; and, where answers differ,
    the most by which a way prefers its own answer to the other's.
    """
    whole = MobileLlava.from_pretrained(task.folder, dtype=getattr(torch, dtype))
    theirs = PeftModel.from_pretrained(whole, adapter).eval()
    table = read_scenes(task._scenes)
    pixels = normalised(draw_scenes(table[table["split"] == "test"].head(n_scenes))).to(whole.dtype)
    rows = task._rows["test"][:n_scenes]
    batch, ours = task._collate(rows), trained.eval()
    if dtype == "float32":
        batch["image_embeds"] = whole.model.multi_modal_projector(whole.patch_features(pixels))
        ours = theirs
    packed = ours(**batch).logits.float()
    found = []
    for picture, row in zip(pixels, rows, strict=True):
        for segment in sorted({*row["segments"]} - {0}):
            ids = [token for token, mine in zip(row["input_ids"], row["segments"], strict=True) if mine == segment]
            ids = torch.tensor([[IMAGE_TOKEN] * N_IMAGE_TOKENS + ids])
            found.append(theirs(input_ids=ids, pixel_values=picture[None]).logits[0, -1].float())
    alone = torch.stack(found)
    a, b = (logits.argmax(-1, keepdim=True) for logits in (packed, alone))
    preferred = torch.cat([packed.gather(1, a) - packed.gather(1, b), alone.gather(1, b) - alone.gather(1, a)])
    return {
        f"same_answers_{dtype}": float((a == b).float().mean()),
        f"logits_differ_by_{dtype}": float((packed - alone).square().mean().sqrt()),
        f"preferred_by_at_most_{dtype}": float(preferred.max()),
    }


if __name__ == "__main__":
    run_benchmark(measure, __doc__ or "")
