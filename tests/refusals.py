"""The check of a message that a user reads."""

import re
from collections.abc import Callable

import pytest

from rankscope.errors import RankscopeError, TaskError


def refused(message: str, act: Callable[[], object], kind: type[RankscopeError] = TaskError) -> None:
    """It raises an error of this kind with exactly this message."""
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        act()
