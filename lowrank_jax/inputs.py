"""What the layers of a model read, and what its predictions feel of their outputs, captured from a few batches as it runs.

The functions take any model that the library has a door to, and pick the door by the model's type.
"""

import math
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.checks import at_least, count, plain
from lowrank_jax.linen import gradients as linen_gradients
from lowrank_jax.linen import inputs as linen_inputs
from lowrank_jax.linen.inputs import COLLECTION as COLLECTION  # for `variable_axes` of nn.scan and nn.vmap
from lowrank_jax.linen.model_check import check_model, check_variables
from lowrank_jax.planning.arguments import check_batches, check_key, check_plan
from lowrank_jax.planning.plans import Plan
from lowrank_jax.projection.two_sided import GradientMoments
from lowrank_jax.text import did_you_mean, shown


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
      TypeError: the model is not a Linen module, or variables, batches or the plan are nothing of their kind.
      ValueError: there are no batches, one is empty, the inputs of a planned kernel cannot be captured, or their moments are
        not finite in float32, as for inputs above 1e19.
    """
    capture = _capture(model, variables, batches, plan)

    @jax.jit
    def run(variables: Any, batch: Any) -> dict[str, Any]:
        return capture(model, variables, batch, plan, _moments, _mean_of_both, rngs, kwargs)

    found: dict[str, tuple[jax.Array, jax.Array]] = {}
    for index, batch in enumerate(batches):
        _check_batch(batch, index, plan)
        for name, summary in run(variables, batch).items():
            # A running mean: a running sum would outgrow float32's digits.
            found[name] = _mean_of_both(found[name], summary) if name in found else summary
    means = _not_empty({name: mean for name, (mean, _) in found.items()}, plan)
    _check_finite(means)
    return means


def _moments(name: str, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """E xxᵀ over inputs `[positions, group, n]`, and how many there are."""
    del name
    x = x.reshape(-1, x.shape[-1])
    power = 2.0 ** math.ceil(math.log2(max(len(x), 1)))  # exact, and the sum is no larger than the largest square
    mean = jnp.matmul(x.T, x / power, precision="highest") * (power / max(len(x), 1))
    return mean, jnp.asarray(len(x), jnp.float32)


def _mean_of_both(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Of two means `[*stack, n, n]` and their counts `[*stack]`."""
    (mean, old), (other, new) = a, b
    total = old + new
    return mean + (new / jnp.maximum(total, 1))[..., None, None] * (other - mean), total


Curvature = str | Callable[[jax.Array, jax.Array], jax.Array]


