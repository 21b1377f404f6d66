"""What a search found, for people and for machines: the table of finalists, the verdict on them, the cost, JSON."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict
from typing import Any

from optuna.trial import TrialState

from rankscope.cli.output import print_line, print_table
from rankscope.searching import START_TRIALS, Finalist, SearchResult, Trial
from rankscope.searching.noise import Interval

FEW_TRIALS = 30  # measured on synthetic landscapes: below, nothing beats a good one-shot


def print_search(result: SearchResult, *, modelled: bool) -> None:
    """The table of finalists (without a confirmation, of the start points and the recommended trial), and what to make of it.

    Args:
        result: Of the search.
        modelled: Whether the sampler has a performance model to report on.
    """
    best = result.best_trial
    if result.finalists:
        seeds = len(result.finalists[0].metrics_by_seed)
        rows = [_trial_row(f.trial, best, f.metric, f.difference, f.interval) for f in result.finalists]
        title = f"{len(result.trials)} trials; finalists on {seeds} fresh seeds, 95 % interval; * recommended"
    else:
        shown = {t.number: t for t in [*starts_of(result), best]}
        rows = [_trial_row(t, best, t.metric, t.difference) for t in shown.values()]
        title = f"{len(result.trials)} trials, validation split; * best observed, not confirmed"
    header = ("strategy", "parameters", "rate", result.metric_name, "difference to uniform")
    print_table(f"{result.study.study_name}: {title}", header, rows)
    print_line(_verdict(result))
    print_line(_cost_line(result))
    for agreement in result.agreements:
        print_line(f"fidelity: {agreement}")
    if modelled:
        print_line(f"performance model: {_model_line(result)}")


def search_summary(result: SearchResult) -> dict[str, Any]:
    """The result for `--json`."""
    found = result.recommendation
    return {
        "recommended": _finalist_summary(found) if found else _trial_summary(result.best_trial),
        "finalists": [_finalist_summary(finalist) for finalist in result.finalists],
        "unconfirmed": result.unconfirmed,
        "performance_model": asdict(result.validation) if result.validation else None,
        "trials": len(result.trials),
        "confirming_runs": result.confirming_runs,
        "steps": result.steps,
        "fidelity": [asdict(agreement) for agreement in result.agreements],
    }


def starts_of(result: SearchResult) -> list[Trial]:
    """The best trials of uniform and of one-shot, as far as the search has come."""
    origins = {trial.origin for trial in result.trials}
    return [result.best_of_origin(origin) for origin in ("uniform", "one-shot") if origin in origins]


def _cost_line(result: SearchResult) -> str:
    """What was trained, and how many optimizer steps it took."""
    ended_as = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
    states = Counter(trial.state.name for trial in result.study.get_trials(deepcopy=False, states=ended_as))
    ended = ", ".join(
        f"{states[name]} {said}" for name, said in (("PRUNED", "pruned"), ("FAIL", "failed")) if states[name]
    )
    trials = f"{sum(states.values())} trials{f' ({ended})' if ended else ''}"
    return f"cost: {trials}, {result.confirming_runs} confirming runs, {result.steps:,} steps"


def _verdict(result: SearchResult) -> str:
    """What fresh seeds say of the recommendation, in words."""
    found = result.recommendation
    if found is None:
        return f"not confirmed: {result.unconfirmed}"
    if found.trial.origin == "uniform":
        return "uniform is recommended: nothing that was tried is worth more, as far as trials and fresh seeds tell"
    if found.difference is None:
        return "uniform did not complete: whether the recommendation is better is not known"
    if found.interval is None:
        return "whether it differs from uniform is not known: an interval needs 3 fresh seeds or more, and differences that vary"
    low, high = found.interval
    if low > 0:
        return f"better than uniform: {found.difference:+.3f}, and not less than {low:+.3f}"
    return f"not told apart from uniform: {low:+.3f} to {high:+.3f}"


def _model_line(result: SearchResult) -> str:
    """What the performance model was good for, and what so many trials can give at all."""
    if result.model is None:
        return f"no proposal yet; it needs {START_TRIALS} trials whose metrics differ"
    scores = str(result.validation) if result.validation else "too few different allocations to validate it"
    if len(result.trials) < FEW_TRIALS:
        scores += f". Fewer than {FEW_TRIALS} trials seldom find more than one-shot gives"
    return scores


def _trial_row(
    trial: Trial, best: Trial, metric: float, difference: float | None, interval: tuple[float, float] | None = None
) -> tuple[str, ...]:
    low, high = interval or (math.nan, math.nan)
    shown = "-" if difference is None or trial.origin == "uniform" else Interval(difference, low, high).text()
    name = f"trial {trial.number}" if trial.origin == "sampler" else trial.origin
    return (
        f"{name} *" if trial.number == best.number else name,
        f"{trial.allocation.parameters:,}",
        f"{trial.learning_rate:g}",
        f"{metric:.3f}",
        shown,
    )


def _trial_summary(trial: Trial) -> dict[str, Any]:
    return {
        "trial": trial.number,
        "origin": trial.origin,
        "parameters": trial.allocation.parameters,
        "learning_rate": trial.learning_rate,
        "metric": trial.metric,
        "difference": trial.difference,
    }


def _finalist_summary(finalist: Finalist) -> dict[str, Any]:
    """The trial's, with what fresh seeds say in place of the trial's own difference."""
    return {
        **_trial_summary(finalist.trial),
        "confirmed": dict(finalist.metrics_by_seed),
        "difference": finalist.difference,
        "interval": finalist.interval,
    }
