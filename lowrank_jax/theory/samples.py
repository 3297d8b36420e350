"""Samples of a function: inputs and outputs, processed on the devices one batch at a time."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lowrank_jax.projection.linalg import highest_precision

Batch = tuple[jax.Array, jax.Array, int]
"""x `[rows, n]`, y `[rows, outputs]`, and the number of rows that are samples; the rest are zeros."""

_ELEMENTS = 2**22  # products of an input and an output in a batch, from which moments are computed


class SampleError(ValueError):
    """Nothing can be learned from these samples; the message says why."""


@dataclasses.dataclass(frozen=True)
class Samples:
    """Samples that can be read any number of times.

    Attributes:
      read: starts reading the batches from the beginning; all have one shape.
      inputs, outputs: n, and the number of outputs.
      dtype: float32, or float64 if JAX has it enabled and the samples use it.
    """

    read: Callable[[], Iterator[Batch]]
    inputs: int
    outputs: int
    dtype: Any

    def total(self, fn: Callable[..., Any], *arguments: Any) -> tuple[Any, int]:
        """A sum over all samples, and their number.

        Args:
          fn: jitted, `(x, y, *arguments)` to a sum over the rows of a batch; rows of zeros must add nothing.
          arguments: further arguments of `fn`.
        """
        total, count = None, 0
        for x, y, rows in self.read():
            part = fn(x, y, *arguments)
            total, count = part if total is None else _add(total, part), count + rows
        return total, count

    def mean(self, fn: Callable[..., Any], *arguments: Any) -> Any:
        """`total` over the number of samples."""
        return _divided(*self.total(fn, *arguments))

    def map(self, fn: Callable[..., tuple[jax.Array, jax.Array]], *arguments: Any) -> "Samples":
        """The samples `fn(x, y, *arguments)`; fn must be jitted and map zeros to zeros."""

        def read() -> Iterator[Batch]:
            return ((*fn(x, y, *arguments), rows) for x, y, rows in self.read())

        x, y = jax.eval_shape(
            fn, *(jax.ShapeDtypeStruct((1, size), self.dtype) for size in (self.inputs, self.outputs)), *arguments
        )
        return Samples(read, x.shape[1], y.shape[1], self.dtype)

    def through(self, root: jax.Array, turn: jax.Array) -> "Samples":
        """The samples x R and y T, for R `[n, n']` and T `[outputs, outputs']`."""
        return self.map(_through, root, turn)

    def head(self, count: int) -> "Samples":
        """The first `count` samples, or all if there are fewer, kept on the devices."""
        kept, found = [], 0
        for x, y, rows in self.read():
            rows = min(rows, count - found)
            kept.append((*_first(x, y, rows), rows))
            found += rows
            if found >= count:
                break
        return Samples(lambda: iter(kept), self.inputs, self.outputs, self.dtype)


def from_batches(batches: Iterable[tuple[Any, Any]], mesh: Mesh | None = None) -> Samples:
    """Samples in batches of any sizes.

    Args:
      batches: pairs of x `[any, n]` and y `[any, outputs]`, NumPy or JAX arrays; read several times, so not an iterator.
      mesh: devices over which every batch is sharded, along the axis `data`.

    Raises:
      SampleError: there are no batches, or they are not such pairs.
    """
    if isinstance(batches, Iterator):
        raise SampleError("batches are read several times: pass a list, or an object whose __iter__ starts over")
    shards, sharding = 1, None
    if mesh is not None:
        if "data" not in mesh.shape:
            raise SampleError(f"the mesh has the axes {list(mesh.shape)}; samples are sharded over an axis named 'data'")
        mesh = Mesh(mesh.devices, mesh.axis_names)  # explicit axes, the default of make_mesh, do not support decompositions
        shards, sharding = mesh.shape["data"], NamedSharding(mesh, PartitionSpec("data"))
    first = next(iter(batches), None)
    if first is None:
        raise SampleError("there are no samples")
    x, y = _checked(first)
    shape, dtype = (x.shape[1], y.shape[1]), jax.dtypes.canonicalize_dtype(np.result_type(x.dtype, y.dtype, np.float32))
    rows = shards * max(64, min(2**14, _ELEMENTS // (shape[0] * shape[1])) // shards)

    def on_devices(part: Any) -> jax.Array:
        part = (jnp if isinstance(part, jax.Array) else np).pad(part, ((0, rows - len(part)), (0, 0)))
        return jax.device_put(part.astype(dtype), sharding)

    def read() -> Iterator[Batch]:
        for x, y in map(_checked, batches):
            if (x.shape[1], y.shape[1]) != shape:
                raise SampleError(
                    f"a batch has {x.shape[1]} inputs and {y.shape[1]} outputs; the first one has {shape[0]} and {shape[1]}"
                )
            for begin in range(0, len(x), rows):
                part = slice(begin, begin + rows)
                yield on_devices(x[part]), on_devices(y[part]), min(rows, len(x) - begin)

    return Samples(read, *shape, dtype)


def from_arrays(x: Any, y: Any, mesh: Mesh | None = None) -> Samples:
    """Samples x `[N, n]` and y `[N, outputs]`: arrays or memory-mapped files; mesh and errors as in `from_batches`."""
    return from_batches([(x, y)], mesh)


def rounding(dtype: Any) -> float:
    """The largest relative squared error that counts as rounding: somewhat above the dtype's epsilon squared."""
    return float(jnp.finfo(dtype).eps) ** 1.5


def negligible(dtype: Any) -> float:
    """The fraction of a second moment's largest eigenvalue below which others are rounding."""
    return float(jnp.finfo(dtype).eps) ** 0.75


def _checked(batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise SampleError(f"a batch must be a pair (x, y); got {_kind(batch)}")
    x, y = batch
    for name, part in (("x", x), ("y", y)):
        if not hasattr(part, "dtype") or part.ndim != 2 or 0 in part.shape:
            raise SampleError(
                f"{name} must be a matrix, samples by {'inputs' if name == 'x' else 'outputs'}; got {_kind(part)}"
            )
        if not jnp.issubdtype(part.dtype, jnp.floating):
            raise SampleError(f"{name} must contain real numbers; its dtype is {part.dtype}")
    if len(x) != len(y):
        raise SampleError(f"x has {len(x)} samples, y has {len(y)}")
    return x, y


def _kind(part: Any) -> str:
    if isinstance(part, tuple | list):
        return f"a {type(part).__name__} of {len(part)}"
    return f"shape {list(part.shape)}" if hasattr(part, "shape") else f"a {type(part).__name__}"


@jax.jit
def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


@jax.jit
def _divided(total: Any, count: int) -> Any:
    return jax.tree.map(lambda part: part / count, total)


@jax.jit
def _first(x: jax.Array, y: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """The first rows; the others become zeros."""
    among = (jnp.arange(len(x)) < rows)[:, None]
    return jnp.where(among, x, 0), jnp.where(among, y, 0)


@jax.jit
@highest_precision
def _through(x: jax.Array, y: jax.Array, root: jax.Array, turn: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x @ root, y @ turn
