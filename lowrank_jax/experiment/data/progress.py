"""A line from time to time about work that takes long."""

import sys
import time
from collections.abc import Callable

from lowrank_jax.text import one_line

_SECONDS = 5.0


def to_stderr(text: str) -> None:
    """Prints a line for the user that is no result."""
    print(one_line(text), file=sys.stderr, flush=True)


class Progress:
    """Says how far a piece of work is, every few seconds; nothing if it is done before.

    Args:
      what: is being done, such as "reading train".
      total: of steps; None if that is not known.
      say: takes a line.
    """

    def __init__(self, what: str, total: int | None = None, say: Callable[[str], None] = to_stderr):
        self._what, self._total, self._say = what, total, say
        self._began = self._told = time.monotonic()

    def at(self, done: int) -> None:
        """So many steps are done."""
        now = time.monotonic()
        if now - self._told < _SECONDS or done == self._total:
            return
        self._told = now
        if self._total is None or not done:
            self._say(f"{self._what}: {done:,} so far")
            return
        left = (now - self._began) * (self._total - done) / done
        self._say(f"{self._what}: {done:,} of {self._total:,}, about {left:.0f}s left")
