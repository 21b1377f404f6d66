"""Many workers on one study, killed and cut off: n_trials trainings, none lost, none twice, one recommendation.

    python studies/bench/scale_out.py --out studies/results/scale_out.json

1. Speed: trainings an hour of 1 and 2 workers on SQLite, with trainings of seconds; what the study costs a trial beside its
   training and the proposal, at 500 and 5,000 trials on SQLite and PostgreSQL, and the memory of the process meanwhile.
2. Faults: 8 workers on PostgreSQL, 200 trials of digits-shift (short trainings), 50 SIGKILLs at random moments, a new worker for
   each, and three restarts of the server; 4 workers on SQLite with 50 SIGKILLs; then 2 and 4 workers on SQLite, a journal and
   Optuna's gRPC proxy without faults. Workers share two host names (as root on Linux), as containers may. What is counted are
   the trainings that really ran (a log that each worker appends to) and what the study holds.
3. Two processes under torchrun (gloo) against one on the same global batches: profile, training and controller of digits-shift.

PostgreSQL comes from Debian's package (`apt-get install postgresql`), on loopback. About 60 CPU minutes; speed wants an idle
machine. Parts that are done are kept in `.cache/scale_out.jsonl` by the sources they measure, so an interrupted run goes on.
`--quick`: the cost of a trial at 60 trials; 3 workers, 20 trials, 3 kills and one restart on PostgreSQL; 2 workers on SQLite;
torchrun with short trainings.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import optuna
from _harness import Claim, run_benchmark
from optuna.trial import TrialState

import rankscope as rs
from rankscope.maps import ranks_png
from rankscope.searching import storage as storages
from rankscope.searching.attachments import Attachments
from rankscope.searching.claims import LOST_KEY, Claims, Job, perform
from rankscope.searching.sampler import suggest_allocation
from rankscope.searching.space import make_space
from rankscope.tasks import profile_task
from rankscope.training import Lora

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.launcher import torchrun
from tests.searching.fleet import NAMED, take_host_name
from tests.searching.servers import Postgres, grpc_proxy

CACHE = Path(__file__).parents[2] / ".cache"
LOG = CACHE / "scale_out.jsonl"
SOURCES = ("rankscope/searching", "rankscope/maps.py", "studies/bench/scale_out.py")
CONTEXT = multiprocessing.get_context("fork")
Row = dict[str, Any]


class Logged(type(rs.load_task("digits-shift"))):  # type: ignore[misc]
    """Digits-shift; each training adds a line to a log: its seed, and its ranks."""

    log: Path | None = None
    seed = 0

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("log", "seed")}

    def train_batches(self, seed: int) -> Iterator[Any]:
        """See the task."""
        self.seed = seed
        return super().train_batches(seed)

    def evaluate(self, model: Any, split: str = "validation") -> dict[str, float]:
        """See the task."""
        if self.log is not None:
            ranks = [m.r["default"] for m in model.modules() if hasattr(m, "lora_A")]
            names = [name for name, m in model.named_modules() if hasattr(m, "lora_A")]
            line = json.dumps({"pid": os.getpid(), "seed": self.seed, "ranks": dict(zip(names, ranks, strict=True))})
            with self.log.open("a") as file:
                file.write(line + "\n")
        return super().evaluate(model, split)


# --- faults -------------------------------------------------------------------------------------------------------


def work(folder: Path, url: str, profile: rs.Profile, options: Mapping[str, Any], host: str, out: Path) -> None:
    """One worker."""
    take_host_name(host)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    task = Logged()
    task.log = folder / "log.jsonl"
    budget = rs.ParameterBudget.uniform(profile.targets, 1)
    found = rs.search(task, budget=budget, profile=profile, storage=url, study_name="many", **options)
    out.write_text(json.dumps({"recommendation": found.recommendation.reason, "ranks": found.best_allocation.vector}))


def with_faults(
    kind: str, *, workers: int, n_trials: int, steps: int, kills: int = 0, restarts: int = 0, grace: float = 10.0
) -> Row:
    """A search with so many workers, kills and restarts, and what came out."""
    task = rs.load_task("digits-shift")
    profile = rs.profile(task.build_model(), list(task.train_batches(0)), loss_fn=task.loss)
    training = rs.TrainingSettings(steps=steps, learning_rate=0.01)
    options = {"n_trials": n_trials, "training": training, "grace_seconds": grace}
    rng, killed, started = random.Random(), 0, time.monotonic()
    with tempfile.TemporaryDirectory() as name, opened(kind, Path(name)) as (url, server):
        folder, processes = Path(name), []

        def start() -> None:
            out = folder / f"worker-{len(processes)}.json"
            host = f"host-{len(processes) % 2}"
            processes.append(CONTEXT.Process(target=work, args=(folder, url, profile, options, host, out)))
            processes[-1].start()

        for _ in range(workers):
            start()
        left = restarts
        while any(process.is_alive() for process in processes):
            time.sleep(rng.uniform(0.5, 2.0))
            done = len((folder / "log.jsonl").read_text().splitlines()) if (folder / "log.jsonl").exists() else 0
            alive = [process for process in processes if process.is_alive()]
            if killed < kills and alive and done > killed * n_trials / max(kills, 1) * 0.95:
                os.kill(rng.choice(alive).pid, signal.SIGKILL)
                killed += 1
                start()
            if left and server is not None and done > (restarts - left + 1) * n_trials / (restarts + 1):
                server.restart(away=3.0)
                left -= 1
        told = {file.read_text() for file in folder.glob("worker-*.json")}
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        row = {"storage": kind, "workers": workers, "n_trials": n_trials, "kills": killed, "restarts": restarts - left,
               "host_names": 2 if NAMED else 1}  # fmt: skip
        return row | counted(url, log) | {"recommendations": len(told), "seconds": time.monotonic() - started}


def counted(url: str, log: list[dict[str, Any]]) -> Row:
    """What the study holds, and what really ran."""
    opened = storages.make_storage(url)
    search, again = (optuna.load_study(study_name=name, storage=opened) for name in ("many", "many-confirming"))
    complete = search.get_trials(states=(TrialState.COMPLETE,))
    failed = [trial for trial in search.get_trials() if storages.FAILURE_KEY in trial.user_attrs]
    runs = [trial for trial in again.get_trials(states=(TrialState.COMPLETE,)) if "seed" in trial.params]
    reused = sum(trial.user_attrs[storages.TRIAL_KEY]["reused"] is not None for trial in complete)
    gone = sum(LOST_KEY in trial.user_attrs for study in (search, again) for trial in study.get_trials())
    times = Counter((line["seed"], tuple(line["ranks"].items())) for line in log)
    kept = Counter((t.params["trial"], t.params["seed"]) for t in runs)
    return {
        "trials": len(complete) + len(failed), "confirming_runs": len(runs), "reused": reused, "trials_of_dead_workers": gone,
        "trained": len(log), "trained_again": sum(count - 1 for count in times.values()),
        "kept_twice": sum(count - 1 for count in kept.values()),
        "unfinished": sum(not t.state.is_finished() for study in (search, again) for t in study.get_trials()),
    }  # fmt: skip


@contextmanager
def opened(kind: str, folder: Path) -> Iterator[tuple[str, Postgres | None]]:
    """The URL of a fresh storage, and its server where that can be restarted."""
    with ExitStack() as stack:
        if kind == "postgresql":
            server = Postgres()
            stack.callback(server.stop)
            yield server.database("searches"), server
        elif kind == "grpc":
            yield stack.enter_context(grpc_proxy(f"sqlite:///{folder}/proxied.db")), None
        else:
            yield f"{kind}:{'///' if kind == 'sqlite' else ''}{folder}/kept", None


# --- speed --------------------------------------------------------------------------------------------------------


def an_hour(workers: int, n_trials: int, steps: int) -> Row:
    """Trainings an hour of so many workers on SQLite, from the first training's start to the last one's end."""
    row = with_faults("sqlite", workers=workers, n_trials=n_trials, steps=steps)
    per_hour = 3600 * row["trained"] / row["seconds"]
    return {"what": "trainings an hour", "workers": workers, "trained": row["trained"], "per_hour": per_hour}


def cost_of_trials(kind: str, n_trials: int, every: int) -> list[Row]:
    """Seconds that the study costs a trial beside training and proposal, by trials before it.

    Each trial claims, keeps a lease, evaluates nothing, reports what a trial of a search reports, and attaches its note for the
    dashboard. Its rank map, a picture whose cost does not grow, is timed apart.
    """
    task = rs.load_task("digits-shift")
    profile = rs.profile(task.build_model(), list(task.train_batches(0)), loss_fn=task.loss)
    space = make_space(profile, profile.targets, rs.ParameterBudget.uniform(profile.targets, 1))
    rng, rows, spent = np.random.default_rng(0), [], []
    with tempfile.TemporaryDirectory() as name, opened(kind, Path(name)) as (url, _):
        study = storages.open_study("many", url, {})
        study.sampler = optuna.samplers.RandomSampler(0)
        study.set_user_attr(storages.STUDY_KEY, {"budget": 6912, "metric": "accuracy", "n_seeds": 1})
        claims, attachments = Claims(study, 30.0), Attachments(study, space.targets, None)
        for number in range(n_trials):
            point = {tilt.name: float(rng.uniform(tilt.low, tilt.high)) for tilt in space.tilts}
            allocation = space.allocation(point)  # the proposal, which is timed in search_latency.py
            kinds = {t.name: optuna.distributions.FloatDistribution(t.low, t.high) for t in space.tilts}
            started = time.perf_counter()
            claims.look()
            attributes = {"origin": storages.SAMPLER, storages.RANKS_KEY: list(allocation.vector)}
            claim = claims.take(Job(storages.SAMPLER, n_trials), attributes, {"params": point, "distributions": kinds})
            assert claim is not None
            running = optuna.Trial(study, claim.trial_id)

            def evaluate(lease: Any, running: optuna.Trial = running, number: int = number) -> float:
                made = suggest_allocation(running, space)
                lease.steps = 100
                trial = storages.Trial(
                    number=number, origin=storages.SAMPLER, allocation=made, learning_rate=0.01, metric=0.5, loss=1.0,
                    metrics_by_seed={"0": 0.5}, history={100: 0.5},
                )  # fmt: skip
                row = {key: value for key, value in trial.to_row().items() if key != storages.RANKS_KEY}
                with attachments.attached(running):
                    running.set_user_attr(storages.TRIAL_KEY, row)
                return 0.5

            perform(claims, claim, evaluate, f"trial {number}")
            spent.append(time.perf_counter() - started)
            if (number + 1) % every == 0:
                memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                rows.append({"what": "a trial's cost", "storage": kind, "trials": number + 1,
                             "median_s": median(spent[-50:]), "peak_mb": memory})  # fmt: skip
    drawn = []
    for _ in range(20):
        started = time.perf_counter()
        ranks_png(space.targets, allocation.ranks, titles=["a trial"])
        drawn.append(time.perf_counter() - started)
    return [*rows, {"what": "a trial's rank map", "storage": kind, "median_s": median(drawn)}]


# --- two processes ------------------------------------------------------------------------------------------------

CONTROLLED = {"freeze_fraction": 0.9, "hysteresis": 0.0, "min_gain_ratio": 0.0, "every": 10}  # one that moves


def results(steps: int) -> dict[str, dict[str, Any]]:
    """Profile, training and controller on digits-shift, by one process or as one of several.

    Values are the modules' leading singular values, and the loss with the norms of the adapter's factors B.
    """
    task = rs.load_task("digits-shift")
    profile = profile_task(task, n_batches=8)
    budget = rs.ParameterBudget.uniform(profile.targets, 1)
    allocation = rs.allocate("one-shot", targets=profile.targets, profile=profile, budget=budget)
    leading = [float(values[0]) for values in profile.table["singular_values"]]
    found = {"profile": {"values": leading, "ranks": list(allocation.vector)}}
    for name, settings in (("training", None), ("controller", rs.ControllerSettings(**CONTROLLED))):
        model, result = rs.train(task, Lora(allocation, settings), {"steps": steps, "learning_rate": 0.01}, seed=3)
        assert result.allocation is not None
        norms = [float(each.detach().norm()) for key, each in model.named_parameters() if "lora_B" in key]
        loss = task.evaluate(model, "validation")["loss"]
        found[name] = {"values": [loss, *norms], "ranks": list(result.allocation.vector)}
    return found


def two_processes(steps: int) -> list[Row]:
    """What torchrun's two processes find, beside what one finds: the largest relative difference, and whether ranks agree."""
    with tempfile.TemporaryDirectory() as name:
        script, out = Path(name) / "two.py", Path(name) / "found.json"
        script.write_text(
            f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nimport json, scale_out\n"
            "from rankscope.distributed import is_first\n"
            f"found = scale_out.results({steps})\n"
            f"is_first() and open({str(out)!r}, 'w').write(json.dumps(found))\n"
        )
        done = torchrun(str(script))
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        two = json.loads(out.read_text())
    rows = []
    for case, one in results(steps).items():
        expected, values = np.array(one["values"]), np.array(two[case]["values"])
        difference = np.max(
            np.abs(values - expected) / np.maximum(np.abs(expected), 1e-30)
        )  # B without ranks has norm 0
        agree = two[case]["ranks"] == one["ranks"]
        rows.append(
            {"what": "two processes", "case": case, "relative_difference": float(difference), "same_ranks": agree}
        )
    return rows


