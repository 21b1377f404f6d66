"""The errors rankscope raises on purpose. Each message is one line: the condition, the value, the remedy."""

from __future__ import annotations

import math


class RankscopeError(Exception):
    """The root of every error that rankscope raises on purpose."""

    def __init__(self, message: str = "") -> None:
        super().__init__(
            " ".join(message.splitlines())
        )  # a name or a value may hold line breaks; the message is one line


class TargetError(RankscopeError, ValueError):
    """A selection of target modules that matches nothing, or a module that cannot carry an adapter."""


class BudgetError(RankscopeError, ValueError):
    """A parameter budget, bound, score or gain that no allocation can satisfy."""


class AllocationError(RankscopeError, ValueError):
    """Ranks that do not fit their target modules, or allocations that cannot be compared."""


class AdapterError(RankscopeError, ValueError):
    """A live adapter whose ranks cannot be changed as asked, or ranks saved beside a checkpoint that do not fit it."""


class OptimizerError(RankscopeError, ValueError):
    """An optimizer whose state cannot be carried over a change of ranks."""


class ProfileError(RankscopeError, ValueError):
    """A profile that cannot be taken, read, or used for the model at hand."""


class PerformanceModelError(RankscopeError, ValueError):
    """Observations that a performance model cannot be fitted to, or something it cannot tell."""


class TaskError(RankscopeError, ValueError):
    """A task whose model, data or factory cannot be loaded, or whose loss cannot be trained on."""


class TrainingError(RankscopeError, RuntimeError):
    """A fine-tuning run that cannot go on, as when its loss is no longer finite."""


class ControlError(RankscopeError, ValueError):
    """A controller that cannot run on this model, optimizer, budget or schedule, or a state that is another's."""


class StudyError(RankscopeError, ValueError):
    """A study file or study database that does not fit what was asked."""


class ComparisonError(RankscopeError, ValueError):
    """A method that cannot be compared, or runs that belong to another comparison."""


class DashboardError(RankscopeError, RuntimeError):
    """The dashboard cannot be opened: a package is missing, or its port is taken."""


class FileFormatError(RankscopeError, ValueError):
    """A file that is missing, truncated, or written by another schema."""


def one_line(error: BaseException, most: int = 300) -> str:
    """What another library's error says, as a part of one line; its type where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[:most] + " …"


def shown(value: object, most: int = 80) -> str:
    """A value for a message, shortened; Python itself refuses to print integers of thousands of digits."""
    if isinstance(value, int) and abs(value) >= 10**18:
        return f"an integer of about {round(value.bit_length() * math.log10(2))} digits"
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else repr(value)
    return text if len(text) <= most else text[:most] + "…"
