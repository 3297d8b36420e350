"""Arrays by path as a model's variables: nothing is missing, left over, or of another shape."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.traverse_util
import jax.numpy as jnp
import numpy as np

from lowrank_jax.paths import named_leaves
from lowrank_jax.patterns import compile_pattern
from lowrank_jax.text import did_you_mean, shown

Arrays = Mapping[str, np.ndarray]


def fitted(
    given: Arrays | Callable[[Any], Arrays], shapes: Any, *, redraw: str | None = None, draw: Callable[[], Any] = dict
) -> dict[str, Any]:
    """Arrays as a model's variables, checked both ways.

    Args:
      given: arrays by path, or a function that makes them of the shapes.
      shapes: of the model's variables.
      redraw: a pattern of paths to draw instead.
      draw: the model's own variables, for those.

    Raises:
      ValueError: something is missing, left over, of another shape, or no finite numbers; all of it is named.
    """
    wanted = named_leaves(shapes)
    found = dict(given(shapes) if callable(given) else given)
    drawn: set[str] = set()
    if redraw is not None:
        matches = compile_pattern(redraw)
        drawn = {path for path in wanted if matches(path) or matches(path.partition("/")[2])}  # with "params/" or without
        if not drawn:
            raise ValueError(f"redraw: {shown(redraw)} matches no path{did_you_mean(redraw, wanted)}")
    problems = [f"{path}: has no array" for path in wanted if path not in found and path not in drawn]
    problems += [f"{path}: is left over{did_you_mean(path, wanted)}" for path in found if path not in wanted]
    values = {}
    for path, shape in wanted.items():
        if path in drawn or path not in found:
            continue
        problem, values[path] = _as_shape(found[path], shape)
        problems += [f"{path}: {problem}"] if problem else []
    if problems:
        raise ValueError("the weights do not fit the model:\n  " + "\n  ".join(problems))
    if drawn:
        own = named_leaves(draw())
        values |= {path: np.asarray(own[path]) for path in drawn}
    return flax.traverse_util.unflatten_dict({path: values[path] for path in wanted}, sep="/")


def _as_shape(value: Any, shape: Any) -> tuple[str, Any]:
    """What is wrong with an array for its place, and the array in its type."""
    if tuple(value.shape) != tuple(shape.shape):
        return f"is {list(value.shape)}, not {list(shape.shape)}", None
    number = jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(shape.dtype, jnp.integer)
    if not number or jnp.issubdtype(value.dtype, jnp.complexfloating):
        return f"is {value.dtype}, not {shape.dtype}", None
    with np.errstate(over="ignore"):
        made = np.asarray(value).astype(shape.dtype)
    return ("" if np.isfinite(made.astype(np.float32)).all() else "has values that are not finite"), made
