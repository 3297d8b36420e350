"""The arms of a preflight: which networks, what the compiler says of each, and the answers that are at hand already."""

import dataclasses
import functools
import hashlib
import inspect
import json
import math
import os
import pathlib
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment.config.schema import Config, LowRankConfig
from lowrank_jax.experiment.preflight import collectives, compiler
from lowrank_jax.experiment.preflight.compiler import EVALUATE, INITIALISE, TRAIN, Cost, PreflightError, Program
from lowrank_jax.experiment.training.build import Experiment, build
from lowrank_jax.planning.chips import Chip


@dataclasses.dataclass(frozen=True)
class Arm:
    """One network on one slice.

    Attributes:
      name: of its row.
      dense: whether no kernel is factored.
      wanted: whether it was asked for, or only is what others are compared with.
      batch_size: of training, over all devices.
      parts: that the batch goes through the network in, one after the other.
      params: of the network.
      kernels, factored, merged: how many kernels it has, how many of them run as two products, and how many are of low rank and
        run as one.
      state_bytes: parameters, statistics, the optimiser's state and averages, as they lie on one device.
      beside: bytes on one device that are no arguments of a program and stay there while it runs, by the program's name.
      programs: the estimates by the program's name.
    """

    name: str
    dense: bool
    wanted: bool
    batch_size: int
    parts: int
    params: int
    kernels: int
    factored: int
    merged: int
    state_bytes: int
    beside: dict[str, int]
    programs: dict[str, Program]

    def peak_bytes(self, program: str) -> int:
        """At the worst moment of a program, with all else that is on the device then."""
        return self.programs[program].peak_bytes + self.beside.get(program, 0)

    @property
    def largest(self) -> str:
        """The program that takes the most memory."""
        return max(self.programs, key=self.peak_bytes)

    def fits(self, usable: int) -> bool:
        """Whether so many bytes suffice."""
        refused = any(program.cost is None for program in self.programs.values())
        return not refused and self.peak_bytes(self.largest) <= usable

    @property
    def step(self) -> Cost | None:
        """Of a training step; None where the compiler refused it."""
        return self.programs[TRAIN].cost


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What to estimate.

    Attributes:
      name: of the row.
      config: parsed.
    """

    name: str
    config: Config

    @property
    def dense(self) -> bool:
        return self.config.lowrank.method == "none"


@dataclasses.dataclass(frozen=True)
class Group:
    """A dense network, and others that differ from it in their factors alone, or in what no program depends on.

    Attributes:
      dense: what the others are compared with.
      wanted: whether it was asked for.
      others: the low-rank ones first.
    """

    dense: Wanted
    wanted: bool
    others: tuple[Wanted, ...]


def grouped(arms: Sequence[Wanted]) -> list[Group]:
    """Every low-rank arm under its dense twin, which is added where nobody asked for it."""
    twins: dict[Config, list[Wanted]] = {}
    for arm in arms:
        twins.setdefault(_dense_twin(arm.config), []).append(arm)
    groups = []
    for members in twins.values():
        asked = [arm for arm in members if arm.dense]
        others = (*(arm for arm in members if not arm.dense), *asked[1:])
        name = "dense twin" if len(twins) == 1 else f"dense twin of {members[0].name}"
        dense = asked[0] if asked else Wanted(name, _dense_twin(members[0].config))
        groups.append(Group(dense, bool(asked), others))
    return groups


def _dense_twin(config: Config) -> Config:
    """The same experiment with no kernel factored; the seed, an argument of the programs, does not tell twins apart."""
    return dataclasses.replace(config, seed=0, lowrank=LowRankConfig(method="none"))


class Cache:
    """Answers as JSON files; without a folder it forgets everything."""

    def __init__(self, folder: pathlib.Path | None):
        self._folder = folder

    def get(self, key: str) -> Program | None:
        """A known answer; None for an unknown one, or one that cannot be read."""
        if self._folder is None:
            return None
        try:
            read = json.loads((self._folder / f"{key}.json").read_text())
            cost = read["cost"] and Cost(**read["cost"])
            return Program(int(read["peak_bytes"]), cost, float(read["compile_seconds"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, key: str, program: Program) -> None:
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        part = self._folder / f"{key}.{os.getpid()}.{threading.get_ident()}.part"
        part.write_text(json.dumps(dataclasses.asdict(program), indent=2) + "\n")
        part.rename(self._folder / f"{key}.json")


@dataclasses.dataclass(frozen=True)
class Compiler:
    """The compiler for one slice, which remembers its answers.

    Attributes:
      topology: such as "v5e:4x4".
      devices, chip: what `compiler.topology` and `chips.of_device` say.
      effort: a key of `compiler.EFFORTS`.
      cache: of the answers.
      say: is told of progress.
    """

    topology: str
    devices: Sequence[Any]
    chip: Chip
    effort: str
    cache: Cache
    say: Callable[[str], None]
    _locks: dict[str, threading.Lock] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def estimates(self, arms: Sequence[tuple[Wanted, bool]]) -> list[Arm]:
        """What the compiler says of networks' programs, as many of them at a time as there are cores and memory for.

        Args:
          arms: with every network whether it was asked for.

        Raises:
          PreflightError, ConfigError: one does not compile, for another reason than memory; the parts do not fit together.
        """
        built = [build(wanted.config, wanted.name, self.devices) for wanted, _ in arms]
        pool = ThreadPoolExecutor(_cores())
        with compiler.compiling(self.effort):
            started: list[dict[str, Future[Program]]] = [{} for _ in arms]
            try:
                for name in (TRAIN, INITIALISE, EVALUATE):  # the longest first
                    for futures, (wanted, _), experiment in zip(started, arms, built, strict=True):
                        lower = compiler.programs(experiment)[name]
                        futures[name] = pool.submit(self.program, f"{wanted.name}: {name}", lower)
                return [
                    _arm(wanted, asked, experiment, {name: futures[name].result() for name in (TRAIN, EVALUATE, INITIALISE)})
                    for (wanted, asked), experiment, futures in zip(arms, built, started, strict=True)
                ]
            finally:
                pool.shutdown(cancel_futures=True)

    def program(self, label: str, lower: Callable[[], jax.stages.Lowered]) -> Program:
        """What the compiler says of one program, or said earlier; `label` is what progress calls it."""
        lowered = lower()
        key = self.key(lowered)
        with self._locks.setdefault(key, threading.Lock()):  # another arm may have the same program
            return self._known_or_compiled(label, lowered, key)

    def _known_or_compiled(self, label: str, lowered: jax.stages.Lowered, key: str) -> Program:
        program = self.cache.get(key)
        if program is not None:
            self.say(f"{label}: known from an earlier preflight")
            return program
        self.say(f"{label}: compiling")
        try:
            program = compiler.compile_program(lowered, self.chip, self.effort)
        except PreflightError as error:
            raise PreflightError(f"{label}: {error}") from None
        try:
            self.cache.put(key, program)
        except OSError as error:  # minutes of work, that need not be lost for it
            self.say(f"{label}: cannot be remembered: {error.filename}: {error.strerror}")
        self.say(f"{label}: {program.compile_seconds:.0f} s")
        return program

    def key(self, lowered: jax.stages.Lowered) -> str:
        """Of everything that the answer depends on.  The program itself, rather than the config that it was made from: it
        knows of every setting, of the code and of the libraries, and making it takes seconds where compiling takes minutes."""
        flags = {name: os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
        parts = [lowered.as_text(), self.topology, repr(self.chip), self.effort, compiler.versions(), flags, _own_code()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _cores() -> int:
    """Of this machine, as far as there is memory for a compilation on each: those of ResNet-50 took some 1.5 GiB."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(len(os.sched_getaffinity(0)), memory // 2**31))


