"""A request to stop, from SIGTERM or Ctrl-C."""

import signal
import threading
from typing import Any


class StopSignal:
    """Turns SIGTERM and Ctrl-C into a request that the loop honours between steps; a second Ctrl-C ends without saving.

    A handler that the program had installed before is called as well: what the program does on a signal stays its own affair.

    Attributes:
      requested: whether to stop; callers that hear of it in another way set it themselves.
    """

    def __init__(self):
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._request) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: Any) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        before = self._before.get(number)
        if callable(before) and before is not signal.default_int_handler:
            before(number, frame)
