"""What models of more than one family drop in training."""

import flax.linen as nn
import jax


def stochastic_depth(branch: jax.Array, rate: float, train: bool) -> jax.Array:
    """Drops a residual branch for whole examples in training, and scales the others up: the expectation stays what it was.

    Args:
      branch: `[batch, ...]`.
      rate: of the examples that lose the branch, drawn from the stream "dropout".
      train: whether to drop at all.
    """
    return nn.Dropout(rate, broadcast_dims=tuple(range(1, branch.ndim)), deterministic=not train)(branch)


def check_rate(name: str, rate: float) -> None:
    """Refuses a rate at which nothing would be left.

    Raises:
      ValueError: it is not in [0, 1).
    """
    if not 0 <= rate < 1:
        raise ValueError(f"{name} {rate} must be in [0, 1)")
