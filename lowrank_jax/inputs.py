"""What the layers of a model read: second moments or samples of their inputs, captured from a few batches as the model runs.

The functions take any model that the library has a door to, and pick the door by the model's type.
"""

import zlib
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lowrank_jax.linen import inputs as linen_inputs
from lowrank_jax.linen.inputs import COLLECTION as COLLECTION  # for `variable_axes` of nn.scan and nn.vmap
from lowrank_jax.linen.model_check import check_model
from lowrank_jax.planning.plans import Plan


def second_moments(
    model: nn.Module, variables: Any, batches: Iterable[Any], plan: Plan, *, rngs: Any = None, **kwargs: Any
) -> dict[str, jax.Array]:
    """E xxᵀ for the inputs x of every kernel that the plan factors; `factorize(..., moments=...)` takes them.

    Batches are read one by one, and only sums are kept.

    Args:
      model, variables: as for `apply`; kernels may be factored already.
      batches: what the model is called on, arrays or tuples of arrays.
      plan: from `plan` for the same model.
      rngs: as for `apply`.
      **kwargs: keyword arguments of the model.  With `train=True`, BatchNorm uses the batch's own statistics, the only
        meaningful ones before training; what the model writes is discarded.

    Returns:
      By the kernel's name `[*stack, n, n]`, float32.

    Raises:
      TypeError: the model is not a Linen module.
      ValueError: there are no batches, or the inputs of a planned kernel cannot be captured.
    """
    capture = _capture(model)

    def summary(name: str, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        del name
        x = x.reshape(-1, x.shape[-1])
        return jnp.matmul(x.T, x, precision="highest"), jnp.asarray(len(x), jnp.float32)

    def add(a: Any, b: Any) -> Any:
        return jax.tree.map(jnp.add, a, b)

    @jax.jit
    def run(variables: Any, batch: Any) -> dict[str, Any]:
        return capture(model, variables, batch, plan, summary, add, rngs, kwargs)

    means: dict[str, jax.Array] = {}
    counts: dict[str, jax.Array] = {}
    for batch in batches:
        for name, (gram, count) in run(variables, batch).items():
            total = counts.get(name, 0) + count
            # A running mean: a running sum would outgrow float32's digits.
            mean = means.get(name, jnp.zeros_like(gram))
            means[name] = mean + (gram - count[..., None, None] * mean) / total[..., None, None]
            counts[name] = total
    return _not_empty(means, plan)


def moment_shapes(plan: Plan) -> dict[str, jax.ShapeDtypeStruct]:
    """What `second_moments` returns, as shapes."""
    return {
        kernel.name: jax.ShapeDtypeStruct((*kernel.stack, kernel.view.n, kernel.view.n), jnp.float32)
        for kernel in plan.captured
    }


def samples(
    model: nn.Module,
    variables: Any,
    batches: Iterable[Any],
    plan: Plan,
    *,
    key: jax.Array,
    per_batch: int = 1024,
    rngs: Any = None,
    **kwargs: Any,
) -> dict[str, jax.Array]:
    """Inputs of every kernel that the plan factors, at random positions; `factorize(..., inputs=...)` takes them.

    Args:
      model, variables, batches, plan, rngs, **kwargs: as in `second_moments`.
      key: for the positions.
      per_batch: the largest number of positions to take from each batch.

    Returns:
      By the kernel's name `[*stack, samples, group, n]`, float32.

    Raises:
      TypeError, ValueError: as in `second_moments`, or per_batch is below 1.
    """
    capture = _capture(model)
    if per_batch < 1:
        raise ValueError(f"per_batch {per_batch} must be at least 1")

    @jax.jit
    def run(variables: Any, batch: Any, key: jax.Array) -> dict[str, Any]:
        def summary(name: str, x: jax.Array) -> tuple[jax.Array]:
            chosen = jax.random.permutation(jax.random.fold_in(key, zlib.crc32(name.encode())), len(x))[:per_batch]
            return (x[chosen],)

        def join(a: tuple[jax.Array], b: tuple[jax.Array]) -> tuple[jax.Array]:
            return (jnp.concatenate([a[0], b[0]]),)

        return capture(model, variables, batch, plan, summary, join, rngs, kwargs)

    parts: dict[str, list[jax.Array]] = {}
    for index, batch in enumerate(batches):
        for name, (rows,) in run(variables, batch, jax.random.fold_in(key, index)).items():
            parts.setdefault(name, []).append(rows)
    return _not_empty({name: jnp.concatenate(rows, axis=-3) for name, rows in parts.items()}, plan)


def _capture(model: Any) -> Callable[..., dict[str, Any]]:
    """The door's function for one batch; see `lowrank_jax.linen.inputs.capture`."""
    check_model(model)
    return linen_inputs.capture


def _not_empty(found: dict[str, jax.Array], plan: Plan) -> dict[str, jax.Array]:
    if not found and plan.captured:
        raise ValueError("no batches to capture inputs from")
    return found
