"""What models of more than one family have in common."""

import flax.linen as nn
import jax

from lowrank_jax.checks import Check


def stochastic_depth(branch: jax.Array, rate: float, train: bool) -> jax.Array:
    """Drops a residual branch for whole examples in training, and scales the others up: the expectation stays what it was.

    Args:
      branch: `[batch, ...]`.
      rate: of the examples that lose the branch, drawn from the stream "dropout".
      train: whether to drop at all.
    """
    return nn.Dropout(rate, broadcast_dims=tuple(range(1, branch.ndim)), deterministic=not train)(branch)


def check_settings(**settings: tuple[float, Check]) -> None:
    """Refuses what no network can have.

    Args:
      **settings: each with its check.

    Raises:
      ValueError: one line for each that fails.
    """
    complaints = {name: check(value) for name, (value, check) in settings.items()}
    wrong = [f"setting {name}: {settings[name][0]!r}; {complaint}" for name, complaint in complaints.items() if complaint]
    if wrong:
        raise ValueError("\n".join(wrong))
