"""A preflight as text and as JSON."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

from lowrank_jax.experiment.config.files import ConfigError
from lowrank_jax.experiment.preflight import compiler, slices
from lowrank_jax.experiment.preflight.arms import Arm, Cache, Compiler, Wanted, check, grouped
from lowrank_jax.experiment.preflight.compiler import Cost
from lowrank_jax.planning.chips import Chip, of_device
from lowrank_jax.text import align, count

Rows = list[list[str]]


@dataclasses.dataclass(frozen=True)
class Report:
    """The arms of a preflight, every group of them with the dense one first.

    Attributes:
      topology: such as "v5e:4x4".
      chip: the roofline of one device.
      devices: how many there are.
      effort: of the compiler.
      groups: the arms.
    """

    topology: str
    chip: Chip
    devices: int
    effort: str
    groups: tuple[tuple[Arm, ...], ...]

    @property
    def arms(self) -> list[Arm]:
        return [arm for group in self.groups for arm in group]

    @property
    def usable(self) -> int:
        """Bytes of a device's memory that a program can have."""
        return compiler.usable_bytes(self.topology)

    @property
    def fits(self) -> bool:
        """Whether all that was asked for fits."""
        return all(arm.fits(self.usable) for arm in self.arms if arm.wanted)

    def __str__(self) -> str:
        tables = [f"{title}\n{align(rows)}" for title, rows in self._tables()]
        return "\n\n".join([self.headline(), *tables, "\n".join(self.notes())])

    def headline(self) -> str:
        name = self.topology.replace(":", " ")
        sizes = sorted({arm.batch_size for arm in self.arms})
        batches = ", ".join(f"global batch {size} ({size / self.devices:g} a {self._unit})" for size in sizes)
        units = f"{self.devices} {self._unit}{'s' if self.devices > 1 else ''}"
        return f"TPU {name}, {units}, {batches}; compiler estimates, nothing ran"

    def _tables(self) -> list[tuple[str, Rows]]:
        gib = self.usable / 2**30
        return [
            (f"Memory of a {self._unit}, of which a program can have {gib:.4g} GiB", self.memory_rows()),
            (f"A training step on a {self._unit}", self.step_rows()),
        ]

    @property
    def _unit(self) -> str:
        return "core" if self.chip.kind == "TPU v3" else "chip"

    def memory_rows(self) -> Rows:
        """Parameters, factored kernels, and memory by program; ratios are to the dense twin."""
        programs = list(self.arms[0].programs)
        rows = [["arm", "parameters", "run factored", "state", *programs, "largest"]]
        for arm, dense in self._pairs():
            cells = [ratio(memory, arm.peak_bytes(name), dense.peak_bytes(name)) for name in programs]
            rows.append([
                arm.name,
                ratio(_count, arm.params, dense.params),
                f"{arm.factored} of {arm.kernels}" + (f", {arm.merged} merged" if arm.merged else ""),
                ratio(memory, arm.state_bytes, dense.state_bytes),
                *cells,
                self._verdict(arm),
            ])  # fmt: skip
        return rows

    def _verdict(self, arm: Arm) -> str:
        share = f"{100 * arm.peak_bytes(arm.largest) / self.usable:.0f} %"
        return share if arm.fits(self.usable) else f"{share}, does not fit"

    def step_rows(self) -> Rows:
        """What a training step takes, and for how long at least."""
        rows = [["arm", "FLOPs", "bytes", "FLOPs/byte", "waits for", "roofline", "compiler's time", "images/s", "collectives"]]
        for arm, dense in self._pairs():
            cost, twin = arm.step, dense.step or arm.step
            if cost is None or twin is None:
                rows.append([arm.name, *["-"] * (len(rows[0]) - 1)])
                continue
            bound = roofline_seconds(cost, self.chip)
            own = "-" if cost.seconds is None else ratio(time, cost.seconds, twin.seconds)
            rows.append([
                arm.name,
                ratio(flops, cost.flops, twin.flops),
                ratio(moved, cost.bytes, twin.bytes),
                f"{cost.flops / cost.bytes:.0f}",
                self.waits_for(cost),
                ratio(time, bound, self.seconds(dense)),
                own,
                f"{arm.batch_size / bound:,.0f}",
                exchanged(cost.collectives, twin.collectives),
            ])  # fmt: skip
        return rows

    def seconds(self, arm: Arm) -> float | None:
        """The roofline's time of a training step."""
        return arm.step and roofline_seconds(arm.step, self.chip)

    def waits_for(self, cost: Cost) -> str:
        return "memory" if cost.bytes / self.chip.bandwidth > cost.flops / self.chip.flops else "products"

    def notes(self) -> list[str]:
        """What the tables cannot say of themselves."""
        lines = [
            "In brackets: ratios to the dense twin.",
            f"Roofline: {self.chip.flops / 1e12:.4g} TFLOP/s and {self.chip.bandwidth / 1e9:.4g} GB/s a {self._unit}, even at "
            f"{self.chip.flops / self.chip.bandwidth:.0f} FLOPs a byte; products and memory are taken to overlap, and "
            "exchanges between devices to take no time. It is a lower bound, and the images/s, of all devices, an upper one.",
            f"Collectives: bytes of the arrays that are summed or gathered. Compiled at effort {self.effort} by libtpu "
            f"{compiler.versions()['libtpu']}.",
        ]
        if any(arm.parts > 1 for arm in self.arms):
            lines.append(
                "optim.accumulate: FLOPs, bytes and times are those of one part and the update, as often as there are parts."
            )
        doubts = {arm.name: arm.step.doubt for arm in self.arms if arm.step and arm.step.doubt}
        lines += [f"{name}: no time of the compiler's: {doubt}." for name, doubt in doubts.items()]
        for arm in self.arms:
            if not arm.fits(self.usable):
                wants = memory(arm.peak_bytes(arm.largest))
                lines.append(f"{arm.name} does not fit: its {arm.largest} wants {wants} of {memory(self.usable)}.")
        return lines

    def _pairs(self) -> Iterator[tuple[Arm, Arm]]:
        """Every arm and its dense twin."""
        for group in self.groups:
            for arm in group:
                yield arm, group[0]

    def json(self) -> str:
        arms = [self._object(arm, dense) for arm, dense in self._pairs()]
        described = {
            "note": "compiler estimates for one device, nothing ran",
            "topology": self.topology,
            "devices": self.devices,
            "chip": dataclasses.asdict(self.chip),
            "effort": self.effort,
            "versions": compiler.versions(),
            "fits": self.fits,
            "arms": arms,
        }
        return json.dumps(described, indent=2) + "\n"

    def _object(self, arm: Arm, dense: Arm) -> dict[str, Any]:
        figures = self._figures(arm)
        twin = self._figures(dense)
        ratios = {name: value / other for name, value in figures.items() if value is not None and (other := twin[name])}
        return {
            "name": arm.name,
            "dense_twin": dense.name,
            "fits": arm.fits(self.usable),
            **figures,
            "ratio": ratios,
            "kernels": arm.kernels,
            "factored": arm.factored,
            "merged": arm.merged,
            "batch_size": arm.batch_size,
            "programs": {name: dataclasses.asdict(program) for name, program in arm.programs.items()},
        }

    def _figures(self, arm: Arm) -> dict[str, float | None]:
        cost, seconds = arm.step, self.seconds(arm)
        return {
            "params": arm.params,
            "state_bytes": arm.state_bytes,
            "peak_bytes": arm.peak_bytes(arm.largest),
            "flops": cost and cost.flops,
            "bytes": cost and cost.bytes,
            "roofline_seconds": seconds,
            "compiler_seconds": cost and cost.seconds,
            "images_per_second": seconds and arm.batch_size / seconds,
            "collective_bytes": cost and sum(cost.collectives.values()),
        }


