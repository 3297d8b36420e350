"""One network: the estimates of its programs, added up; the compiler's answers are cached."""

import dataclasses
import functools
import hashlib
import inspect
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from lowrank_jax.experiment.preflight import collectives, compiler
from lowrank_jax.experiment.preflight.cache import Cache
from lowrank_jax.experiment.preflight.compiler import EVALUATE, INITIALISE, TRAIN, Cost, PreflightError, Program
from lowrank_jax.experiment.preflight.networks import Network
from lowrank_jax.experiment.training.build import Experiment, build
from lowrank_jax.planning.chips import Chip


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One network on one slice: a row of the table.

    Attributes:
      name: of the network.
      dense: whether no kernel is factored.
      requested: whether the user asked for it; if not, it is only there to compare others with.
      batch_size: of training, over all devices.
      parts: the number of micro-batches per step, `optim.accumulate`.
      params: number of parameters.
      kernels, factored, merged: how many kernels there are, how many of them run as two products, and how many are low-rank
        but run as one product.
      state_bytes: parameters, statistics, optimiser state and averages, as they lie on one device.
      resident: bytes on one device that are not arguments of a program but stay there while it runs, by the program's name.
      programs: the compiler's estimates by the program's name.
      waiting: how many kernels are dense here because their ranks are open.
    """

    name: str
    dense: bool
    requested: bool
    batch_size: int
    parts: int
    params: int
    kernels: int
    factored: int
    merged: int
    state_bytes: int
    resident: dict[str, int]
    programs: dict[str, Program]
    waiting: int = 0

    def peak_bytes(self, program: str) -> int:
        """Peak memory of one device while a program runs, with everything else that is on the device then."""
        return self.programs[program].peak_bytes + self.resident.get(program, 0)

    @property
    def largest(self) -> str:
        """The program that needs the most memory."""
        return max(self.programs, key=self.peak_bytes)

    def fits(self, usable: int) -> bool:
        """Whether `usable` bytes per device are enough."""
        refused = any(program.cost is None for program in self.programs.values())
        return not refused and self.peak_bytes(self.largest) <= usable

    @property
    def step(self) -> Cost | None:
        """The cost of a training step; None if the compiler refused it."""
        return self.programs[TRAIN].cost


@dataclasses.dataclass(frozen=True)
class Estimator:
    """The compiler for one slice; it caches its answers.

    Attributes:
      topology: for example "v5e:4x4".
      devices, chip: from `compiler.topology` and `chips.of_device`.
      effort: a key of `compiler.EFFORTS`.
      cache: of the answers.
      say: called with lines of progress.
    """

    topology: str
    devices: Sequence[Any]
    chip: Chip
    effort: str
    cache: Cache
    say: Callable[[str], None]
    _locks: dict[str, threading.Lock] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def estimates(self, networks: Sequence[tuple[Network, bool]]) -> list[Estimate]:
        """Compiles the programs of networks, as many at a time as there are cores and memory for.

        Args:
          networks: each with whether it was requested.

        Raises:
          PreflightError, ConfigError: a program does not compile for a reason other than memory; the settings do not fit
            together.
        """
        built = [
            build(network.config, network.name, self.devices, guided_steps=network.guided_steps) for network, _ in networks
        ]
        pool = ThreadPoolExecutor(_cores())
        with compiler.compiling(self.effort):
            started: list[dict[str, Future[Program]]] = [{} for _ in networks]
            try:
                for name in (TRAIN, INITIALISE, EVALUATE):  # the longest first
                    for futures, (network, _), experiment in zip(started, networks, built, strict=True):
                        lower = compiler.programs(experiment)[name]
                        futures[name] = pool.submit(self.program, f"{network.name}: {name}", lower)
                ended = [{name: futures[name].result() for name in (TRAIN, EVALUATE, INITIALISE)} for futures in started]
            finally:
                pool.shutdown(cancel_futures=True)
        return [
            _estimate(network, requested, experiment, programs)
            for (network, requested), experiment, programs in zip(networks, built, ended, strict=True)
        ]

    def program(self, label: str, lower: Callable[[], jax.stages.Lowered]) -> Program:
        """The compiler's estimate of one program, cached or new; progress calls the program `label`."""
        lowered = lower()
        key = self.key(lowered)
        with self._locks.setdefault(key, threading.Lock()):  # another network may have the same program
            return self._cached_or_compiled(label, lowered, key)

    def _cached_or_compiled(self, label: str, lowered: jax.stages.Lowered, key: str) -> Program:
        program = self.cache.get(key)
        if program is not None:
            self.say(f"{label}: cached by an earlier preflight")
            return program
        self.say(f"{label}: compiling")
        try:
            program = compiler.compile_program(lowered, self.chip, self.effort)
        except PreflightError as error:
            raise PreflightError(f"{label}: {error}") from None
        try:
            self.cache.put(key, program)
        except OSError as error:  # no reason to lose minutes of work
            self.say(f"{label}: cannot be cached: {error.filename}: {error.strerror}")
        self.say(f"{label}: {program.compile_seconds:.0f} s")
        return program

    def key(self, lowered: jax.stages.Lowered) -> str:
        """The cache key: everything that the answer depends on.

        It contains the lowered program, not the config: the program reflects every setting, the code and the libraries, and
        lowering takes seconds where compiling takes minutes.
        """
        flags = {name: os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
        parts = [lowered.as_text(), self.topology, repr(self.chip), self.effort, compiler.versions(), flags, _own_code()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _cores() -> int:
    """How many programs to compile at a time: one per core, and 2 GiB of memory for each (ResNet-50's took some 1.5)."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(len(os.sched_getaffinity(0)), memory // 2**31))


def _estimate(network: Network, requested: bool, experiment: Experiment, programs: dict[str, Program]) -> Estimate:
    parts = network.config.optim.accumulate
    plan, state = experiment.plan, device_bytes(experiment.shapes)
    # With guides beside them, factors are multiplied out and blended.
    merged = sum(kernel.execution == "merged" or network.guided_steps > 0 for kernel in plan.factored)
    return Estimate(
        name=network.name,
        dense=network.dense,
        requested=requested,
        batch_size=network.config.batch_size,
        parts=parts,
        params=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(experiment.shapes.params)),
        kernels=len(plan.kernels),
        factored=len(plan.factored) - merged,
        merged=merged,
        state_bytes=state,
        # Where averages of the weights are kept, they are what is evaluated.
        resident={EVALUATE: state - device_bytes(experiment.shapes.variables()[""])},
        programs={**programs, TRAIN: in_parts(programs[TRAIN], parts)},
        waiting=len(plan.waiting),
    )


def in_parts(program: Program, parts: int) -> Program:
    """The training step with its loop over micro-batches counted in full; the compiler counts the body of a loop once.

    The update, which is outside the loop, is counted too often: a few per cent of the bytes.
    """
    cost = program.cost
    if cost is None or parts == 1:
        return program
    seconds = cost.seconds and parts * cost.seconds
    return dataclasses.replace(
        program, cost=dataclasses.replace(cost, flops=parts * cost.flops, bytes=parts * cost.bytes, seconds=seconds)
    )


@functools.cache
def _own_code() -> str:
    """A digest of the modules that read the compiler's answers."""
    return hashlib.sha256("".join(map(inspect.getsource, (compiler, collectives))).encode()).hexdigest()


def device_bytes(shapes: Any) -> int:
    """Bytes that arrays take on one device, from their shapes and shardings."""
    leaves: Iterable[Any] = jax.tree.leaves(shapes)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
