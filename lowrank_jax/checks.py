"""Checks of numbers: each returns what is wrong with a value, or None."""

import math
from collections.abc import Callable

Check = Callable[[float], str | None]


def at_least(low: float) -> Check:
    """Finite and at least `low`."""
    return lambda value: None if low <= value < math.inf else f"must be at least {low:g}"


def above(low: float) -> Check:
    """Finite and greater than `low`."""
    return lambda value: None if low < value < math.inf else f"must be above {low:g}"


def below_one(value: float) -> str | None:
    """A rate in [0, 1)."""
    return None if 0 <= value < 1 else "must be in [0, 1)"
