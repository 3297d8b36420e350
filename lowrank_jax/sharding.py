"""Where arrays live: a mesh of devices, and the part of every array that each of them holds."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lowrank_jax.kernel import is_low_rank

AXES = ("data", "fsdp", "model")
BATCH_AXES = ("data", "fsdp")


def make_mesh(data: int = -1, fsdp: int = 1, model: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over the given devices, by default all; the axis given as -1 takes those that the others leave.

    Sizes are checked by `config`.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, model]
    if -1 in sizes:
        sizes[sizes.index(-1)] = len(devices) // math.prod(size for size in sizes if size != -1)
    # Explicit axes, jax's default, refuse decompositions of sharded arrays.
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Mesh) -> int:
    """In how many parts a batch is cut."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's part of a batch as part of a global array."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, part) for name, part in batch.items()}


def tree_shardings(shapes: Any, mesh: Mesh) -> Any:
    """A sharding for every array of a state, from its shapes (`jax.eval_shape`).

    The fsdp axis takes the longest axis of an array that it divides, the model axis the longest that is left; the rank of a
    factor is never cut.  With both of size one, everything is replicated.
    """

    def place(node: Any) -> Any:
        if not is_low_rank(node):
            return NamedSharding(mesh, _spec(node.shape, mesh, whole=None))
        rank_axis = len(node.stack)
        u = NamedSharding(mesh, _spec(node.u.shape, mesh, whole=node.u.ndim - 1))
        v = NamedSharding(mesh, _spec(node.v.shape, mesh, whole=rank_axis))
        return dataclasses.replace(node, u=u, v=v)

    return jax.tree.map(place, shapes, is_leaf=is_low_rank)


def _spec(shape: tuple[int, ...], mesh: Mesh, whole: int | None) -> PartitionSpec:
    spec: list[str | None] = [None] * len(shape)
    for name in ("fsdp", "model"):
        size = mesh.shape[name]
        free = [axis for axis in range(len(shape)) if axis != whole and spec[axis] is None and shape[axis] % size == 0]
        if size > 1 and free:
            spec[max(free, key=lambda axis: shape[axis])] = name
    return PartitionSpec(*spec)
