"""`ControllerConfig`: how a controller is run, apart from the model and the budget that it is run on."""

from __future__ import annotations

from dataclasses import dataclass, field

from rankscope.control.policy import Policy
from rankscope.control.schedule import Schedule
from rankscope.performance import PerformanceModel

MOST_EVERY = 50
DECISIONS = 4  # before the freeze, of a run too short for MOST_EVERY


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerConfig:
    """The settings of a `RankController` for `rankscope.train`.

    Attributes:
        every: Optimizer steps between decisions; None: 50, or less in short runs, so that four decisions come before the freeze.
        freeze_fraction: Share of the run after which ranks stay.
        samples: Steps before each decision whose gradients are seen.
        policy: How bold.
        performance_model: A study's, which refuses moves that it believes to be harmful.

    >>> ControllerConfig().every_of(1000), ControllerConfig().every_of(100), ControllerConfig(every=10).every_of(100)
    (50, 7, 10)
    """

    every: int | None = None
    freeze_fraction: float = 0.3
    samples: int = 8
    policy: Policy = field(default_factory=Policy)
    performance_model: PerformanceModel | None = None

    def every_of(self, steps: int) -> int:
        """Optimizer steps between decisions in a run of so many."""
        return self.every or max(1, min(MOST_EVERY, int(self.freeze_fraction * steps) // DECISIONS))

    def schedule(self, steps: int) -> Schedule:
        """When a run of so many steps looks and decides.

        Raises:
            ControlError: It would never decide anything.
        """
        return Schedule(
            every=self.every_of(steps),
            total_steps=steps,
            freeze_fraction=self.freeze_fraction,
            samples=self.samples,
        )