# --- the benchmark ------------------------------------------------------------------------------------------------


def measure(quick: bool) -> tuple[list[Row], list[Claim]]:
    """All parts, and what they show."""
    if quick:
        parts: dict[str, Callable[[], Row | list[Row]]] = {
            "cost on sqlite": lambda: cost_of_trials("sqlite", 60, 60),
            "faults": lambda: with_faults("postgresql", workers=3, n_trials=20, steps=2, kills=3, restarts=1, grace=3.0),
            "two on sqlite": lambda: with_faults("sqlite", workers=2, n_trials=12, steps=2),
            "torchrun": lambda: two_processes(24),
        }  # fmt: skip
    else:
        parts = {f"an hour of {workers}": lambda n=workers: an_hour(n, 24, 400) for workers in (1, 2)}
        for kind in ("sqlite", "postgresql"):
            parts[f"cost on {kind}"] = lambda k=kind: cost_of_trials(k, 5000, 500)
        parts["faults"] = lambda: with_faults("postgresql", workers=8, n_trials=200, steps=20, kills=50, restarts=3)
        parts["faults on sqlite"] = lambda: with_faults("sqlite", workers=4, n_trials=200, steps=20, kills=50)
        for kind in ("sqlite", "journal", "grpc"):
            for workers in (2, 4):
                parts[f"{workers} on {kind}"] = lambda k=kind, n=workers: with_faults(
                    k, workers=n, n_trials=40, steps=10
                )
        parts["torchrun"] = lambda: two_processes(84)
    rows = {name: resumed(name, part, quick=quick) for name, part in parts.items()}
    return [row for part in rows.values() for row in part], claims(rows)


