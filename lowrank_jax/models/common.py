"""What models of more than one family have in common."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from lowrank_jax.checks import at_least

BLOCKS = at_least(1, 1000)
"""A number of blocks; with many more, not even the shapes would be known in an hour."""


def stochastic_depth(branch: jax.Array, rate: float, train: bool) -> jax.Array:
    """Drops a residual branch for whole examples in training, and scales the others up to keep the expectation.

    Args:
      branch: `[batch, ...]`.
      rate: the probability that an example loses the branch, drawn from the stream "dropout".
      train: whether to drop at all.
    """
    return nn.Dropout(rate, broadcast_dims=tuple(range(1, branch.ndim)), deterministic=not train)(branch)


def check_settings(**settings: tuple[Any, Callable[[Any], str | None]]) -> None:
    """Refuses settings that are out of range.

    Args:
      **settings: by name, a value and its check.

    Raises:
      ValueError: a check fails; one line per failure.
    """
    complaints = {name: check(value) for name, (value, check) in settings.items()}
    wrong = [f"setting {name}: {settings[name][0]!r}; {complaint}" for name, complaint in complaints.items() if complaint]
    if wrong:
        raise ValueError("\n".join(wrong))
