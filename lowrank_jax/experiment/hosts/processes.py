"""One run of several processes: how they connect, exchange messages and exit together."""

import atexit
import contextlib
import dataclasses
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
from jax._src import distributed as _jax_distributed  # its client of the coordinator has no public name
from jax._src import xla_bridge

from lowrank_jax.experiment import interrupts
from lowrank_jax.experiment.errors import BAD_INPUT, UserError

_FAILURE_KEY = "lowrank/failure"
_DAY_MS = 24 * 60 * 60 * 1000  # a lost process ends the others through its missing heartbeat, not through a timeout
_EXIT_SECONDS = 10.0  # after which a process that failed exits without the others
_PRECEDENCE_MS = 2000  # that the other processes leave process 0 to report a failure first
_ACKNOWLEDGE_SECONDS = 2.0  # that process 0 waits for the others to read a failure
_POLL_MS = 1000  # between checks whether the run is over
_TASK_COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
_exchanges = itertools.count()


class ClusterError(UserError):
    """The processes of a run cannot connect; the message says what to do."""


class OtherFailed(Exception):
    """Another process of the run failed and reports why."""


@dataclasses.dataclass(frozen=True)
class ProcessOptions:
    """How a process joins its run; what is not given is detected.

    Attributes:
      coordinator: "host:port" of process 0.
      processes: the number of processes; 1 runs alone, whatever the environment says.
      process: the index of this one, from 0.
      heartbeat: seconds without a heartbeat before a process counts as lost, which ends the others.
      patience: seconds to wait for the other processes at start-up.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    heartbeat: int = 100
    patience: int = 300

    def problems(self) -> list[str]:
        """One line for each contradiction between the flags."""
        given = {"--coordinator": self.coordinator, "--processes": self.processes, "--process": self.process}
        missing = [flag for flag, value in given.items() if value is None]
        if self.processes == 1 and self.coordinator is None and self.process in (None, 0):
            return []
        if 0 < len(missing) < len(given):
            return [f"{' and '.join(missing)}: missing; give all three of the flags, or none to detect the cluster"]
        problems = []
        if self.coordinator is not None and not _port(self.coordinator):
            problems.append(f"--coordinator: {self.coordinator!r} must be HOST:PORT, such as 10.0.0.1:1234")
        if self.processes is not None and self.process is not None and self.process >= self.processes:
            problems.append(f"--process: {self.process} must be less than --processes={self.processes}; counting starts at 0")
        return problems


def start(options: ProcessOptions) -> None:
    """Connects this process to the others of its run; call it before any use of the devices.

    Without flags jax looks for a cluster in the environment (TPU slices, GKE, Slurm, Open MPI).  The process runs alone if
    there is none or it has a single task, with `processes=1`, and if its devices are in use already.

    Raises:
      ClusterError: the processes cannot connect.
    """
    if problems := options.problems():
        raise ClusterError("\n".join(problems))
    detect = options.coordinator is None
    single = any(os.environ.get(name) == "1" for name in _TASK_COUNTS)
    if options.processes == 1 or (detect and (single or xla_bridge.backends_are_initialized())):
        return
    if options.process == 0:
        _check_free(options.coordinator)
    with _deadline(options):
        _connect(options, detect)
    # jax's own handler, which Python does not know of, would keep SIGTERM from ending a process that has nothing to save yet.
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)
    if several():
        interrupts.leave_by(end_all)
        if jax.default_backend() == "cpu":
            # There, programs with collectives have hung at their first steps when they came from the cache.
            jax.config.update("jax_enable_compilation_cache", False)
        over = threading.Event()
        watcher = threading.Thread(target=_watch, args=(over,), daemon=True)
        watcher.start()
        # Python aborts if it ends while a thread is inside jax.  The last handler registered runs first, before jax's own.
        atexit.register(lambda: (over.set(), watcher.join()))


def _connect(options: ProcessOptions, detect: bool) -> None:
    try:
        jax.distributed.initialize(
            options.coordinator,
            options.processes,
            options.process,
            cluster_detection_method=None if detect else "deactivate",
            initialization_timeout=options.patience + 60,  # jax aborts when it is over; _deadline comes first
            heartbeat_timeout_seconds=options.heartbeat,
        )
    except ValueError as error:
        if detect and "JAX_COORDINATOR_ADDRESS" not in os.environ:
            return  # there is no cluster
        raise ClusterError(f"{error} Give --coordinator, --processes and --process.") from None
    except Exception as error:
        raise ClusterError(f"cannot connect to the other processes: {error}. Pass --processes=1 to run alone.") from error


def several() -> bool:
    """Whether this run has more than one process."""
    return _state().client is not None and _state().num_processes > 1


def barrier() -> None:
    """Returns when every process of the run has called it."""
    exchange("")


def exchange(text: str) -> list[str]:
    """The texts of all processes, ordered by process; every process has to call it."""
    if not several():
        return [text]
    client, key = _state().client, f"lowrank/exchange/{next(_exchanges)}"
    client.key_value_set(f"{key}/{_state().process_id}", text)
    client.wait_at_barrier(key, _DAY_MS)
    texts = {int(name.rpartition("/")[2]): value for name, value in client.key_value_dir_get(f"{key}/")}
    return [texts[process] for process in sorted(texts)]


def end_all(status: int, message: str) -> NoReturn:
    """Ends every process of the run with this status; process 0 prints the message.

    If several processes fail, the first report counts, and process 0 has precedence over the others.
    """
    client, process = _state().client, _state().process_id
    if process:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            client.blocking_key_value_get(_FAILURE_KEY, _PRECEDENCE_MS)
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was first
        client.key_value_set(_FAILURE_KEY, json.dumps({"status": status, "process": process, "message": message}))
    time.sleep(_EXIT_SECONDS)  # _watch ends this process
    _exit(status, message)


def end_with_the_others(status: int) -> NoReturn:
    """Ends this process as soon as the failed one has reported; with this status if it never does."""
    time.sleep(_EXIT_SECONDS)
    _exit(status, "another process failed without a message")


def _watch(over: threading.Event) -> None:
    """Ends this process when another one failed: the main thread may be waiting for that one's part of a computation."""
    client, process = _state().client, _state().process_id
    failure = None
    while not over.is_set() and failure is None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # no failure yet
            failure = json.loads(client.blocking_key_value_get(_FAILURE_KEY, _POLL_MS))
    if failure is None:
        return
    if process:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 has ended
            client.key_value_set(f"{_FAILURE_KEY}/read/{process}", "")
        _exit(failure["status"])
    who = f"process {failure['process']}: " if failure["process"] else ""
    _say(f"{who}{failure['message']}")
    # The coordinator ends with this process, and jax aborts those that have not read the failure by then.
    end = time.monotonic() + _ACKNOWLEDGE_SECONDS
    while time.monotonic() < end and len(client.key_value_dir_get(f"{_FAILURE_KEY}/read/")) < _state().num_processes - 1:
        time.sleep(0.05)
    time.sleep(0.2)
    _exit(failure["status"])


