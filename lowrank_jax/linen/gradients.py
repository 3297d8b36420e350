"""The gradients of a Linen module's predictions at its kernels, as sums of their products.

Every planned kernel gets two arrays of zeros beside it, past which its layer's outputs go unchanged.  In the backward pass
their "gradients" are what is wanted: Σ SSᵀ and Σ SᵀS, S the gradient of one example at the kernel.  So jax itself adds up the
uses of a shared kernel and the turns of a loop, and keeps the members of a stack apart.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.linen.inputs import read_by
from lowrank_jax.linen.interception import observe
from lowrank_jax.linen.known import find, first_argument, kernel_of
from lowrank_jax.linen.layers import apply
from lowrank_jax.linen.named_axes import in_named_axes
from lowrank_jax.planning.plans import FactoredKernel, Plan
from lowrank_jax.projection.two_sided import GradientMoments

Outputs = Callable[[Any], jax.Array]  # what a loss takes, from what the model returns
Cotangents = Callable[[jax.Array], jax.Array]  # the gradients at these outputs
Read = Callable[[jax.Array], jax.Array]  # from a layer's inputs to what its kernel is multiplied with, [positions, group, n]


def capture(
    model: nn.Module,
    variables: Any,
    batch: Any,
    plan: Plan,
    outputs: Outputs,
    cotangents: Cotangents,
    rngs: Any,
    kwargs: Mapping[str, Any],
) -> tuple[dict[str, GradientMoments], jax.Array]:
    """Σ SSᵀ and Σ SᵀS over the examples of one batch, for every kernel that the plan factors in a known layer.

    Args:
      model, variables, batch, plan, rngs, kwargs: as in `lowrank_jax.inputs.gradient_moments`.
      outputs: from what the model returns, the array at which the backward pass begins.
      cotangents: what it begins with there.

    Returns:
      By the kernel's name, float32; and the model's outputs.

    Raises:
      ValueError: a planned kernel is not seen at work.
    """
    planned = {kernel.name: kernel for kernel in plan.captured}
    mutable = [name for name in variables if name != "params"]
    args = batch if isinstance(batch, tuple) else (batch,)
    watch = _Watch(planned)

    def forward(sums: dict[str, GradientMoments]) -> jax.Array:
        with observe(watch):
            given = {**variables, "params": _beside(variables["params"], sums)}
            returned, _ = in_named_axes(lambda: apply(model, given, *args, **kwargs, mutable=mutable, rngs=rngs))
        return outputs(returned)

    nothing = jax.tree.map(lambda sum_: jnp.zeros(sum_.shape, sum_.dtype), shapes(plan))
    made, pull_back = jax.vjp(forward, nothing)
    if unseen := [name for name in planned if name not in watch.seen]:
        more = f" and {len(unseen) - 1} more" if len(unseen) > 1 else ""
        raise ValueError(
            f"cannot capture the gradients of {unseen[0]!r}{more}: its layer is not seen at work; "
            "keep a kernel dense if this call does not use it"
        )
    return pull_back(cotangents(made))[0], made


def shapes(plan: Plan) -> dict[str, GradientMoments]:
    """Of what `capture` returns."""

    def square(kernel: FactoredKernel, size: int) -> Any:
        return jax.ShapeDtypeStruct((*kernel.stack, size, size), jnp.float32)

    return {
        kernel.name: GradientMoments(square(kernel, kernel.view.n), square(kernel, kernel.view.m // kernel.view.group))
        for kernel in plan.captured
    }


class _Watch:
    """The interceptor that leads the outputs of planned layers past their sums; it has `seen` these kernels."""

    def __init__(self, planned: Mapping[str, FactoredKernel]):
        self._planned = planned
        self.seen: set[str] = set()

    def __call__(self, next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        known = find(layer) if context.method_name == "__call__" else None
        name = "/".join((*layer.path, *known.kernels)) if known else ""
        made = next_fun(*args, **kwargs)
        if name not in self._planned or known is None:
            return made
        rows, columns = (kernel_of(layer, _beside_name(known.kernels[0], side)) for side in GradientMoments._fields)
        if rows is None or columns is None:
            return made
        self.seen.add(name)
        kernel = self._planned[name]
        x = jax.lax.stop_gradient(first_argument(layer, args, kwargs).astype(made.dtype))
        return _past(read_by(layer, kernel), _examples(layer, kernel, made), made, x, GradientMoments(rows, columns))


def _examples(layer: Any, kernel: FactoredKernel, made: jax.Array) -> int:
    """How many examples a layer's outputs are of: those along the first axis, if it is none of the layer's own."""
    own = np.size(layer.kernel_size) if isinstance(layer, nn.Conv) else 0  # an int is a window of one axis
    left, axes = kernel.view.m // kernel.view.group, 0
    while left > 1:
        axes += 1
        left //= made.shape[-axes]
    return made.shape[0] if made.ndim > max(axes, 1) + own else 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _past(read: Read, examples: int, made: jax.Array, x: jax.Array, sums: GradientMoments) -> jax.Array:
    del read, examples, x, sums
    return made


def _forward(
    read: Read, examples: int, made: jax.Array, x: jax.Array, sums: GradientMoments
) -> tuple[jax.Array, tuple[jax.Array, GradientMoments]]:
    del read, examples
    return made, (x, sums)


def _backward(
    read: Read, examples: int, kept: tuple[jax.Array, GradientMoments], gradients: jax.Array
) -> tuple[jax.Array, jax.Array, GradientMoments]:
    x, sums = kept
    inputs = read(x)
    inputs = inputs.reshape(examples, -1, *inputs.shape[1:])
    felt = gradients.astype(jnp.float32).reshape(examples, inputs.shape[1], len(sums.columns))
    return gradients, jnp.zeros_like(x), _products(inputs, felt)


def _products(x: jax.Array, g: jax.Array) -> GradientMoments:
    """Σ SSᵀ and Σ SᵀS of S = Σ_positions x gᵀ, for every column of an output.

    Args:
      x: `[examples, positions, group, n]`.
      g: `[examples, positions, m]`, m the outputs.
    """
    _, positions, group, n = x.shape
    m = g.shape[-1]
    einsum = functools.partial(jnp.einsum, precision="highest")
    if positions * group * n * m + group * n * m * (n + m) < 2 * positions**2 * (group * n + m):
        s = einsum("bphn,bpm->bhnm", x, g)
        return GradientMoments(einsum("bhnm,bhkm->nk", s, s), einsum("bhnm,bhnk->mk", s, s))
    # The same by the products of positions, which are fewer than a kernel's elements.
    of_x, of_g = einsum("bphn,bqhn->bpq", x, x), einsum("bpm,bqm->bpq", g, g)
    return GradientMoments(
        einsum("bphn,bphk->nk", x, einsum("bpq,bqhk->bphk", of_g, x)), einsum("bpm,bpk->mk", g, einsum("bpq,bqk->bpk", of_x, g))
    )


_past.defvjp(_forward, _backward)


def _beside(params: Any, sums: Mapping[str, GradientMoments]) -> Any:
    """The parameters with the sums next to their kernels."""
    flat: dict[Any, Any] = dict(flax.traverse_util.flatten_dict(params, keep_empty_nodes=True))
    for name, pair in sums.items():
        for side, value in zip(pair._fields, pair, strict=True):
            flat[tuple(_beside_name(name, side).split("/"))] = value
    return flax.traverse_util.unflatten_dict(flat)


def _beside_name(kernel: str, side: str) -> str:
    place, slash, leaf = kernel.rpartition("/")
    return f"{place}{slash}gradients of {leaf}, {side}"
