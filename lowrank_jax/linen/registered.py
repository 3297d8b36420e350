"""Whether a layer that somebody registered computes the same in two stages: x U first, then the layer itself with V.

It does if it multiplies its input with its kernel, and reads neither elsewhere, nor their sizes.  The layer is traced twice to
see that: on an input and a kernel of other sizes, no two alike, and on what its second stage would get.  Programs that move
values differently look alike, so a few numbers go through both as well.
"""

import functools
import math
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import DenyList
from jax.core import Tracer
from jax.extend.core import Literal

from lowrank_jax.kernel import LowRankKernel
from lowrank_jax.linen import known, programs
from lowrank_jax.linen.interception import unseen
from lowrank_jax.linen.layers import alone, own_stages, second_stage, with_kernels

_SHAPED = ("convert_element_type", "transpose", "reshape", "squeeze", "broadcast_in_dim")
_FEW = 3  # the rank at which numbers are compared
_ROUNDING = {np.dtype(np.float32): 1e-3, np.dtype(np.float64): 1e-3}  # of the largest number; products of a few terms
_ROUNDING_OF_OTHERS = 0.05  # as that of bfloat16


def misfit(layer: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Why a registered layer must not run in two stages; empty if it may.

    Args:
      layer: as it is called, bound.
      name: the kernel's, below it.
      args, kwargs: what it is called on.
    """
    rows = known.rows_of(layer)
    if rows is None or known.has_own_run(layer):
        return ""
    try:
        with unseen():
            problem = _reads_more(layer, name, rows, args, kwargs) or _computes_else(layer, name, rows, args, kwargs)
    except Exception as error:  # whatever somebody's layer may raise
        what = textwrap.shorten(f"{type(error).__name__}: {error}", 100, placeholder=" ...")
        problem = f"it fails with other sizes ({what})"
    return f"{type(layer).__name__} does not run in two stages, {problem}: register it with run=" if problem else ""


def _reads_more(layer: nn.Module, name: str, rows: known.Rows, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """What else than one product reads the input, the kernel or their sizes; empty if nothing does."""
    x, kernel = known.first_argument(layer, args, kwargs), known.kernel_of(layer, name)
    given, other, hidden, v = _other_sizes(x, kernel, rows, 1 + max(*x.shape, *kernel.shape))

    def whole(x: jax.Array, kernel: jax.Array) -> Any:
        before, params = layer.variables, with_kernels(layer, {name: kernel})
        args_, kwargs_ = known.with_first_argument(layer, args, kwargs, x)
        y, after = alone(layer).apply({**before, "params": params}, *args_, **kwargs_, mutable=DenyList("params"))
        if written := [name for name in after if not _same(before.get(name), after[name])]:
            raise ValueError(f"writes to {written[0]!r}")
        return y

    def second(hidden: jax.Array, v: jax.Array) -> Any:
        return second_stage(layer, name, rows, v, hidden, args, kwargs)

    once, twice = jax.make_jaxpr(whole)(given, other), jax.make_jaxpr(second)(hidden, v)
    if list(_constants(once)) != list(_constants(twice)):
        return "it computes with the size of its input"
    return _not_a_product(once.jaxpr, programs.labelled(once.jaxpr.invars, ["its input", "its kernel"]))[0]


def _computes_else(layer: nn.Module, name: str, rows: known.Rows, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Whether a few numbers come out of two stages as out of one."""
    x, kernel = known.first_argument(layer, args, kwargs), known.kernel_of(layer, name)
    given, other, _, v = _other_sizes(x, kernel, rows, _FEW)
    u = jax.ShapeDtypeStruct((*(other.shape[axis] for axis in rows), _FEW), v.dtype)
    with jax.ensure_compile_time_eval():
        draw = _numbers()
        bound = alone(layer).bind(jax.tree.map(draw, layer.variables))
        args, kwargs = jax.tree.map(draw, known.with_first_argument(layer, args, kwargs, given))
        pair = functools.partial(LowRankKernel, draw(u), draw(v), rows)
        two, one = (
            np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(y)])
            for y in (own_stages(bound, name, pair(execution), args, kwargs) for execution in ("factored", "merged"))
        )
    rounding = _ROUNDING.get(np.dtype(kernel.dtype), _ROUNDING_OF_OTHERS)
    if getattr(layer, "dtype", None) not in (None, kernel.dtype):
        rounding = _ROUNDING_OF_OTHERS
    return "" if np.max(np.abs(two - one)) <= rounding * np.max(np.abs(one)) else "other numbers come out"


