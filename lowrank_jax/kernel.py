"""A kernel as a matrix, and as a pair of low-rank factors."""

import dataclasses
import functools
import html
import json
import math
from typing import Any, Literal

import jax
import jax.export
import jax.numpy as jnp

Execution = Literal["factored", "merged", "premerged"]

SPATIAL_ROWS = (0, 2)  # window height and input channels; no other view of a convolution has these


@functools.partial(jax.tree_util.register_dataclass, data_fields=["u", "v"], meta_fields=["rows", "execution"])
@dataclasses.dataclass(frozen=True, repr=False)
class LowRankKernel:
    """A kernel stored as the product of two factors; it replaces the dense kernel in a parameter tree.

    Attributes:
      u: `[*stack, *row_sizes, r]`, the sizes of the kernel's row axes and the rank.
      v: `[*stack, r, *column_sizes]`, the rank and the sizes of the remaining axes.
      rows: which axes of the dense kernel are the rows of its matrix, not counting `stack`.  `(0,)` is a dense layer,
        `(0, 1, 2)` a convolution in the channel scheme, `(0, 2)` one in the spatial scheme.
      execution: how its layer runs: `factored` applies the two thin factors in turn, `merged` multiplies UV first and runs the
        layer unchanged (see `execution.choose_execution`).  `premerged`: the product is formed before the model sees its
        parameters, which serves any kernel, whatever the model does with it.  The function and the gradients are the same.

    `stack` holds the leading axes that `nn.scan` and `nn.vmap` add to the parameters of a repeated module.
    """

    u: jax.Array
    v: jax.Array
    rows: tuple[int, ...] = (0,)
    execution: Execution = "factored"

    @property
    def rank(self) -> int:
        return without_box(self.u).shape[-1]

    @property
    def stack(self) -> tuple[int, ...]:
        u = without_box(self.u)
        return tuple(u.shape[: u.ndim - 1 - len(self.rows)])

    @property
    def view(self) -> "MatrixView":
        """How the dense kernel is read as the matrix UV; `group` is not stored."""
        depth = len(self.stack)
        sizes = tuple(without_box(self.u).shape[depth:-1]) + tuple(without_box(self.v).shape[depth + 1 :])
        columns = tuple(axis for axis in range(len(sizes)) if axis not in self.rows)
        shape = [size for _, size in sorted(zip(self.rows + columns, sizes, strict=True))]
        return MatrixView(tuple(shape), self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense kernel."""
        return self.stack + self.view.shape

    @property
    def ndim(self) -> int:
        """The number of axes of the dense kernel."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements of the dense kernel; what is stored is `u.size + v.size`."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of both factors, which are what is stored."""
        return sum(math.prod(factor.shape) * factor.dtype.itemsize for factor in map(without_box, (self.u, self.v)))

    @property
    def dtype(self) -> Any:
        return jnp.result_type(without_box(self.u).dtype, without_box(self.v).dtype)

    def astype(self, dtype: Any) -> "LowRankKernel":
        """The same with both factors in another dtype."""
        return jax.tree.map(lambda factor: factor.astype(dtype), self)

    def __repr__(self) -> str:
        try:
            size = "x".join(map(str, self.shape))
            return f"LowRankKernel({size}, rank {self.rank}, {self.execution}, {self.dtype})"
        except Exception:  # in trees of shardings, of masks, ... factors are anything
            return f"LowRankKernel(u={self.u!r}, v={self.v!r}, rows={self.rows}, execution={self.execution!r})"

    def _repr_html_(self) -> str:
        return f"<code>{html.escape(repr(self))}</code>"

    def matrices(self) -> tuple[jax.Array, jax.Array]:
        """The factors as matrices: `[*stack, n, r]` and `[*stack, r, m]`."""
        return without_box(self.u).reshape(*self.stack, -1, self.rank), without_box(self.v).reshape(*self.stack, self.rank, -1)

    def merge(self) -> jax.Array:
        """The dense kernel, `[*stack, *kernel]` in the factors' dtype, multiplied in float32 or better."""
        wide = jnp.promote_types(self.dtype, jnp.float32)
        return self.product(wide, jax.lax.Precision.HIGHEST).astype(self.dtype)

    def product(self, dtype: Any, precision: Any = None) -> jax.Array:
        """The dense kernel, `[*stack, *kernel]`, multiplied in `dtype`: for use inside a layer."""
        u, v = self.matrices()
        return self.view.from_matrix(jnp.matmul(u.astype(dtype), v.astype(dtype), precision=precision))


def without_box(value: Any) -> Any:
    """An array without its box, such as flax's `Partitioned`: a node of the tree with a single leaf."""
    leaves = jax.tree.leaves(value)
    return leaves[0] if len(leaves) == 1 else value


def _meta_from_bytes(data: bytes | bytearray) -> tuple[tuple[int, ...], str]:
    rows, execution = json.loads(bytes(data))
    return tuple(rows), execution


# `jax.export` then takes parameters as arguments.
jax.export.register_pytree_node_serialization(
    LowRankKernel,
    serialized_name="lowrank_jax.LowRankKernel",
    serialize_auxdata=lambda meta: json.dumps(meta).encode(),
    deserialize_auxdata=_meta_from_bytes,
)


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """How a kernel is read as a matrix `[n, m]`: some axes become rows, the others columns, both in order.

    Attributes:
      shape: the shape of the kernel, without stack axes.
      rows: its row axes, ascending.
      group: columns per output; column `j` feeds output `j % (m // group)`.
    """

    shape: tuple[int, ...]
    rows: tuple[int, ...]
    group: int = 1

    @property
    def columns(self) -> tuple[int, ...]:
        return tuple(axis for axis in range(len(self.shape)) if axis not in self.rows)

    @property
    def n(self) -> int:
        return math.prod(self.shape[axis] for axis in self.rows)

    @property
    def m(self) -> int:
        return math.prod(self.shape[axis] for axis in self.columns)

    @property
    def full_rank(self) -> int:
        return min(self.n, self.m)

    def to_matrix(self, kernel: jax.Array) -> jax.Array:
        """`[*stack, *shape] -> [*stack, n, m]`."""
        stack = kernel.shape[: kernel.ndim - len(self.shape)]
        order = self._behind(stack, self.rows + self.columns)
        return kernel.transpose(order).reshape(*stack, self.n, self.m)

    def from_matrix(self, matrix: jax.Array) -> jax.Array:
        """`[*stack, n, m] -> [*stack, *shape]`, the inverse of `to_matrix`."""
        stack = matrix.shape[:-2]
        order = self.rows + self.columns
        split = matrix.reshape(*stack, *(self.shape[axis] for axis in order))
        inverse = tuple(order.index(axis) for axis in range(len(order)))
        return split.transpose(self._behind(stack, inverse))

    def from_factors(self, u: jax.Array, v: jax.Array, execution: Execution = "factored") -> LowRankKernel:
        """`[*stack, n, r]` and `[*stack, r, m]` as a `LowRankKernel`."""
        row_sizes = (self.shape[axis] for axis in self.rows)
        column_sizes = (self.shape[axis] for axis in self.columns)
        return LowRankKernel(
            u.reshape(*u.shape[:-2], *row_sizes, u.shape[-1]), v.reshape(*v.shape[:-1], *column_sizes), self.rows, execution
        )

    @staticmethod
    def _behind(stack: tuple[int, ...], order: tuple[int, ...]) -> tuple[int, ...]:
        depth = len(stack)
        return tuple(range(depth)) + tuple(depth + axis for axis in order)


def is_low_rank(leaf: Any) -> bool:
    """Whether a node of a parameter tree is a factor pair; for use as `is_leaf=`."""
    return isinstance(leaf, LowRankKernel)


def dense_view(shape: tuple[int, ...], contracted: int = 1) -> MatrixView:
    """A dense kernel: the first `contracted` axes, over which the layer sums, are the rows."""
    return MatrixView(shape, tuple(range(contracted)))


def channel_view(shape: tuple[int, ...]) -> MatrixView:
    """A convolution `[*window, c_in, c_out]` as `[window * c_in, c_out]`: r filters with the full window, then 1x1."""
    return MatrixView(shape, tuple(range(len(shape) - 1)))


def spatial_view(shape: tuple[int, ...]) -> MatrixView:
    """A 2-D convolution `[kh, kw, c_in, c_out]` as `[kh * c_in, kw * c_out]`: kh x 1 with r filters, then 1 x kw.

    Each output has kw of the columns (docs/mathematics.md, section 5).
    """
    return MatrixView(shape, SPATIAL_ROWS, group=shape[1])
