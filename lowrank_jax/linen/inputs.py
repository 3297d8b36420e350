"""The inputs of a Linen module's layers, captured as the module runs.

A convolution's inputs are the patches under its window.  The layer cuts them itself: given an identity kernel, it returns them
with its own strides, dilation and padding.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lowrank_jax.linen.known import BUILT_IN, find
from lowrank_jax.linen.layers import apply
from lowrank_jax.paths import named_leaves
from lowrank_jax.planning.plans import FactoredKernel, Plan

COLLECTION = "lowrank_inputs"

Summary = Callable[[str, jax.Array], Any]  # from a kernel's name and its inputs [positions, group, n]
Combine = Callable[[Any, Any], Any]  # the summaries of two uses of one kernel


def capture(
    model: nn.Module, variables: Any, batch: Any, plan: Plan, summary: Summary, combine: Combine, rngs: Any, kwargs: Any
) -> dict[str, Any]:
    """Summaries of the inputs of every kernel that the plan factors in a known layer, over one batch.

    Args:
      model, variables, batch, plan, rngs, kwargs: as in `lowrank_jax.inputs.second_moments`.
      summary: what to keep of a kernel's inputs, as a tuple of arrays.
      combine: joins the summaries of two uses of one kernel.

    Returns:
      By the kernel's name its summary; under `nn.scan` and `nn.vmap` with the stack's axis in front.

    Raises:
      ValueError: the inputs of a planned kernel cannot be captured.
    """
    planned = {kernel.name: kernel for kernel in plan.captured}

    def observe(next_fun: Any, args: Any, call_kwargs: Any, context: Any) -> Any:
        module = context.module
        known = find(module) if context.method_name == "__call__" else None
        name = "/".join((*module.path, *known.kernels)) if known else ""
        # The layers that cut patches are run on their own, where nothing can be written.
        if name in planned and module.is_mutable_collection(COLLECTION):
            x = args[0] if args else next(iter(call_kwargs.values()))
            module.sow(
                COLLECTION,
                _sown(name),
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
    names = {f"{kernel.rpartition('/')[0]}/{_sown(kernel)}".lstrip("/"): kernel for kernel in planned}
    found = {names[name]: value for name, value in sown.items()}
    _check_found(found, planned)
    return found


def _sown(kernel: str) -> str:
    """The name under which the inputs of a kernel are written, next to it."""
    return f"inputs of {kernel.rpartition('/')[2]}"


def _inputs(module: Any, kernel: FactoredKernel, x: jax.Array) -> jax.Array:
    """What a kernel's matrix is multiplied with at every output position: `[positions, group, n]`, float32."""
    view = kernel.view
    if not isinstance(module, BUILT_IN):  # it multiplies the last axes
        return x.astype(jnp.float32).reshape(-1, 1, view.n)
    row_sizes = view.shape[:-1] if isinstance(module, nn.Conv) else tuple(view.shape[axis] for axis in view.rows)
    size = math.prod(row_sizes)
    layer = module.clone(features=size, use_bias=False, dtype=jnp.float32, precision="highest", name=None)
    identity = jnp.eye(size, dtype=jnp.float32).reshape(*row_sizes, size)
    read: Any = layer.apply({"params": {"kernel": identity}}, x.astype(jnp.float32))
    read = read.reshape(-1, *row_sizes)
    if view.group == 1:
        return read.reshape(-1, 1, size)
    return read.swapaxes(1, 2).reshape(-1, view.group, view.n)  # [positions, kh, kw, c_in]: an output owns kw columns


def _check_found(found: dict[str, Any], planned: Mapping[str, FactoredKernel]) -> None:
    missing = [name for name in planned if name not in found]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"cannot capture the inputs of {missing[0]!r}{more}: under nn.scan and nn.vmap, add "
            f'"{COLLECTION}": 0 to variable_axes; keep a kernel dense if this call does not use it'
        )
