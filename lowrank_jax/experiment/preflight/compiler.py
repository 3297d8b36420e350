"""One program and what the TPU's own compiler says of it, memory per generation included; no TPU is needed, nothing runs."""

import contextlib
import dataclasses
import importlib.metadata
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from lowrank_jax.experiment.errors import UserError
from lowrank_jax.experiment.preflight import slices
from lowrank_jax.experiment.preflight.collectives import collectives
from lowrank_jax.experiment.training.build import Experiment
from lowrank_jax.planning.chips import Chip
from lowrank_jax.text import first_line

EXTRA = "pip install 'lowrank_jax[tpu-preflight]'"
EFFORTS = {"fast": "O0", "full": "UNKNOWN"}
"""The compiler's efforts, as `jax_optimization_level` calls them."""

# GiB of a device's memory that a program can use, as libtpu 0.0.42 states when it refuses one.
_USABLE = {"v3": 15.48, "v4": 30.75, "v5e": 15.75, "v5p": 95.74, "v6e": 31.25}

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class PreflightError(UserError):
    """There is no compiler, no such slice, or the compiler failed; the message says why."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of running a program once, on one device.

    Attributes:
      flops: floating-point operations.
      bytes: read from and written to memory.
      seconds: the compiler's own estimate; None where it is not credible.
      doubt: why it is not; empty where it is.
      collectives: bytes by kind; see `collectives.collectives`.
    """

    flops: float
    bytes: float
    seconds: float | None
    doubt: str
    collectives: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiler's estimates of one program, for one device.

    Attributes:
      peak_bytes: peak memory, arguments and results included; where the compiler refused the program, the memory it needs.
      cost: None where the compiler refused the program for lack of memory.
      compile_seconds: time to compile; the compiler uses one core per program.
    """

    peak_bytes: int
    cost: Cost | None
    compile_seconds: float


def topology(name: str) -> Sequence[Any]:
    """The devices of a TPU slice such as "v5e:4x4", which need not exist here: its chips, or on v3 their cores.

    Raises:
      PreflightError: libtpu is not installed, or there is no such slice.
    """
    try:
        slice_ = slices.parse(name)
    except ValueError as error:
        raise PreflightError(f"topology: {error}") from None
    _require_compiler()
    from jax.experimental import topologies

    bounds = {1: {"chips_per_host_bounds": (1, 1, 1)}, 8: {"chips_per_host_bounds": (2, 4, 1)}}.get(slice_.chips_per_host, {})
    # The cores of a v4 chip share its memory and count as one device on real slices too.
    megacore = {"chip_config_name": "megacore"} if slice_.generation == "v4" else {}
    try:
        name = f"{slice_.generation}:{slice_.topology}"
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **bounds, **megacore).devices
    except Exception as error:  # libtpu has no error type of its own
        raise PreflightError(f"topology {name!r}: {first_line(error)}") from None


def _require_compiler() -> None:
    """Loads libtpu, told not to look for a TPU and that another process may have it open."""
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")  # it warns without one; topologies state their own
    try:
        import libtpu as libtpu  # type: ignore[import-not-found]
    except ImportError:
        raise PreflightError(f"libtpu, which contains the TPU's compiler, is not installed: {EXTRA}") from None


def usable_bytes(topology: str) -> int:
    """Bytes of a device's memory that a program can use."""
    return int(_USABLE[slices.parse(topology).generation] * 2**30)


def versions() -> dict[str, str]:
    """Versions of the packages that an estimate depends on besides the program."""
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu", "lowrank_jax")}


TRAIN, EVALUATE, INITIALISE = "training step", "evaluation", "initialiser"


def programs(experiment: Experiment) -> dict[str, Callable[[], jax.stages.Lowered]]:
    """The programs that a run executes on its devices; each value lowers one."""
    return {TRAIN: experiment.lower_train_step, EVALUATE: experiment.lower_eval_step, INITIALISE: experiment.lower_init}


def compile_program(lowered: jax.stages.Lowered, chip: Chip, effort: str = "fast") -> Program:
    """Compiles a program for its estimates.

    At effort "fast" the FLOPs of ResNet-50's training step equal those at "full", and its memory is within two per cent.

    Raises:
      PreflightError: it does not compile for a reason other than memory.
    """
    begin = time.perf_counter()
    try:
        with compiling(effort):
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return Program(_wanted_bytes(error), None, time.perf_counter() - begin)
    seconds = time.perf_counter() - begin
    memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    assert memory is not None and cost is not None and text is not None
    flops, estimate = cost["flops"], cost.get("optimal_seconds", math.nan)
    believed, doubt = believable_seconds(estimate, text.count('custom_call_target="ConcatBitcast"'), flops, chip)
    found = Cost(flops, cost["bytes accessed"], believed, doubt, collectives(text))
    return Program(memory.peak_memory_in_bytes, found, seconds)


@contextlib.contextmanager
def compiling(effort: str) -> Iterator[None]:
    """Settings while programs compile.  They are global: enter this once around threads that compile at the same time."""
    # jax's compilation cache would store programs that it cannot read back without the device.
    changes = {"jax_optimization_level": EFFORTS[effort], "jax_persistent_cache_min_compile_time_secs": math.inf}
    before = {name: jax.config.values[name] for name in changes}
    try:
        for name, value in changes.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def _wanted_bytes(error: Exception) -> int:
    """The memory that a refused program needs, from the compiler's message.

    Raises:
      PreflightError: memory was not the reason.
    """
    message = str(error)
    amount = r"([\d.]+)([KMGT]?)"
    found = re.search(rf"\({amount}\) exceeds available HBM", message) or re.search(rf"Used {amount} of [\d.]+\w? hbm", message)
    if found is None:
        raise PreflightError(f"the compiler failed: {first_line(error)}")
    return round(float(found[1]) * _UNITS[found[2]])


def believable_seconds(estimate: float, untimed: int, flops: float, chip: Chip) -> tuple[float | None, str]:
    """The compiler's time estimate, or None and the reason why it is not credible.

    The compiler charges -1 second for each operation that it has no time for: ConcatBitcast, which joins arrays in place and
    takes no time.  If exactly these were charged, they are removed.

    Args:
      estimate: seconds, by the compiler.
      untimed: number of such operations in the program.
      flops: of the program.
      chip: that the program runs on.
    """
    if not math.isfinite(estimate):
        return None, "the compiler gives none"
    charged = math.ceil(-estimate) if estimate < 0 else 0
    if charged != untimed:
        return None, f"it is {estimate:.3g} s, with {untimed} operations charged -1 s each"
    seconds = estimate + charged
    if charged * 1e-7 > 0.01 * seconds:  # a float32
        return None, f"{untimed} operations charged -1 s each leave too few digits"
    if seconds < 0.5 * flops / chip.flops:
        return None, f"it is {seconds:.3g} s, but the FLOPs alone take {flops / chip.flops:.3g} s"
    return seconds, ""
