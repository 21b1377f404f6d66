"""How the time grows with the number of target modules, from 600 to 19,200: nothing is quadratic.

    python studies/bench/large_inventories.py --out studies/results/large_inventories.json

Issue 22: twice as many modules take at most 2.3 times the time. Two inventories: `blocks`, a model that gets deeper, and
`experts`, 24 blocks of a mixture whose experts grow in number. Times are CPU seconds in the program itself (user time), the
median of repeats: what the system takes to find memory depends on what else runs. A claim is the largest factor from one size
to twice the size. Profiles and runs are drawn at random: only their size matters here.

`--quick`: 600 to 2,400 modules, experts only, and the mean factor of the two doublings.
"""

from __future__ import annotations

import gc
import json
import resource
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
from _harness import Claim, run_benchmark
from peft import LoraConfig

import rankscope as rs
from rankscope.comparison import read_comparison, summarise, write_report
from rankscope.naming import describe_modules
from rankscope.performance import rank_features
from rankscope.plotting import plot_energy, plot_flow, plot_ranks, plot_spectra, plot_trajectories, save_plot
from rankscope.profiling import read_profile
from rankscope.searching import group_by_depth

SIZES = (600, 1200, 2400, 4800, 9600, 19200)
MOST_GROWTH, REPEATS = 2.3, 3
SLOW = ("plots", "report")  # seconds each: timed once
ATTENTION = {"q_proj": (1024, 1024), "k_proj": (1024, 256), "v_proj": (1024, 256), "o_proj": (1024, 1024)}
EXPERT = {"gate_proj": (1024, 768), "up_proj": (1024, 768), "down_proj": (768, 1024)}
N_BLOCKS, N_VALUES = 24, 16
SPEC = {"study": "s", "task": "s", "metric": "accuracy", "variant": "", "factor": 1.0, "role": "reported", "steps": 1}


