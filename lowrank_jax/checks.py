"""What numbers may be: each check names what is wrong with a value, or gives None."""

import math
from collections.abc import Callable

Check = Callable[[float], str | None]


def at_least(low: float) -> Check:
    """Finite, and `low` or more."""
    return lambda value: None if low <= value < math.inf else f"must be at least {low:g}"


def above(low: float) -> Check:
    """Finite, and more than `low`."""
    return lambda value: None if low < value < math.inf else f"must be above {low:g}"


def below_one(value: float) -> str | None:
    """A rate that leaves something over."""
    return None if 0 <= value < 1 else "must be in [0, 1)"
