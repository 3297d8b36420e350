"""A request to stop, from SIGTERM or Ctrl-C."""

import signal
import threading
from typing import Any


class StopSignal:
    """Turns SIGTERM and Ctrl-C into a request that the loop honours between steps; a second Ctrl-C ends without saving.

    Attributes:
      requested: whether to stop; callers that hear of it in another way set it themselves.
      chained: also call the handler that was installed before.  Off, since such a handler may end the program before the run
        is saved, as Ray's does; a program that has to end at once turns it on for all of its runs.
    """

    chained = False

    def __init__(self):
        self.requested = False
        self._before: dict[int, Any] = {}
        self._depth = 0

    def __enter__(self) -> "StopSignal":
        self._depth += 1  # whoever made it may have entered it before the run does
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._request) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: Any) -> None:
        self._depth -= 1
        if self._depth:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: Any) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        before = self._before.get(number)
        if self.chained and callable(before) and before is not signal.default_int_handler:
            before(number, frame)
