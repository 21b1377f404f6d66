"""How metrics are shown: shares in per cent and their differences in points, every other metric as it is; and intervals."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Unit(NamedTuple):
    """What a metric's values are multiplied by for a reader, with how many decimals, and the words after them."""

    scale: float
    digits: int
    sign: str  # after a value
    points: str  # after a difference

    def value(self, metric: float) -> str:
        """A value of the metric.

        >>> SHARE.value(0.913), AS_IT_IS.value(27.31)
        ('91.3 %', '27.310')
        """
        return f"{self.scale * metric:.{self.digits}f}{self.sign}"

    def difference(self, of: float, *, digits: int = 0) -> str:
        """A difference of two values, without its words, and with some decimals more.

        >>> SHARE.difference(0.0207), SHARE.difference(-0.0207, digits=1), AS_IT_IS.difference(1.2)
        ('+2.1', '-2.07', '+1.200')
        """
        return f"{self.scale * of:+.{self.digits + digits}f}"

    def distance(self, of: float) -> str:
        """How far two values are apart, in words.

        >>> SHARE.distance(0.0207), AS_IT_IS.distance(1.2)
        ('2.1 points', '1.200')
        """
        return f"{self.scale * of:.{self.digits}f}{self.points}"


SHARE = Unit(scale=100.0, digits=1, sign=" %", points=" points")
AS_IT_IS = Unit(scale=1.0, digits=3, sign="", points="")


def unit_of(metrics: ArrayLike) -> Unit:
    """The unit for values of a metric: that of shares if all are from 0 to 1. A loss or a score may be anything.

    >>> unit_of([0.91, 0.94]) == SHARE, unit_of([27.3, 0.5]) == AS_IT_IS
    (True, True)
    """
    values = np.asarray(metrics, dtype=np.float64)
    return SHARE if np.all((values >= 0.0) & (values <= 1.0) | np.isnan(values)) else AS_IT_IS


class Interval(NamedTuple):
    """A mean with its confidence interval; `low` and `high` are NaN where there is none."""

    mean: float
    low: float
    high: float

    def text(self, unit: Unit = AS_IT_IS) -> str:
        """A difference as tables show it; a dash where there is no interval.

        >>> Interval(0.02, 0.01, 0.03).text(SHARE), Interval(0.02, math.nan, math.nan).text()
        ('+2.0 [+1.0, +3.0]', '+0.020 [-]')
        """
        mean, low, high = map(unit.difference, self)
        return f"{mean} [-]" if math.isnan(self.low) else f"{mean} [{low}, {high}]"
