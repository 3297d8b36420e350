"""Timing several runs in turn, so that a noisy moment hits all of them."""

import statistics
import time
from collections.abc import Callable
from typing import Any

Times = dict[str, list[float]]


def take_turns(runs: dict[str, Callable[[], Any]], turns: int) -> Times:
    """Seconds of every run by turn; a first turn, not counted, warms up.  Runs return when they are done."""
    times: Times = {name: [] for name in runs}
    for _ in range(turns + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    return {name: column[1:] for name, column in times.items()}


def ratio(times: Times, name: str, rival: str) -> float:
    """The median over the turns of one run's time over another's."""
    return statistics.median(ours / theirs for ours, theirs in zip(times[name], times[rival], strict=True))
