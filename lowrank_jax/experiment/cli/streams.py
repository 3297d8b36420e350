"""Standard streams that stay usable: closed ones are opened, and what nobody can read any more is dropped."""

import contextlib
import errno
import io
import os
import sys
from typing import Any


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
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        return len(data)
