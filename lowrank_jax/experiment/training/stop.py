"""A request to stop, from SIGTERM, SIGHUP or Ctrl-C."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from lowrank_jax.experiment import interrupts
from lowrank_jax.experiment.errors import INTERRUPTED

_PATIENCE = 10.0  # seconds, for which a request waits for a batch; a machine that is taken away gives 30


_AGAIN = 1.0  # seconds, after which a program is told once more: an exception may be lost in somebody's callback


class Stalled(KeyboardInterrupt):
    """In a program: the data that is waited for does not come, and a signal has asked to stop.

    As a KeyboardInterrupt is, it is raised wherever the main thread happens to be, which may be the user's own code.
    """


class StopSignal:
    """Turns signals into a request that the loop honours between steps; a second Ctrl-C ends without saving.

    Attributes:
      requested: whether to stop; callers that hear of it in another way set it themselves.
      chained: outside of a command, also call the handler that was installed before.  Off, since such a handler may end the
        program before the run is saved, as Ray's does; a program that has to end at once turns it on for all of its runs.
    """

    chained = False

    def __init__(self):
        self.requested = False
        self._before: dict[int, Any] = {}
        self._depth = 0
        self._waiting: tuple[float, bool] | None = None
        self._given_up: tuple[float, bool] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Ray pickles what holds one; the handlers of this process stay here."""
        return {"requested": self.requested, "_before": {}, "_depth": 0, "_waiting": None, "_given_up": None}

    @contextlib.contextmanager
    def waiting_for_data(self, *, saved: bool) -> Iterator[None]:
        """Within, a request does not wait for ever: a stalled file system or the user's own data may never answer.

        Args:
          saved: whether there is a checkpoint, from which the same command goes on.

        Raises:
          Stalled: in a program, some seconds after a request; a command ends.  What was waited for may just have come.
        """
        self._waiting = time.monotonic(), saved
        try:
            yield
        finally:
            self._waiting = None

    def __enter__(self) -> "StopSignal":
        self._depth += 1  # whoever made it may have entered it before the run does
        if self._depth > 1:
            return self
        if interrupts.obeyed():
            interrupts.start_receiving(self._take)
        elif threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in interrupts.SIGNALS}
            if self._before[signal.SIGHUP] is signal.SIG_IGN:  # nohup
                del self._before[signal.SIGHUP]
            # None stands for a handler that Python did not install, and cannot put back.
            self._before = {number: handler for number, handler in self._before.items() if handler is not None}
            for number in self._before:
                signal.signal(number, self._request)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._depth -= 1
        if self._depth:
            return
        if self.requested and exception[:1] in ((), (None,)):
            interrupts.too_late()  # what was asked for has been done
        if interrupts.obeyed():
            interrupts.stop_receiving(self._take)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int) -> bool:
        """Takes a signal of a command, but for a second Ctrl-C."""
        again, self.requested = self.requested, True
        if not again:
            threading.Thread(target=self._watch, args=(number,), name="stop", daemon=True).start()
        return not (again and number == signal.SIGINT)

    def _watch(self, number: int) -> None:
        """Ends a command whose loop cannot hear of the request, as of its last checkpoint; in a program the wait ends."""
        asked = time.monotonic()
        while self._depth:
            time.sleep(0.2)
            waiting = self._waiting
            if waiting is None or time.monotonic() - max(asked, waiting[0]) < _PATIENCE:
                continue
            if not interrupts.obeyed():
                self._give_up(waiting)
                continue
            since, saved = waiting
            what = f"no batch of data came for {time.monotonic() - since:.0f}s"
            if saved:
                interrupts.end(
                    INTERRUPTED, f"lowrank: {what}; ended without saving, and the same command goes on from what was saved"
                )
            interrupts.end(128 + number, f"lowrank: {interrupts.SIGNALS[signal.Signals(number)]}; {what}")

    def _give_up(self, waiting: tuple[float, bool]) -> None:
        """Has the main thread's handler raise `Stalled`: no other exception ends what it waits for in the system."""
        self._given_up = waiting
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):  # Ctrl-C last: should it be late, it is a second one
            if number in self._before and signal.getsignal(number) == self._request:
                signal.pthread_kill(threading.main_thread().ident or 0, number)
                break
        time.sleep(_AGAIN)

    def _request(self, number: int, frame: Any) -> None:
        given_up, self._given_up = self._given_up, None
        if given_up is not None:
            if given_up is self._waiting:
                raise Stalled(f"no data came for {time.monotonic() - given_up[0]:.0f}s")
            return
        if not self._take(number):
            raise KeyboardInterrupt
        before = self._before.get(number)
        if self.chained and callable(before) and before is not signal.default_int_handler:
            before(number, frame)
