"""What a profile costs: its time against a LoRA training step, its memory against full gradients and against LoRA's state.

    python studies/bench/profile_cost.py --out studies/results/profile_cost.json

Time: forward, backward and all features of a batch, against forward and backward of the same frozen model with a rank-16
LoRA; both take turns, batch by batch, and their medians are compared. One thread. What a profile does once, after its last
batch (factorisations, weight features), is a row of its own. Memory: bytes of live tensors, counted by a dispatch mode, at the
peak of one profiled step over the peak of a plain forward and backward of the same frozen model.
`--quick`: digits and MiniLM, fewer batches; the LLaMA-shaped block at an eighth of its width.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from time import perf_counter
from typing import Any

import torch
from _harness import Claim, batches_of, run_benchmark
from peft import EvaConfig, LoraConfig, LoraGAConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import rankscope as rs
from rankscope.profiling import profile
from rankscope.profiling.sketch import SKETCH_SIZE, GradientAccumulator, RandomMatrices
from rankscope.tasks import Task

RANK = 16


def measure(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """All rows and claims."""
    torch.set_num_threads(1)
    names = ("digits-shift", "supersense") if quick else ("digits-shift", "supersense", "glosses")
    rows, claims = [], []
    for name in names:
        row = time_row(name, n_batches=12 if quick else 24)
        rows.append(row)
        claims.append(Claim.at_most(f"{name}: profiling step over rank-16 LoRA step", row["ratio"], 1.3))
    block = memory_row("llama-7b-block", *llama_block(512 if quick else 4096), peers=False)
    rows.append(block)
    share, state = block["extra"] / block["full_gradients"], block["extra"] / block["lora_32_state"]
    if not quick:  # at an eighth of the width, a sketch of the same size is a larger share
        claims += [
            Claim.at_most("LLaMA-7B block: extra peak over full gradients", share, 0.125),
            Claim.at_most("LLaMA-7B block: extra peak over rank-32 LoRA with AdamW", state, 1.5),
        ]
    claims.append(Claim.at_most("LLaMA-7B block: largest store over its full gradient", block["worst_module"], 1))
    if not quick:
        task = rs.load_task("glosses")
        row = memory_row("glosses", task.build_model(), batches_of(task, 4), task.loss, peers=True)
        rows.append(row)
        claims.append(Claim.at_most("SmolLM2: largest store over its full gradient", row["worst_module"], 1))
    return rows, claims


# --- time --------------------------------------------------------------------------------------------------------


def time_row(name: str, n_batches: int) -> dict[str, Any]:
    """Both kinds of step in turns on the same batches."""
    task = rs.load_task(name)
    model = task.build_model().eval().requires_grad_(False)
    targets = rs.find_targets(model)
    data = batches_of(task, n_batches)
    lora = get_peft_model(copy.deepcopy(model), LoraConfig(r=RANK, target_modules=[t.name for t in targets])).eval()
    plain, lora_times, profiled = [], [], []

    def interleaved() -> Iterator[Any]:
        """Times the other steps between two batches of the profile, and the profile's own from yield to yield."""
        for batch in data:
            lora_times.append(_timed(lambda batch=batch: _step(lora, task, batch)))
            with reached(model, targets[0].name):
                plain.append(_timed(lambda batch=batch: _step(model, task, batch)))
            start = perf_counter()
            yield batch
            profiled.append(perf_counter() - start)

    start = perf_counter()
    profile(model, interleaved(), targets=targets, loss_fn=task.loss)
    finish = perf_counter() - start - sum(profiled) - sum(lora_times) - sum(plain)
    warm = slice(2, None)
    ratio = median(p / q for p, q in zip(profiled[warm], lora_times[warm], strict=True))
    return {
        "model": name, "modules": len(targets), "batches": n_batches, "ratio": ratio,
        "profile_s": median(profiled[warm]), "lora_16_s": median(lora_times[warm]), "frozen_s": median(plain[warm]),
        "once_s": finish, "once_over_lora_steps": finish / median(lora_times[warm]),
    }  # fmt: skip


def _timed(step: Callable[[], None]) -> float:
    start = perf_counter()
    step()
    return perf_counter() - start


def _step(model: nn.Module, task: Task, batch: Any) -> None:
    task.loss(model, batch).backward()
    model.zero_grad()


