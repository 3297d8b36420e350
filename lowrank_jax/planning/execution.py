"""Whether a layer runs on its kernel's factors or on their product, by the time of a training step on a device.

On the factors, a layer needs fewer multiplications, but it writes and reads one more activation, between the two stages.  Where
a device is bound by memory, as TPUs are in most convolutions with 1x1 windows or large images, that activation costs more time
than the multiplications save.  There it is better to form the product UV first, which costs little, and to run the layer as the
dense one: the parameters, the function and the gradients stay those of the factors.

The model is a roofline, operation by operation (docs/mathematics.md, section 10).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from lowrank_jax.checks import count, is_number, plain
from lowrank_jax.kernel import SPATIAL_ROWS, Execution
from lowrank_jax.planning.arguments import check_plan
from lowrank_jax.planning.chips import Chip
from lowrank_jax.planning.plans import Choice, FactoredKernel, Plan, PlannedKernel
from lowrank_jax.text import shown

Operation = tuple[float, float]  # FLOPs, and bytes to and from memory

_GRADIENT_BYTES = 4  # of an element of a kernel's gradient


def choose_execution(plan: Plan, chip: Chip | None, *, batch: int, itemsize: int = 4) -> Plan:
    """Sets the execution of every factored kernel whose rule leaves it open (`auto`), and returns the new plan.

    Args:
      plan: from `plan`.
      chip: the device for training (`chips.of_device`, `chips.CHIPS`); None if it is unknown, then all kernels run factored.
      batch: examples per step and device.
      itemsize: bytes per element of an activation, such as 2 for bfloat16.

    Raises:
      TypeError: the plan or the chip is none.
      ValueError: `batch` or `itemsize` is no whole number of at least 1, or the plan has an open rank.
    """
    check_plan(plan)
    if chip is not None and not isinstance(chip, Chip):
        raise TypeError(f"chip must be one of lowrank_jax.chips.CHIPS, or None, not {shown(chip)}")
    batch, itemsize = _counts(batch=batch, itemsize=itemsize)
    open_ = [kernel for kernel in plan.factored if kernel.execution is None]

    def chosen(kernel: PlannedKernel) -> PlannedKernel:
        if not isinstance(kernel, FactoredKernel) or kernel not in open_:
            return kernel
        execution: Execution = "factored"
        if chip is not None and seconds(kernel, "merged", chip, batch, itemsize) < seconds(
            kernel, "factored", chip, batch, itemsize
        ):
            execution = "merged"
        return dataclasses.replace(kernel, execution=execution)

    return dataclasses.replace(plan, kernels=tuple(chosen(kernel) for kernel in plan.kernels))


def _counts(**given: Any) -> list[int]:
    """The counts as Python's numbers.  Raises ValueError for one that is none."""
    counts = {name: plain(value) for name, value in given.items()}
    for name, value in counts.items():
        if complaint := count(value):
            raise ValueError(f"{name} {complaint}, not {shown(given[name])}")
    return list(counts.values())


def seconds(kernel: FactoredKernel, execution: Execution, chip: Chip, batch: int, itemsize: int = 4) -> float:
    """The layer's estimated time in a training step, in seconds: forward and both gradients.

    Args:
      kernel: a kernel of a plan.
      execution: `factored` or `merged`.
      chip: the device.
      batch: examples per step on that device.
      itemsize: bytes per element of an activation.
    """
    operations = _factored if execution == "factored" else _merged
    return sum(chip.seconds(flops, moved) for flops, moved in operations(kernel, chip, batch, itemsize))


def seconds_of(
    kernel: PlannedKernel, choice: Choice, rank: int, execution: Execution, chip: Chip, batch: int, itemsize: int = 4
) -> float:
    """`seconds` of a kernel at one of its choices and a rank."""
    line = dataclasses.replace(_as_factored(kernel), choice=choice, rank=rank)
    return seconds(line, execution, chip, batch, itemsize)


def dense_seconds(kernel: PlannedKernel, chip: Chip, batch: int, itemsize: int = 4) -> float:
    """The time of the dense layer; of a kernel whose work is not known, 0."""
    return sum(chip.seconds(flops, moved) for flops, moved in _dense(kernel, chip, batch, itemsize))


