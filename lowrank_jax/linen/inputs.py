"""The inputs of a Linen module's layers, captured as the module runs.

A convolution's inputs are the patches under its window.  The layer cuts them itself: given an identity kernel, it returns them
with its own strides, dilation and padding.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.linen.interception import observe, unseen
from lowrank_jax.linen.known import find, first_argument, is_built_in
from lowrank_jax.linen.layers import apply
from lowrank_jax.linen.named_axes import in_named_axes
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
    watch = _Watch(planned, summary, combine)
    mutable = [COLLECTION, *(name for name in variables if name != "params")]
    args = batch if isinstance(batch, tuple) else (batch,)
    with observe(watch):
        _, written = in_named_axes(lambda: apply(model, variables, *args, **kwargs, mutable=mutable, rngs=rngs))
    sown = named_leaves(written.get(COLLECTION, {}), is_leaf=lambda node: isinstance(node, tuple))
    by_place = {name: f"{name.rpartition('/')[0]}/{_sown(name)}".lstrip("/") for name in planned}
    found = {name: sown[place] for name, place in by_place.items() if place in sown and name not in watch.missed}
    _check_found(found, planned)
    return {name: _of_one_kernel(found[name], planned[name], watch.axes[name], combine) for name in planned}


class _Watch:
    """The interceptor that writes down what planned kernels are fed.

    Attributes:
      missed: kernels that are also used where nothing can be written.
      axes: by the kernel's name, of how many axes its summary is where it is made.
    """

    def __init__(self, planned: Mapping[str, FactoredKernel], summary: Summary, combine: Combine):
        self._planned, self._summary, self._combine = planned, summary, combine
        self.missed: set[str] = set()
        self.axes: dict[str, int] = {}

    def __call__(self, next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        known = find(layer) if context.method_name == "__call__" else None
        name = "/".join((*layer.path, *known.kernels)) if known else ""
        if name in self._planned:
            with unseen():  # patches are cut by another layer of the kind
                self._write(layer, name, first_argument(layer, args, kwargs))
        return next_fun(*args, **kwargs)

    def _write(self, layer: nn.Module, name: str, x: jax.Array) -> None:
        if not layer.is_mutable_collection(COLLECTION):
            self.missed.add(name)
            return
        new = self._summary(name, read_by(layer, self._planned[name])(x))
        self.axes[name] = new[0].ndim
        layer.sow(
            COLLECTION,
            _sown(name),
            new,
            init_fn=lambda: None,
            reduce_fn=lambda old, new: new if old is None else self._combine(old, new),
        )


def _of_one_kernel(summary: Any, kernel: FactoredKernel, axes: int, combine: Combine) -> Any:
    """Joins the summaries of all turns of a loop that uses one kernel again and again."""
    turns = summary[0].ndim - axes - len(kernel.stack)
    if turns and kernel.stack:
        raise ValueError(f"cannot capture the inputs of {kernel.name!r}: it is both stacked and used in a loop")
    for _ in range(turns):
        parts = [jax.tree.map(lambda part, i=i: part[i], summary) for i in range(len(summary[0]))]
        summary = functools.reduce(combine, parts)
    return summary


def _sown(kernel: str) -> str:
    """The name under which the inputs of a kernel are written, next to it."""
    return f"inputs of {kernel.rpartition('/')[2]}"


def read_by(module: Any, kernel: FactoredKernel) -> Callable[[jax.Array], jax.Array]:
    """A function from a layer's inputs to what its kernel's matrix is multiplied with at every output position.

    Returns:
      `[positions, group, n]`, float32, positions in the order of the layer's outputs.
    """
    view = kernel.view
    if not is_built_in(module) or _is_pointwise(module):  # it multiplies the last axes
        return lambda x: x.astype(jnp.float32).reshape(-1, 1, view.n)
    row_sizes = view.shape[:-1] if isinstance(module, nn.Conv) else tuple(view.shape[axis] for axis in view.rows)
    size = math.prod(row_sizes)
    layer = module.clone(features=size, use_bias=False, dtype=jnp.float32, precision="highest", name=None)

    def read(x: jax.Array) -> jax.Array:
        identity = jnp.eye(size, dtype=jnp.float32).reshape(*row_sizes, size)
        patches: Any = layer.apply({"params": {"kernel": identity}}, x.astype(jnp.float32))
        patches = patches.reshape(-1, *row_sizes)
        if view.group == 1:
            return patches.reshape(-1, 1, size)
        return patches.swapaxes(1, 2).reshape(-1, view.group, view.n)  # [positions, kh, kw, c_in]: an output owns kw columns

    return read


def _is_pointwise(module: Any) -> bool:
    """Whether a layer's inputs at an output position are its last axis at that position."""
    if not isinstance(module, nn.Conv):
        return isinstance(module, nn.Dense)
    sizes = (module.kernel_size, module.strides or 1, module.input_dilation or 1)
    return all(np.all(np.asarray(size) == 1) for size in sizes) and module.padding in ("SAME", "VALID")


def _check_found(found: dict[str, Any], planned: Mapping[str, FactoredKernel]) -> None:
    missing = [name for name in planned if name not in found]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"cannot capture the inputs of {missing[0]!r}{more}: under nn.scan and nn.vmap, add "
            f'"{COLLECTION}": 0 to variable_axes; keep a kernel dense if this call does not use it'
        )
