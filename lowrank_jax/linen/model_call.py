"""A Linen model and what it is called on, traced on shapes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.core import DenyList

from lowrank_jax.linen.interception import intercept, unseen
from lowrank_jax.linen.layers import call_model, with_keywords
from lowrank_jax.linen.named_axes import in_named_axes


@dataclasses.dataclass(frozen=True)
class ModelCall:
    """A model and its arguments.

    Attributes:
      model: the module.
      args, kwargs: its arguments; arrays and `jax.ShapeDtypeStruct`s anywhere in them are traced, the rest is kept as it is.
      rngs: as for `model.apply`; by default one key serves all.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rngs: Any = None

    @property
    def arrays(self) -> list[Any]:
        """The arrays among the arguments, in order."""
        return [leaf for leaf in jax.tree.leaves((self.args, self.kwargs)) if _is_array(leaf)]

    def batch(self) -> int:
        """The first axis of the first array; 1 if there is none.

        Raises:
          ValueError: an array is empty.
        """
        empty = next((array for array in self.arrays if 0 in array.shape), None)
        if empty is not None:
            raise ValueError(f"an input of shape {list(empty.shape)} is empty: plan on at least one example")
        first = next(iter(self.arrays), None)
        return first.shape[0] if first is not None and first.ndim else 1

    def init(self) -> Any:
        """The shapes of the variables that `model.init` makes."""
        rngs = {"params": jax.random.key(0), **(self.rngs or {})} if not _is_array(self.rngs) else self.rngs

        def init(arrays: list[Any]) -> Any:
            args, kwargs = self._filled(arrays)
            own = {name: value for name, value in kwargs.items() if name not in ("method", "mutable")}
            return self.model.init(rngs, *args, method=with_keywords(kwargs.get("method"), own))

        return jax.eval_shape(lambda arrays: in_named_axes(lambda: init(arrays)), self.arrays)

    def trace(self, make_variables: Callable[..., Any], interceptor: Any, *shapes: Any) -> Any:
        """The program of `model.apply`, whose first inputs are the leaves of `shapes`.

        Args:
          make_variables: the model's variables, from values of these shapes.
          interceptor: as for `nn.intercept_methods`.
          shapes: of the values.

        Raises:
          Exception: whatever the model raises.
        """
        variables = jax.eval_shape(make_variables, *shapes)
        rngs = {"params": jax.random.key(0)} if self.rngs is None else self.rngs

        def program(mutable: Any) -> Any:
            def run(shapes: tuple[Any, ...], arrays: list[Any]) -> Any:
                args, kwargs = self._filled(arrays)
                options = {"rngs": rngs, "mutable": mutable} | kwargs
                with unseen(), intercept(interceptor):
                    return call_model(self.model, make_variables(*shapes), *args, **options)

            return in_named_axes(run, lambda mapped: jax.make_jaxpr(mapped)(shapes, self.arrays))

        try:
            return program([name for name in variables if name != "params"])
        except Exception as error:
            # Collections that are only made here.  Where there are none, nn.map_variables would initialise its module anew.
            try:
                return program(DenyList("params"))
            except Exception:
                raise error from None

    def _filled(self, arrays: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with these arrays in the place of their own."""
        rest = iter(arrays)
        return jax.tree.map(lambda leaf: next(rest) if _is_array(leaf) else leaf, (self.args, self.kwargs))


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)