def resumed(name: str, part: Callable[[], Row | list[Row]], *, quick: bool) -> list[Row]:
    """A part's rows: from the log if these sources have made them before."""
    names = [f"HEAD:{source}" for source in SOURCES]
    version = subprocess.run(["git", "rev-parse", *names], capture_output=True, text=True, check=False).stdout.split()
    key = {"part": name, "quick": quick, "version": version}
    for line in LOG.read_text().splitlines() if LOG.exists() else ():
        entry = json.loads(line)
        if entry["key"] == key:
            return list(entry["rows"])
    found = part()
    rows = found if isinstance(found, list) else [found]
    CACHE.mkdir(exist_ok=True)
    with LOG.open("a") as log:
        print(json.dumps({"key": key, "rows": rows}), file=log, flush=True)
    return rows


def claims(parts: Mapping[str, list[Row]]) -> list[Claim]:
    """What must hold of each part."""
    found: list[Claim] = []
    for name, rows in parts.items():
        for row in rows:
            if "kills" in row:
                missing = abs(row["trials"] + row["confirming_runs"] - row["n_trials"])
                found += [
                    Claim.at_most(f"{name}: trials too few or too many", missing, 0),
                    Claim.at_most(f"{name}: confirming runs kept twice", row["kept_twice"], 0),
                    Claim.at_most(f"{name}: trials left unfinished", row["unfinished"], 0),
                    Claim.at_most(f"{name}: trained again, beyond the trials of dead workers",
                                  max(0, row["trained_again"] - row["trials_of_dead_workers"]), 0),
                    Claim.at_most(f"{name}: recommendations", row["recommendations"], 1),
                ]  # fmt: skip
            elif row["what"] == "two processes":
                found.append(
                    Claim.at_most(f"torchrun, {row['case']}: relative difference", row["relative_difference"], 1e-3)
                )
                found.append(Claim.at_least(f"torchrun, {row['case']}: the same ranks", float(row["same_ranks"]), 1.0))
            elif row["what"] == "a trial's cost" and row["trials"] in (60, 500, 5000):
                bound = 0.1 if row["trials"] == 5000 else 0.05
                found.append(
                    Claim.at_most(f"{row['storage']}: seconds a trial at {row['trials']}", row["median_s"], bound)
                )
    if {"an hour of 1", "an hour of 2"} <= parts.keys():
        one, two = (parts[f"an hour of {n}"][0]["per_hour"] for n in (1, 2))
        found.append(Claim.at_least("trainings an hour, 2 workers over 1", two / one, 1.8))
    return found


if __name__ == "__main__":
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    run_benchmark(measure, __doc__ or "")
