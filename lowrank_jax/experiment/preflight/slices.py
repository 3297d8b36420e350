"""The TPU slices that exist, named by generation and topology, for example `v5e:4x4`."""

import dataclasses
import math
import re

from lowrank_jax.text import did_you_mean


@dataclasses.dataclass(frozen=True)
class Slice:
    """A TPU slice.

    Attributes:
      generation: for example v5e.
      topology: of the chips, for example 4x4.
      hosts: number of virtual machines.
      chips_per_host: number of chips of each.
    """

    generation: str
    topology: str
    hosts: int
    chips_per_host: int

    @property
    def chips(self) -> int:
        return self.hosts * self.chips_per_host


@dataclasses.dataclass(frozen=True)
class _Generation:
    topologies: tuple[str, ...]
    most_chips: int = 0  # if not 0, boxes of 4x4x4 cubes up to so many chips are topologies too

    def has(self, topology: str) -> bool:
        sides = [int(side) for side in topology.split("x")]
        box = len(sides) == 3 and sides == sorted(sides) and not any(side % 4 for side in sides)
        return topology in self.topologies or (box and math.prod(sides) <= self.most_chips)


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SOLID = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_GENERATIONS = {
    "v3": _Generation(("2x2", "4x4", "4x8", "8x8", "8x16", "16x16", "16x32", "32x32")),
    "v4": _Generation(_SOLID, most_chips=4096),
    "v5e": _Generation(_FLAT),
    "v5p": _Generation(_SOLID, most_chips=6144),
    "v6e": _Generation(_FLAT),
}


def parse(text: str) -> Slice:
    """Parses `v5e:4x4`, `v4:2x2x2`, `v5p:2x2x1`, `v6e:2x4`, `v3:2x2`.

    A host has four chips, except that a 1x1 or 2x4 of v5e or v6e is a single host.  A 2x4 on two hosts of four chips (GKE's
    machine types that end in -4t) is written `v5e:2x4/4`.  From 4x4x4 on, v4 and v5p have all boxes whose sides are multiples
    of four, the shortest side first.

    Raises:
      ValueError: there is no such slice.
    """
    match = re.fullmatch(r"([^:/]+):([1-9]\d*(?:x[1-9]\d*)+)(/4)?", text)
    if not match:
        raise ValueError(f"{text!r}: expected GENERATION:TOPOLOGY, for example v5e:4x4")
    name, topology, halved = match.groups()
    if name not in _GENERATIONS:
        raise ValueError(f"unknown generation {name!r}{did_you_mean(name, _GENERATIONS)}")
    generation = _GENERATIONS[name]
    if not generation.has(topology):
        raise ValueError(f"{name} has no topology {topology!r}{did_you_mean(topology, generation.topologies)}")
    if halved and topology != "2x4":
        raise ValueError(f"{text!r}: /4 is only for 2x4")
    chips = math.prod(int(side) for side in topology.split("x"))
    per_host = {"1x1": 1, "2x4": 4 if halved else 8}.get(topology, 4)
    return Slice(name, topology, chips // per_host, per_host)