def _arm(wanted: Wanted, asked: bool, experiment: Experiment, programs: dict[str, Program]) -> Arm:
    parts = wanted.config.optim.accumulate
    plan, state = experiment.plan, device_bytes(experiment.shapes)
    merged = sum(kernel.execution == "merged" for kernel in plan.factored)
    return Arm(
        name=wanted.name,
        dense=wanted.dense,
        wanted=asked,
        batch_size=wanted.config.batch_size,
        parts=parts,
        params=plan.params,
        kernels=len(plan.kernels),
        factored=len(plan.factored) - merged,
        merged=merged,
        state_bytes=state,
        # Averages of the weights are evaluated in their place, where there are any.
        beside={EVALUATE: state - device_bytes(experiment.shapes.variables()[""])},
        programs={**programs, TRAIN: in_parts(programs[TRAIN], parts)},
    )


def in_parts(program: Program, parts: int) -> Program:
    """A training step whose loop over parts of the batch the compiler has counted once, as all loops.

    The update, which is outside of the loop, is counted too often: some per cent of the bytes.
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
    """What arrays take on one device, from their shapes and shardings."""
    leaves: Iterable[Any] = jax.tree.leaves(shapes)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def check(config: Config, source: str, devices: int) -> Config:
    """The config judged for so many devices.  Raises ConfigError if its mesh or batches do not fit them."""
    return configs.parse(configs.to_dict(config), source=source, devices=devices)
