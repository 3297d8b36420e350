"""Checks of numbers: each returns what is wrong with a value, or None."""

import math
from collections.abc import Callable, Iterable

Check = Callable[[float], str | None]


def at_least(low: float, high: float = math.inf) -> Check:
    """Finite, at least `low` and at most `high`."""
    return lambda value: _too_large(value, high) if low <= value < math.inf else f"must be at least {low:g}"


def above(low: float, high: float = math.inf) -> Check:
    """Finite, greater than `low` and at most `high`."""
    return lambda value: _too_large(value, high) if low < value < math.inf else f"must be above {low:g}"


def each(check: Check) -> Callable[[Iterable[float]], str | None]:
    """What is wrong with the first value that is wrong."""
    return lambda values: next(filter(None, map(check, values)), None)


def _too_large(value: float, high: float) -> str | None:
    return f"must be at most {high:.10g}" if value > high else None


def below_one(value: float) -> str | None:
    """A rate in [0, 1)."""
    return None if 0 <= value < 1 else "must be in [0, 1)"
