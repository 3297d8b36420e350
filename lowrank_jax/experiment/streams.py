"""Standard streams that stay usable: closed ones are opened, and what nobody can read any more is dropped."""

import contextlib
import errno
import io
import os
import select
import signal
import sys
import threading
import time
from typing import Any, NoReturn


def keep_open() -> None:
    """To be called before any file is opened: it could become the standard output of libraries."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name) or open(number, "w", closefd=False)  # noqa: SIM115
        with contextlib.suppress(AttributeError, io.UnsupportedOperation):  # another program's, in memory
            if stream.fileno() == number:
                setattr(sys, name, _kept(stream, number))


def _kept(stream: Any, number: int) -> io.TextIOWrapper:
    raw = _Raw(number, "w", closefd=False)
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),  # type: ignore[arg-type]
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


_STDERR = 2


class _Raw(io.FileIO):
    """Drops what it is given once the reader of the pipe, or the terminal, has gone: the work that says it goes on."""

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            # What cannot be complained of is dropped too, so that the status still says what was wrong.
            if error.errno not in (errno.EPIPE, errno.EIO) and self.fileno() != _STDERR:
                raise
        _lead_nowhere(self.fileno())
        return len(data)


def _lead_nowhere(number: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)


WAKING = signal.SIGURG  # which nobody else sends, and by default does nothing
_UNREAD = 5.0  # seconds, which a pager that is being read may well take


def drop_unread() -> NoReturn:
    """From now on, output that nobody reads is dropped after some seconds: it would hold back for ever whoever writes it."""
    since: dict[int, float] = {}
    while True:
        for number in (1, 2):
            if _is_read(number):
                since.pop(number, None)
            elif time.monotonic() - since.setdefault(number, time.monotonic()) > _UNREAD:
                _lead_nowhere(number)
                _wake_all()
        time.sleep(0.2)


def _is_read(number: int) -> bool:
    """Whether a stream takes something, if only an error."""
    poll = select.poll()
    poll.register(number, select.POLLOUT)
    return bool(poll.poll(0))


def _wake_all() -> None:
    """Has every thread that waits for the system try again: a write that has begun does not see where its stream leads now."""
    for thread in threading.enumerate():
        if thread.ident is not None and thread.is_alive():
            with contextlib.suppress(OSError):
                signal.pthread_kill(thread.ident, WAKING)
