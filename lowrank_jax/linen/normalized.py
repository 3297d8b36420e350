"""Which kernels' outputs are normalised, found by following every output through the traced program.

An output is normalised if each of its ways on ends in a product with the inverse root of a mean square that was computed from
it, or of a statistic of the collection `batch_stats`, as BatchNorm's is for evaluation.  Until then nothing but shapes, dtypes,
constants, its own mean and a bias may change it, and nothing but small constants the mean square.  Whatever else reads it means
no.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jax.extend.core import Literal, Var

from lowrank_jax.linen import programs
from lowrank_jax.linen.signals import (
    SHAPES,
    Constant,
    Done,
    Signal,
    Value,
    Variable,
    alike,
    bounded,
    exponent_of,
    is_output,
    power_of,
    reshaped,
    summed,
)
from lowrank_jax.projection.curves import Normalization

_CALLS = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call")
_ARITHMETIC = ("add", "sub", "mul", "div", "max", "min", "sqrt", "rsqrt", "integer_pow", "gt", "ge", "lt", "le", "select_n")


class Marks(NamedTuple):
    """How the marks of a program are read.

    Attributes:
      kernel: the number of the layer's call whose kernel a mark is on; None if it is on none.
      output: the same for its output.
      layers: by that number what is known of the call.
    """

    kernel: Callable[[str], int | None]
    output: Callable[[str], int | None]
    layers: Sequence["Layer"]


class Layer(NamedTuple):
    """A call of a layer.

    Attributes:
      kernel: the kernel's name, where the program does not say it.
      features: the sizes of the last axes of its output, those of its features.
      size: of its output, without the axes of `vmap`.
    """

    kernel: str
    features: tuple[int, ...]
    size: int


class _Output:
    """What became of what a layer made of a kernel.

    Attributes:
      kernel: its name.
      is_variable: whether it is a variable of the model as it is.
      elements: of the output's features, mapped axes included.
      normalized: whether the output was.
      together: whether its features share a statistic.
      read: whether something else read it, or could.
    """

    def __init__(self, kernel: str, is_variable: bool):
        self.kernel, self.is_variable, self.elements = kernel, is_variable, 0
        self.normalized = self.together = False
        self.read = True  # until the layer's output is seen


def find(jaxpr: Any, names: Sequence[str], marks: Marks) -> dict[str, Normalization]:
    """The kernels all of whose outputs are normalised.

    Args:
      jaxpr: of the model, with marks on kernels and outputs.
      names: of its variables, the first inputs of the program, with their collections.
      marks: how they are read.

    Returns:
      By the kernel's name, with its collection.
    """
    follower = _Follower(marks)
    known = [Variable(name, var.aval.size) for name, var in zip(names, jaxpr.invars, strict=False)]
    follower.read(follower.follow(jaxpr, known))
    found: dict[str, Normalization] = {}
    refused = {output.kernel for output in follower.outputs if output.read or not output.normalized}
    for output in follower.outputs:
        if output.kernel not in refused:
            together = output.together or found.get(output.kernel) == "together"
            found[output.kernel] = "together" if together else "each"
    return found


class _Follower:
    """Follows outputs through programs.

    Attributes:
      outputs: all that were seen; a program that is called twice has its own twice.
    """

    def __init__(self, marks: Marks):
        self.outputs: list[_Output] = []
        self._marks = marks
        self._called: dict[int, int] = {}  # by a call's number the last output's place; a shared program calls again

    def follow(self, jaxpr: Any, given: Sequence[Value]) -> list[Value]:
        """Follows the values that a program is given; returns what it returns."""
        known: dict[Any, Value] = {}
        for var, value in zip(jaxpr.invars, given, strict=False):
            known[var] = value._replace(size=min(value.size, var.aval.size)) if isinstance(value, Variable) else value
        for eqn in jaxpr.eqns:
            results = self._results(eqn, [_value(var, known) for var in eqn.invars])
            known |= dict(zip(eqn.outvars, results, strict=False))
        return [_value(var, known) for var in jaxpr.outvars]

    def read(self, values: Sequence[Value]) -> list[Value]:
        """Notes that something else reads outputs."""
        for value in values:
            if is_output(value):
                self.outputs[value.place].read = True
        return []

    def _results(self, eqn: Any, values: list[Value]) -> list[Value]:
        if (mark := programs.mark_of(eqn)) is not None:
            return self._marked(mark, eqn, values)
        if programs.is_copy(eqn):
            return values
        kind = eqn.primitive.name
        if kind in _CALLS and (bodies := programs.inner(eqn)):
            return self.follow(bodies[0], values)
        if bodies := programs.inner(eqn):
            return self._inside(eqn, bodies, values)
        if not any(isinstance(value, Signal | Variable) for value in values):
            constant = kind in (*SHAPES, *_ARITHMETIC) and all(isinstance(value, Constant) for value in values)
            return [values[0] if kind in SHAPES else Constant()] if constant else []
        result = self._computed(kind, eqn, values)
        if result is None:
            return self._unknown(values)
        return [] if isinstance(result, Done) else [result]

    def _unknown(self, values: list[Value]) -> list[Value]:
        """Statistics, too, are for normalising only: a network may go on with a mean."""
        for value in values:
            if isinstance(value, Signal):
                self.outputs[value.place].read = True
        return []

    def _marked(self, mark: str, eqn: Any, values: list[Value]) -> list[Value]:
        if (number := self._marks.kernel(mark)) is not None:
            self._called[number] = len(self.outputs)
            self.outputs.append(self._of_kernel(number, values[0]))
        if (number := self._marks.output(mark)) is None:
            return values
        self.read(values)  # of another layer, which this one is made of
        place = self._called[number]
        return [self._of_output(place, self._marks.layers[number], eqn.outvars[0].aval)]

    def _of_kernel(self, number: int, value: Value) -> _Output:
        if isinstance(value, Variable) and not value.power:
            return _Output(value.name, is_variable=True)
        return _Output(self._marks.layers[number].kernel, is_variable=False)

    def _of_output(self, place: int, layer: Layer, shaped: Any) -> Signal:
        """A layer's output, whose features are the last axes."""
        axes, output = len(layer.features), self.outputs[place]
        output.elements = math.prod(layer.features) * shaped.size // max(layer.size, 1)
        output.read = not output.is_variable or tuple(shaped.shape[len(shaped.shape) - axes :]) != layer.features
        return Signal(place, split=(*[1] * (len(shaped.shape) - axes), *layer.features))

    def _inside(self, eqn: Any, bodies: Sequence[Any], values: list[Value]) -> list[Value]:
        """Follows loops and branches, into which variables go, but no outputs."""
        self._unknown(values)
        variables = [value if isinstance(value, Variable) else None for value in values]
        given = programs.bodies(eqn, _without_carry(eqn, variables))
        for body, operands in given or [(body, []) for body in bodies]:
            self.read(self.follow(body, operands))
        return []

    def _computed(self, kind: str, eqn: Any, values: list[Value]) -> Value | Done:
        if kind in SHAPES:
            return reshaped(kind, eqn, values[0])
        if kind == "mul":
            return self._product(*values)
        if kind == "div":
            return self._product(values[0], power_of(values[1], -1))
        if kind in ("add", "sub"):
            return self._sum(*values, subtracts=kind == "sub")
        if kind in ("max", "min", "select_n"):
            return bounded(kind, values)
        if kind == "reduce_sum":
            return summed(values[0], eqn.params["axes"])
        if kind == "psum":
            return values[0] if isinstance(values[0], Signal) and not values[0].whole else None
        return power_of(values[0], exponent_of(kind, eqn))

    def _product(self, one: Value, other: Value) -> Value | Done:
        for value, factor in ((one, other), (other, one)):
            if isinstance(factor, Constant):
                return value
            if is_output(value) and self._normalized(value, factor):
                return Done()
            if isinstance(value, Signal | Variable) and value.power < 0 and isinstance(factor, Variable) and not factor.power:
                return value  # the scale that follows a normalisation
        if isinstance(one, Signal) and isinstance(other, Signal) and alike(one, other):
            squared = one.whole or (one.squared and other.squared)
            together = one.together or other.together
            return one._replace(power=one.power + other.power, together=together, squared=squared)
        return None

    def _normalized(self, value: Signal, factor: Value) -> bool:
        """Whether the factor normalises an output; notes it."""
        output = self.outputs[value.place]
        if isinstance(factor, Signal) and factor.place == value.place and _is_inverse_length(factor):
            output.together |= factor.together
        elif isinstance(factor, Variable) and factor.normalizes and factor.power == -1 and factor.size in (1, output.elements):
            output.together |= factor.size < output.elements
        else:
            return False
        output.normalized = True
        return True

    def _sum(self, one: Value, other: Value, subtracts: bool) -> Value:
        for value, more in ((one, other), (other, one)):
            if isinstance(more, Constant):
                turned = subtracts and more is one  # a constant minus a statistic
                return value if is_output(value) or (more.is_small and not turned) else None
            if isinstance(value, Signal) and isinstance(more, Variable):
                return self._with_variable(value, more)
        if not isinstance(one, Signal) or not isinstance(other, Signal) or (one.place, one.power) != (other.place, other.power):
            return None
        if one.whole != other.whole and not (subtracts and is_output(one)):
            return None
        if is_output(one) and is_output(other):
            return None
        squared = one.squared or (other.squared and not subtracts)
        return one._replace(together=one.together or (other.together and not one.whole), squared=squared)

    def _with_variable(self, value: Signal, more: Variable) -> Value:
        if more.power:
            return None
        if not value.whole:
            return more if more.stored else None  # a running average
        return value if is_output(value) and more.size <= self.outputs[value.place].elements else None


def _is_inverse_length(value: Signal) -> bool:
    return value.power == -1 and not value.whole and value.squared


def _value(var: Any, known: Mapping[Any, Value]) -> Value:
    if isinstance(var, Literal):
        return Constant(var.val)
    return known.get(var) if isinstance(var, Var) else None


def _without_carry(eqn: Any, values: Sequence[Value]) -> list[Any]:
    """What a loop computes anew in every turn is no variable any more."""
    if eqn.primitive.name == "scan":
        first, count = eqn.params["num_consts"], eqn.params["num_carry"]
        return [None if first <= i < first + count else value for i, value in enumerate(values)]
    if eqn.primitive.name == "while":
        kept = eqn.params["cond_nconsts"] + eqn.params["body_nconsts"]
        return [value if i < kept else None for i, value in enumerate(values)]
    return list(values)
