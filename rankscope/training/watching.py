"""How far a training of this process has come, told to whoever watches: a progress bar, which no function passes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Watcher = Callable[[str, int, int], object]

_watcher: ContextVar[Watcher] = ContextVar("watcher", default=lambda phase, done, total: None)


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Call `watcher` with phase, step and steps in all, at each step and evaluation of trainings in this thread.

    Trainings in worker processes are not seen.

    >>> with watching(lambda phase, done, total: print(phase, done, "of", total)):
    ...     tell("step", 1, 2)
    step 1 of 2
    """
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def tell(phase: str, done: int, total: int) -> None:
    """Tell who watches, if anyone does."""
    _watcher.get()(phase, done, total)
