"""The part of a TPU's peak and bandwidth that its own compiler reckons with: `reached` in lowrank_jax/planning/chips.py.

    python -m scripts.calibrate_chips

Compiles a large product and a large sum for every generation, at the lowest effort, and divides the FLOPs and the bytes by the
compiler's estimate of the time.  Needs libtpu (pip install 'lowrank_jax[tpu-preflight]') and no TPU.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from lowrank_jax.experiment.preflight.compiler import compiling, topology
from lowrank_jax.planning import chips

TOPOLOGIES = ("v3:2x2", "v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2")


def rates(device: Any, fn: Callable[..., jax.Array], shapes: Sequence[tuple[int, ...]]) -> tuple[float, float]:
    """FLOPs and bytes a second of a program, by the compiler."""
    placed = SingleDeviceSharding(device)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=placed) for shape in shapes]
    cost = jax.jit(fn).lower(*arguments).compile().cost_analysis()
    assert cost is not None
    return cost["flops"] / cost["optimal_seconds"], cost["bytes accessed"] / cost["optimal_seconds"]


def main() -> None:
    for name in TOPOLOGIES:
        device = topology(name)[0]
        chip = chips.of_device(device)
        assert chip is not None
        with compiling("fast"):
            flops, _ = rates(device, jnp.matmul, [(8192, 8192)] * 2)
            _, moved = rates(device, jnp.add, [(16384, 8192)] * 2)
        print(f"{chip.name}: reached=({flops / chip.flops:.3f}, {moved / chip.bandwidth:.3f})")


if __name__ == "__main__":
    main()
