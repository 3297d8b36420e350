"""What the layers of a model are fed: second moments or samples, captured from a few batches as the model runs.

For a convolution that is the patches under its window, cut by the layer itself: an identity kernel in its place returns them
with its own strides, dilation and padding.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lowrank_jax.linen.discover import SUPPORTED
from lowrank_jax.linen.layers import apply
from lowrank_jax.paths import named_leaves
from lowrank_jax.planning.plans import FactoredKernel, Plan

COLLECTION = "lowrank_inputs"

Summary = Callable[[str, jax.Array], Any]  # from a kernel's name and its inputs [positions, group, n]
Combine = Callable[[Any, Any], Any]  # the summaries of two uses of one kernel


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
      ValueError: there are no batches, or the inputs of a planned kernel cannot be seen.
    """

    def summary(name: str, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        del name
        x = x.reshape(-1, x.shape[-1])
        return jnp.matmul(x.T, x, precision="highest"), jnp.asarray(len(x), jnp.float32)

    def add(a: Any, b: Any) -> Any:
        return jax.tree.map(jnp.add, a, b)

    run = jax.jit(lambda variables, batch: _capture(model, variables, batch, plan, summary, add, rngs, kwargs))
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
        for kernel in plan.factored
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
    """Inputs of every kernel that the plan factors, at positions drawn at random; `factorize(..., inputs=...)` takes them.

    Args:
      model, variables, batches, plan, rngs, **kwargs: as in `second_moments`.
      key: for the positions.
      per_batch: how many of each batch, at most.

    Returns:
      By the kernel's name `[*stack, samples, group, n]`, float32.

    Raises:
      ValueError: as in `second_moments`, or per_batch is below 1.
    """

    if per_batch < 1:
        raise ValueError(f"per_batch {per_batch} must be at least 1")

    def run(variables: Any, batch: Any, key: jax.Array) -> dict[str, Any]:
        def summary(name: str, x: jax.Array) -> tuple[jax.Array]:
            chosen = jax.random.permutation(jax.random.fold_in(key, zlib.crc32(name.encode())), len(x))[:per_batch]
            return (x[chosen],)

        def join(a: tuple[jax.Array], b: tuple[jax.Array]) -> tuple[jax.Array]:
            return (jnp.concatenate([a[0], b[0]]),)

        return _capture(model, variables, batch, plan, summary, join, rngs, kwargs)

    parts: dict[str, list[jax.Array]] = {}
    jitted = jax.jit(run)
    for index, batch in enumerate(batches):
        for name, (rows,) in jitted(variables, batch, jax.random.fold_in(key, index)).items():
            parts.setdefault(name, []).append(rows)
    return _not_empty({name: jnp.concatenate(rows, axis=-3) for name, rows in parts.items()}, plan)


def _capture(
    model: nn.Module, variables: Any, batch: Any, plan: Plan, summary: Summary, combine: Combine, rngs: Any, kwargs: Any
) -> dict[str, Any]:
    """The summaries of one batch by kernel name."""
    planned = {kernel.name: kernel for kernel in plan.factored}

    def observe(next_fun: Any, args: Any, call_kwargs: Any, context: Any) -> Any:
        module, name = context.module, "/".join((*context.module.path, "kernel"))
        # The layers that cut patches are run on their own, where nothing can be written.
        seen = context.method_name == "__call__" and name in planned and module.is_mutable_collection(COLLECTION)
        if seen and isinstance(module, SUPPORTED):
            x = args[0] if args else call_kwargs["inputs"]
            module.sow(
                COLLECTION,
                "inputs",
                summary(name, _inputs(module, planned[name], x)),
                init_fn=lambda: None,
                reduce_fn=lambda old, new: new if old is None else combine(old, new),
            )
        return next_fun(*args, **call_kwargs)

    mutable = [COLLECTION, *(name for name in variables if name != "params")]
    args = batch if isinstance(batch, tuple) else (batch,)
    with nn.intercept_methods(observe):
        _, written = apply(model, variables, *args, **kwargs, mutable=mutable, rngs=rngs)
    sown = named_leaves(written.get(COLLECTION, {}), is_leaf=lambda node: isinstance(node, tuple))
    found = {name.removesuffix("inputs") + "kernel": value for name, value in sown.items()}
    _check_found(found, planned)
    return found


def _inputs(module: Any, kernel: FactoredKernel, x: jax.Array) -> jax.Array:
    """What a kernel's matrix is multiplied with at every output position: `[positions, group, n]`, float32."""
    view = kernel.view
    fed = view.shape[:-1] if isinstance(module, nn.Conv) else tuple(view.shape[axis] for axis in view.rows)
    size = math.prod(fed)
    layer = module.clone(features=size, use_bias=False, dtype=jnp.float32, precision="highest", name=None)
    identity = jnp.eye(size, dtype=jnp.float32).reshape(*fed, size)
    seen: Any = layer.apply({"params": {"kernel": identity}}, x.astype(jnp.float32))
    seen = seen.reshape(-1, *fed)
    if view.group == 1:
        return seen.reshape(-1, 1, size)
    return seen.swapaxes(1, 2).reshape(-1, view.group, view.n)  # [positions, kh, kw, c_in]: an output owns kw columns


def _check_found(found: dict[str, Any], planned: Mapping[str, FactoredKernel]) -> None:
    missing = [name for name in planned if name not in found]
    if missing:
        raise ValueError(
            f"the inputs of {missing[0]!r} (and {len(missing) - 1} more) cannot be seen: under nn.scan and nn.vmap add "
            f'"{COLLECTION}": 0 to variable_axes; a kernel that this call does not use has to be kept dense'
        )


def _not_empty(found: dict[str, jax.Array], plan: Plan) -> dict[str, jax.Array]:
    if not found and plan.factored:
        raise ValueError("no batches to capture inputs from")
    return found
