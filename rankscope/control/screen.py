"""The performance models in the loop: both may refuse what the policy proposes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from rankscope.allocation import RankAllocation
from rankscope.control.effects import Effect, EffectModel
from rankscope.control.policy import Proposal
from rankscope.performance import PerformanceModel

Action = Literal["moved", "kept", "refused", "skipped"]
UNKNOWN = Effect(math.nan, math.nan)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What becomes of a proposal.

    Attributes:
        action: `"moved"`, `"kept"`, `"refused"` or `"skipped"`.
        reason: In words.
        offline: What the study's model expects.
        online: What the model of earlier moves expects.
    """

    action: Action
    reason: str
    offline: Effect = UNKNOWN
    online: Effect = UNKNOWN


def screen(
    proposal: Proposal | None, before: RankAllocation, offline: PerformanceModel | None, online: EffectModel
) -> Verdict:
    """Refuses moves that a model expects to do harm, by more than one standard deviation of its own uncertainty."""
    if proposal is None:
        return Verdict(action="skipped", reason="no finite gradient to decide on")
    if not proposal.transfers:
        return Verdict(action="kept", reason="nothing is worth moving")
    after = proposal.allocation
    expected = UNKNOWN
    if offline is not None:
        order = [target.name for target in offline.features.targets]
        rows = [[allocation.ranks[name] for name in order] for allocation in (after, before)]
        mean, deviation = offline.difference([rows[0]], [rows[1]])
        expected = Effect(float(mean[0]), float(deviation[0]))
    measured = online.predict(before, after) or UNKNOWN
    for name, effect in (("the study's model", expected), ("the model of earlier moves", measured)):
        if effect.mean + effect.error < 0:
            reason = f"{name} expects {effect.mean:.3g} with uncertainty {effect.error:.3g}"
            return Verdict(action="refused", reason=reason, offline=expected, online=measured)
    reason = f"captures {proposal.predicted:.1%} of the gradient energy more"
    return Verdict(action="moved", reason=reason, offline=expected, online=measured)
