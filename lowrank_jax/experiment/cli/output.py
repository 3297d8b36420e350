"""What a command prints, and files that it writes when its work is done."""

import contextlib
import dataclasses
import errno
import io
import os
import pathlib
import stat
import sys
from collections.abc import Iterator

from lowrank_jax.experiment import interrupts
from lowrank_jax.experiment.workdir.files import named_in_errors, write
from lowrank_jax.text import printable


def print_anything() -> None:
    """Whatever a terminal cannot show is replaced, rather than an error after the work is done."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    print(printable(text), flush=True)  # names and reasons out of files may hold a terminal's commands


def hush(text: str) -> None:
    """In place of `say`, where another process prints."""


def complain(text: str) -> None:
    print(f"{printable(text)}\n", end="", file=sys.stderr, flush=True)  # in one piece, whatever other threads print


@dataclasses.dataclass(frozen=True)
class Output:
    """A file to write after long work; without a path, nothing is written."""

    path: pathlib.Path | None
    new: bool

    def write(self, content: str | bytes) -> None:
        if self.path:
            with named_in_errors(self.path):
                _write(self.path.resolve(), content.encode() if isinstance(content, str) else content)

    def give_up(self) -> None:
        """Leaves the folder as it was."""
        if self.path and self.new:
            self.path.unlink(missing_ok=True)


def _write(path: pathlib.Path, content: bytes) -> None:
    """Completely or not at all, where that can be: a full disk must not cost what was there before."""
    if not path.is_file():  # a terminal, which may wait for its reader
        path.write_bytes(content)
    elif os.access(path.parent, os.W_OK):
        mode = stat.S_IMODE(path.stat().st_mode)
        write(path, content)
        path.chmod(mode)
    else:
        with interrupts.held_back():
            path.write_bytes(content)


_open: set[pathlib.Path] = set()


@contextlib.contextmanager
def written_at_the_end(name: str | None) -> Iterator[Output]:
    """A file for the result of long work: it is opened first, so that a bad path is found early, and kept as it was on failure.

    A failure includes a signal.

    Raises:
      OSError: the file cannot be written, or another result is going to be written to it.
    """
    output = Output(path := pathlib.Path(name) if name else None, new=path is not None and not path.exists())
    place = path.resolve() if path else None
    if path and path.is_fifo():
        raise OSError(errno.EINVAL, "a pipe, which nobody may ever read; name a file", name)
    if place in _open:
        raise OSError(errno.EINVAL, "named for two results, and can hold one", name)
    with interrupts.cleaning_up(output.give_up):
        if path and place:
            path.open("a").close()
            _open.add(place)
        try:
            yield output
        except BaseException:
            output.give_up()
            raise
        finally:
            if place:
                _open.discard(place)
