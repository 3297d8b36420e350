"""The peak compute and memory bandwidth of accelerators, by jax's name for them.

Figures are for one jax device.  That is a chip, except on v3 and on v4 without megacore, where it is one of a chip's two cores.
They are the vendors' own, for bfloat16 matrix products with dense operands: Google's pages on the TPU generations
(docs.cloud.google.com/tpu/docs/v3, v4, v5e, v5p, v6e) and NVIDIA's data sheets of the A100 80GB, H100 SXM and H200.
"""

import dataclasses
from typing import Any

from lowrank_jax.text import did_you_mean


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as a roofline.

    Attributes:
      name: such as "v5e".
      kind: `jax.Device.device_kind`, or its beginning.
      flops: peak bfloat16 FLOP/s.
      bandwidth: peak memory bandwidth, bytes/s.
      memory: its size in bytes, as stated; `preflight` knows how much of a TPU's memory a program can use.
      reached: the fractions of `flops` and `bandwidth` that the device's own compiler assumes; `python -m
        scripts.calibrate_chips` prints them for TPUs.  Ones where there is no such compiler.
      tile: rows and columns of the tiles in which arrays are stored; smaller axes are padded.  None if there are none.
    """

    name: str
    kind: str
    flops: float
    bandwidth: float
    memory: int
    reached: tuple[float, float] = (1.0, 1.0)
    tile: tuple[int, int] | None = None

    def half(self) -> "Chip":
        """One of the chip's two cores."""
        return dataclasses.replace(self, flops=self.flops / 2, bandwidth=self.bandwidth / 2, memory=self.memory // 2)

    def seconds(self, flops: float, moved: float) -> float:
        """The roofline's time in seconds: of the FLOPs or of the bytes moved to and from memory, whichever is longer."""
        return max(flops / (self.flops * self.reached[0]), moved / (self.bandwidth * self.reached[1]))


_GIB = 2**30
_TILE = (8, 128)

CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v3", "TPU v3", 123e12, 900e9, 32 * _GIB, (0.998, 0.954), _TILE),
        Chip("v4", "TPU v4", 275e12, 1200e9, 32 * _GIB, (0.996, 0.819), _TILE),
        Chip("v5e", "TPU v5 lite", 197e12, 819e9, 16 * _GIB, (1.0, 0.901), _TILE),
        Chip("v5p", "TPU v5", 459e12, 2765e9, 95 * 10**9, (0.858, 0.850), _TILE),
        Chip("v6e", "TPU v6 lite", 918e12, 1638e9, 32 * _GIB, (1.0, 1.0), _TILE),
        Chip("a100", "NVIDIA A100", 312e12, 2039e9, 80 * 10**9),
        Chip("h100", "NVIDIA H100", 989e12, 3350e9, 80 * 10**9),
        Chip("h200", "NVIDIA H200", 989e12, 4800e9, 141 * 10**9),
        # What a core of a server did in float32 (`python -m benchmarks.execution`); only the ratio of the two matters.
        Chip("cpu", "cpu", 90e9, 10e9, 0),
    )
}


def of_device(device: Any) -> Chip | None:
    """The chip of a `jax.Device`, which may be of an abstract topology; None if it is not in the table."""
    kind = device.device_kind
    found = [chip for chip in CHIPS.values() if kind.startswith(chip.kind)]
    if not found:
        return None
    chip = max(found, key=lambda chip: len(chip.kind))  # "TPU v5 lite" begins like "TPU v5"
    shared = chip.name == "v3" or (chip.name == "v4" and device.num_cores == 1)
    return chip.half() if shared else chip


def named(name: str) -> Chip:
    """The chip with this name.

    Raises:
      ValueError: there is no such chip.
    """
    if not isinstance(name, str) or name not in CHIPS:
        raise ValueError(f"unknown chip {name!r}{did_you_mean(name, CHIPS)}")
    return CHIPS[name]
