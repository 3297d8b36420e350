"""A Ray cluster: what a trial takes of it, how to connect to it, and what its workers start with."""

import contextlib
import dataclasses
import logging
import math
import os
import pathlib
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Iterator

import jax

from lowrank_jax.experiment import config as configs
from lowrank_jax.text import first_line

_PASSED_ON = ("JAX_", "XLA_", "LIBTPU_", "TFDS_", "TF_CPP_MIN_LOG_LEVEL", "TF_ENABLE_ONEDNN_OPTS")
_PATIENCE = 10.0  # seconds for a connection
_GPU_MEMORY = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE")


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a trial takes of a node while it runs.

    Attributes:
      cpus: cores, for scheduling only; JAX uses all cores of the node.
      gpus: a fraction lets trials share a GPU.
      tpus: chips of one host: 1, 2, 4 or 8.
    """

    cpus: float = 1
    gpus: float = 0
    tpus: int = 0

    def check(self) -> None:
        """Raises ConfigError if no node could have them."""
        problems = []
        if not all(0 <= amount < math.inf for amount in dataclasses.astuple(self)) or not any(dataclasses.astuple(self)):
            problems.append(f"{self}: must be at least 0, and not all 0")
        if self.gpus > 1 and self.gpus != int(self.gpus):
            problems.append(f"gpus: {self.gpus:g}; must be at most 1, or a whole number")
        if self.tpus not in (0, 1, 2, 4, 8):
            problems.append(f"tpus: {self.tpus}; must be 1, 2, 4 or 8")
        if problems:
            raise configs.ConfigError("--cpus, --gpus, --tpus", problems)

    def bundle(self) -> dict[str, float]:
        """By Ray's names for them."""
        named = {"CPU": float(self.cpus), "GPU": float(self.gpus), "TPU": float(self.tpus)}
        return {name: amount for name, amount in named.items() if amount}


@contextlib.contextmanager
def connected(address: str | None, resources: Resources) -> Iterator[None]:
    """Connects to a cluster; see `ray_tune.run` for the address."""
    import ray

    address = address or os.environ.get("RAY_ADDRESS") or "local"
    _check_address(address)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}

    def restore() -> None:
        """Ray installs handlers of its own, and leaves them."""
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)

    with warnings.catch_warnings():
        # Its processes are forks that become other programs at once, to which JAX's threads do not matter.
        warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called", category=RuntimeWarning)
        ray.init(
            address,
            runtime_env={"env_vars": worker_environment(resources)},
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    restore()
    try:
        yield
    finally:
        ray.shutdown()
        restore()


def _check_address(address: str) -> None:
    """Raises ConfigError unless somebody listens there; Ray would wait for minutes."""
    if address in ("auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise configs.ConfigError("--ray-address", [f"{address!r}; must be auto or HOST:PORT"])
    try:
        socket.create_connection((host, int(port)), timeout=_PATIENCE).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise configs.ConfigError("--ray-address", [f"no Ray cluster answers at {address}: {first_line(error)}"]) from None


def worker_environment(resources: Resources) -> dict[str, str]:
    """Environment variables of the worker processes, in addition to those of their nodes."""
    passed = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
    for name in ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"):
        if (value := jax.config.values[name]) is not None:  # trials of a sweep often share programs
            passed[name.upper()] = str(value)
    if not resources.gpus and not resources.tpus:  # Ray hides accelerators only from tasks that ask for some
        passed.setdefault("JAX_PLATFORMS", "cpu")
    if 0 < resources.gpus < 1 and not any(name in passed for name in _GPU_MEMORY):
        passed["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 * resources.gpus:.3f}"  # JAX would take three quarters of it at once
    return {**passed, "PYTHONPATH": os.pathsep.join(_own_paths())}


def _own_paths() -> list[str]:
    """Where the driver finds modules that are not installed: a checkout, the user's models."""
    own = [path for path in sys.path if not path.startswith((sys.prefix, sys.base_prefix))]
    return list(dict.fromkeys(str(pathlib.Path(path).absolute()) for path in own))


def fits(resources: Resources) -> bool:
    """Whether any node of the connected cluster has the resources."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return any(all(node.get(name, 0) >= amount for name, amount in resources.bundle().items()) for node in nodes)
