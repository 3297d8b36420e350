"""Keeps orbax, whose threads log every failure with a traceback, from repeating what a CheckpointError reports."""

import contextlib
import dataclasses
import gc
import logging
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

_STRAGGLER_SECONDS = 0.1  # for other reads to end after one has failed

# What orbax's threads log about a save that fails, and Python about what they leave behind.
_REPEATED = re.compile(
    r"Failed to write metadata|Failed to json parse Metadata file: \S+\.orbax-checkpoint-tmp"
    r"|_SignalingThread\.run\(\) raised|Handler Commit operations|Save Finalize thread"
    r"|(?s:exception was never retrieved.*orbax)"
)


@contextlib.contextmanager
def quiet_reads() -> Iterator[None]:
    """Silences Python's complaints about the reads that orbax leaves unfinished when one of them fails.

    They come as these are collected; `drop_unfinished` does that.
    """
    log, hook = logging.getLogger("asyncio"), sys.unraisablehook
    level = log.level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="coroutine .* was never awaited", category=RuntimeWarning)
        log.setLevel(logging.CRITICAL)
        sys.unraisablehook = lambda unraisable: None
        try:
            yield
        finally:
            sys.unraisablehook = hook
            log.setLevel(level)


def drop_unfinished() -> None:
    """Collects what orbax has left of a read that has failed."""
    time.sleep(_STRAGGLER_SECONDS)
    gc.collect()


def quiet_saves() -> None:
    """Silences the threads of a save that fails, for the rest of the process: they may complain at any time until they end."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_new)
    if not isinstance(sys.unraisablehook, _IgnoreClosedLoops):
        sys.unraisablehook = _IgnoreClosedLoops(sys.unraisablehook)


def _is_new(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR or not _REPEATED.search(record.getMessage())


@dataclasses.dataclass(frozen=True)
class _IgnoreClosedLoops:
    """An unraisable hook that ignores writes which end after the event loop of a failed save was closed."""

    otherwise: Callable[[Any], object]

    def __call__(self, unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            self.otherwise(unraisable)
