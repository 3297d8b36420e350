"""Boxes around parameters, such as those of `nn.with_partitioning`: from a kernel to its factors and back.

A box names the axes of its array.  Of a factored kernel u has the names of the stack's axes and of the row axes, v those of the
stack's and of the column axes; the axis of the rank has none.
"""

from typing import Any

import flax.linen as nn
import jax

from lowrank_jax.kernel import LowRankKernel, without_box

Names = tuple[Any, ...]


def like(boxed: Any, new: Any) -> Any:
    """An array, or a kernel's factors, in the box that the dense parameter was in; as it is if that was in none."""
    if not nn.meta.is_axis_metadata(boxed):
        return new
    if not isinstance(new, LowRankKernel):
        return boxed.replace_boxed(new)
    depth, rows = len(new.stack), new.rows
    names = _names(boxed, new.ndim)
    stack, kernel = names[:depth], names[depth:]
    columns = tuple(name for axis, name in enumerate(kernel) if axis not in rows)
    return LowRankKernel(
        _boxed(boxed, new.u, (*stack, *(kernel[axis] for axis in rows), None)),
        _boxed(boxed, new.v, (*stack, None, *columns)),
        rows,
        new.execution,
    )


def merged(pair: LowRankKernel) -> Any:
    """The product of a pair's factors; in a box if they are in boxes."""
    product = pair.merge()
    box = next(filter(nn.meta.is_axis_metadata, (pair.u, pair.v)), None)
    if box is None:
        return product
    depth = len(pair.stack)
    u, v = _names(pair.u, without_box(pair.u).ndim), _names(pair.v, without_box(pair.v).ndim)
    by_axis = dict(zip(pair.rows, u[depth:-1], strict=True)) | dict(zip(pair.view.columns, v[depth + 1 :], strict=True))
    stack = u[:depth] if any(u[:depth]) else v[:depth]
    return _boxed(box, product, (*stack, *(by_axis[axis] for axis in sorted(by_axis))))


def _names(box: Any, axes: int) -> Names:
    """One for each axis; None where the box has none."""
    names = tuple(box.names) if isinstance(box, nn.Partitioned) else ()
    return names + (None,) * (axes - len(names))


def _boxed(box: Any, value: jax.Array, names: Names) -> Any:
    """Boxes of other classes are kept as they are: what they say of axes is not known."""
    return box.replace(value=value, names=names) if isinstance(box, nn.Partitioned) else box.replace_boxed(value)
