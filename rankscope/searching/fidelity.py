"""Fidelity: what trials that stopped early say of full ones, and whether short training ranks allocations like long training."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from optuna.trial import FrozenTrial, TrialState
from scipy.stats import kendalltau

from rankscope.searching.finalists import Finalist
from rankscope.searching.trials import Trial, learning_rate_of, seeds_of

MIN_PAIRS = 5  # with fewer, a rank correlation says nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How alike short and long training rank the same allocations.

    Attributes:
        steps: Of the short training.
        of_steps: Of the long one.
        kendall: Kendall's tau of the two metrics.
        pairs: Trials behind it.
        fresh: Whether long training is a run of its own, on other seeds, and not the end of the short one.
    """

    steps: int
    of_steps: int
    kendall: float
    pairs: int
    fresh: bool

    def __str__(self) -> str:
        what = "finalists, trained in full on fresh seeds" if self.fresh else "trials at their end"
        return f"{self.steps} of {self.of_steps} steps rank {self.pairs} {what}: Kendall's tau {self.kendall:.2f}"


def agreement_on_the_way(trials: Sequence[Trial]) -> list[Agreement]:
    """Metrics about a quarter and half way against the final metric, over trials that were evaluated there.

    Metrics are taken less the mean of their learning rate: allocations are compared, not rates.
    """
    trained = [t for t in trials if t.reused is None]
    common = set.intersection(*(set(t.history) for t in trained)) if trained else set()
    steps = max(common, default=0)
    found = []
    for step in sorted(
        {min(common, key=lambda s: abs(s - share * steps)) for share in (0.25, 0.5) if common} - {steps}
    ):
        early = _less_rate_mean(trained, [t.history[step] for t in trained])
        late = _less_rate_mean(trained, [t.metric for t in trained])
        found += _agreement(early, late, steps=step, of_steps=steps, fresh=False)
    return found


def agreement_when_confirmed(finalists: Sequence[Finalist], steps: int, of_steps: int) -> list[Agreement]:
    """Metrics of short trials against those of full training on fresh seeds, over finalists; none where trials are not short."""
    if steps >= of_steps:
        return []
    early, late = [f.trial.metric for f in finalists], [f.metric for f in finalists]
    return _agreement(early, late, steps=steps, of_steps=of_steps, fresh=True)


def observe(trial: FrozenTrial, complete: Sequence[FrozenTrial], *, by_seed: bool) -> tuple[float, float] | None:
    """A trial as an observation of the final metric, and how many training runs it counts as; None if it is not one.

    A pruned trial was seen up to some step (or over some of its seeds). Trials that completed at its learning rate gained, from
    there to their end, a mean gain; it is expected to gain as much: its difference to the others, uniform among them, is
    taken at equal steps. It counts as the share of the run that it was given, or as its seeds.

    Args:
        trial: Complete or pruned.
        complete: The complete trials of the study.
        by_seed: Whether intermediate values are those of seeds, and not on the way.
    """
    if trial.state == TrialState.COMPLETE and trial.value is not None and math.isfinite(trial.value):
        return trial.value, float(seeds_of(trial))
    if trial.state != TrialState.PRUNED or not trial.intermediate_values:
        return None
    seen = sorted(trial.intermediate_values)
    steps = seen if by_seed else seen[-1:]
    rate = learning_rate_of(trial)
    like = [t for t in complete if learning_rate_of(t) == rate and set(steps) <= set(t.intermediate_values)]
    if not like:
        return None
    gain = fmean(float(t.value or 0.0) - _mean_at(t, steps) for t in like)
    value = _mean_at(trial, steps) + gain
    runs = len(seen) if by_seed else seen[-1] / max(like[0].intermediate_values)
    return (value, float(runs)) if math.isfinite(value) and runs > 0 else None


def _mean_at(trial: FrozenTrial, steps: Sequence[int]) -> float:
    return fmean(trial.intermediate_values[step] for step in steps)


def _less_rate_mean(trials: Sequence[Trial], values: Sequence[float]) -> list[float]:
    by_rate = defaultdict(list)
    for trial, value in zip(trials, values, strict=True):
        by_rate[trial.learning_rate].append(value)
    return [value - fmean(by_rate[trial.learning_rate]) for trial, value in zip(trials, values, strict=True)]


def _agreement(
    early: Sequence[float], late: Sequence[float], *, steps: int, of_steps: int, fresh: bool
) -> list[Agreement]:
    """The agreement, if there is enough to tell it."""
    if len(early) < MIN_PAIRS or len(set(early)) < 2 or len(set(late)) < 2:
        return []
    tau = float(kendalltau(early, late)[0])
    return [Agreement(steps=steps, of_steps=of_steps, kendall=tau, pairs=len(early), fresh=fresh)]