def run(wanted: list[Wanted], topology: str, *, source: str, effort: str, cache: Cache, say: Callable[[str], None]) -> Report:
    """Estimates networks and their dense twins.

    Raises:
      PreflightError, ConfigError: it cannot be done; the message says why.
    """
    devices = compiler.topology(topology)
    chip = of_device(devices[0])
    assert chip is not None, f"{slices.parse(topology).generation} is not in the table of chips"
    judged = _judged(wanted, source, len(devices))
    compile = Compiler(topology, devices, chip, effort, cache, say)
    groups = [[(group.dense, group.wanted), *((arm, True) for arm in group.others)] for group in grouped(judged)]
    arms = iter(compile.estimates(list(itertools.chain(*groups))))
    return Report(topology, chip, len(devices), effort, tuple(tuple(itertools.islice(arms, len(group))) for group in groups))


def roofline_seconds(cost: Cost, chip: Chip) -> float:
    """How long a program takes at least, at what the chip's maker states."""
    return max(cost.flops / chip.flops, cost.bytes / chip.bandwidth)


def _judged(wanted: list[Wanted], source: str, devices: int) -> list[Wanted]:
    """The arms judged for so many devices, or ConfigError with all that is wrong."""
    judged, problems = [], {}
    for arm in wanted:
        try:
            judged.append(Wanted(arm.name, check(arm.config, source, devices)))
        except ConfigError as error:
            problems.update({problem: arm.name for problem in error.problems if problem not in problems})
    if problems:
        raise ConfigError(source, [f"{problem}   (in {name})" for problem, name in problems.items()])
    return judged


def ratio(text: Callable[[float], str], value: float, dense: float | None) -> str:
    """A figure, and in brackets what it is to the dense one, where they differ."""
    return text(value) + (f" ({value / dense:.2f})" if dense and value != dense else "")


def _count(value: float) -> str:
    return count(round(value))


def memory(value: float) -> str:
    """Bytes that lie somewhere, in powers of 1024."""
    return f"{value / 2**30:.3g} GiB" if value >= 2**30 else f"{value / 2**20:.3g} MiB"


def flops(value: float) -> str:
    return _scaled(value, "")


def moved(value: float) -> str:
    """Bytes that go somewhere, in powers of 1000, as bandwidths are."""
    return _scaled(value, "B")


def _scaled(value: float, unit: str) -> str:
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} µs"


def exchanged(kinds: dict[str, int], dense: dict[str, int]) -> str:
    """Collectives by kind."""
    return ", ".join(f"{kind} {ratio(moved, value, dense.get(kind))}" for kind, value in kinds.items()) or "none"