def _exit(status: int, message: str = "") -> NoReturn:
    """Exits without waiting for the other processes, as a normal exit would."""
    interrupts.clean_up()
    if message:
        _say(message)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(status)


def _say(message: str) -> None:
    """Prints to stderr; a closed terminal or pipe must not keep the process from exiting."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _deadline(options: ProcessOptions) -> Iterator[None]:
    """Ends the process with a message when the others have not connected in time; jax would abort it."""
    done = threading.Event()

    def wait() -> None:
        if not done.wait(options.patience):
            _exit(BAD_INPUT, _timeout_message(options))

    threading.Thread(target=wait, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _timeout_message(options: ProcessOptions) -> str:
    waited = f"timed out after {options.patience} s waiting for the other processes"
    if options.coordinator is None:
        return f"{waited}; start them all, or pass --processes=1"
    return (
        f"{waited} at {options.coordinator}; start all {options.processes}, each with the address of process 0 as --coordinator"
    )


def _check_free(address: str | None) -> None:
    """Raises ClusterError if the port is taken, which would crash jax."""
    assert address is not None
    try:
        with socket.create_server(("", _port(address))):
            pass
    except OSError as error:
        raise ClusterError(f"--coordinator: cannot listen on port {_port(address)}: {error.strerror}") from None


def _port(address: str) -> int:
    """The port of "host:port"; 0 if there is none."""
    host, _, port = address.rpartition(":")
    return int(port) if host and port.isascii() and port.isdecimal() and int(port) < 2**16 else 0


def _state() -> Any:
    return _jax_distributed.global_state
