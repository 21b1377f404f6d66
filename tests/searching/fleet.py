"""Several workers on one study: a task whose training takes milliseconds, worker processes, and what they did."""

from __future__ import annotations

import ctypes
import faulthandler
import json
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from torch import nn

import rankscope as rs
from rankscope.plotting import plot_ranks, save_plot

CONTEXT = multiprocessing.get_context("fork")  # what is imported already need not be imported again
TRAINING = rs.TrainingSettings(steps=2, learning_rate=0.01)
NAMED = sys.platform == "linux" and os.geteuid() == 0  # whether workers can have host names of their own
LONGEST = 300.0  # seconds that workers have


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


class Tiny:
    """Its metric is a sum over modules, by worth, and noise of the seed; each training adds a line to a log."""

    name, metric = "tiny", "score"

    def __init__(self, log: Path | None = None, seconds: float = 0.0) -> None:
        self._log, self._seconds, self._seed = log, seconds, 0

    def __getstate__(self) -> dict[str, Any]:
        return {}  # the same task, whatever its log

    def build_model(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"h": nn.ModuleList([Block() for _ in range(3)])})

    def train_batches(self, seed: int) -> Iterator[torch.Tensor]:
        self._seed = seed
        generator = torch.Generator().manual_seed(seed)
        for _ in range(4):
            yield torch.randn(8, 16, generator=generator)

    def loss(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        for block in model.get_submodule("base_model.model.h" if hasattr(model, "base_model") else "h"):
            batch = batch + block(batch)
        return batch.square().mean()

    def evaluate(self, model: nn.Module, split: str = "validation") -> dict[str, float]:
        ranks = [module.r.get("default", 0) for module in model.modules() if hasattr(module, "lora_A")]
        adapted = {name: module.r["default"] for name, module in model.named_modules() if hasattr(module, "lora_A")}
        if self._log is not None:
            line = json.dumps({"pid": os.getpid(), "seed": self._seed, "adapted": adapted, "at": time.time()})
            with self._log.open("a") as file:  # one write, at the end of the file: whole among those of others
                file.write(line + "\n")
        if self._seconds:
            time.sleep(self._seconds)
        worth = sum(np.log1p(rank) * (index + 1) for index, rank in enumerate(ranks))
        noise = np.random.default_rng([self._seed, *ranks]).normal(0.0, 0.1)
        return {"score": float(worth + noise), "loss": float(-worth)}


def profile_of(task: Tiny) -> rs.Profile:
    return rs.profile(task.build_model(), list(task.train_batches(0)), loss_fn=task.loss)


@dataclass(frozen=True)
class Fleet:
    """What some workers did."""

    results: list[dict[str, Any]]  # of each that ended well
    errors: list[str]
    trained: list[dict[str, Any]]  # lines of the log

    def doubles(self) -> list[Any]:
        """Trainings that were done more than once."""
        times = Counter((line["seed"], tuple(sorted(line["adapted"].items()))) for line in self.trained)
        return [each for each, count in times.items() if count > 1]


def take_host_name(name: str) -> None:
    """Give this process, and no other, another host name, as a container has it; nothing where only root of Linux may."""
    if not NAMED:
        return
    new_uts = 0x04000000  # CLONE_NEWUTS of sched.h
    if ctypes.CDLL(None, use_errno=True).unshare(new_uts):
        raise OSError(ctypes.get_errno(), "unshare")
    socket.sethostname(name)


def work(
    task: Tiny, profile: rs.Profile, storage: str, options: dict[str, Any], host: str, out: Path, outputs: Path | None
) -> None:
    """One worker: the search, its outputs where it writes any, and what it found as a file."""
    with out.with_suffix(".stacks").open("w") as stacks:  # where it stands if it never ends
        faulthandler.dump_traceback_later(LONGEST - 5.0, exit=True, file=stacks)
        take_host_name(host)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        torch.set_num_threads(1)
        try:
            budget = rs.ParameterBudget.uniform(profile.targets, 2)
            found = rs.search(task, budget=budget, profile=profile, storage=storage, training=TRAINING, **options)
            out.with_suffix(".writing").touch()
            if outputs is not None:
                write(found, outputs)
            told = {"trials": len(found.trials), "confirming_runs": found.confirming_runs, "steps": found.steps}
            told |= {"recommendation": found.recommendation.reason, "ranks": list(found.best_allocation.vector)}
            told |= {"finalists": [finalist.trial.number for finalist in found.finalists]}
            told |= {"origins": dict(Counter(trial.origin for trial in found.trials))}
        except rs.RankscopeError as error:
            told = {"error": str(error)}
        except Exception:  # a page instead of a line
            told = {"error": traceback.format_exc()}
        out.with_suffix(".half").write_text(json.dumps(told))
        out.with_suffix(".half").rename(out)
        faulthandler.cancel_dump_traceback_later()


def write(found: rs.SearchResult, folder: Path) -> None:
    """What `rankscope search` writes, in short."""
    found.best_allocation.to_json(folder / "allocation.json")
    save_plot(partial(plot_ranks, found.best_allocation), folder / "ranks.png")
    found.to_parquet(folder / "trials.parquet")


def start(
    n: int, folder: Path, storage: str, *, seconds: float = 0.0, outputs: Path | None = None, **options: Any
) -> list[Any]:
    """Start so many workers at once, named by where their results go, on two host names in turn."""
    task = Tiny(folder / "log.jsonl", seconds)
    profile = profile_of(Tiny())
    workers = []
    for _ in range(n):
        number = len(list(folder.glob("worker-*.stacks")))
        out = folder / f"worker-{number}.json"
        out.with_suffix(".stacks").touch()
        arguments = task, profile, storage, options, f"host-{number % 2}", out, outputs
        worker = CONTEXT.Process(target=work, args=arguments, name=out.stem)
        worker.start()
        workers.append(worker)
    return workers


def trained(folder: Path) -> list[dict[str, Any]]:
    """A line of the log for each training, so far."""
    log = folder / "log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def finish(workers: Sequence[Any], folder: Path) -> Fleet:
    """Wait for workers, and read what they did. Those that hung have an error that says where."""
    deadline = time.monotonic() + LONGEST
    for worker in workers:
        worker.join(max(0.1, deadline - time.monotonic()))
        if worker.is_alive():
            worker.kill()
    told = [json.loads(path.read_text()) for path in sorted(folder.glob("worker-*.json"))]
    errors = [each["error"] for each in told if "error" in each]
    errors += [stacks for path in folder.glob("worker-*.stacks") if (stacks := path.read_text())]
    return Fleet([each for each in told if "error" not in each], errors, trained(folder))
