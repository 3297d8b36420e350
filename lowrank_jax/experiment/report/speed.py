"""How fast a run trained, by the windows of its log."""

import math
import statistics
from collections.abc import Sequence


def images_per_second(curve: Sequence[tuple[int, float]], first: int, last: float = math.inf) -> float:
    """The median over the windows that lie between two steps; NaN if there is none.

    The window that begins with the first of them counts only where it is the only one: it includes what is compiled then.

    Args:
      curve: the last step of each window and its images per second, as logged.
      first: the step before the first one that counts.
      last: the last step that counts.
    """
    begins = [0, *(step for step, _ in curve)]
    within = {begin: rate for begin, (end, rate) in zip(begins, curve, strict=False) if first <= begin and end <= last}
    later = [rate for begin, rate in within.items() if begin > first]
    return statistics.median(later or within.values() or [math.nan])
