"""What the controller costs: training time with it over training time without, and beside PEFT's AdaLoRA.

    python studies/bench/controller_cost.py --out studies/results/controller_cost.json

LoRA of rank 8, the same under the controller, and AdaLoRA (mean rank 8, from 12) take turns on the same batches, step by step, in
one process with one torch thread; times are of the CPU. Steps under the controller are told apart: watched (its hooks are on),
deciding (a decision and its resize follow), and plain ones. What each kind takes longer than the plain LoRA step beside
it (median) is weighed by the default schedule over 1,000 steps: 6 decisions of 8 watched steps each. For MiniLM a whole run
of 167 steps with its four decisions is measured too, sum over sum. About 12 minutes. `--quick`: MiniLM, fewer steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, count
from statistics import median
from time import process_time
from typing import Any

import torch
from _harness import Claim, run_benchmark
from torch import nn

import rankscope as rs
from rankscope.control import count_moved
from rankscope.settings import TrainingSettings
from rankscope.tasks import Task
from rankscope.training import AdaLora, Lora, Method

RANK, STEPS = 8, 1000
DEFAULTS = rs.ControllerSettings()
EVERY = DEFAULTS.every_of(STEPS)
ALPHA = 32.0


def measure(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """All rows and claims."""
    torch.set_num_threads(1)
    rows = [cost_by_kind("supersense", decisions=1 if quick else 3)]
    if not quick:
        rows.append(cost_by_kind("glosses", decisions=2))
    claims = []
    for row in rows:
        claims += [
            Claim.at_most(f"{row['model']}: training with the controller over without", row["ratio"], 1.03),
            Claim.at_most(f"{row['model']}: controller's step over AdaLoRA's", row["over_adalora"], 1.0),
        ]
    if not quick:
        rows.append(whole_run("supersense"))
        claims.append(
            Claim.at_most("supersense: a whole run with the controller over without", rows[-1]["ratio"], 1.03)
        )
    return rows, claims


class Training:
    """One method's training, a step at a time."""

    def __init__(self, task: Task, method: Method, steps: int) -> None:
        config = TrainingSettings(steps=steps, learning_rate=1e-3)
        torch.manual_seed(0)
        self.task = task
        self.model: nn.Module = method.adapt(task.build_model(), task, config, 0).train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=config.learning_rate)
        self.running = method.follow(self.model, self.optimizer, config, 0)

    def step(self, batch: Any) -> float:
        """CPU seconds of one step, what the method does after it included."""
        started = process_time()
        loss = self.task.loss(self.model, batch)
        loss.backward()
        self.optimizer.step()
        self.running.step(loss.detach())
        self.optimizer.zero_grad()
        return process_time() - started


def cost_by_kind(name: str, decisions: int) -> dict[str, Any]:
    """Medians of each kind of step, and their weighted sum."""
    task = rs.load_task(name)
    every = DEFAULTS.samples + 4  # 4 plain steps, then the watched ones, the last of which decides
    steps = every * (decisions + 1)
    plain, moving, adalora = _methods(
        task, rs.ControllerSettings(every=every, freeze_fraction=decisions * every / steps)
    )
    runs = [Training(task, method, steps) for method in (plain, moving, adalora)]
    batches = _endless(task)
    [run.step(next(batches)) for run in runs for _ in range(2)]  # warm-up; the controller has seen two steps
    kinds: dict[str, list[float]] = {"plain": [], "watched": [], "deciding": []}
    base, peer = [], []
    for step in range(3, every * decisions + 3):
        batch = next(batches)
        lora, controlled, other = _in_turn(runs, batch, step)
        base.append(lora)
        peer.append(other)
        place = step % every
        kind = "deciding" if place == 0 else "watched" if place > every - DEFAULTS.samples else "plain"
        kinds[kind].append(controlled - lora)
    n_decisions = int(DEFAULTS.freeze_fraction * STEPS) // EVERY
    n = {"deciding": n_decisions, "watched": n_decisions * (DEFAULTS.samples - 1)}
    n["plain"] = STEPS - sum(n.values())
    typical = median(base)
    extra = sum(n[kind] * max(median(values), 0.0) for kind, values in kinds.items())  # noise is not credited
    ratio = 1.0 + extra / (STEPS * typical)
    return {
        "model": name,
        "rank": RANK,
        "lora_s": typical,
        "extra_s": {kind: median(values) for kind, values in kinds.items()},
        "steps_of_1000": n,
        "ratio": ratio,
        "adalora_s": median(peer),
        "over_adalora": ratio * typical / median(peer),
        "ranks_moved": _moved(runs[1]),
    }


def whole_run(name: str) -> dict[str, Any]:
    """A short run with its decisions, beside the same steps without."""
    task = rs.load_task(name)
    steps = round(EVERY / DEFAULTS.freeze_fraction)
    plain, moving, _ = _methods(task, DEFAULTS)
    runs = [Training(task, plain, steps), Training(task, moving, steps)]
    batches = _endless(task)
    seconds = [_in_turn(runs, next(batches), step) for step in range(steps)]
    lora, controlled = (sum(column) for column in zip(*seconds, strict=True))
    decided = runs[1].running.decisions
    return {
        "model": name,
        "steps": steps,
        "lora_s": lora,
        "controlled_s": controlled,
        "ratio": controlled / lora,
        "decisions": 0 if decided is None else len(decided),
        "ranks_moved": _moved(runs[1]),
    }


def _in_turn(runs: list[Training], batch: Any, step: int) -> list[float]:
    """Seconds of each run's step on the batch; who comes first changes from step to step."""
    order = sorted(range(len(runs)), key=lambda place: (place + step) % len(runs))
    seconds = {place: runs[place].step(batch) for place in order}
    return [seconds[place] for place in range(len(runs))]


def _methods(task: Task, controller: rs.ControllerSettings) -> tuple[Method, Method, Method]:
    targets = rs.find_targets(task.build_model())
    uniform = rs.allocate("uniform", targets=targets, budget=rs.ParameterBudget.uniform(targets, RANK))
    return Lora(uniform), Lora(uniform, controller), AdaLora(targets, RANK, ALPHA)


def _endless(task: Task) -> Iterator[Any]:
    return chain.from_iterable(task.train_batches(seed) for seed in count())


def _moved(run: Training) -> int:
    decisions = run.running.decisions
    return 0 if decisions is None else count_moved(decisions)


if __name__ == "__main__":
    run_benchmark(measure, __doc__ or "")
