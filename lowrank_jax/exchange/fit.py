"""Arrays by path as a model's variables: nothing is missing, left over, or of another shape."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.paths import named_leaves
from lowrank_jax.patterns import compile_pattern
from lowrank_jax.text import did_you_mean, one_line, shown

Arrays = Mapping[str, np.ndarray]

_KINDS = (jnp.floating, jnp.integer, jnp.bool_)  # arrays are converted within one
_HINTS = 10  # arrays that are left over, for which the nearest path is looked up; it takes milliseconds each


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
    drawn = _drawn(redraw, wanted)
    left = [path for path in found if path not in wanted]
    close = [_close(path, wanted) if i < _HINTS else "" for i, path in enumerate(left)]
    problems = [f"{path}: has no array" for path in wanted if path not in found and path not in drawn]
    problems += [f"{one_line(path)}: is left over{hint}" for path, hint in zip(left, close, strict=True)]
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
    return jax.tree.unflatten(jax.tree.structure(shapes), [values[path] for path in wanted])


def _drawn(redraw: str | None, wanted: Mapping[str, Any]) -> set[str]:
    """The paths that a pattern matches, with the name of their collection or without."""
    if redraw is None:
        return set()
    matches = compile_pattern(redraw)
    drawn = {path for path in wanted if matches(path) or matches(path.partition("/")[2])}
    if not drawn:
        raise ValueError(f"redraw: {shown(redraw)} matches no path{did_you_mean(redraw, wanted)}")
    return drawn


def _close(path: str, wanted: Mapping[str, Any]) -> str:
    """A path that is similar, as a clause; in a long list of problems all paths would be too many."""
    (clause, *_) = did_you_mean(path, wanted).partition("; known: ")
    return clause


def _as_shape(value: Any, shape: Any) -> tuple[str, Any]:
    """What is wrong with an array for its place, and the array in its type."""
    if tuple(value.shape) != tuple(shape.shape):
        return f"is {list(value.shape)}, not {list(shape.shape)}", None
    if not any(jnp.issubdtype(value.dtype, kind) and jnp.issubdtype(shape.dtype, kind) for kind in _KINDS):
        return f"is {value.dtype}, not {shape.dtype}", None
    array = np.asarray(value)
    if not np.isfinite(array).all():
        return "has values that are not finite", None
    with np.errstate(over="ignore"):
        made = array.astype(shape.dtype)
    fits = np.isfinite(made).all() if jnp.issubdtype(shape.dtype, jnp.floating) else np.array_equal(made, array)
    return ("" if fits else f"has values that are too large for {shape.dtype}"), made
