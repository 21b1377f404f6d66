"""`ControllerConfig`: how a controller is run, apart from the model and the budget that it is run on."""

from __future__ import annotations

from dataclasses import dataclass, field

from rankscope.control.policy import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerConfig:
    """The settings of a `RankController` for `rankscope.train`.

    Attributes:
        every: Optimizer steps between decisions.
        freeze_fraction: Share of the run after which ranks stay.
        samples: Steps before each decision whose gradients are seen.
        policy: How bold.

    >>> ControllerConfig(every=10).freeze_fraction
    0.3
    """

    every: int = 50
    freeze_fraction: float = 0.3
    samples: int = 8
    policy: Policy = field(default_factory=Policy)
