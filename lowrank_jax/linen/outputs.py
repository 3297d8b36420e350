"""The outputs of a Linen module's layers, captured as the module runs."""

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax.linen.inputs import COLLECTION
from lowrank_jax.linen.interception import observe
from lowrank_jax.linen.known import find
from lowrank_jax.paths import named_leaves

Captured = dict[str, tuple[jax.Array, ...]]  # by a kernel's name the arrays that its layer returned, in the order of its uses

_PREFIX = "outputs of "  # before a kernel's name below its layer
_UNKNOWN = "its layer is not known, or this call does not use it"
_HIDDEN = f'nothing is written where its layer runs: under nn.scan and nn.vmap, add "{COLLECTION}": 0 to variable_axes'
_NO_ARRAYS = "its layer returns no floating-point arrays"


def capture(
    run: Callable[[list[str]], tuple[Any, Any]], kernels: Collection[str], examples: int | None = None
) -> tuple[Any, Captured, dict[str, str]]:
    """Runs a model, and captures what the layers of these kernels return.

    Args:
      run: calls `lowrank_jax.apply`, with these collections among the mutable ones, and returns what it does.
      kernels: names of parameters, factored or not.
      examples: the size of the batch, if outputs are wanted by example; then layers have to return the examples on the first
        axis.

    Returns:
      What the model returned; by the kernel's name its layer's outputs, each `[..., examples, elements]`, with 1 in the place
      of `examples` if that is None, and with the axes of `nn.scan` and `nn.vmap` in front; and by the name of every other
      kernel why there are none.
    """
    watch = _Watch(kernels, examples)
    if not kernels:
        return *run([])[:1], {}, {}
    with observe(watch):
        returned, written = run([COLLECTION])
    sown = named_leaves(written.get(COLLECTION, {}), is_leaf=lambda node: isinstance(node, tuple))
    by_kernel = {place.replace(_PREFIX, "", 1): arrays for place, arrays in sown.items()}
    found = {name: by_kernel[name] for name in kernels if name in by_kernel and name not in watch.unseen}
    return returned, found, {name: watch.unseen.get(name, _UNKNOWN) for name in kernels if name not in found}


class _Watch:
    """The interceptor that writes down what layers return.

    Attributes:
      unseen: by the kernel's name why its layer's outputs are not written.
    """

    def __init__(self, kernels: Collection[str], examples: int | None):
        self._kernels, self._examples = frozenset(kernels), examples
        self.unseen: dict[str, str] = {}

    def __call__(self, next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer, returned = context.module, next_fun(*args, **kwargs)
        known = find(layer) if context.method_name == "__call__" else None
        for below in known.kernels if known else ():
            name = "/".join((*layer.path, below))
            if name in self._kernels:
                self._write(layer, name, f"{_PREFIX}{below}", returned)
        return returned

    def _write(self, layer: Any, name: str, place: str, returned: Any) -> None:
        arrays = [leaf for leaf in jax.tree.leaves(returned) if _is_floating(leaf)]
        if problem := self._problem(layer, arrays):
            self.unseen[name] = problem
            return
        rows = self._examples or 1
        new = tuple(array.reshape(rows, array.size // rows) for array in arrays)
        layer.sow(COLLECTION, place, new, init_fn=tuple, reduce_fn=lambda old, new: old + new)

    def _problem(self, layer: Any, arrays: list[jax.Array]) -> str:
        """What keeps outputs from being written; empty if nothing does."""
        if not layer.is_mutable_collection(COLLECTION):
            return _HIDDEN
        if not arrays:
            return _NO_ARRAYS
        shapes = [list(array.shape) for array in arrays if self._examples and not _leads(array, self._examples)]
        return f"the {self._examples} examples are not the first axis of its layer's output {shapes[0]}" if shapes else ""


def _leads(array: jax.Array, examples: int) -> bool:
    """Whether the first axis may be that of the examples, alone or with others behind it in the same axis."""
    return array.ndim > 0 and array.shape[0] % examples == 0


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating)
