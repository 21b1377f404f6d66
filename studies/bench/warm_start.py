"""What earlier studies of other tasks bring: ranks of allocations on a task never seen, after 0, 10 and 25 trials.

    python studies/bench/warm_start.py --out studies/results/warm_start.json

Leave one task out: the prior comes from up to 60 single measurements of every table of RankBench whose task is another, and is
judged on the table's other allocations by Kendall's tau with their mean test metric (validation where no test was read); 20
draws of what is measured. Without a trial: the profile alone (the captured norm), the cold prior (both terms of the profile,
in equal parts) and the warm start. After 10 and 25 trials (uniform and one-shot among them): the model without and with the
warm start, and with one from earlier studies whose metrics are shuffled, which can only mislead. Tasks of one encoder
(`digits-*`) or one language model are never quite unseen, so the warm start is repeated with the other model's studies only.
Then searches on the tables that have a test metric for three budgets: the regret (1 for uniform, 0 for the best) of the
allocation that the model values most, cold and warm, 20 seeds. About four minutes, two processes. `--quick`: two tables, 3
draws, no searches. The claims are what one would hope for, whatever comes out.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import optuna
import pandas as pd
from _harness import Claim, run_benchmark
from joblib import Parallel, delayed
from scipy.stats import kendalltau

import rankscope as rs
from rankscope.benchmark import RankBench
from rankscope.performance import EarlierStudy, PerformanceModel, Prior, RankFeatures, learn_prior, rank_features

TABLES = {
    "digits-shift, rank 1": ("digits-shift", 1, 84),
    "digits-shift, rank 2": ("digits-shift", 2, 84),
    "digits-shift, rank 4": ("digits-shift", 4, 84),
    "digits-turned": ("digits-turned", 1, 84),
    "digits-inverted": ("digits-inverted", 1, 84),
    "digits-mirrored": ("digits-mirrored", 1, 84),
    "digits-parity": ("digits-parity", 1, 84),
    "supersense, 50 steps": ("supersense", 2, 50),
    "supersense, 250 steps": ("supersense", 2, 250),
    "sentiment": ("sentiment", 2, 60),
}
SEARCHED = ("digits-shift, rank 1", "digits-shift, rank 2", "digits-shift, rank 4")
QUICK = ("digits-turned", "supersense, 50 steps")
EARLIER_TRIALS = 60
SIZES = (10, 25)
MIN_JUDGED = 10  # allocations; a tau of fewer says nothing
COLD, WARM, OTHER_MODEL, SHUFFLED = "cold", "warm", "warm, other model only", "warm, shuffled"


def measure(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """Rows by table, predictor and trials; the warm start's margins over profile and cold model."""
    warnings.simplefilter("ignore")
    names = QUICK if quick else tuple(TABLES)
    cells = [(name, draw) for name in names for draw in range(3 if quick else 20)]
    found = Parallel(n_jobs=2)(delayed(judge)(*cell) for cell in cells)
    scores = pd.DataFrame([row for rows in found for row in rows])
    means = scores.groupby(["table", "predictor", "trials"], sort=False)["tau"].mean().reset_index()
    rows: list[dict[str, Any]] = means.round(4).to_dict("records")
    claims = [margin(means, WARM, "profile alone", 0), margin(means, WARM, COLD, 0)]
    claims += [margin(means, WARM, COLD, n) for n in SIZES]
    claims.append(margin(means, SHUFFLED, COLD, 10, bound=-0.05))
    if not quick:
        searches = [(name, method, seed) for name in SEARCHED for method in (COLD, WARM) for seed in range(20)]
        regrets = pd.DataFrame(Parallel(n_jobs=2)(delayed(search)(*cell) for cell in searches))
        rows += [
            {
                "table": table,
                "search": method,
                "trials": int(n),
                "regret_quartiles": part[n].quantile([0.25, 0.5, 0.75]).round(4).tolist(),
            }
            for (table, method), part in regrets.groupby(["table", "method"], sort=False)
            for n in (0, *SIZES)
        ]
    return rows, claims


def margin(means: pd.DataFrame, mine: str, other: str, trials: int, bound: float = 0.0) -> Claim:
    """Mean tau over tasks, a task's tables counted together, of one predictor minus another's."""
    table = means[means["trials"] == trials].assign(task=lambda rows: [TABLES[name][0] for name in rows["table"]])
    by_task = table.pivot_table(index="task", columns="predictor", values="tau")
    value = float((by_task[mine] - by_task[other]).mean())
    return Claim.at_least(
        f"tau after {trials} trials, {mine} minus {other}, mean of {len(by_task)} tasks", value, bound
    )


