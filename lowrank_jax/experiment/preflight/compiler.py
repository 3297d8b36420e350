"""What a program will take of a TPU, from the TPU's own compiler; no TPU is needed, and nothing runs."""

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
"""Of the compiler, by what `jax_optimization_level` calls them."""

# GiB of a device's memory that the compiler lets a program have, as libtpu 0.0.42 states them when it refuses one.
_USABLE = {"v3": 15.48, "v4": 30.75, "v5e": 15.75, "v5p": 95.74, "v6e": 31.25}

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class PreflightError(UserError):
    """There is no compiler, no such slice, or the compiler gives up; the message says why."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """What running a program once takes of one device.

    Attributes:
      flops: floating-point operations.
      bytes: read from and written to memory.
      seconds: the compiler's own estimate; None where it cannot be believed.
      doubt: why not; empty where it can.
      collectives: bytes by kind, see `collectives`.
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
      peak_bytes: memory at its worst moment, arguments and results included; where the compiler refused, what it asked for.
      cost: None where the compiler refused because the memory does not suffice.
      compile_seconds: that it took the compiler, which uses one core for a program.
    """

    peak_bytes: int
    cost: Cost | None
    compile_seconds: float


def topology(name: str) -> Sequence[Any]:
    """The devices of a TPU slice such as "v5e:4x4", which need not be there: its chips, or on v3 their cores.

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
    """libtpu, told before it is loaded not to look for a TPU, and that another process may have it open."""
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")  # it complains if it knows none; topologies state their own
    try:
        import libtpu as libtpu  # type: ignore[import-not-found]
    except ImportError:
        raise PreflightError(f"libtpu, which holds the TPU's compiler, is not installed: {EXTRA}") from None


def usable_bytes(topology: str) -> int:
    """What of a device's memory a program can have."""
    return int(_USABLE[slices.parse(topology).generation] * 2**30)


def versions() -> dict[str, str]:
    """Of all that an estimate depends on besides the program."""
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu", "lowrank_jax")}


TRAIN, EVALUATE, INITIALISE = "training step", "evaluation", "initialiser"


def programs(experiment: Experiment) -> dict[str, Callable[[], jax.stages.Lowered]]:
    """All that a run executes on its devices, and what lowers it."""
    return {TRAIN: experiment.lower_train_step, EVALUATE: experiment.lower_eval_step, INITIALISE: experiment.lower_init}


def compile_program(lowered: jax.stages.Lowered, chip: Chip, effort: str = "fast") -> Program:
    """Has the compiler estimate a program.

    At effort "fast" the FLOPs of ResNet-50's training step are those of "full" and its memory within two per cent.

    Raises:
      PreflightError: it does not compile, for another reason than memory.
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
    """What holds while programs are compiled; of all threads, so that one has to be around several that compile at a time."""
    # jax's compilation cache would store what it cannot read back without the device.
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
    """How much memory the compiler asked for when it refused.

    Raises:
      PreflightError: memory was not the reason.
    """
    message = str(error)
    amount = r"([\d.]+)([KMGT]?)"
    found = re.search(rf"\({amount}\) exceeds available HBM", message) or re.search(rf"Used {amount} of [\d.]+\w? hbm", message)
    if found is None:
        raise PreflightError(f"the compiler gives up: {first_line(error)}")
    return round(float(found[1]) * _UNITS[found[2]])


def believable_seconds(estimate: float, untimed: int, flops: float, chip: Chip) -> tuple[float | None, str]:
    """The compiler's estimate of a time, or None and the reason why it cannot be believed.

    The compiler charges -1 second for each operation that it has no time of, ConcatBitcast, which joins arrays where they
    lie and takes none.  Where exactly these were charged, they are taken out.

    Args:
      estimate: the compiler's.
      untimed: how many such operations there are.
      flops: of the program.
      chip: that it runs on.
    """
    if not math.isfinite(estimate):
        return None, "it has none"
    charged = math.ceil(-estimate) if estimate < 0 else 0
    if charged != untimed:
        return None, f"it is {estimate:.3g} s, with {untimed} operations charged -1 s each"
    seconds = estimate + charged
    if charged * 1e-7 > 0.01 * seconds:  # a float32
        return None, f"{untimed} operations charged -1 s each leave too few digits of it"
    if seconds < 0.5 * flops / chip.flops:
        return None, f"it is {seconds:.3g} s, and the products alone take {flops / chip.flops:.3g} s"
    return seconds, ""
