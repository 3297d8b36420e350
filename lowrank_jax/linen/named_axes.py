"""Models in the named axes that they ask for, such as those of a BatchNorm over devices.

Where a batch is one array over all devices, as under `jax.jit`, there is nothing left to exchange along such an axis: it has
size 1, and a mean over it is the value itself.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_UNBOUND = re.compile(r"unbound axis name:? '?(\w+)")


def in_named_axes(run: Callable[..., Any], use: Callable[[Callable[..., Any]], Any] = lambda run: run()) -> Any:
    """`run()`, in the named axes of size 1 that it asks for.

    Args:
      run: runs a model, and returns arrays.
      use: what to do with it, such as to trace it; by default it is called.

    Raises:
      ValueError: it exchanges within groups along such an axis.
      Exception: whatever `run` raises.
    """
    axes: list[str] = []
    while True:
        try:
            return use(functools.reduce(_in_axis, axes, run))
        except NameError as error:
            unbound = _UNBOUND.search(str(error))
            if unbound is None or unbound[1] in axes:
                raise
            axes.append(unbound[1])
        except NotImplementedError as error:
            if not axes:
                raise
            axis, advice = axes[-1], "leave out axis_index_groups, or the axis"
            raise ValueError(
                f"the named axis {axis!r} has no groups: a batch is one array over all devices here; {advice}"
            ) from error


def _in_axis(run: Callable[..., Any], axis: str) -> Callable[..., Any]:
    def inside(*args: Any) -> Any:
        mapped: Any = jax.vmap(lambda _: run(*args), in_axes=None, axis_name=axis, axis_size=1)  # type: ignore[arg-type]
        return jax.tree.map(lambda leaf: leaf[0], mapped(jnp.zeros(())))

    return inside
