"""The estimates of a preflight as text tables and as JSON."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

from lowrank_jax.experiment.preflight import compiler
from lowrank_jax.experiment.preflight.compiler import Cost
from lowrank_jax.experiment.preflight.estimate import Estimate
from lowrank_jax.experiment.preflight.rest import Rest
from lowrank_jax.planning.chips import Chip
from lowrank_jax.text import align, count

Rows = list[list[str]]


@dataclasses.dataclass(frozen=True)
class Estimates:
    """All estimates of a preflight, by families of networks, the dense network of each first.

    Attributes:
      topology: for example "v5e:4x4".
      chip: the roofline of one device.
      devices: number of devices.
      effort: of the compiler.
      families: the estimates.
      rests: for budgets of seconds.
    """

    topology: str
    chip: Chip
    devices: int
    effort: str
    families: tuple[tuple[Estimate, ...], ...]
    rests: tuple[Rest, ...] = ()

    @property
    def rows(self) -> list[Estimate]:
        return [row for family in self.families for row in family]

    @property
    def usable(self) -> int:
        """Bytes of a device's memory that a program can use."""
        return compiler.usable_bytes(self.topology)

    @property
    def fits(self) -> bool:
        """Whether every requested network fits."""
        return all(row.fits(self.usable) for row in self.rows if row.requested)

    def __str__(self) -> str:
        tables = [f"{title}\n{align(rows)}" for title, rows in self._tables()]
        return "\n\n".join([self.headline(), *tables, "\n".join(self.notes())])

    def headline(self) -> str:
        name = self.topology.replace(":", " ")
        sizes = sorted({row.batch_size for row in self.rows})
        batches = ", ".join(f"global batch {size} ({size / self.devices:g} per {self._unit})" for size in sizes)
        units = f"{self.devices} {self._unit}{'s' if self.devices > 1 else ''}"
        return f"TPU {name}, {units}, {batches}; compiler estimates, nothing was run"

    def _tables(self) -> list[tuple[str, Rows]]:
        gib = self.usable / 2**30
        return [
            (f"Memory per {self._unit}; a program can use {gib:.4g} GiB", self.memory_rows()),
            (f"Training step, per {self._unit}", self.step_rows()),
        ]

    @property
    def _unit(self) -> str:
        return "core" if self.chip.kind == "TPU v3" else "chip"

    def memory_rows(self) -> Rows:
        """Parameters, factored kernels and memory by program, with ratios to the dense twin."""
        programs = list(self.rows[0].programs)
        rows = [["network", "parameters", "factored", "state", *programs, "memory used"]]
        for row, dense in self._pairs():
            cells = [ratio(memory, row.peak_bytes(name), dense.peak_bytes(name)) for name in programs]
            rows.append([
                row.name,
                ratio(_count, row.params, dense.params),
                f"{row.factored} of {row.kernels}"
                + (f", {row.merged} merged" if row.merged else "")
                + (f", {row.waiting} open" if row.waiting else ""),
                ratio(memory, row.state_bytes, dense.state_bytes),
                *cells,
                self._verdict(row),
            ])  # fmt: skip
        return rows

    def _verdict(self, row: Estimate) -> str:
        share = f"{100 * row.peak_bytes(row.largest) / self.usable:.0f} %"
        return share if row.fits(self.usable) else f"{share}, does not fit"

    def step_rows(self) -> Rows:
        """FLOPs, bytes, times and collectives of a training step."""
        rows = [
            ["network", "FLOPs", "bytes", "FLOPs/byte", "bound by", "roofline", "compiler's time", "images/s", "collectives"]
        ]
        for row, dense in self._pairs():
            cost, twin = row.step, dense.step or row.step
            if cost is None or twin is None:
                rows.append([row.name, *["-"] * (len(rows[0]) - 1)])
                continue
            bound = roofline_seconds(cost, self.chip)
            own = "-" if cost.seconds is None else ratio(time, cost.seconds, twin.seconds)
            rows.append([
                row.name,
                ratio(flops, cost.flops, twin.flops),
                ratio(moved, cost.bytes, twin.bytes),
                f"{cost.flops / cost.bytes:.0f}",
                self.bound_by(cost),
                ratio(time, bound, self.seconds(dense)),
                own,
                f"{row.batch_size / bound:,.0f}",
                exchanged(cost.collectives, twin.collectives),
            ])  # fmt: skip
        return rows

    def seconds(self, row: Estimate) -> float | None:
        """The roofline's time of a training step; None if the compiler refused it."""
        return row.step and roofline_seconds(row.step, self.chip)

    def bound_by(self, cost: Cost) -> str:
        return "memory" if cost.bytes / self.chip.bandwidth > cost.flops / self.chip.flops else "compute"

    def notes(self) -> list[str]:
        """How to read the tables, and what does not fit."""
        lines = [
            "In parentheses: ratio to the dense twin.",
            f"Roofline: {self.chip.flops / 1e12:.4g} TFLOP/s and {self.chip.bandwidth / 1e9:.4g} GB/s per {self._unit}, "
            f"balanced at {self.chip.flops / self.chip.bandwidth:.0f} FLOPs/byte. It assumes that compute and memory traffic "
            "overlap and that communication is free: the time is a lower bound, images/s (over all devices) an upper bound.",
            f"Collectives: bytes of the arrays that are reduced or gathered. Compiled at effort {self.effort} with libtpu "
            f"{compiler.versions()['libtpu']}.",
        ]
        if any(row.parts > 1 for row in self.rows):
            lines.append(
                "optim.accumulate: FLOPs, bytes and times are those of one micro-batch and the update, times the number of "
                "micro-batches."
            )
        lines += [
            f"{row.name}: the ranks of {row.waiting} kernels are open until the dense warm-up ends, and they are dense here."
            for row in self.rows
            if row.waiting
        ]
        doubts = {row.name: row.step.doubt for row in self.rows if row.step and row.step.doubt}
        lines += [f"{name}: the compiler's time is left out: {doubt}." for name, doubt in doubts.items()]
        for row in self.rows:
            if not row.fits(self.usable):
                needed = memory(row.peak_bytes(row.largest))
                lines.append(f"{row.name} does not fit: its {row.largest} needs {needed}, {memory(self.usable)} are available.")
        if self.rests and self.effort == "fast":
            lines.append("Seconds at effort fast are those of a less optimised program; those of --effort=full are closer.")
        return [*lines, *map(str, self.rests)]

    def _pairs(self) -> Iterator[tuple[Estimate, Estimate]]:
        """Every network and its dense twin."""
        for family in self.families:
            for row in family:
                yield row, family[0]

    def json(self) -> str:
        rows = [self._object(row, dense) for row, dense in self._pairs()]
        described = {
            "note": "compiler estimates for one device, nothing was run",
            "topology": self.topology,
            "devices": self.devices,
            "chip": dataclasses.asdict(self.chip),
            "effort": self.effort,
            "versions": compiler.versions(),
            "fits": self.fits,
            "arms": rows,
            "rests": [dataclasses.asdict(rest) for rest in self.rests],
        }
        return json.dumps(described, indent=2) + "\n"

    def _object(self, row: Estimate, dense: Estimate) -> dict[str, Any]:
        figures = self._figures(row)
        twin = self._figures(dense)
        ratios = {name: value / other for name, value in figures.items() if value is not None and (other := twin[name])}
        return {
            "name": row.name,
            "dense_twin": dense.name,
            "fits": row.fits(self.usable),
            **figures,
            "ratio": ratios,
            "kernels": row.kernels,
            "factored": row.factored,
            "merged": row.merged,
            "open": row.waiting,
            "batch_size": row.batch_size,
            "programs": {name: dataclasses.asdict(program) for name, program in row.programs.items()},
        }

    def _figures(self, row: Estimate) -> dict[str, float | None]:
        cost, seconds = row.step, self.seconds(row)
        return {
            "params": row.params,
            "state_bytes": row.state_bytes,
            "peak_bytes": row.peak_bytes(row.largest),
            "flops": cost and cost.flops,
            "bytes": cost and cost.bytes,
            "roofline_seconds": seconds,
            "compiler_seconds": cost and cost.seconds,
            "images_per_second": seconds and row.batch_size / seconds,
            "collective_bytes": cost and sum(cost.collectives.values()),
        }


def roofline_seconds(cost: Cost, chip: Chip) -> float:
    """The minimum time of a program, at the peak rates that the chip's maker states."""
    return max(cost.flops / chip.flops, cost.bytes / chip.bandwidth)


def ratio(text: Callable[[float], str], value: float, dense: float | None) -> str:
    """A figure, with its ratio to the dense one in parentheses where they differ."""
    return text(value) + (f" ({value / dense:.2f})" if dense and value != dense else "")


def _count(value: float) -> str:
    return count(round(value))


def memory(value: float) -> str:
    """Bytes in memory, in powers of 1024."""
    return f"{value / 2**30:.3g} GiB" if value >= 2**30 else f"{value / 2**20:.3g} MiB"


def flops(value: float) -> str:
    return _scaled(value, "")


def moved(value: float) -> str:
    """Bytes of traffic, in powers of 1000 like bandwidths."""
    return _scaled(value, "B")


def _scaled(value: float, unit: str) -> str:
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} µs"


def exchanged(kinds: dict[str, int], dense: dict[str, int]) -> str:
    """Bytes of the collectives by kind, with ratios to the dense ones."""
    return ", ".join(f"{kind} {ratio(moved, value, dense.get(kind))}" for kind, value in kinds.items()) or "none"
