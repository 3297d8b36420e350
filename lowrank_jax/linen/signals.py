"""What is known of a value on its way from a layer to a normalisation, and what operations make of it."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from lowrank_jax.linen.split_axes import after_broadcast, after_reshape

SHAPES = ("reshape", "transpose", "broadcast_in_dim", "squeeze", "expand_dims", "convert_element_type", "reduce_precision")
_PARAMETERS, _STATISTICS = "params/", "batch_stats/"
_SMALL = 1e-2  # beside a mean square near 1


class Signal(NamedTuple):
    """A layer's output, or a statistic of it.

    Attributes:
      place: of the output among those that were seen.
      power: of the output's length: 1 of the output and its mean, 2 of squares, -1 of an inverse length.
      whole: whether no axis has been summed over.
      split: along each axis how many elements of the output's features it has; None if that is not known any more.
      together: whether features were summed over, so that all share one statistic.
      squared: whether it came through squares of the output: a mean is no length.
    """

    place: int
    power: int = 1
    whole: bool = True
    split: tuple[int, ...] | None = None
    together: bool = False
    squared: bool = False


class Variable(NamedTuple):
    """A variable of the model, up to its shape.

    Attributes:
      name: with its collection.
      size: of how many elements, without stack axes.
      power: 1 of a root of what is stored, -1 of an inverse root; 0 as it is.
    """

    name: str
    size: int
    power: int = 0

    @property
    def stored(self) -> bool:
        """Whether it is none of the parameters."""
        return not self.name.startswith(_PARAMETERS)

    @property
    def normalizes(self) -> bool:
        """Whether an output may be normalised with it: any other state may be any number."""
        return self.name.startswith(_STATISTICS)


class Constant(NamedTuple):
    """A number that the program knows; None where only that it is one is known."""

    value: Any = None

    @property
    def number(self) -> float | None:
        return float(self.value) if self.value is not None and np.size(self.value) == 1 else None

    @property
    def is_small(self) -> bool:
        """Whether it only keeps a statistic from being 0."""
        return self.number is not None and abs(self.number) <= _SMALL


class Done(NamedTuple):
    """A normalised output, which nothing needs to follow."""


Value = Signal | Variable | Constant | None


def is_output(value: Value) -> TypeGuard[Signal]:
    """Whether it is an output itself, up to its shape and its mean."""
    return isinstance(value, Signal) and value.whole and value.power == 1


def alike(one: Signal, other: Signal) -> bool:
    return one.place == other.place and one.whole == other.whole


def reshaped(kind: str, eqn: Any, value: Value) -> Value:
    if not isinstance(value, Signal):
        return value
    before, after = eqn.invars[0].aval, eqn.outvars[0].aval
    if not jnp.issubdtype(after.dtype, jnp.floating):
        return None
    split = value.split
    if split is None:
        return value
    if kind == "transpose":
        split = tuple(split[axis] for axis in eqn.params["permutation"])
    elif kind == "broadcast_in_dim":
        split = after_broadcast(split, eqn.params["broadcast_dimensions"], len(after.shape))
    else:
        split = after_reshape(split, before.shape, after.shape)
    return value._replace(split=split)


def summed(value: Value, axes: Sequence[int]) -> Value:
    if not isinstance(value, Signal) or value.split is None:
        return None
    together = value.together or any(value.split[axis] > 1 for axis in axes)
    split = tuple(size for axis, size in enumerate(value.split) if axis not in axes)
    return value._replace(whole=False, split=split, together=together)


def bounded(kind: str, values: Sequence[Value]) -> Value:
    """A statistic that is kept from being negative, too small or not a number."""
    known = [value for value in values if not isinstance(value, Constant)]
    if len(known) != 1 or is_output(known[0]):
        return None
    constants = [value for value in values if isinstance(value, Constant)]
    if kind == "select_n":  # by a constant, which comes first
        constants = [value for value in values[1:] if isinstance(value, Constant)]
    return known[0] if all(_is_harmless(kind, known[0], bound) for bound in constants) else None


def _is_harmless(kind: str, value: Value, bound: Constant) -> bool:
    if bound.number is None:
        return False
    inverse = isinstance(value, Signal | Variable) and value.power < 0
    if kind == "select_n":
        return np.isnan(bound.number) or bound.number == 0
    if kind == "max":
        return bound.number <= (0 if inverse else _SMALL)
    return inverse and bound.number >= 1 / _SMALL


def exponent_of(kind: str, eqn: Any) -> float | None:
    match kind:
        case "square":
            return 2
        case "sqrt":
            return 0.5
        case "rsqrt":
            return -0.5
        case "integer_pow":
            return eqn.params["y"]
        case "pow":
            power = eqn.invars[1]
            return float(power.val) if isinstance(power, Literal) else None
    return None


def power_of(value: Value, exponent: float | None) -> Value:
    """A value to a power; None where that is no statistic of any use."""
    if isinstance(value, Constant):
        return value
    if exponent is None or value is None:
        return None
    if isinstance(value, Signal):
        power = value.power * exponent
        possible = exponent == 2 if value.whole else power in (-2, -1, 1, 2)
        return value._replace(power=int(power), squared=value.squared or value.whole) if possible else None
    if exponent == -1 and value.power:
        return value._replace(power=-value.power)
    if value.power == 0 and value.stored and exponent in (0.5, -0.5):
        return value._replace(power=int(2 * exponent))
    return None
