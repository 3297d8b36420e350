"""Orbax without its chatter, and its barriers among the processes of one run."""

import contextlib
import dataclasses
import gc
import logging
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp

from lowrank_jax.experiment.hosts.processes import several

# What orbax's threads log of a save that fails, with a traceback each, and Python of what they leave.
_TOLD_ANYWAY = re.compile(
    r"Failed to write metadata|Failed to json parse Metadata file: \S+\.orbax-checkpoint-tmp"
    r"|_SignalingThread\.run\(\) raised|Handler Commit operations|Save Finalize thread"
    r"|(?s:exception was never retrieved.*orbax)"
)


def together() -> ocp.options.MultiprocessingOptions:
    """Barriers of the coordinator's instead of computations on the devices, which other threads' would get in the way of."""
    everyone = set(range(jax.process_count())) if several() else None
    return ocp.options.MultiprocessingOptions(active_processes=everyone)


def barrier() -> Callable[..., None]:
    """Orbax's own, but for a save that fails in this process, which orbax would hide while it waits for the others."""
    wait, caller = ocp.multihost.get_barrier_sync_fn(processes=set(range(jax.process_count()))), threading.current_thread()

    def sync(*, key: str, timeout_ms: int) -> None:
        failure = sys.exc_info()[1]  # what orbax's thread is about to end with; the caller may be handling one of its own
        if failure and threading.current_thread() is not caller:
            raise failure
        wait(key=key, timeout_ms=timeout_ms)

    return sync


def alone() -> ocp.options.MultiprocessingOptions:
    """No barriers: nobody waits for a process whose part is damaged."""
    own = jax.process_index()
    return ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"read{own}")


@contextlib.contextmanager
def quiet_failure() -> Iterator[None]:
    """When a read fails, orbax leaves its other reads unfinished, and Python complains of each as it is collected."""
    log, hook = logging.getLogger("asyncio"), sys.unraisablehook
    level = log.level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="coroutine .* was never awaited", category=RuntimeWarning)
        log.setLevel(logging.CRITICAL)
        sys.unraisablehook = lambda unraisable: None
        try:
            yield
            gc.collect()
        finally:
            sys.unraisablehook = hook
            log.setLevel(level)


def hush_saves() -> None:
    """Leaves a save that fails to the CheckpointError; its threads would complain too, at any time until they end."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_news)
    if not isinstance(sys.unraisablehook, _WithoutClosedLoops):
        sys.unraisablehook = _WithoutClosedLoops(sys.unraisablehook)


def _is_news(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR or not _TOLD_ANYWAY.search(record.getMessage())


@dataclasses.dataclass(frozen=True)
class _WithoutClosedLoops:
    """A hook that keeps quiet of writes beside one that failed, which end after the loop that waited for them."""

    otherwise: Callable[[Any], object]

    def __call__(self, unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            self.otherwise(unraisable)
