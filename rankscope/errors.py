"""The errors rankscope raises on purpose. Each message is one line: condition, value, remedy."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable


class RankscopeError(Exception):
    """The root of every error that rankscope raises on purpose."""

    def __init__(self, message: str = "") -> None:
        super().__init__(" ".join(message.splitlines()))  # names and values may hold line breaks


class SettingsError(RankscopeError, ValueError):
    """An option, budget, bound, study or database that cannot work."""


class FileError(RankscopeError, ValueError):
    """A file that is missing, broken, or made from something else."""


class ModelError(RankscopeError, ValueError):
    """A model, adapter, optimizer or profile that cannot be used as asked."""


class TaskError(RankscopeError, ValueError):
    """A task whose model, data or loss cannot be used."""


class TrainingError(RankscopeError, RuntimeError):
    """A training that failed or diverged."""


def one_line(error: BaseException, most: int = 300) -> str:
    """Another library's error message on one line; its type where the message is empty."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[:most] + " …"


def did_you_mean(
    wrong: object, known: Iterable[str], otherwise: str, *, cutoff: float = 0.6, quoted: Callable[[str], str] = repr
) -> str:
    """A message's remedy: "did you mean 'x'?" with the known name most like the wrong one; `otherwise` if none is."""
    close = difflib.get_close_matches(str(wrong), list(known), n=1, cutoff=cutoff)
    return f"did you mean {quoted(close[0])}?" if close else otherwise


def shown(value: object, most: int = 80) -> str:
    """A value for a message, shortened. Python refuses to print integers of thousands of digits."""
    if isinstance(value, int) and abs(value) >= 10**18:
        return f"an integer of about {round(value.bit_length() * math.log10(2))} digits"
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else repr(value)
    return text if len(text) <= most else text[:most] + "…"
