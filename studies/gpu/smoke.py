"""Whether rankscope does on a GPU what it does on a CPU, and what it costs there.

    python studies/gpu/smoke.py --out studies/results/gpu_smoke.json     # within 4 minutes on one GPU
    python studies/gpu/smoke.py --toy                                    # the same in small, within 2 minutes on a CPU
    python studies/gpu/smoke.py --part costs --out FILE                  # one part; FILE keeps the rows of the others
    python studies/gpu/smoke.py --part costs --shape 8b --out FILE       # costs at the shape of Llama 8B

Parts: `pipeline` profiles, allocates, trains with and without the controller and compares, on digits-shift (float32 weights
under bf16 autocast) and on a small Llama (bf16 weights), and asserts that models and batches are on the device and products in
bf16; `memory` trains again and again without the garbage collector; `costs` measures time and peak memory on a Llama with
random weights, beside PEFT's LoRA-GA and EVA; `controller` times training with the controller over training without.
Without a GPU the products still run in bf16, as on one.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import sys
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

from _harness import Claim, circumstances

import rankscope as rs
from rankscope import distributed as devices
from rankscope.files import write_json
from rankscope.tasks import Batch, Split, profile_task

RANK = 16
SHAPES = {
    "toy": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "intermediate_size": 128, "vocab_size": 512, "tie_word_embeddings": True},
    "1b": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
           "intermediate_size": 8192, "vocab_size": 128256, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
           "intermediate_size": 14336, "vocab_size": 128256, "tie_word_embeddings": False},
}  # fmt: skip
ROWS, TOKENS = 2, 512  # of a batch
LARGE_ROWS = 8  # of the batches that times are taken on as well: those of 2 rows are bound by launches
SMALL = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
         "intermediate_size": 512, "vocab_size": 512, "tie_word_embeddings": True}  # fmt: skip


class Progression:
    """A Llama with random bf16 weights, made on the device; its texts count on from a random number in random strides."""

    metric = "token_accuracy"
    head_modules = ()

    def __init__(self, name: str, shape: dict[str, Any], *, rows: int, tokens: int, n_batches: int = 16) -> None:
        self.name, self.shape, self.rows, self.tokens, self.n_batches = name, shape, rows, tokens, n_batches
        self._made: nn.Module | None = None

    def build_model(self) -> nn.Module:
        """The same weights at every call."""
        from transformers import LlamaConfig, LlamaForCausalLM

        if self._made is None:
            config = LlamaConfig(**self.shape, max_position_embeddings=4096, use_cache=False)
            before = torch.get_default_dtype()
            torch.set_default_dtype(torch.bfloat16)
            try:
                with devices.seeded(0), torch.device(devices.best_device()):
                    self._made = LlamaForCausalLM(config).eval().requires_grad_(False)
            finally:
                torch.set_default_dtype(before)
        return copy.deepcopy(self._made)

    def train_batches(self, seed: int) -> Iterator[Batch]:
        """One epoch."""
        generator = torch.Generator().manual_seed(seed)
        vocabulary = self.shape["vocab_size"]
        for _ in range(self.n_batches):
            start = torch.randint(vocabulary, (self.rows, 1), generator=generator)
            stride = torch.randint(1, 5, (self.rows, 1), generator=generator)
            ids = (start + stride * torch.arange(self.tokens)) % vocabulary
            yield {"input_ids": ids, "labels": ids.clone()}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy of the next token."""
        return model(**batch).loss

    def evaluate(self, model: nn.Module, split: Split = "validation") -> dict[str, float]:
        """On two batches that training never sees."""
        was, device = model.training, devices.batch_device(model)
        model.eval()
        loss, right = [], []
        with torch.no_grad():
            for batch in list(self.train_batches(10**6 + (split == "test")))[:2]:
                ids = batch["input_ids"].to(device)
                logits = model(input_ids=ids).logits[:, :-1]
                assert logits.dtype == torch.float32, "metrics are computed in float32"
                loss.append(nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
                right.append((logits.argmax(-1) == ids[:, 1:]).float().mean())
        model.train(was)
        return {"token_accuracy": float(torch.stack(right).mean()), "loss": float(torch.stack(loss).mean())}


class Watched:
    """A task that asserts, at every loss and evaluation, that everything is on the device and in bf16."""

    def __init__(self, task: Any) -> None:
        self.task, self.name, self.metric = task, task.name, task.metric
        self.head_modules, self.train_batches = task.head_modules, task.train_batches
        self.losses = self.evaluations = 0
        self.built: list[weakref.ref[nn.Module]] = []

    def build_model(self) -> nn.Module:
        """The task's own, remembered weakly."""
        model = self.task.build_model()
        self.built.append(weakref.ref(model))
        return model

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The task's own."""
        self.losses += 1
        _check_placed([*model.parameters(), *model.buffers(), *batch.values()])
        return self.task.loss(model, batch)

    def evaluate(self, model: nn.Module, split: Split = "validation") -> dict[str, float]:
        """The task's own."""
        self.evaluations += 1
        _check_placed(model.parameters())
        return self.task.evaluate(model, split)


def _check_placed(tensors: Any) -> None:
    kind = devices.best_device().type
    assert {tensor.device.type for tensor in tensors} == {kind}, f"all tensors must be on {kind}"
    assert torch.is_autocast_enabled(kind), "products must run in mixed precision"
    assert torch.get_autocast_dtype(kind) == torch.bfloat16, "products must run in bf16"


# --- parts -------------------------------------------------------------------------------------------------------


def pipeline(toy: bool, _shape: str) -> tuple[list[dict[str, Any]], list[Claim]]:
    """Profile, allocation, training with and without the controller, and a comparison, on two tasks."""
    rows, claims = [], []
    small = SHAPES["toy"] if toy else SMALL
    tasks = (
        (rs.load_task("digits-shift"), 2, 30, ("one-shot", "controller", "eva"), 0.02),
        (Progression("small-llama", small, rows=8, tokens=32), 8, 20 if toy else 100, ("one-shot", "controller"), 1e-2),
    )
    for plain, rank, steps, methods, rate in tasks:
        task: Any = Watched(plain)
        start = time.perf_counter()
        targets = rs.find_targets(task.build_model())
        budget = rs.ParameterBudget.uniform(targets, rank)
        profile = profile_task(task, targets=targets, n_batches=6, head_steps=20)
        n_profiled = task.losses
        allocation = rs.allocate("one-shot", targets=targets, budget=budget, profile=profile)
        uniform = rs.allocate("uniform", targets=targets, budget=budget)
        config = rs.TrainingSettings(steps=steps, learning_rate=rate)
        before = rs.train(task, uniform, rs.TrainingSettings(steps=1, learning_rate=1e-9))[1].metrics
        _, static = rs.train(task, allocation, config)
        _, moved = rs.train(task, uniform, config, controller=rs.ControllerSettings(every=5))
        found = rs.compare(task, methods, budget=budget, targets=targets, profile=profile,
                           training=rs.TrainingSettings(steps=10, learning_rate=rate), seeds=range(2))  # fmt: skip
        in_workers = rs.compare(plain, ["uniform"], budget=budget, targets=targets, seeds=range(2), n_jobs=2,
                                training=rs.TrainingSettings(steps=10, learning_rate=rate))  # fmt: skip
        assert n_profiled
        assert task.evaluations
        rows.append(
            {"task": task.name, "modules": len(targets), "budget": budget.limit, "batches_seen": task.losses,
             "evaluations_seen": task.evaluations, "loss_before": before["loss"], "loss_one_shot": static.metrics["loss"],
             "loss_controller": moved.metrics["loss"], "decisions": len(moved.decisions),
             "compared": found.runs.groupby("method", sort=False)["test"].mean().to_dict(),
             "uniform_in_workers": float(in_workers.runs["test"].mean()),
             "peak_bytes": int(found.runs["peak_memory"].max()), "seconds": time.perf_counter() - start}
        )  # fmt: skip
        for what, result in (("one-shot", static), ("controller", moved)):
            ratio = result.metrics["loss"] / before["loss"]
            claims.append(Claim.at_most(f"{task.name}: loss after {what} training over before", ratio, 1.0))
    return rows, claims


def memory(toy: bool, _shape: str) -> tuple[list[dict[str, Any]], list[Claim]]:
    """Bytes in use after each of several runs, without the garbage collector."""
    task: Any = Watched(Progression("small-llama", SHAPES["toy"] if toy else SMALL, rows=8, tokens=32))
    targets = rs.find_targets(task.build_model())
    uniform = rs.allocate("uniform", targets=targets, budget=rs.ParameterBudget.uniform(targets, RANK))
    config = rs.TrainingSettings(steps=10, learning_rate=1e-3)
    runs: list[Callable[[], object]] = [
        lambda: rs.train(task, uniform, config),
        lambda: rs.train(task, uniform, config, controller=rs.ControllerSettings(every=3)),
        lambda: profile_task(task, targets=targets, n_batches=3),
    ]
    used = []
    for run in runs:  # what libraries keep for good
        run()
    gc.collect()
    gc.disable()
    try:
        start = _bytes_in_use()
        for run in 2 * runs:
            run()
            used.append(_bytes_in_use() - start)
        alive = sum(ref() is not None for ref in task.built)
    finally:
        gc.enable()
    row = {"runs": len(used), "bytes_left_after_each": used, "models_built": len(task.built), "models_alive": alive}
    return [row], [
        Claim.at_most("models alive after their runs", alive, 0),
        Claim.at_most("bytes left by all runs", used[-1], 2**20),
    ]


def costs(toy: bool, shape: str) -> tuple[list[dict[str, Any]], list[Claim]]:
    """Time of a profiled step over a rank-16 LoRA step, and the peaks of profile, LoRA, LoRA-GA and EVA."""
    shape = "toy" if toy else shape
    deadline = time.perf_counter() + 150
    task = Progression(f"llama-{shape}", SHAPES[shape], rows=ROWS, tokens=32 if toy else TOKENS, n_batches=12)
    say(f"building {task.name}")
    model = task.build_model()
    task._made = None  # one copy is enough
    targets = rs.find_targets(model)
    row: dict[str, Any] = {"model": task.name, "parameters": sum(p.numel() for p in model.parameters()),
                           "modules": len(targets), "batch": [ROWS, task.tokens]}  # fmt: skip
    data = [devices_batch(batch) for batch in task.train_batches(0)]
    for name, run in _peaks(model, targets, task, data):
        if time.perf_counter() > deadline:
            say(f"{name}: left out, the time is up")
            continue
        gc.collect()
        _empty_cache()
        try:
            base = _bytes_in_use()
            row[f"{name}_peak"] = _peak(run) - base
            say(f"{name}: {row[f'{name}_peak'] / 2**30:.3f} GiB above the weights")
        except torch.OutOfMemoryError as error:
            row[f"{name}_peak"] = None
            say(f"{name}: {error}")
    row["weights"] = sum(p.numel() * p.element_size() for p in model.parameters())
    row["target_gradients_in_weights_type"] = sum(2 * t.in_features * t.out_features for t in targets)
    large = Progression(task.name, SHAPES[shape], rows=LARGE_ROWS, tokens=task.tokens, n_batches=8)
    rows, claims = [row], []
    for batches in (data[:8], [devices_batch(batch) for batch in large.train_batches(0)]):
        if time.perf_counter() > deadline:
            say("times: left out, the time is up")
            break
        rows.append({"model": task.name, **_times(model, targets, task, batches)})
    if len(rows) == 3:
        what = f"{task.name}: profiled step over rank-16 LoRA step, {LARGE_ROWS} rows of {task.tokens} tokens"
        claims.append(Claim.at_most(what, rows[2]["ratio"], 1.3))
    if row.get("lora_ga_peak") and row.get("profile_peak"):
        ratio = row["profile_peak"] / row["lora_ga_peak"]
        claims.append(Claim.at_most(f"{task.name}: peak of the profile over LoRA-GA's", ratio, 1.0))
    return rows, claims if not toy else []


def controller(toy: bool, shape: str) -> tuple[list[dict[str, Any]], list[Claim]]:
    """Time of the steps with the controller over those without, in turns."""
    shape = "toy" if toy else shape
    task = Progression(f"llama-{shape}", SHAPES[shape], rows=ROWS, tokens=32 if toy else TOKENS)
    targets = rs.find_targets(task.build_model())
    uniform = rs.allocate("uniform", targets=targets, budget=rs.ParameterBudget.uniform(targets, RANK))
    config = rs.TrainingSettings(steps=20 if toy else 100, learning_rate=1e-4)
    taken: dict[str, list[float]] = {"without": [], "with": []}
    moved = decisions = 0
    for name in ("without", "with", "without", "with"):
        stamps: list[float] = []

        def stamp(step: int, stamps: list[float] = stamps) -> None:
            if step in (2, config.steps):
                _synchronize()
                stamps.append(time.perf_counter())

        chosen = rs.ControllerSettings() if name == "with" else None
        _, result = rs.train(task, uniform, config, controller=chosen, on_step=stamp)
        taken[name].append((stamps[1] - stamps[0]) / (config.steps - 2))
        if result.decisions is not None:
            decisions, moved = len(result.decisions), int(result.allocation.vector != uniform.vector)
        say(f"{name} controller: {1000 * taken[name][-1]:.1f} ms a step")
    ratio = min(taken["with"]) / min(taken["without"])
    row = {"model": task.name, "steps": config.steps, "rank": RANK, "decisions": decisions, "ranks_moved": bool(moved),
           "step_s": min(taken["without"]), "step_with_controller_s": min(taken["with"]), "all_s": taken,
           "ratio": ratio}  # fmt: skip
    claim = Claim.at_most(f"{task.name}: training step with the controller over without", ratio, 1.1)
    return [row], [] if toy else [claim]


PARTS = {"pipeline": pipeline, "memory": memory, "costs": costs, "controller": controller}


# --- costs -------------------------------------------------------------------------------------------------------


def _peaks(
    model: nn.Module, targets: Sequence[rs.TargetModule], task: Any, data: list[Batch]
) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is measured, each on the one model and leaving it as it was."""
    yield "frozen", lambda: _frozen_step(model, task, data[0])
    yield "lora_16", lambda: _lora_steps(model, targets, task, data[:3])
    for size in (56, 128):  # the second for budgets of about rank 64
        yield (
            f"profile_{size}" if size != 56 else "profile",
            lambda size=size: rs.profile(model, data[:3], targets=targets, loss_fn=_mixed(task), sketch_size=size),
        )
    yield "lora_ga", lambda: _lora_ga(model, targets, task, data[:2])
    if len(targets) < 200:  # on a GPU its SVDs take half a minute a batch at 1B, and minutes at 8B
        yield "eva", lambda: _eva(model, targets, data[:2])


def _mixed(task: Any) -> Callable[[nn.Module, Batch], Tensor]:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with devices.mixed_precision(model):
            return task.loss(model, batch)

    return loss


def _frozen_step(model: Any, task: Any, batch: Batch) -> None:
    """A frozen model has no backward pass unless something asks for it: here, the embedded tokens."""
    handle = model.get_input_embeddings().register_forward_hook(lambda _m, _a, output: output.requires_grad_())
    try:
        _mixed(task)(model, batch).backward()
    finally:
        handle.remove()


def _lora_steps(model: nn.Module, targets: Sequence[rs.TargetModule], task: Any, data: list[Batch]) -> None:
    """Training steps of a rank-16 LoRA with AdamW, taken off again."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(r=RANK, target_modules=[t.name for t in targets]))
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad])
    for batch in data:
        _mixed(task)(wrapped, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    wrapped.unload()


def _lora_ga(model: nn.Module, targets: Sequence[rs.TargetModule], task: Any, data: list[Batch]) -> None:
    """PEFT's full gradients; by hand, as PEFT takes them, where PEFT is older than LoRA-GA."""
    modules = [model.get_submodule(t.name) for t in targets]

    def run() -> None:
        for batch in data:
            _mixed(task)(model, batch).backward()

    try:
        from peft import LoraConfig, LoraGAConfig
        from peft.tuners.lora.loraga import preprocess_loraga
    except ImportError:
        for module in modules:
            module.weight.requires_grad_(True)
        run()
    else:
        names = [t.name for t in targets]
        config = LoraConfig(r=RANK, target_modules=names, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
        preprocess_loraga(model, config, run)
    for module in modules:
        module.weight.requires_grad_(False)
        module.weight.grad = None
        module.__dict__.pop("_peft_loraga_grad", None)


def _eva(model: nn.Module, targets: Sequence[rs.TargetModule], data: list[Batch]) -> None:
    """PEFT's EVA, stopped at once: its memory does not grow while it converges."""
    from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights

    config = LoraConfig(
        r=RANK, target_modules=[t.name for t in targets], init_lora_weights="eva",
        eva_config=EvaConfig(rho=1.0, tau=0.0),
    )  # fmt: skip
    wrapped = get_peft_model(model, config)
    inputs = [{"input_ids": b["input_ids"], "attention_mask": torch.ones_like(b["input_ids"])} for b in data]
    initialize_lora_eva_weights(wrapped, inputs, show_progress_bar=False)
    wrapped.unload()


def _times(model: nn.Module, targets: Sequence[rs.TargetModule], task: Any, data: list[Batch]) -> dict[str, Any]:
    """Forward and backward of the profile and of a rank-16 LoRA, in turns on the same batches."""
    from peft import LoraConfig, get_peft_model

    loss = _mixed(task)
    lora = get_peft_model(copy.deepcopy(model), LoraConfig(r=RANK, target_modules=[t.name for t in targets])).eval()
    plain, adapted, profiled = [], [], []

    def lora_step(batch: Batch) -> None:
        loss(lora, batch).backward()
        lora.zero_grad()

    def interleaved() -> Iterator[Batch]:
        for batch in data:
            adapted.append(_timed(lambda batch=batch: lora_step(batch)))
            plain.append(_timed(lambda batch=batch: _frozen_step(model, task, batch)))
            _synchronize()
            start = time.perf_counter()
            yield batch
            _synchronize()
            profiled.append(time.perf_counter() - start)

    start = time.perf_counter()
    rs.profile(model, interleaved(), targets=targets, loss_fn=loss, sketch_size=56)
    _synchronize()
    once = time.perf_counter() - start - sum(profiled) - sum(adapted) - sum(plain)
    warm = slice(2, None)
    ratio = median(p / q for p, q in zip(profiled[warm], adapted[warm], strict=True))
    say(
        f"profiled step {1000 * median(profiled[warm]):.1f} ms, LoRA step {1000 * median(adapted[warm]):.1f} ms: {ratio:.2f}"
    )
    return {
        "batch": list(data[0]["input_ids"].shape), "ratio": ratio,
        "profile_s": median(profiled[warm]), "lora_16_s": median(adapted[warm]),
        "frozen_s": median(plain[warm]), "once_s": once, "once_over_lora_steps": once / median(adapted[warm]),
    }  # fmt: skip


def _timed(step: Callable[[], None]) -> float:
    _synchronize()
    start = time.perf_counter()
    step()
    _synchronize()
    return time.perf_counter() - start


# --- the device --------------------------------------------------------------------------------------------------


def devices_batch(batch: Batch) -> dict[str, Tensor]:
    """The batch on the device."""
    return {key: value.to(devices.best_device()) for key, value in batch.items()}


def _on_gpu() -> bool:
    return devices.best_device().type == "cuda"


def _synchronize() -> None:
    if _on_gpu():
        torch.cuda.synchronize()


def _empty_cache() -> None:
    if _on_gpu():
        torch.cuda.empty_cache()


def _bytes_in_use() -> int:
    if _on_gpu():
        _synchronize()
        return torch.cuda.memory_allocated()
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _live_tensors()}.values())