def gradient_moments(
    model: nn.Module,
    variables: Any,
    batches: Iterable[Any],
    plan: Plan,
    *,
    key: jax.Array,
    loss: Curvature = "softmax",
    draws: int = 1,
    logits: Callable[[Any], Any] | None = None,
    rngs: Any = None,
    **kwargs: Any,
) -> dict[str, GradientMoments]:
    """E SSᵀ and E SᵀS of the gradients S at every kernel that the plan factors, over what the model itself predicts.

        gradients = lr.inputs.gradient_moments(model, variables, images, plan.opened(), key=key)
        plan = lr.allocate(plan, macs=0.5, variables=variables, gradients=gradients)
        params = lr.factorize(variables["params"], plan, key=key, gradients=gradients)

    No labels are needed: S are the gradients of single predictions, in random directions that have the loss's curvature (the
    Fisher information, or the Gauss-Newton matrix) at the model's own outputs.  So ½ tr(Eᵀ A E B), A and B the two moments, is
    about what the loss gains, to second order and taken for each kernel alone, when a kernel changes by E: of softmax the
    Kullback-Leibler divergence in nats (docs/mathematics.md, section 14).  One forward and one backward pass over the batches;
    only sums are kept.

    Args:
      model, variables, batches, plan, rngs: as in `second_moments`; the examples of a batch must not depend on each other.
      key: for the random signs that the backward passes begin with.
      loss: `softmax`, `sigmoid` (each output by itself) or `squared` (½ (y - t)²), or a function from the outputs
        `[..., classes]` and a key to random cotangents of zero mean whose covariance is the loss's curvature.
      draws: backward passes for each batch; more of them leave less to chance.
      logits: from what the model returns, the loss's outputs `[..., classes]`; by default it returns them.
      **kwargs: keyword arguments of the model, such as `train=False`.

    Returns:
      By the kernel's name `rows`, A of trace one, `[*stack, n, n]`, and `columns`, B, `[*stack, m / group, m / group]`,
      float32.  S is the sum over all positions of an example; examples are along the first axis of a layer's outputs.  Several
      uses of a kernel are taken to be independent.  Predictions are what the outputs have besides their last axis.

    Raises:
      TypeError: as in `second_moments`; the key is none, the model returns no array of outputs, or loss or logits is no
        function.
      ValueError: as in `second_moments`; an unknown loss, or draws is no count.
    """
    _capture(model, variables, batches, plan)
    check_key(key)
    draws = plain(draws)
    if complaint := count(draws):
        raise ValueError(f"draws {shown(draws)} {complaint}")
    if logits is not None and not callable(logits):
        raise TypeError(f"logits must be a function, not {shown(logits)}")
    cotangents_of = _curvature(loss)
    variables = {**variables, "params": nn.meta.unbox(variables["params"])}

    def outputs(returned: Any) -> jax.Array:
        made = returned if logits is None else logits(returned)
        if not isinstance(made, jax.Array) or not made.ndim or not jnp.issubdtype(made.dtype, jnp.floating):
            raise TypeError(f"{type(model).__name__} returns no array of outputs: pass logits=, a function of what it returns")
        return made.astype(jnp.promote_types(made.dtype, jnp.float32))

    @jax.jit
    def run(variables: Any, batch: Any, key: jax.Array) -> tuple[dict[str, GradientMoments], Any]:
        def cotangents(made: jax.Array) -> jax.Array:
            return cotangents_of(made, key)

        sums, made = linen_gradients.capture(model, variables, batch, plan, outputs, cotangents, rngs, kwargs)
        predictions = max(made.size // made.shape[-1], 1)
        return jax.tree.map(lambda value: value / predictions, sums), jnp.asarray(predictions, jnp.float32)

    found: dict[str, GradientMoments] = {}
    total = jnp.zeros((), jnp.float32)
    for index, batch in enumerate(batches):
        _check_batch(batch, index, plan)
        for draw in range(draws):
            means, predictions = run(variables, batch, jax.random.fold_in(jax.random.fold_in(key, index), draw))
            total = total + predictions
            found = _moved(found, means, predictions / total) if found else means
    found = _not_empty(found, plan)
    if broken := [name for name, sides in found.items() if not all(jnp.isfinite(side).all() for side in sides)]:
        raise ValueError(f"gradients are not finite in float32 at {', '.join(broken)}")
    groups = {kernel.name: kernel.view.group for kernel in plan.captured}
    return {name: _normalized(sides, groups[name]) for name, sides in found.items()}


@jax.jit
def _moved(means: Any, others: Any, share: jax.Array) -> Any:
    """Means that others join, which have this share of all."""
    return jax.tree.map(lambda mean, other: mean + share * (other - mean), means, others)


def _normalized(sides: GradientMoments, group: int) -> GradientMoments:
    """E SSᵀ / E |S|² and E SᵀS / group, so that ½ tr(Eᵀ A E B) is the mean of ½ ⟨E, S⟩² over all directions of E."""
    size = jnp.trace(sides.rows, axis1=-2, axis2=-1)[..., None, None]
    even = jnp.eye(sides.rows.shape[-1]) / sides.rows.shape[-1]  # where nothing is felt, no direction is
    return GradientMoments(jnp.where(size > 0, sides.rows / jnp.where(size > 0, size, 1), even), sides.columns / group)


def _of_softmax(outputs: jax.Array, key: jax.Array) -> jax.Array:
    """(diag(√p) - p √pᵀ) z of random signs z: its covariance is diag(p) - ppᵀ, and it varies less than labels drawn from p."""
    p = jax.nn.softmax(outputs)
    drawn = jnp.sqrt(p) * jax.random.rademacher(key, outputs.shape, outputs.dtype)
    return drawn - p * jnp.sum(drawn, axis=-1, keepdims=True)


def _of_sigmoid(outputs: jax.Array, key: jax.Array) -> jax.Array:
    p = jax.nn.sigmoid(outputs)
    return jnp.sqrt(p * (1 - p)) * jax.random.rademacher(key, outputs.shape, outputs.dtype)


def _of_squares(outputs: jax.Array, key: jax.Array) -> jax.Array:
    return jax.random.rademacher(key, outputs.shape, outputs.dtype)


CURVATURES = {"softmax": _of_softmax, "sigmoid": _of_sigmoid, "squared": _of_squares}


def _curvature(loss: Curvature) -> Callable[[jax.Array, jax.Array], jax.Array]:
    if callable(loss):
        return loss
    if loss not in CURVATURES:
        raise ValueError(f"unknown loss {shown(loss)}{did_you_mean(str(loss), CURVATURES)}")
    return CURVATURES[loss]


def check_captured(model: nn.Module, variables: Any, batch: Any, plan: Plan, *, rngs: Any = None, **kwargs: Any) -> None:
    """Whether `second_moments` can capture the inputs of every kernel that the plan factors; nothing is computed.

    Args:
      model, plan, rngs, **kwargs: as in `second_moments`.
      variables, batch: the same, or their shapes.

    Raises:
      TypeError: the model is not a Linen module.
      ValueError: the inputs of a planned kernel cannot be captured; the message says which, and what to do.
    """
    capture = _capture(model, variables, [batch], plan)

    def run(variables: Any, batch: Any) -> dict[str, Any]:
        return capture(model, variables, batch, plan, _moments, _mean_of_both, rngs, kwargs)

    jax.eval_shape(run, variables, batch)


def moment_shapes(plan: Plan) -> dict[str, jax.ShapeDtypeStruct]:
    """What `second_moments` returns, as shapes."""
    return {
        kernel.name: jax.ShapeDtypeStruct((*kernel.stack, kernel.view.n, kernel.view.n), jnp.float32)
        for kernel in plan.captured
    }


def gradient_shapes(plan: Plan) -> dict[str, GradientMoments]:
    """What `gradient_moments` returns, as shapes."""
    return linen_gradients.shapes(plan)


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
      TypeError, ValueError: as in `second_moments`, but for moments; the key is none, or per_batch is no count.
    """
    capture = _capture(model, variables, batches, plan)
    check_key(key)
    per_batch = plain(per_batch)
    if complaint := (at_least(1)(per_batch) if type(per_batch) is int else None) or count(per_batch):
        raise ValueError(f"per_batch {shown(per_batch)} {complaint}")

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
        _check_batch(batch, index, plan)
        for name, (rows,) in run(variables, batch, jax.random.fold_in(key, index)).items():
            parts.setdefault(name, []).append(rows)
    return _not_empty({name: jnp.concatenate(rows, axis=-3) for name, rows in parts.items()}, plan)


def _capture(model: Any, variables: Any, batches: Any, plan: Any) -> Callable[..., dict[str, Any]]:
    """The door's function for one batch; see `lowrank_jax.linen.inputs.capture`."""
    check_model(model)
    check_variables(variables)
    check_batches(batches)
    check_plan(plan)
    return linen_inputs.capture


def _not_empty(found: dict[str, Any], plan: Plan) -> dict[str, Any]:
    if not found and plan.captured:
        raise ValueError("no batches to capture inputs from")
    return found


def _check_batch(batch: Any, index: int, plan: Plan) -> None:
    shape = next((np.shape(leaf) for leaf in jax.tree.leaves(batch)), ())
    if 0 in shape and plan.factored:
        name = plan.factored[0].name
        raise ValueError(f"batch {index} is empty, an array of shape {list(shape)}: there are no inputs of {name!r} in it")


def _check_finite(means: dict[str, jax.Array]) -> None:
    broken = [name for name, mean in means.items() if not jnp.isfinite(mean).all()]
    if broken:
        names = ", ".join(broken)
        raise ValueError(f"second moments are not finite in float32: inputs are not finite, or are above 1e19, for {names}")
