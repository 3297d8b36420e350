"""Reads and writes the files of a work directory: only plain files, and never through a link that somebody left there."""

import contextlib
import errno
import itertools
import json
import math
import os
import pathlib
import stat
from collections.abc import Iterator
from typing import Any, BinaryIO, NoReturn

from lowrank_jax.experiment import interrupts

_LARGEST_JSON = 2**26  # bytes
_LONGEST_INT = 20  # characters


def read_json(path: Any) -> Any:
    """The JSON value in a file.

    Raises:
      OSError: see `read_bytes`.
      ValueError: it is not JSON, or not within its limits; the message says what is wrong.
    """
    return parse_json(read_bytes(path, _LARGEST_JSON).decode())


def parse_json(text: str) -> Any:
    """A JSON value of finite numbers of 64 bits.  Raises ValueError, also for what is nested too deeply to be read."""
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number that JSON can hold")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)


def _whole(text: str) -> int:
    value = int(text) if len(text) <= _LONGEST_INT else 2**64
    return value if -(2**63) <= value < 2**64 else _refuse(f"{text[:_LONGEST_INT]}...")


_DECODER = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite, parse_int=_whole)


def read_bytes(path: Any, largest: int | None = None) -> bytes:
    """The content of a plain file, local or remote.

    Raises:
      OSError: it cannot be read, or is a folder, a pipe or a device, which could block for ever.
      ValueError: it has more bytes than `largest`.
    """
    if not is_local(path):
        return path.read_bytes()
    with open_to_read(path) as file:
        if largest and (size := os.fstat(file.fileno()).st_size) > largest:
            raise ValueError(f"it has {size:,} bytes; at most {largest:,} are expected")
        return file.read()


def write(path: Any, content: bytes) -> None:
    """Writes a file completely or not at all; a link in its place is replaced, not followed."""
    if not is_local(path):  # stores of objects write whole ones
        path.write_bytes(content)
        return
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # what a kill has left, or a link
    with interrupts.cleaning_up(lambda: partial.unlink(missing_ok=True)):
        try:
            with named_in_errors(path), _plain(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW) as file:
                file.write(content)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def make_folder(path: Any) -> None:
    """Makes a folder and those above it, unless it is there; Python's own way calls itself for each of them."""
    if not is_local(path):
        path.mkdir(parents=True, exist_ok=True)
        return
    missing = [pathlib.Path(path)]
    while missing[-1].parent != missing[-1] and not missing[-1].parent.exists():
        missing.append(missing[-1].parent)
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)


def append(path: Any, content: bytes) -> None:
    """Appends to a file.  Raises OSError if it is a link, or no plain file."""
    if not is_local(path):
        with path.open("ab") as file:
            file.write(content)
        return
    with named_in_errors(path), open_to_append(path) as file:
        file.write(content)


@contextlib.contextmanager
def named_in_errors(path: Any) -> Iterator[None]:
    """Gives an OSError the name of the file: where writing fails, as on a full disk, Python leaves it out."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def open_to_read(path: Any) -> BinaryIO:
    """Opens a local file.  Raises OSError unless it is a plain one."""
    return _plain(path, os.O_RDONLY)


def open_to_append(path: Any) -> BinaryIO:
    """Opens a local file; one with a second name, as in a backup of links, becomes a copy first, and the other stays as it is.

    Raises:
      OSError: it is a link, or no plain file.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    file = _plain(path, flags)
    if os.fstat(file.fileno()).st_nlink > 1:
        file.close()
        write(path, read_bytes(path))
        file = _plain(path, flags)
    return file


def _plain(path: Any, flags: int) -> BinaryIO:
    """Opens a local file, without waiting for the other end of a pipe.  Raises OSError unless it is a plain file."""
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP or not flags & os.O_NOFOLLOW:
            raise
        raise _through_a_link(path) from None
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "wb" if flags & os.O_WRONLY else "rb")
    os.close(descriptor)
    raise OSError(errno.EINVAL, "it is not a plain file", str(path))


def free_name(path: Any) -> Any:
    """The path with the first number that makes it new: `metrics-1.jsonl` for `metrics.jsonl`."""
    names = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(1))
    return next(name for name in names if not is_there(name))


def is_there(path: Any) -> bool:
    """Whether there is anything by this name, a link that leads nowhere included."""
    return path.exists() or is_link(path)


def is_link(path: Any) -> bool:
    """Whether this is a symbolic link; buckets have none."""
    return is_local(path) and pathlib.Path(path).is_symlink()


def refuse_link(path: Any) -> None:
    """Raises OSError if a folder that is to be written to, and need not exist, is a link."""
    if is_link(path):
        raise _through_a_link(path)


def _through_a_link(path: Any) -> OSError:
    return OSError(errno.ELOOP, "it is a link, and nothing is written through links", str(path))


def is_count(value: Any) -> bool:
    """Whether a value that was read is a whole number of at least 0, of 63 bits."""
    return type(value) is int and 0 <= value < 2**63


def is_local(path: Any) -> bool:
    return "://" not in str(path)