def judge(name: str, draw: int) -> list[dict[str, Any]]:
    """All predictors of one table, for one draw of what is measured."""
    warnings.simplefilter("ignore")
    rng = np.random.default_rng(draw)
    table = load(name)
    features = features_of(name)
    truth = table.truth
    measured = table.validation[:, rng.integers(table.validation.shape[1])]
    order = np.append([0, 1], 2 + rng.permutation(len(truth) - 2))  # a search measures uniform and one-shot first
    priors = priors_of(name, rng)
    rows: list[dict[str, Any]] = []

    def add(predictor: str, n: int, predicted: np.ndarray, of: np.ndarray) -> None:
        tau = float(np.nan_to_num(kendalltau(predicted, truth[of])[0]))
        rows.append({"table": name, "predictor": predictor, "trials": n, "tau": tau})

    places = [features.names.index(f"profile/{term}") for term in ("norm", "energy")]
    norm, energy = (features.transform(table.ranks)[:, places] / features.unit[places]).T
    everything = np.arange(len(truth))
    add("profile alone", 0, norm, everything)
    add(COLD, 0, norm + energy, everything)
    for label, prior in priors.items():
        add(label, 0, prior.predict(features, table.ranks), everything)
    for n in SIZES:
        train, test = order[:n], order[n:]
        if len(test) < MIN_JUDGED:
            continue
        add("profile alone", n, norm[test], test)
        for label, given in {COLD: None, **priors}.items():
            model = PerformanceModel(features, prior=given).fit(table.ranks[train], measured[train])
            add(label, n, model.predict(table.ranks[test]), test)
    return rows


def priors_of(name: str, rng: np.random.Generator) -> dict[str, Prior]:
    """From the tables of all other tasks; of those of other models; and of all other tasks with their metrics shuffled."""
    task = TABLES[name][0]
    others = {other: study_of(other, rng) for other, (its, _, _) in TABLES.items() if its != task}
    foreign = [study for other, study in others.items() if encoder(other) != encoder(name)]
    shuffled = [replace(study, metric=rng.permutation(study.metric)) for study in others.values()]
    return {
        WARM: learn_prior(list(others.values())),
        OTHER_MODEL: learn_prior(foreign),
        SHUFFLED: learn_prior(shuffled),
    }


def study_of(name: str, rng: np.random.Generator) -> EarlierStudy:
    """What a search of 60 trials would have left: single measurements, uniform and one-shot among them."""
    table = load(name)
    rows = np.append([0, 1], 2 + rng.permutation(len(table.ranks) - 2))[:EARLIER_TRIALS]
    return EarlierStudy(
        name=name,
        task=TABLES[name][0],
        features=features_of(name),
        ranks=table.ranks[rows],
        metric=table.validation[rows, 0],
        conditions=[None] * len(rows),
    )


def search(name: str, method: str, seed: int) -> dict[str, Any]:
    """The regret of what the model values most, by number of trials."""
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    table = load(name)
    prior = priors_of(name, np.random.default_rng(seed))[WARM] if method == WARM else None
    sampler = rs.PerformanceModelSampler(table.space, seed=seed, prior=prior)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    space = table.space
    start = space.allocation(space.point(tau=1.0))
    if prior is not None:
        features = features_of(name)
        gains = features.gains(np.nan_to_num(prior.coefficients(features)[0]))
        start = space.solve(gains)
    found: dict[Any, Any] = {"table": name, "method": method, 0: regret(table, start)}
    for number in range(max(SIZES)):
        if number < 2:
            study.enqueue_trial(space.point(tau=float(number)))
        trial = study.ask()
        ranks = np.array(rs.suggest_allocation(trial, space).vector)
        repeat = sum(t.user_attrs["ranks"] == ranks.tolist() for t in study.trials[:-1])
        study.tell(trial, table.measure(ranks, seed + repeat))
        if number + 1 in SIZES:
            found[number + 1] = regret(table, sampler.best(study)[0])
    return found


def regret(table: RankBench, allocation: rs.RankAllocation) -> float:
    """Of an allocation of the table."""
    return table.regret(np.array(allocation.vector))


_loaded: dict[str, tuple[RankBench, RankFeatures]] = {}


def load(name: str) -> RankBench:
    """A table by its name here, read once a process."""
    if name not in _loaded:
        table = RankBench(*TABLES[name])
        space = table.space
        features = rank_features(space.targets, space.budget, gains=space.gains, groups=space.groups)
        _loaded[name] = table, features
    return _loaded[name][0]


def features_of(name: str) -> RankFeatures:
    """Those that a search on a table would use."""
    load(name)
    return _loaded[name][1]


def encoder(name: str) -> str:
    """Which pretrained model a table's task adapts."""
    return "digits" if name.startswith("digits") else "MiniLM"


if __name__ == "__main__":
    run_benchmark(measure, __doc__ or "")
