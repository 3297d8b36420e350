"""Reads and writes the files of a work directory: only plain files, and never through a link that somebody left there."""

import errno
import json
import math
import os
import stat
from typing import Any, NoReturn

_LARGEST_JSON = 2**26  # bytes


def read_text(path: Any) -> str:
    """The text of a plain file, local or remote.

    Raises:
      OSError: it cannot be read, or is a folder, a pipe or a device, which could block for ever.
      ValueError: it is not UTF-8.
    """
    return read_bytes(path).decode()


def read_json(path: Any) -> Any:
    """The JSON value in a file.

    Raises:
      OSError: see `read_text`.
      ValueError: it is not JSON, or not within its limits; the message says what is wrong.
    """
    return parse_json(read_bytes(path, _LARGEST_JSON).decode())


def parse_json(text: str) -> Any:
    """A JSON value of finite numbers.  Raises ValueError, also for what is nested too deeply to be read."""
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)


def read_bytes(path: Any, largest: int | None = None) -> bytes:
    """The content of a plain file; see `read_text`.  Raises ValueError if it has more bytes than `largest`."""
    if not is_local(path):
        return path.read_bytes()
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is not a plain file", str(path))
        if largest and found.st_size > largest:
            raise ValueError(f"it has {found.st_size:,} bytes; at most {largest:,} are expected")
        return file.read()


def write(path: Any, content: bytes) -> None:
    """Writes a file completely or not at all; a link in its place is replaced, not followed."""
    partial = path.with_name(f".{path.name}.partial")
    if not is_local(path):
        partial.write_bytes(content)
        partial.replace(path)
        return
    partial.unlink(missing_ok=True)  # what a kill has left, or a link
    with _open(partial, os.O_CREAT | os.O_EXCL) as file:
        file.write(content)
    partial.replace(path)


def append(path: Any, content: bytes) -> None:
    """Appends to a file.  Raises OSError if it is a link, or no plain file."""
    if not is_local(path):
        with path.open("ab") as file:
            file.write(content)
        return
    with _open(path, os.O_CREAT | os.O_APPEND | os.O_NONBLOCK) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is not a plain file", str(path))
        file.write(content)


def _open(path: Any, flags: int) -> Any:
    try:
        return os.fdopen(os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o666), "wb")
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(errno.ELOOP, "it is a link, and nothing is written through links", str(path)) from None


def is_local(path: Any) -> bool:
    return "://" not in str(path)