def _numbers() -> Callable[[Any], Any]:
    """What draws normal numbers in the place of arrays, ones in that of whole numbers, and leaves all else."""
    rng = np.random.default_rng(0)

    def draw(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        numbers = rng.standard_normal(leaf.shape) if jnp.issubdtype(leaf.dtype, jnp.floating) else np.ones(leaf.shape)
        return jnp.asarray(numbers, leaf.dtype)

    return draw


def _other_sizes(x: Any, kernel: Any, rows: known.Rows, rank: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes of an input, a kernel, x U and V of a rank; all axes that the layer sums over are longer, no two alike.

    Raises:
      ValueError: the rows are no axes of the kernel, or do not fit the input.
    """
    if rows[-1] >= kernel.ndim or len(rows) == kernel.ndim:
        raise ValueError(f"rows {rows} leave no columns of a kernel of shape {list(kernel.shape)}")
    axes = known.summed_axes(x.shape, math.prod(kernel.shape[axis] for axis in rows))
    if len(rows) not in (1, axes):
        raise ValueError(f"rows {rows} are not the {axes} axes of the input that it sums over")
    sizes = list(range(rank + 1, rank + 1 + axes))
    by_row = dict(zip(rows, sizes if len(rows) == axes else [math.prod(sizes)], strict=True))
    kept = x.shape[: x.ndim - axes]
    columns = [size for axis, size in enumerate(kernel.shape) if axis not in rows]
    shapes = [
        ((*kept, *sizes), x.dtype),
        (tuple(by_row.get(axis, size) for axis, size in enumerate(kernel.shape)), kernel.dtype),
        ((*kept, rank), x.dtype),
        ((rank, *columns), kernel.dtype),
    ]
    return tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes)


def _same(before: Any, after: Any) -> bool:
    old, new = jax.tree.leaves(before), jax.tree.leaves(after)
    return len(old) == len(new) and all(a is b for a, b in zip(old, new, strict=True))


def _constants(jaxpr: Any) -> Iterator[Any]:
    """What a program does, without sizes, and the numbers in it."""
    for const in getattr(jaxpr, "consts", ()):
        yield None if isinstance(const, Tracer) else _number(const)
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name not in _SHAPED:  # some of these do nothing, depending on sizes, and are left out then
            yield eqn.primitive.name
        yield from (_number(var.val) for var in eqn.invars if isinstance(var, Literal))
        for body in programs.inner(eqn):
            yield from _constants(body)


def _number(value: Any) -> Any:
    return np.asarray(value).tobytes()


def _not_a_product(jaxpr: Any, labels: programs.Labels) -> tuple[str, list[str | None]]:
    """What else than one product reads the input or the kernel, and which outputs are these themselves."""
    products = 0
    for eqn in jaxpr.eqns:
        operands = programs.labels_of(eqn.invars, labels)
        if not any(operands):
            continue
        given, name = programs.bodies(eqn, operands), eqn.primitive.name
        if name in _SHAPED or programs.is_copy(eqn):
            outputs = operands[:1]
        elif given and name not in ("cond", "scan", "while"):
            ((body, known_there),) = given
            problem, outputs = _not_a_product(body, programs.labelled(body.invars, known_there))
            if problem:
                return problem, []
        elif name == "dot_general" and all(operands) and operands[0] != operands[1] and not products:
            products, outputs = 1, []
        else:
            return f"as {next(filter(None, operands))} is read by {name}", []
        labels |= programs.labelled(eqn.outvars, outputs)
    return "", programs.labels_of(jaxpr.outvars, labels)
