"""Timing several runs in turn, so that a noisy moment hits all of them."""

import statistics
import time
from collections.abc import Callable
from typing import Any

Times = dict[str, list[float]]


def take_turns(runs: dict[str, Callable[[], Any]], turns: int, clock: Callable[[], float] = time.perf_counter) -> Times:
    """Seconds of every run by turn; a first turn, not counted, warms up.  Runs return when they are done."""
    times: Times = {name: [] for name in runs}
    for _ in range(turns + 1):
        for name, run in runs.items():
            begin = clock()
            run()
            times[name].append(clock() - begin)
    return {name: column[1:] for name, column in times.items()}


def per_cpu_second(runs: dict[str, Callable[[], Any]], turns: int, count: int) -> Times:
    """How many of the `count` things that a run does it does in a second of processor time, by turn."""
    return {name: [count / used for used in column] for name, column in take_turns(runs, turns, time.process_time).items()}


def ratio(times: Times, name: str, rival: str) -> float:
    """The median over the turns of one run's time over another's."""
    return statistics.median(ours / theirs for ours, theirs in zip(times[name], times[rival], strict=True))