def rest_of_step(plan: Plan, step: float | jax.stages.Compiled, chip: Chip, *, batch: int, itemsize: int = 4) -> float:
    """What a dense training step takes besides the plan's kernels, in seconds: `rest` of `allocate(seconds=...)`.

    With it a fraction is one of the whole step, normalisations, optimiser and all.

    Args:
      plan: from `plan`.
      step: the seconds of the whole step with dense kernels, as measured or as a device's compiler estimates them; or the step
        compiled, for whatever device, whose other FLOPs and bytes are then taken as one more operation of the roofline.
      chip: the device.
      batch: examples per step on it.
      itemsize: bytes per element of an activation.

    Returns:
      At least 0: a step cannot take less than its kernels.

    Raises:
      TypeError: the plan or the chip is none.
      ValueError: the step's time is no number above 0, the compiler tells neither FLOPs nor bytes, or `batch` or `itemsize` is
        no whole number of at least 1.
    """
    check_plan(plan)
    if not isinstance(chip, Chip):
        raise TypeError(f"chip must be one of lowrank_jax.chips.CHIPS, not {shown(chip)}")
    batch, itemsize = _counts(batch=batch, itemsize=itemsize)
    operations = [operation for kernel in plan.kernels for operation in _dense(kernel, chip, batch, itemsize)]
    if isinstance(step, jax.stages.Compiled):
        cost: Any = step.cost_analysis()
        if not cost or not {"flops", "bytes accessed"} <= cost.keys():
            raise ValueError("the compiler tells neither FLOPs nor bytes of the step: measure its seconds")
        flops, moved = (sum(part) for part in zip((0.0, 0.0), *operations, strict=True))
        return chip.seconds(max(cost["flops"] - flops, 0), max(cost["bytes accessed"] - moved, 0))
    whole: Any = plain(step)
    if not is_number(whole) or whole <= 0:
        raise ValueError(f"step {shown(step)} must be seconds, a number above 0, or a compiled program")
    return max(whole - sum(chip.seconds(flops, moved) for flops, moved in operations), 0.0)


def _dense(kernel: PlannedKernel, chip: Chip, batch: int, itemsize: int) -> Sequence[Operation]:
    flops = 2 * batch * kernel.macs
    if not kernel.choices:
        return [(3 * flops, 0.0)]
    x, y = _ends(_as_factored(kernel), chip, batch, itemsize)
    return [(flops, x + y), (flops, x + 2 * y), (flops, 2 * y + 2 * x)]


def _as_factored(kernel: PlannedKernel) -> FactoredKernel:
    assert kernel.rule is not None
    return FactoredKernel(**kernel.shared, choice=kernel.choices[0], rank=1)


def _factored(kernel: FactoredKernel, chip: Chip, batch: int, itemsize: int) -> Sequence[Operation]:
    view, rank, traffic = kernel.view, kernel.rank, kernel.traffic.scaled(batch)
    x, y = _ends(kernel, chip, batch, itemsize)
    h = _stored(traffic.hidden_positions * rank, rank, chip, batch, itemsize)
    first = 2 * traffic.hidden_positions * view.n * rank
    second = 2 * traffic.positions * rank * view.m
    # At rank 1 the second product is elementwise: XLA recomputes it wherever the output is read, and does not store it.
    output = h if rank == 1 and view.rows != SPATIAL_ROWS else y
    return [
        (first, x + h),
        (second, h + output),
        (second, h + y + output),  # of V
        (second, y + output + h),  # of the activation between
        (first, x + h),  # of U
        (first, h + 2 * x),  # of the input
    ]


def _merged(kernel: FactoredKernel, chip: Chip, batch: int, itemsize: int) -> Sequence[Operation]:
    x, y = _ends(kernel, chip, batch, itemsize)
    flops = 2 * batch * kernel.macs
    elements = math.prod(kernel.shape)
    product = 2 * elements * kernel.rank
    return [
        (product, elements * itemsize),
        (flops, x + y),
        (flops, x + 2 * y),  # of the kernel
        (flops, 2 * y + 2 * x),  # of the input
        (product, elements * _GRADIENT_BYTES),  # of U
        (product, elements * _GRADIENT_BYTES),  # of V
    ]


def _ends(kernel: FactoredKernel, chip: Chip, batch: int, itemsize: int) -> tuple[float, float]:
    """Bytes of the layer's input and output.

    In the backward pass, what follows the layer is recomputed wherever its gradient is read, which reads the output again; so
    is what precedes it, which reads the input again.  Hence the twos above.
    """
    view, traffic = kernel.view, kernel.traffic.scaled(batch)
    inputs, outputs = view.shape[max(view.rows)], view.m // view.group
    x = _stored(traffic.inputs, inputs, chip, batch, itemsize)
    y = _stored(traffic.positions * outputs, outputs, chip, batch, itemsize)
    return x, y


def _stored(elements: int, channels: int, chip: Chip, batch: int, itemsize: int) -> float:
    """Bytes of an activation in memory.

    TPUs store arrays in tiles of 8 x 128 elements; the compiler puts either batch or channels along the long side, whichever
    needs less padding.  Padding is moved too.
    """
    if chip.tile is None or channels == 1:  # an axis of size one is not tiled
        return elements * itemsize
    rows, columns = chip.tile
    fill = min(
        _filled(batch, columns) * _filled(channels, rows) / (batch * channels),
        _filled(channels, columns) * _filled(batch, rows) / (batch * channels),
    )
    return elements * itemsize * fill


def _filled(size: int, tile: int) -> int:
    return -(-size // tile) * tile
