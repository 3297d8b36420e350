"""What a Linen model predicts for the batches that it is called on: for functions that compare predictions."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lowrank_jax.linen.layers import apply
from lowrank_jax.linen.named_axes import in_named_axes
from lowrank_jax.text import shown


def check_functions(**functions: Any) -> None:
    """Raises TypeError unless each of these arguments is a function, or None."""
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be a function, not {shown(function)}")


def written(variables: Any) -> list[str]:
    """The collections that a model may write to; what it writes is discarded."""
    return [name for name in variables if name != "params"]


def call(model: nn.Module, variables: Any, batch: Any, rngs: Any, kwargs: dict[str, Any], mutable: Sequence[str]) -> Any:
    """What the model returns for a batch, and the collections that it wrote; kernels may be factored.

    Args:
      model, variables, rngs: as for `apply`.
      batch: an array, or a tuple of the model's arguments.
      kwargs: keyword arguments of the model.
      mutable: the names of collections.
    """
    args = batch if isinstance(batch, tuple) else (batch,)
    return in_named_axes(lambda: apply(model, variables, *args, **{**kwargs, "rngs": rngs, "mutable": list(mutable)}))


def logits_of(model: nn.Module, returned: Any, logits: Callable[[Any], Any] | None) -> jax.Array:
    """The logits `[..., classes]`, in float32 or better, of what a model returned.

    Raises:
      TypeError: they are none.
    """
    made = returned if logits is None else logits(returned)
    if not isinstance(made, jax.Array) or not made.ndim or not jnp.issubdtype(made.dtype, jnp.floating):
        raise TypeError(f"{type(model).__name__} returns no array of logits: pass logits=, a function of what it returns")
    return made.astype(jnp.promote_types(made.dtype, jnp.float32))


def check_predictions(predictions: jax.Array, batch: int, whose: str) -> None:
    """Raises ValueError for the predictions of an empty batch, and for those that are no numbers; `whose` they are."""
    if not predictions.size:
        raise ValueError(f"batch {batch} is empty")
    if jnp.isnan(predictions).any():
        raise ValueError(f"batch {batch}: the {whose}'s predictions are not numbers")
