"""Arguments that are nothing of their kind: refused by their names, before jax or NumPy say something else."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from lowrank_jax.kernel import MatrixView
from lowrank_jax.planning.plans import Plan
from lowrank_jax.projection import linalg
from lowrank_jax.projection.two_sided import GradientMoments
from lowrank_jax.text import shown


def check_plan(plan: Any) -> None:
    """Raises TypeError unless it is a plan."""
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a lowrank_jax.Plan, as lowrank_jax.plan makes it, not {shown(plan)}")


def check_mapping(name: str, value: Any) -> None:
    """Raises TypeError unless it is a mapping, or None."""
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a dict by the kernels' names, not {shown(value)}")


def check_key(key: Any) -> None:
    """Raises TypeError unless it is one key of `jax.random`."""
    try:
        jax.eval_shape(jax.random.fold_in, key, 0)
    except (TypeError, ValueError):
        raise TypeError(f"key must be a key of jax.random, such as jax.random.key(0), not {shown(key)}") from None


def check_batches(batches: Any) -> None:
    """Raises TypeError unless batches can be read from it one by one."""
    if not isinstance(batches, Iterable) or isinstance(batches, str | bytes | Mapping):
        raise TypeError(f"batches must be a list of what the model is called on, or an iterator, not {shown(batches)}")


def array_problem(value: Any) -> str | None:
    """What keeps a value from being an array of real numbers, or the shape of one."""
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        return f"must be an array, not {shown(value)}"
    real = any(jnp.issubdtype(value.dtype, kind) for kind in (jnp.floating, jnp.integer))
    return None if real else f"is {value.dtype}, not real numbers"


_ASYMMETRY = 1e-2  # of the largest element: more than any rounding


def moments_problem(moment: Any) -> str | None:
    """What keeps an array of real numbers, `[*stack, n, n]`, from being second moments, as far as it is known."""
    if not moment.size:
        return "moments are empty"
    if not linalg.known_finite(moment):
        return "moments contain non-finite values"
    if isinstance(moment, Tracer):
        return None
    with jax.ensure_compile_time_eval():
        values = jnp.asarray(moment)
        values = values.astype(linalg.wide(values.dtype))
        if jnp.abs(values - values.mT).max() > _ASYMMETRY * jnp.abs(values).max():
            return "moments must be symmetric"
    # What is no matrix of second moments has no real square root.
    return None if linalg.known_finite(linalg.square_roots(moment)) else "moments must be positive semidefinite"


def gradients_problem(value: Any, stack: tuple[int, ...], views: Sequence[MatrixView]) -> str | None:
    """What keeps a value from being the gradients' moments of a kernel that is seen in one of these ways."""
    if value is None:
        return "has no gradients; measure them for plan.opened()"
    if not isinstance(value, tuple) or len(value) != 2:
        return f"gradients must be a pair of rows and columns, as inputs.gradient_moments gives it, not {shown(value)}"
    for name, array in zip(GradientMoments._fields, value, strict=True):
        if problem := array_problem(array):
            return f"{name} of gradients: {problem}"
    wanted = [tuple((*stack, size, size) for size in (view.n, view.m // view.group)) for view in views]
    found = tuple(tuple(array.shape) for array in value)
    if found not in wanted:
        either = " or ".join(f"{list(rows)} and {list(columns)}" for rows, columns in dict.fromkeys(wanted))
        return f"gradients must have rows and columns of shapes {either}, not {list(found[0])} and {list(found[1])}"
    for name, array in zip(GradientMoments._fields, value, strict=True):
        if problem := moments_problem(array):
            return f"{name} of gradients: {problem}"
    return None
