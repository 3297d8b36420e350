"""Ctrl-C, SIGTERM and SIGHUP at any moment of a command.

Python tells its main thread of a signal once that runs Python again, which a compiler can delay by minutes.  An exception
raised there is lost where another language has called Python, and elsewhere it unwinds libraries that were not made for that.
So a command ends without an exception, and a thread listens beside the main one: whichever is first acts.  Until then signals
wait in a pipe, in their order, so that each goes to whoever received signals when it came.

What nobody reads of a command's output holds it back where it says something, in the system and for ever.  From the first
signal on such output is dropped, so that the run can be saved, and the command can end.
"""

import atexit
import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from lowrank_jax.experiment import streams

SIGNALS = {signal.SIGHUP: "ended by SIGHUP", signal.SIGINT: "interrupted", signal.SIGTERM: "ended by SIGTERM"}
"""What is said of each, once it has ended a command; the status is 128 and its number."""

Receive = Callable[[int], bool]
_PATIENCE = 20.0  # seconds, after which clean-ups that hang are given up; several processes need 15 to agree
_YIELDED = 2.0  # seconds, for which the main thread waits for the one that acts; a clean-up may wait for the main thread

_pipe: int | None = None  # None: this process is not a command, and its signals are not handled here
_lock = threading.Lock()  # held for good by whoever ends the process
_main_inside = False  # the main thread has the lock or waits for it, so that a handler in it must not
_receivers: list[Receive] = []
_clean_ups: list[Callable[[], object]] = []
_leave: list[Callable[[int, str], NoReturn]] = []
_too_late = False
_reached: int | None = None  # the status of a command that has nothing left to do
_dropping = False


def obey() -> None:
    """From now on signals end this process at once, with one line; to be called in the main thread before long imports."""
    global _pipe
    _pipe, written = os.pipe()
    for end in (_pipe, written):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(written, warn_on_full_buffer=False)
    install()
    threading.Thread(target=_listen, name="signals", daemon=True).start()
    os.register_at_fork(after_in_child=_forget)
    atexit.register(_ignore)  # the first to be registered is the last to be called


def obeyed() -> bool:
    """Whether `obey` was called: this process is a command, not another program that uses the package."""
    return _pipe is not None


def install() -> None:
    """Takes the signals back from a library that has handlers of its own; does nothing where this process is not a command."""
    if not obeyed() or threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, _heard)
    signal.signal(streams.WAKING, _awake)


def start_receiving(receive: Receive) -> None:
    """From now on signals go to `receive`, which returns whether it takes them; any other still ends the command."""
    install()
    with _alone():
        _deliver()  # what came before
        _receivers.append(receive)


def stop_receiving(receive: Receive) -> None:
    """Signals no longer go to `receive`, but for those that have come."""
    with _alone():
        _deliver()
        _receivers.remove(receive)


@contextlib.contextmanager
def cleaning_up(clean_up: Callable[[], object]) -> Iterator[None]:
    """What a signal must not leave behind is removed by this, in a thread of its own, before the process ends."""
    with _alone():
        _clean_ups.append(clean_up)
    try:
        yield
    finally:
        with _alone():  # never, if a signal is ending the process
            if clean_up in _clean_ups:
                _clean_ups.remove(clean_up)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Signals wait until this short work is complete."""
    with _alone():
        yield
        _deliver()


def clean_up() -> None:
    """What a process does that ends without leaving its contexts."""
    while _clean_ups:
        with contextlib.suppress(Exception):
            _clean_ups.pop()()


def leave_by(leave: Callable[[int, str], NoReturn]) -> None:
    """A signal ends this process by that, given the status and the message; for processes that have to end together."""
    _leave.append(leave)


def too_late(status: int | None = None) -> None:
    """The work is done, and its status stands: SIGTERM and SIGHUP no longer change it; Ctrl-C is still obeyed.

    Args:
      status: of a command that has nothing left to do: these signals end it with this one.  Python may still be waiting for
        threads that somebody's code has left behind.
    """
    global _too_late, _reached
    with _alone():
        _too_late, _reached = True, status


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One thread at a time; the main thread does not go on before what came meanwhile is delivered.

    It may go on to code that never lets another thread run, so that it cannot leave a signal to that one.
    """
    global _main_inside
    if threading.current_thread() is not threading.main_thread():
        with _lock:
            yield
        return
    _main_inside = True
    try:
        with _lock:
            yield
    finally:
        _main_inside = False
        _heard()


def _heard(*_: Any) -> None:
    """Python calls it in the main thread for a signal."""
    global _main_inside
    # In this order: what another thread has read by now, it has read under the lock.
    while not _main_inside and (_has_come() or _lock.locked()):
        _main_inside = True
        try:
            if not _lock.acquire(timeout=_YIELDED):
                return
            try:
                _deliver()
            finally:
                _lock.release()
        finally:
            _main_inside = False


def _awake(*_: Any) -> None:
    """Python calls it in the main thread, which then tries again what the signal has interrupted."""


def _has_come() -> bool:
    return _pipe is not None and bool(select.select([_pipe], [], [], 0)[0])


def _listen() -> None:
    assert _pipe is not None
    while True:
        select.select([_pipe], [], [])
        with _alone():
            _deliver()


def _deliver() -> None:
    if _pipe is None:
        return
    try:
        numbers = os.read(_pipe, 4096)
    except BlockingIOError:  # another thread was first
        return
    if any(number in SIGNALS for number in numbers):
        _drop_unread()
    for number in numbers:
        if number in SIGNALS and not (_receivers and _receivers[-1](number)):
            _end(number)


def _drop_unread() -> None:
    global _dropping
    if not _dropping:
        _dropping = True
        with contextlib.suppress(RuntimeError):  # no memory for a thread
            threading.Thread(target=streams.drop_unread, name="unread", daemon=True).start()


def end(status: int, message: str) -> NoReturn:
    """Ends the process at once, from any thread, as a signal does."""
    with _alone():
        _end_with(status, message)


def _end(number: int) -> None:
    if number == signal.SIGINT or not _too_late:
        _end_with(128 + number, f"lowrank: {SIGNALS[signal.Signals(number)]}")
    if _reached is not None and not _leave:  # several processes end together
        _end_with(_reached, "")


def _end_with(status: int, message: str) -> NoReturn:
    with contextlib.suppress(RuntimeError):  # no memory for a thread
        timer = threading.Timer(_PATIENCE, os._exit, [status])
        timer.daemon = True
        timer.start()
    clean_up()
    for leave in _leave:
        leave(status, message)
    with contextlib.suppress(OSError):
        os.write(2, f"{message}\n".encode() if message else b"")
    os._exit(status)


def _ignore() -> None:
    """At the end of Python, which would let signals kill the process while its libraries are unloaded."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # Python tries again, and says so
            stream.flush()  # may take for ever, while signals are still obeyed
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _forget() -> None:
    """In a fork, which shares the pipe: its signals are not the command's."""
    global _pipe, _lock, _main_inside, _dropping
    _pipe, _lock, _main_inside, _dropping = None, threading.Lock(), False, False
    _receivers.clear()
    _clean_ups.clear()
    _leave.clear()
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        if signal.getsignal(number) is _heard:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
