"""Regret of searches at equal numbers of trials, on RankBench (real, tabulated) and on synthetic landscapes.

    python studies/bench/search_regret.py --out studies/results/search_regret.json

Every method gets the same one-shot gains and the same start: uniform and one-shot. Of t trials the last are spent on
confirming: five finalists are measured again and again. They are the same for all methods (uniform, one-shot, the three
best observed), but for ours, where they are uniform, one-shot, the posterior mean's allocation, the best by its prediction
and the best observed. The recommendation is the best of their means; regret is 1 for uniform and 0 for the optimum. 20 seeds.
CMA-ES runs only where the package cmaes is installed. Two processes, one thread each; over an hour;
searches that are done are kept in `.cache/search_regret.jsonl`, so an interrupted run goes on. `--quick`: ours, TPE
and random on the tilts, one synthetic landscape, 5 seeds, 60 trials.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import optuna
from _harness import Claim, run_benchmark
from _landscapes import Landscape, RankBench, Synthetic, medians
from joblib import Parallel, delayed

import rankscope as rs
from rankscope.budget import allocate_proportional

OURS = "performance model"
BUDGETS = (30, 33, 60, 100, 150)
POPULATION, TOURNAMENT = 20, 5
LOG = Path(__file__).parents[2] / ".cache" / "search_regret.jsonl"
Cell = tuple[str, str, int]

LANDSCAPES: dict[str, Callable[[int], Landscape]] = {
    "rankbench digits-shift": lambda _seed: RankBench("digits-shift", 1, 84),
    "synthetic, 72 modules": lambda seed: Synthetic(seed),
    "synthetic, 72 modules, little noise": lambda seed: Synthetic(seed, noise=0.1),
    "synthetic, 72 modules, useless profile": lambda seed: Synthetic(seed, informative=0.0),
    "synthetic, 24 modules": lambda seed: Synthetic(seed, modules=24),
    "synthetic, 210 modules": lambda seed: Synthetic(seed, modules=210),
}


def measure(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """All searches; rows of regrets by landscape, method and trials."""
    names = ["synthetic, 72 modules"] if quick else list(LANDSCAPES)
    methods = [OURS, "tpe tilts", "random tilts"] if quick else [m for m in METHODS if m != "cma-es tilts" or _cmaes()]
    seeds = range(5 if quick else 20)
    cells = [(name, method, seed) for seed in seeds for name in names for method in methods]
    curves_by_cell = run_all(cells, 60 if quick else max(BUDGETS))
    regrets: dict[tuple[str, str], list[dict[int, float]]] = {}
    for name, method, seed in cells:
        regrets.setdefault((name, method), []).append(curves_by_cell[name, method, seed])
    rows = [
        {"landscape": name, "method": method, "trials": t, "regret_quartiles": medians([c[t] for c in curves])}
        for (name, method), curves in regrets.items()
        for t in curves[0]
    ]
    return rows, [claim for name in names for claim in claims(name, methods, regrets)]


def claims(name: str, methods: list[str], regrets: dict[tuple[str, str], list[dict[int, float]]]) -> list[Claim]:
    """A third of TPE's trials do; nobody is better at 30, beyond noise."""

    def at(method: str, t: int) -> float:
        return median(curve[t] for curve in regrets[name, method])

    last = max(regrets[name, OURS][0])
    bounds = [(f"{last} trials, minus TPE's on the tilts", at(OURS, last) - at("tpe tilts", last))]
    if 100 in regrets[name, OURS][0]:
        best = min((m for m in methods if m != OURS), key=lambda m: at(m, 30))
        bounds += [
            ("33 trials, minus that of TPE's 100", at(OURS, 33) - at("tpe tilts", 100)),
            (f"30 trials, minus the best other's ({best})", at(OURS, 30) - at(best, 30)),
        ]
    return [Claim.at_most(f"{name}: our regret of {text}", value, 0.0) for text, value in bounds]


def run_all(cells: list[Cell], n_trials: int) -> dict[Cell, dict[int, float]]:
    """Every search, two at a time; those that these sources have done already are read from the log."""
    sources = [f"HEAD:rankscope/{part}" for part in ("searching", "performance", "space.py", "budget.py")]
    version = subprocess.run(["git", "rev-parse", *sources], capture_output=True, text=True, check=True).stdout.split()
    known: dict[Cell, dict[int, float]] = {}
    for line in LOG.read_text().splitlines() if LOG.exists() else ():
        entry = json.loads(line)
        if (entry["version"], entry["trials"]) == (version, n_trials):
            known[tuple(entry["cell"])] = {int(t): regret for t, regret in entry["curve"].items()}
    missing = [cell for cell in cells if cell not in known]
    LOG.parent.mkdir(exist_ok=True)
    with LOG.open("a") as log:
        jobs = (delayed(run_cell)(cell, n_trials) for cell in missing)
        for cell, curve in Parallel(n_jobs=2, batch_size=1, return_as="generator_unordered")(jobs):
            known[cell] = curve
            entry = {"version": version, "trials": n_trials, "cell": cell, "curve": curve}
            print(json.dumps(entry), file=log, flush=True)
    return known


def run_cell(cell: Cell, n_trials: int) -> tuple[Cell, dict[int, float]]:
    """One search, with what identifies it."""
    return cell, run(*cell, n_trials)


# --- one search --------------------------------------------------------------------------------------------------


