"""Ctrl-C without a half-seen batch: the first one asks to stop after the present batch, the second stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stop:
    """Whether to stop.

    Attributes:
        requested: After the present batch.
    """

    requested = False


@contextmanager
def stop_on_interrupt(*, enabled: bool) -> Iterator[Stop]:
    """Turns the first SIGINT into a request; in other threads than the main one signals stay as they are."""
    stop = Stop()
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.getsignal(signal.SIGINT)

    def request(_number: int, _frame: Any) -> None:
        stop.requested = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, request)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