def _live_tensors() -> list[Tensor]:
    return [found for found in gc.get_objects() if type(found) in (Tensor, nn.Parameter)]


def _peak(run: Callable[[], object]) -> int:
    """Bytes in use at the peak, the model's weights included."""
    if _on_gpu():
        torch.cuda.reset_peak_memory_stats()
        run()
        _synchronize()
        return torch.cuda.max_memory_allocated()
    from profile_cost import LiveBytes

    base = _bytes_in_use()
    with LiveBytes() as counter:
        run()
    return base + counter.peak


@contextmanager
def bf16_without_a_gpu() -> Iterator[None]:
    """Mixed precision on the CPU, which by itself has none."""
    before = devices.mixed_dtype
    if not _on_gpu():
        devices.mixed_dtype = lambda device: torch.bfloat16
    try:
        yield
    finally:
        devices.mixed_dtype = before


def _card() -> str:
    return torch.cuda.get_device_name() if _on_gpu() else "none: CPU"


def say(text: str) -> None:
    """Progress, with the seconds since the start."""
    print(f"[{time.perf_counter() - STARTED:6.1f} s] {text}", flush=True)


STARTED = time.perf_counter()


def main() -> int:
    """Runs the parts, writes after each, and returns 1 where one failed or a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="tiny models, for a CPU")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this; may be given several times")
    parser.add_argument("--shape", choices=("1b", "8b"), default="1b", help="of costs and controller")
    parser.add_argument("--out", type=Path, help="write the result as JSON; rows of parts that are not run are kept")
    given = parser.parse_args()
    say(f"device: {devices.best_device()} ({_card()}), torch {torch.__version__}")
    rows, claims = _kept(given.out)
    failed = False
    with bf16_without_a_gpu():
        for name in given.part or PARTS:
            key = f"{name}-8b" if given.shape == "8b" and name in ("costs", "controller") else name
            say(f"part {key}")
            start = time.perf_counter()
            try:
                found, kept = PARTS[name](given.toy, given.shape)
            except Exception:
                failed = True
                traceback.print_exc()
                found, kept = [{"failed": traceback.format_exc(limit=-1).strip().splitlines()[-1]}], []
            seconds = time.perf_counter() - start
            rows = [r for r in rows if r["part"] != key] + [{"part": key, "part_seconds": seconds, **r} for r in found]
            claims = [c for c in claims if c["part"] != key] + [{"part": key, **asdict(claim)} for claim in kept]
            for row in found:
                say(json.dumps(row))
            for claim in kept:
                say(f"{'holds' if claim.holds else 'FAILS'}: {claim.name}: {claim.value:.4g} ({claim.bound})")
            if given.out:
                about = circumstances()
                about["machine"]["card"] = _card()
                write_json(given.out, {**about, "rows": rows, "claims": claims})
            gc.collect()
            _empty_cache()
    say(f"done{', with failures' if failed else ''}; wrote {given.out}" if given.out else "done")
    return int(failed or not all(claim["holds"] for claim in claims))


def _kept(out: Path | None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    if out is None or not out.exists():
        return [], []
    earlier = json.loads(out.read_text())
    return earlier["rows"], earlier["claims"]


if __name__ == "__main__":
    sys.exit(main())
