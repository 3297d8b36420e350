"""What models of more than one family have in common."""

import math

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


def check_settings(**settings: tuple[float, str]) -> None:
    """Refuses what no network can have.

    Args:
      **settings: each with what it must be: "rate", in [0, 1), such as of dropout, that leaves something over; "above 0"; or
        "at least 1".

    Raises:
      ValueError: one line for each that is not.
    """
    tests = {"rate": lambda x: 0 <= x < 1, "above 0": lambda x: 0 < x < math.inf, "at least 1": lambda x: 1 <= x < math.inf}
    words = {"rate": "in [0, 1)"}
    wrong = [
        f"setting {name}: {value!r}; must be {words.get(kind, kind)}"
        for name, (value, kind) in settings.items()
        if not tests[kind](value)
    ]
    if wrong:
        raise ValueError("\n".join(wrong))