def run(name: str, method: str, seed: int, n_trials: int) -> dict[int, float]:
    """The regret of the recommendation by number of trials, of one search."""
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    landscape = LANDSCAPES[name](seed)
    propose = METHODS[method](landscape, seed)
    study = optuna.create_study(direction="maximize", sampler=propose.sampler)
    for origin, tau in (("uniform", 0.0), ("one-shot", 1.0)):
        ranks = list(landscape.space.allocation(landscape.space.point(tau=tau)).vector)
        study.enqueue_trial(landscape.space.point(tau=tau), user_attrs={"ranks": ranks, "origin": origin})
    visits: dict[tuple[int, ...], int] = {}
    curve = {}
    for number in range(n_trials):
        trial = study.ask()
        ranks = landscape.realise(np.asarray(propose(trial)))
        trial.set_user_attr("ranks", ranks.tolist())
        key = tuple(ranks.tolist())
        visits[key] = visits.get(key, -1) + 1
        study.tell(trial, landscape.measure(ranks, visits[key]))
        for t in BUDGETS:
            if t <= n_trials and number + 1 == t - confirmations(t):
                curve[t] = landscape.regret(recommend(landscape, study, propose, confirmations(t)))
    return curve


def confirmations(trials: int) -> int:
    """Of so many trials."""
    return 10 if trials < 60 else 20


def recommend(landscape: Landscape, study: optuna.Study, propose: Proposer, n: int) -> np.ndarray:
    """The best of five finalists, after n more measurements."""
    trials = sorted(study.get_trials(deepcopy=False), key=lambda trial: -float(trial.value or 0.0))
    finalists = [t.user_attrs["ranks"] for t in study.get_trials(deepcopy=False)[:2]]
    sampler = propose.sampler
    if isinstance(sampler, rs.PerformanceModelSampler) and (model := sampler.model(study)):
        finalists.append(landscape.realise(np.array(sampler.best(study)[0].vector)).tolist())
        table = [t.user_attrs["ranks"] for t in trials]
        finalists.append(table[int(np.argmax(model.predict(table)))])
    for trial in trials:
        if len(finalists) < 5 and trial.user_attrs["ranks"] not in finalists:
            finalists.append(trial.user_attrs["ranks"])
    unique = [np.array(ranks) for ranks in dict.fromkeys(map(tuple, finalists))]
    means = [np.mean([landscape.measure(ranks, 1 + i) for i in range(n // 5)]) for ranks in unique]
    return unique[int(np.argmax(means))]


class Proposer:
    """From a trial to ranks, under some sampler."""

    def __init__(self, landscape: Landscape, sampler: optuna.samplers.BaseSampler) -> None:
        self.space, self.sampler = landscape.space, sampler

    def __call__(self, trial: optuna.Trial) -> tuple[int, ...]:
        """The ranks that the trial proposes."""
        return rs.suggest_allocation(trial, self.space).vector


class Raw(Proposer):
    """One integer a module, repaired onto the budget."""

    def __call__(self, trial: optuna.Trial) -> tuple[int, ...]:
        """The ranks that the trial proposes."""
        top = 4 * max(self.space.allocation(self.space.point(tau=0.0)).vector)
        wanted = {t.name: float(trial.suggest_int(t.name, 0, min(top, t.full_rank))) for t in self.space.targets}
        if "ranks" in trial.user_attrs:
            return tuple(trial.user_attrs["ranks"])
        if not any(wanted.values()):
            wanted = dict.fromkeys(wanted, 1.0)
        return allocate_proportional(self.space.targets, wanted, self.space.budget).vector


class Evolution(Proposer):
    """Regularised evolution (Real et al. 2019): the best of a few of the last twenty moves some ranks between two modules."""

    def __init__(self, landscape: Landscape, seed: int) -> None:
        super().__init__(landscape, optuna.samplers.RandomSampler(seed))
        self.rng = np.random.default_rng(seed)

    def __call__(self, trial: optuna.Trial) -> tuple[int, ...]:
        """The ranks that the trial proposes."""
        if "ranks" in trial.user_attrs:
            return tuple(trial.user_attrs["ranks"])
        done = [t for t in trial.study.get_trials(deepcopy=False) if t.value is not None]
        if len(done) < POPULATION:
            point = {tilt.name: float(self.rng.uniform(tilt.low, tilt.high)) for tilt in self.space.tilts}
            return self.space.allocation(point).vector
        pool = self.rng.choice(len(done) - POPULATION + np.arange(POPULATION), TOURNAMENT, replace=False)
        parent = max((done[i] for i in pool), key=lambda t: float(t.value or 0.0)).user_attrs["ranks"]
        scores = np.array(parent, dtype=np.float64)
        for index in self.rng.choice(len(scores), 4, replace=False):
            scores[index] = max(0.0, scores[index] + self.rng.choice([-2, -1, 1, 2]))
        named = {t.name: s for t, s in zip(self.space.targets, scores, strict=True)}
        return allocate_proportional(self.space.targets, named, self.space.budget).vector


def _cmaes() -> bool:
    return importlib.util.find_spec("cmaes") is not None


METHODS: dict[str, Callable[[Landscape, int], Proposer]] = {
    OURS: lambda landscape, seed: Proposer(landscape, rs.PerformanceModelSampler(landscape.space, seed=seed)),
    "tpe tilts": lambda landscape, seed: Proposer(landscape, optuna.samplers.TPESampler(seed=seed)),
    "gp tilts": lambda landscape, seed: Proposer(landscape, optuna.samplers.GPSampler(seed=seed)),
    "cma-es tilts": lambda landscape, seed: Proposer(landscape, optuna.samplers.CmaEsSampler(seed=seed)),
    "random tilts": lambda landscape, seed: Proposer(landscape, optuna.samplers.RandomSampler(seed=seed)),
    "tpe raw": lambda landscape, seed: Raw(landscape, optuna.samplers.TPESampler(seed=seed)),
    "random raw": lambda landscape, seed: Raw(landscape, optuna.samplers.RandomSampler(seed=seed)),
    "evolution": Evolution,
}

if __name__ == "__main__":
    run_benchmark(measure, __doc__ or "")
