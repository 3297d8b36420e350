"""Checks of numbers: most return what is wrong with a value, or None."""

import math
import sys
from collections.abc import Callable, Iterable
from typing import Any

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


def plain(value: Any) -> Any:
    """A number of Python's for one of NumPy's or jax's that is known."""
    if not hasattr(value, "item") or getattr(value, "ndim", None) != 0:
        return value
    try:
        return value.item()
    except TypeError:  # what jax traces has no value yet
        return value


def is_number(value: Any) -> bool:
    """Whether it is a finite number of Python's that a float can hold; truth values are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def count(value: Any) -> str | None:
    """A whole number of Python's, at least 1 and of at most 64 bits."""
    if type(value) is not int or value < 1:
        return "must be a whole number of at least 1"
    return None if value < 2**63 else "must have at most 64 bits"
