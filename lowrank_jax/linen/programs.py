"""Traced programs: marks on their values, and where the values of a model's parameters go.

A mark is an operation that returns its operands, found in the program by its name.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Var

_PREFIX = "lowrank_jax."
_COPIES = ("sharding_constraint", "copy", "device_put", "optimization_barrier", "pvary")
_CALLS = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint")

Labels = dict[Any, str]  # by variable what it is


def mark(array: jax.Array, name: str) -> jax.Array:
    """The array as it is; `mark_of` finds the operation in a program."""
    return checkpoint_name(array, _PREFIX + name)


@functools.cache
def mark_together(name: str, derivatives: str) -> Callable[..., Any]:
    """A function that marks several arrays in one operation, and with another name what derivatives by them are made of."""

    def plain(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(mark(array, name) for array in arrays)  # an identity alone would leave no trace

    watched: Any = jax.custom_vjp(plain)
    watched.defvjp(lambda *arrays: (plain(*arrays), None), lambda _, rates: tuple(mark(rate, derivatives) for rate in rates))

    def marked(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        return watched(*arrays)

    marked.__name__ = _PREFIX + name
    return jax.jit(marked)


def mark_of(eqn: Any) -> str | None:
    """The name of the mark that an operation is; None if it is none."""
    name = eqn.params.get("name")
    is_mark = eqn.primitive.name in ("name", "jit", "pjit") and isinstance(name, str) and name.startswith(_PREFIX)
    return name.removeprefix(_PREFIX) if is_mark else None


def labelled(variables: Sequence[Any], labels: Sequence[str | None]) -> Labels:
    return {var: label for var, label in zip(variables, labels, strict=False) if label and isinstance(var, Var)}


def labels_of(variables: Sequence[Any], labels: Labels) -> list[str | None]:
    return [labels.get(var) if isinstance(var, Var) else None for var in variables]


def is_copy(eqn: Any) -> bool:
    """Whether an operation returns its operands as they are."""
    return eqn.primitive.name in _COPIES


def bodies(eqn: Any, operands: list[Any]) -> list[tuple[Any, list[Any]]]:
    """The programs that an operation calls with some of its operands as they are, and those operands; none for all others."""
    kind, params = eqn.primitive.name, eqn.params
    if kind == "cond":
        return [(branch.jaxpr, operands[1:]) for branch in params["branches"]]
    if kind == "scan":
        carried = slice(params["num_consts"], params["num_consts"] + params["num_carry"])
        return [] if any(operands[carried]) else [(params["jaxpr"].jaxpr, operands)]
    if kind == "while":
        tests, consts = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        carry = operands[consts:]
        programs = [
            (params["cond_jaxpr"].jaxpr, [*operands[:tests], *carry]),
            (params["body_jaxpr"].jaxpr, [*operands[tests:consts], *carry]),
        ]
        return [] if any(carry) else programs
    if kind not in _CALLS:
        return []
    body = params.get("jaxpr", params.get("call_jaxpr"))
    return [(getattr(body, "jaxpr", body), operands)]


def inner(eqn: Any) -> list[Any]:
    """All programs inside an operation."""
    values = (part for value in eqn.params.values() for part in (value if isinstance(value, tuple | list) else (value,)))
    found = (getattr(value, "jaxpr", value) for value in values)
    return [program for program in found if hasattr(program, "eqns")]


def marks(jaxpr: Any) -> list[str]:
    """The name of every mark in a program, as often as it is there."""
    found: list[str] = []
    for eqn in jaxpr.eqns:
        mark = mark_of(eqn)
        found += [mark] if mark is not None else []
        found += [name for body in inner(eqn) for name in marks(body)]
    return found
