"""Several processes as one run: how they find each other, tell each other things, and end together."""

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

from lowrank_jax.experiment.errors import BAD_INPUT, UserError

_FAILURE = "lowrank/failure"
_DAY = 24 * 60 * 60 * 1000  # in ms: a process that is lost ends the others by its missing heartbeat, not by a timeout
_ENDING = 10.0  # seconds until a process that failed ends without the others
_PRECEDENCE = 2000  # ms that the other processes wait for process 0 to speak
_HEARING = 2.0  # seconds for the others to hear of a failure
_LOOK = 1000  # ms between two looks at whether the run is over
_TASKS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
_rounds = itertools.count()


class ClusterError(UserError):
    """The processes of a run do not find each other; the message says what to do."""


class OtherFailed(Exception):
    """Another process of the run has failed, and will say why."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Where a process stands among those of its run; what is not given is detected.

    Attributes:
      coordinator: "host:port" of process 0.
      processes: how many there are; 1 keeps a process alone whatever its environment says.
      process: which of them this is, from 0.
      heartbeat: a process counts as lost after so many seconds without a sign of life, which ends the others.
      patience: seconds to wait for the others at the start.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    heartbeat: int = 100
    patience: int = 300

    def problems(self) -> list[str]:
        """What does not fit together."""
        given = {"--coordinator": self.coordinator, "--processes": self.processes, "--process": self.process}
        missing = [flag for flag, value in given.items() if value is None]
        if self.processes == 1 and self.coordinator is None and self.process in (None, 0):
            return []
        if 0 < len(missing) < len(given):
            return [f"{' and '.join(missing)}: needed too (or none of the three, where the cluster is detected)"]
        problems = []
        if self.coordinator is not None and not _port(self.coordinator):
            problems.append(f"--coordinator: {self.coordinator!r} is no HOST:PORT such as 10.0.0.1:1234")
        if self.processes is not None and self.process is not None and self.process >= self.processes:
            problems.append(f"--process: {self.process} of {self.processes}; they are counted from 0")
        return problems


def start(cluster: Cluster) -> None:
    """Joins this process to the others of its run; it has to come before any use of the devices.

    Without flags jax looks for a cluster in the environment (TPU slices, GKE, Slurm, Open MPI); where it finds none, or one of
    a single task, the process is alone, as it is with `processes=1`, and stays as it is where its devices are in use already.

    Raises:
      ClusterError: the others cannot be found.
    """
    if problems := cluster.problems():
        raise ClusterError("\n".join(problems))
    detected = cluster.coordinator is None
    single = any(os.environ.get(name) == "1" for name in _TASKS)
    if cluster.processes == 1 or (detected and (single or xla_bridge.backends_are_initialized())):
        return
    if cluster.process == 0:
        _check_free(cluster.coordinator)
    with _deadline(cluster):
        try:
            jax.distributed.initialize(
                cluster.coordinator,
                cluster.processes,
                cluster.process,
                cluster_detection_method=None if detected else "deactivate",
                initialization_timeout=cluster.patience + 60,  # it would abort; the deadline comes first
                heartbeat_timeout_seconds=cluster.heartbeat,
            )
        except ValueError as error:
            if detected and "JAX_COORDINATOR_ADDRESS" not in os.environ:
                return  # there is no cluster
            raise ClusterError(f"{error} Give --coordinator, --processes and --process.") from None
        except Exception as error:
            raise ClusterError(f"the other processes cannot be joined: {error}. --processes=1 goes without them.") from error
    # jax's own handler would keep SIGTERM from ending a process that has nothing to save yet.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if several():
        over = threading.Event()
        watcher = threading.Thread(target=_watch, args=(over,), daemon=True)
        watcher.start()
        # Where Python ends while a thread is in jax's hands, it aborts.  What is registered last runs first, before jax leaves.
        atexit.register(lambda: (over.set(), watcher.join()))


def several() -> bool:
    """Whether this run has more than one process."""
    return _state().client is not None and _state().num_processes > 1


def gather(text: str) -> list[str]:
    """The texts of all processes, in their order; every process has to call it."""
    if not several():
        return [text]
    client, key = _state().client, f"lowrank/gather/{next(_rounds)}"
    client.key_value_set(f"{key}/{_state().process_id}", text)
    client.wait_at_barrier(key, _DAY)
    texts = {int(name.rpartition("/")[2]): value for name, value in client.key_value_dir_get(f"{key}/")}
    return [texts[process] for process in sorted(texts)]


def end_all(status: int, message: str) -> NoReturn:
    """Ends every process of the run with this status; process 0 says why.

    Of what befalls several of them the first to speak has its say, and process 0 goes before the others.
    """
    client, process = _state().client, _state().process_id
    if process:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            client.blocking_key_value_get(_FAILURE, _PRECEDENCE)
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was first
        client.key_value_set(_FAILURE, json.dumps({"status": status, "process": process, "message": message}))
    time.sleep(_ENDING)  # _watch ends this process
    _exit(status, message)


def end_with_the_others(status: int) -> NoReturn:
    """Ends this process as soon as the one that failed has said why; by itself with this status if it never does."""
    time.sleep(_ENDING)
    _exit(status, "another process failed and did not say why")


def _watch(over: threading.Event) -> None:
    """Ends this process when another has failed: the main thread may be waiting for that one's part of a computation."""
    client, process = _state().client, _state().process_id
    failure = None
    while not over.is_set() and failure is None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # not in this time
            failure = json.loads(client.blocking_key_value_get(_FAILURE, _LOOK))
    if failure is None:
        return
    if process:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 has ended
            client.key_value_set(f"{_FAILURE}/heard/{process}", "")
        _exit(failure["status"])
    who = f"process {failure['process']}: " if failure["process"] else ""
    _say(f"{who}{failure['message']}")
    # With this process the coordinator ends, and the others are aborted if they have not heard by then.
    end = time.monotonic() + _HEARING
    while time.monotonic() < end and len(client.key_value_dir_get(f"{_FAILURE}/heard/")) < _state().num_processes - 1:
        time.sleep(0.05)
    time.sleep(0.2)
    _exit(failure["status"])


def _exit(status: int, message: str = "") -> NoReturn:
    """Without waiting for the others, as an ordinary end does."""
    if message:
        _say(message)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(status)


def _say(message: str) -> None:
    """To whoever still listens: a closed terminal or pipe must not keep the process from ending."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _deadline(cluster: Cluster) -> Iterator[None]:
    """Ends the process in words when the others have not come in time; jax would abort it."""
    done = threading.Event()

    def wait() -> None:
        if not done.wait(cluster.patience):
            _exit(BAD_INPUT, _absence(cluster))

    threading.Thread(target=wait, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _absence(cluster: Cluster) -> str:
    if cluster.coordinator is None:
        return f"not all processes of the cluster came within {cluster.patience} s: start each, or go without: --processes=1"
    return (
        f"not all of {cluster.processes} processes met at {cluster.coordinator} within {cluster.patience} s:"
        " start each of them, with the address at which process 0 listens as --coordinator"
    )


def _check_free(address: str | None) -> None:
    """A port that is taken would crash jax."""
    assert address is not None
    try:
        with socket.create_server(("", _port(address))):
            pass
    except OSError as error:
        raise ClusterError(f"--coordinator: port {_port(address)} of this machine cannot be used: {error.strerror}") from None


def _port(address: str) -> int:
    """0 if there is none."""
    host, _, port = address.rpartition(":")
    return int(port) if host and port.isascii() and port.isdecimal() and int(port) < 2**16 else 0


def _state() -> Any:
    return _jax_distributed.global_state