@contextmanager
def reached(model: nn.Module, name: str) -> Iterator[None]:
    """A frozen model has no backward pass unless something asks for it: here, the output of the named module."""
    handle = model.get_submodule(name).register_forward_hook(lambda _m, _a, output: output.requires_grad_())
    try:
        yield
    finally:
        handle.remove()


# --- memory ------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that tensor operations make, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self._known = 0, 0, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {id(t.untyped_storage()) for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage(), known)
        return out

    def _see(self, storage: torch.UntypedStorage, inputs: set[int]) -> None:
        key = storage._cdata
        if key in self._known or id(storage) in inputs:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class Block(nn.Module):
    """The projections of one LLaMA-7B block, with plain attention between them."""

    def __init__(self, hidden: int, mlp: int) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(hidden, hidden, bias=False))
        self.gate_proj, self.up_proj = (nn.Linear(hidden, mlp, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(mlp, hidden, bias=False)
        self.heads = hidden // 128

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, hidden) to the same."""
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(attended.transpose(1, 2).flatten(2))
        return x + self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def llama_block(hidden: int) -> tuple[nn.Module, list[torch.Tensor], Callable[[nn.Module, torch.Tensor], torch.Tensor]]:
    """The block at its own width or a smaller one, and batches of 4 x 64 rows."""
    torch.manual_seed(0)
    model = Block(hidden, hidden * 11008 // 4096)
    return model, [torch.randn(4, 64, hidden) for _ in range(2)], lambda model, batch: model(batch).square().mean()


def memory_row(
    name: str, model: nn.Module, data: list[Any], loss: Callable[..., torch.Tensor], *, peers: bool
) -> dict[str, Any]:
    """Extra peaks in bytes."""
    targets = rs.find_targets(model)
    model = model.eval().requires_grad_(False)

    def plain() -> None:
        with reached(model, targets[0].name):
            for batch in data:
                loss(model, batch).backward()

    base = _peak(plain)
    profiled = _peak(lambda: profile(model, data, targets=targets, loss_fn=loss))
    gradients = 4 * sum(t.in_features * t.out_features for t in targets)
    lora = 4 * 4 * 32 * sum(t.rank_cost for t in targets)
    row = {
        "model": name, "modules": len(targets), "plain_peak": base, "profile_peak": profiled, "extra": profiled - base,
        "full_gradients": gradients, "lora_32_state": lora, "worst_module": _worst_module(targets),
    }  # fmt: skip
    if peers:
        row |= {f"{peer}_extra": _peak(run) - base for peer, run in _peers(model, targets, data, loss).items()}
    return row


def _peak(run: Callable[[], Any]) -> int:
    gc.collect()
    with LiveBytes() as counter:
        run()
    return counter.peak


def _worst_module(targets: tuple[rs.TargetModule, ...]) -> float:
    """The numbers that a gradient store keeps over those of the full gradient, at worst."""
    matrices = RandomMatrices(k=SKETCH_SIZE, seed=0)
    kept = []
    for t in targets:
        store = GradientAccumulator(t.in_features, t.out_features, matrices, torch.empty(0))
        kept.append(sum(tensor.numel() for tensor in store.kept) / (t.in_features * t.out_features))
    return max(kept)


def _peers(
    model: nn.Module, targets: tuple[rs.TargetModule, ...], data: list[Any], loss: Callable[..., torch.Tensor]
) -> dict[str, Callable[[], Any]]:
    """PEFT's EVA (stopped at once: its memory does not grow while it converges) and LoRA-GA on the same data."""
    names = [t.name for t in targets]

    def eva() -> None:
        config = LoraConfig(r=32, target_modules=names, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0, tau=0.0))
        wrapped = get_peft_model(copy.deepcopy(model), config)
        initialize_lora_eva_weights(wrapped, data)

    def lora_ga() -> None:
        config = LoraConfig(r=32, target_modules=names, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
        copied = copy.deepcopy(model).requires_grad_(True)

        def run() -> None:
            for batch in data:
                loss(copied, batch).backward()

        preprocess_loraga(copied, config, run)

    return {"eva": eva, "lora_ga": lora_ga}


if __name__ == "__main__":
    run_benchmark(measure, __doc__ or "")