def blocks_of(n: int) -> list[tuple[str, int, int, int]]:
    """Name, inputs, outputs and block of n modules in blocks of six."""
    roles = {**ATTENTION, "gate_proj": (1024, 2816), "up_proj": (1024, 2816)}
    return [(f"model.layers.{b}.part.{role}", *shape, b) for b in range(n // 6) for role, shape in roles.items()]


def experts_of(n: int) -> list[tuple[str, int, int, int]]:
    """The same of 24 blocks with as many experts as make n modules."""
    found = []
    for b in range(N_BLOCKS):
        found += [(f"model.layers.{b}.self_attn.{role}", *shape, b) for role, shape in ATTENTION.items()]
        for number in range(n // N_BLOCKS - len(ATTENTION)):
            role, shape = list(EXPERT.items())[number % 3]
            found.append((f"model.layers.{b}.mlp.experts.{number // 3}.{role}", *shape, b))
    return found


class Inventory:
    """One inventory of n modules, and what the parts need of it."""

    def __init__(self, kind: str, n: int, folder: Path) -> None:
        rows = {"blocks": blocks_of, "experts": experts_of}[kind](n)
        self.names, rng = [name for name, *_ in rows], np.random.default_rng(0)
        self.targets = tuple(
            rs.TargetModule(name=name, in_features=i, out_features=o, block=b, role=name.rpartition(".")[2])
            for name, i, o, b in rows
        )
        self.folder, self.budget = folder, rs.ParameterBudget.uniform(self.targets, 8)
        spectra = np.sort(rng.gamma(1.0, size=(n, N_VALUES)))[:, ::-1] * rng.gamma(1.0, size=(n, 1))
        self.profile = profile_of(self.targets, spectra)
        self.gains = {target.name: values**2 for target, values in zip(self.targets, spectra, strict=True)}
        self.random = rs.allocate("random", targets=self.targets, budget=self.budget)
        self.uniform = rs.allocate("uniform", targets=self.targets, budget=self.budget)
        self.one_each = LoraConfig(target_modules=self.names, r=3, rank_pattern=dict(self.random.ranks))
        self.decisions = pd.DataFrame(
            [
                {
                    "step": 5 * step,
                    "action": "moved",
                    "modules": tuple(self.names),
                    "ranks_before": a.vector,
                    "ranks_after": b.vector,
                }
                for step, (a, b) in enumerate([(self.uniform, self.random), (self.random, self.uniform)], start=1)
            ]
        )

    def allocate(self) -> None:
        """Water-filling on the profile's spectra."""
        rs.allocate("one-shot", targets=self.targets, budget=self.budget, profile=self.profile)

    def draw_random(self) -> None:
        """Shares drawn at random."""
        rs.allocate("random", targets=self.targets, budget=self.budget, seed=1)

    def features(self) -> None:
        """The performance model's features: made, of ten allocations, and read back as gains."""
        groups = group_by_depth(self.targets)
        found = rank_features(self.targets, self.budget, gains=self.gains, groups=groups)
        found.transform([self.random.vector] * 10)
        found.gains(np.ones(len(found.names)))

    def as_json(self) -> None:
        """allocation.json, there and back."""
        self.random.to_json(self.folder / "allocation.json")
        rs.RankAllocation.from_json(self.folder / "allocation.json")

    def patterns(self) -> None:
        """A PEFT config, there and back."""
        rs.RankAllocation.from_lora_config(self.random.to_lora_config(), self.targets)

    def patterns_of_others(self) -> None:
        """A PEFT config with one pattern for each module, as other tools write it."""
        rs.RankAllocation.from_lora_config(self.one_each, self.targets)

    def names_read(self) -> None:
        """Tower, block and role, from the names."""
        describe_modules(self.names)

    def profile_kept(self) -> None:
        """profile.parquet, there and back."""
        read_profile(self.profile.to_parquet(self.folder / "profile.parquet"))

    def plots(self) -> None:
        """Ranks, energy, spectra, a controller's moves and the flow of the budget, as PNGs."""
        plots: list[Callable[..., Any]] = [
            partial(plot_ranks, self.uniform, self.random),
            partial(plot_energy, self.profile),
            partial(plot_spectra, self.profile),
            partial(plot_trajectories, self.decisions, self.targets),
            partial(plot_flow, self.decisions, self.targets),
        ]
        for plot in plots:
            save_plot(plot, self.folder / "figure.png")

    def report(self) -> None:
        """A comparison of two methods on three seeds: comparison.parquet read, the page and its pictures written."""
        rows = [
            {
                **SPEC,
                "method": each.strategy,
                "budget": self.budget.limit,
                "seed": seed,
                "learning_rate": 0.1,
                "validation": 0.5,
            }
            | {
                "test": 0.5 + 0.01 * seed * (each is self.random),
                "parameters": each.parameters,
                "n_moved": 0,
                "wall_seconds": 1.0,
            }
            | {"peak_memory": 1, "revision": "r", "ranks": json.dumps(dict(each.ranks)), "cost_steps": 0, "schema": 2}
            for each in (self.uniform, self.random)
            for seed in range(3)
        ]
        pd.DataFrame(rows).to_parquet(self.folder / "comparison.parquet")
        runs = read_comparison(self.folder / "comparison.parquet")
        write_report(self.folder, runs, summarise(runs), targets=self.targets)


PARTS: dict[str, Callable[[Inventory], None]] = {
    "allocate one-shot": Inventory.allocate,
    "allocate random": Inventory.draw_random,
    "features": Inventory.features,
    "JSON": Inventory.as_json,
    "patterns": Inventory.patterns,
    "patterns, one a module": Inventory.patterns_of_others,
    "names": Inventory.names_read,
    "profile file": Inventory.profile_kept,
    "plots": Inventory.plots,
    "report": Inventory.report,
}


def profile_of(targets: tuple[rs.TargetModule, ...], spectra: np.ndarray) -> rs.Profile:
    """A profile with these singular values."""
    n = len(targets)
    energy = (spectra**2).sum(axis=1)
    fields = {"module": "name", "tower": "tower", "block": "block", "role": "role", "kind": "kind"}
    fields |= {name: name for name in ("in_features", "out_features", "rank_cost")}
    columns: dict[str, Any] = {
        column: [getattr(target, field) for target in targets] for column, field in fields.items()
    }
    columns |= {"gradient_norm": np.sqrt(energy), "signal_energy": energy / 2, "noise_energy": energy / 2}
    columns |= {"signal_share": np.full(n, 0.5), "fisher_trace": energy, "singular_values": list(spectra)}
    columns |= {"singular_error": np.zeros(n), "exact": np.ones(n, bool), "sensitivity": energy, "weight_norm": energy}
    columns |= {"activation_moment": energy, "activation_variance": energy, "activation_values": list(spectra**2)}
    columns |= {"left_directions": [None] * n, "right_directions": [None] * n}
    metadata = {
        "schema": 4, "model": rs.targets.fingerprint_targets(targets), "weights": "", "data": "", "targets": n, "skipped": {},
        "without_gradient": [], "batches": 8, "skipped_batches": 0, "interrupted": False, "tokens": 0, "loss": 1.0, "seed": 0,
        "head_steps": 0, "sketch_size": N_VALUES, "sketch_wanted": N_VALUES, "versions": {},
    }  # fmt: skip
    return rs.Profile(pd.DataFrame(columns).astype({"block": "Int64"}), metadata)


def seconds(part: Callable[[Inventory], None], inventory: Inventory) -> float:
    """CPU seconds of one call."""
    gc.collect()
    started = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    part(inventory)
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime - started


def measure(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """All timings, and the growth of each part."""
    sizes, kinds = (SIZES[:3], ("experts",)) if quick else (SIZES, ("blocks", "experts"))
    rows, claims = [], []
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            inventories = [Inventory(kind, n, Path(folder)) for n in sizes]
            for name, part in PARTS.items():
                # First untimed: imports, fonts, caches, and memory that the system has to find.
                for each in inventories[:1] if name in SLOW else inventories:
                    seconds(part, each)
                repeats = 1 if name in SLOW else REPEATS
                times = [[seconds(part, each) for each in inventories] for _ in range(repeats)]
                found = [median(each) for each in zip(*times, strict=True)]
                growth = [later / former for former, later in pairwise(found)]
                if quick:
                    growth = [(found[-1] / found[0]) ** (1 / (len(found) - 1))]
                measured = dict(zip(map(str, sizes), found, strict=True))
                print(kind, name, [round(each, 3) for each in found], flush=True)
                rows.append({"inventory": kind, "part": name, "cpu_seconds": measured, "growth": growth})
                claims.append(
                    Claim.at_most(f"{kind}: {name}: time at twice the modules, over", max(growth), MOST_GROWTH)
                )
    return rows, claims


if __name__ == "__main__":
    run_benchmark(measure, __doc__ or "")
