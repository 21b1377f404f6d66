"""When the controller looks and decides: pure arithmetic on optimizer steps, counted from 1."""

from __future__ import annotations

from dataclasses import dataclass

from rankscope.exceptions import ControlError


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Decisions after each `every` steps until the freeze, each resting on the gradients of the `samples` steps before it.

    >>> schedule = Schedule(every=50, total_steps=1000, freeze_fraction=0.3, samples=8)
    >>> schedule.last_decision, schedule.samples_at(43), schedule.decides_at(50)
    (300, True, True)
    """

    every: int
    total_steps: int
    freeze_fraction: float
    samples: int

    def __post_init__(self) -> None:
        for name in ("every", "total_steps", "samples"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ControlError(f"`{name}` must be a whole number above 0, but got {value!r}.")
        if not 0 < self.freeze_fraction <= 1:
            raise ControlError(
                f"`freeze_fraction` must be above 0 and at most 1, but got {self.freeze_fraction}; for ranks that "
                "stay, train without a controller."
            )
        if self.last_decision == 0:
            raise ControlError(
                f"`every` must leave a decision before the ranks freeze at step {self.freeze_step} of {self.total_steps}, "
                f"but got {self.every}; lower it, or raise `freeze_fraction`."
            )

    @property
    def freeze_step(self) -> int:
        """The last step after which ranks may change."""
        return int(self.freeze_fraction * self.total_steps + 1e-9)

    @property
    def last_decision(self) -> int:
        """The step of the last decision."""
        return self.freeze_step // self.every * self.every

    @property
    def last_look(self) -> int:
        """The step at which the last decision's effect is measured."""
        return min(self.last_decision + self.every, self.total_steps)

    def decides_at(self, step: int) -> bool:
        """Whether there is a decision after this step."""
        return step % self.every == 0 and 0 < step <= self.last_decision

    def samples_at(self, step: int) -> bool:
        """Whether this step's gradients are seen."""
        return 0 < step <= self.last_decision and -step % self.every < self.samples

    def is_coarse(self, step: int, coarse_fraction: float) -> bool:
        """Whether a decision may move all modules together: in the first part of the time until the freeze."""
        return step <= coarse_fraction * self.freeze_step
