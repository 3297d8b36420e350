"""The gradients at the outputs of a Linen module's layers, as sums of their outer products.

Every planned kernel gets an array of zeros beside it, through which its layer's outputs pass unchanged.  In the backward pass
that array's "gradient" is what is wanted, Σ ggᵀ.  So jax itself adds up the uses of a shared kernel and the turns of a loop,
keeps the members of a stack apart, and stores nothing for it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp

from lowrank_jax.linen.interception import observe
from lowrank_jax.linen.known import find, kernel_of
from lowrank_jax.linen.layers import apply
from lowrank_jax.linen.named_axes import in_named_axes
from lowrank_jax.planning.plans import FactoredKernel, Plan

Outputs = Callable[[Any], jax.Array]  # what a loss takes, from what the model returns
Cotangents = Callable[[jax.Array], jax.Array]  # the gradients at these outputs


def capture(
    model: nn.Module,
    variables: Any,
    batch: Any,
    plan: Plan,
    outputs: Outputs,
    cotangents: Cotangents,
    rngs: Any,
    kwargs: Mapping[str, Any],
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Σ ggᵀ over all positions and examples of one batch, for every kernel that the plan factors in a known layer.

    Args:
      model, variables, batch, plan, rngs, kwargs: as in `lowrank_jax.inputs.gradient_moments`.
      outputs: from what the model returns, the array at which the backward pass begins.
      cotangents: what it begins with there.

    Returns:
      By the kernel's name `[*stack, outputs, outputs]`, float32; and the model's outputs.

    Raises:
      ValueError: a planned kernel is not seen at work.
    """
    planned = {kernel.name: kernel for kernel in plan.captured}
    mutable = [name for name in variables if name != "params"]
    args = batch if isinstance(batch, tuple) else (batch,)
    watch = _Watch(planned)

    def forward(sums: dict[str, jax.Array]) -> jax.Array:
        with observe(watch):
            given = {**variables, "params": _beside(variables["params"], sums)}
            returned, _ = in_named_axes(lambda: apply(model, given, *args, **kwargs, mutable=mutable, rngs=rngs))
        return outputs(returned)

    nothing = {name: jnp.zeros((*kernel.stack, *(_outputs(kernel),) * 2), jnp.float32) for name, kernel in planned.items()}
    made, pull_back = jax.vjp(forward, nothing)
    if unseen := [name for name in planned if name not in watch.seen]:
        more = f" and {len(unseen) - 1} more" if len(unseen) > 1 else ""
        raise ValueError(
            f"cannot capture the gradients of {unseen[0]!r}{more}: its layer is not seen at work; "
            "keep a kernel dense if this call does not use it"
        )
    return pull_back(cotangents(made))[0], made


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
        sums = kernel_of(layer, _beside_name(known.kernels[0]))
        if sums is None:
            return made
        self.seen.add(name)
        return _past(made, sums)


@jax.custom_vjp
def _past(made: jax.Array, sums: jax.Array) -> jax.Array:
    del sums
    return made


def _forward(made: jax.Array, sums: jax.Array) -> tuple[jax.Array, jax.Array]:
    return made, sums


def _backward(sums: jax.Array, gradients: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows = gradients.astype(jnp.float32).reshape(-1, len(sums))
    return gradients, jnp.matmul(rows.T, rows, precision="highest")


_past.defvjp(_forward, _backward)


def _outputs(kernel: FactoredKernel) -> int:
    """Of the layer, at one position."""
    return kernel.view.m // kernel.view.group


def _beside(params: Any, sums: Mapping[str, jax.Array]) -> Any:
    """The parameters with the sums next to their kernels."""
    flat = flax.traverse_util.flatten_dict(params, keep_empty_nodes=True)
    for name, value in sums.items():
        flat[tuple(_beside_name(name).split("/"))] = value
    return flax.traverse_util.unflatten_dict(flat)


def _beside_name(kernel: str) -> str:
    place, slash, leaf = kernel.rpartition("/")
    return f"{place}{slash}gradients of {leaf}"
