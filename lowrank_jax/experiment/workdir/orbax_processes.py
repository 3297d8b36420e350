"""How orbax synchronises the processes of one run, and which of them writes what."""

import sys
import threading
from collections.abc import Callable

import jax
import orbax.checkpoint as ocp

from lowrank_jax.experiment.hosts.processes import several

_LARGE = 2**20  # bytes


def all_processes() -> ocp.options.MultiprocessingOptions:
    """Barriers of the coordinator, for saves.  Orbax's default runs a computation, which would get in the way of training."""
    active = set(range(jax.process_count())) if several() else None
    return ocp.options.MultiprocessingOptions(active_processes=active)


def handlers() -> ocp.CheckpointHandlerRegistry:
    """What writes the items of a step.

    Processes share the writing of large arrays that all of them have.  Orbax would cut every array into slices, one a device,
    and compile a program for each slice: of EfficientNet-B0 on 8 devices, 15 seconds of the first save.
    """
    processes = all_processes()
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_LARGE)
    state = ocp.PyTreeCheckpointHandler(
        type_handler_registry=ocp.type_handlers.create_type_handler_registry((jax.Array, arrays)),
        multiprocessing_options=processes,
    )
    info = ocp.JsonCheckpointHandler(multiprocessing_options=processes)
    return ocp.handlers.create_default_handler_registry(state=state, info=info)


def this_process() -> ocp.options.MultiprocessingOptions:
    """No barriers, for reads: no process waits for one whose part is damaged."""
    own = jax.process_index()
    return ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"read{own}")


def barrier() -> Callable[..., None]:
    """Orbax's barrier, which raises if a save has failed in this process; orbax would wait for the others and hide that."""
    wait, caller = ocp.multihost.get_barrier_sync_fn(processes=set(range(jax.process_count()))), threading.current_thread()

    def sync(*, key: str, timeout_ms: int) -> None:
        failure = sys.exc_info()[1]  # what orbax's thread is about to end with; the caller may be handling one of its own
        if failure and threading.current_thread() is not caller:
            raise failure
        wait(key=key, timeout_ms=timeout_ms)

    return sync
