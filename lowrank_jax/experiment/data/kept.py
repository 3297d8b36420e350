"""What was found out about data, kept for a command.

A run asks for the description of its data many times, and has to get the same answer each time, whatever happens to the files
meanwhile.  Only where a config is read anew, what has visibly changed is looked at again; and where a process begins something
else, everything is.
"""

import threading
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

Found = TypeVar("Found")

_configs_read = 0
_commands = 0


def forget() -> None:
    """What a command would do begins: nothing tells cheaply what a function returns now, or that a file was overwritten."""
    global _commands
    _commands += 1


def look_again() -> None:
    """A config is about to be read: what has changed since the last one is to be noticed."""
    global _configs_read
    _configs_read += 1


class Kept(Generic[Found]):
    """A function whose results are kept.

    Args:
      find: the function, of arguments that can be hashed.
      stamp: by which a change of what a result was found in is noticed, from the result; cheap.
    """

    def __init__(self, find: Callable[..., Found], stamp: Callable[[Found], Any] = lambda found: None):
        self._find, self._stamp = find, stamp
        self._kept: dict[tuple[Hashable, ...], tuple[int, int, Any, Found]] = {}
        self._lock = threading.RLock()

    def __call__(self, *key: Hashable) -> Found:
        with self._lock:
            if key in self._kept:
                command, when, stamp, found = self._kept[key]
                if command == _commands and (when == _configs_read or self._stamp(found) == stamp):
                    self._kept[key] = _commands, _configs_read, stamp, found
                    return found
            found = self._find(*key)
            self._kept[key] = _commands, _configs_read, self._stamp(found), found
            return found
