"""Who reads a kernel on its way to its layer, found by following the factors through the traced program.

A layer on factors is right only if it gets them as they are stored.  A wrapper may halve, mask or normalise the leaves
of the layer inside, and runs on factors all the same: it halves each of them.  So the model is traced with factors in it, every
layer marks the pairs that reach it, and a pair is untouched if nothing but calls, loops and marks has its factors as operands.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from lowrank_jax.kernel import LowRankKernel, is_low_rank
from lowrank_jax.linen import programs
from lowrank_jax.linen.layers import on_factors
from lowrank_jax.linen.model_call import ModelCall
from lowrank_jax.paths import map_named

_ARRIVAL, _DERIVATIVE = "arrival", "derivative"


class _Differentiated(Exception):
    """The model differentiates by its kernels while it runs; derivatives by factors are not derivatives by the kernel."""


def foreign_readers(call: ModelCall, variables: Any, pairs: dict[str, LowRankKernel]) -> dict[str, str]:
    """Finds the planned kernels that something other than their layer reads.

    Args:
      call: of the model, which runs while nothing is factored.
      variables: the model's variables as shapes.
      pairs: by the kernel's name the factor pair that it will become, as shapes.

    Returns:
      By the kernel's name what reads it.
    """
    if not pairs:
        return {}
    raised = _Raised()
    try:
        return _followed(call, variables, pairs, raised)
    except Exception as error:  # whatever somebody's module may raise where a kernel is a pair
        inside = [name for name in pairs if name.startswith(f"{raised.place}/")]
        alone = inside if len(inside) == 1 else list(pairs) if len(pairs) == 1 else []
        if alone:
            rest = {name: pair for name, pair in pairs.items() if name not in alone}
            return dict.fromkeys(alone, _why(error)) | foreign_readers(call, variables, rest)
    names = list(pairs)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    first, second = ({name: pairs[name] for name in half} for half in halves)
    return foreign_readers(call, variables, first) | foreign_readers(call, variables, second)


class _Raised:
    """The interceptor that runs layers on marked factors.

    Attributes:
      place: the path of the innermost module that raised.
    """

    def __init__(self) -> None:
        self.place = ""

    def __call__(self, next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        try:
            return _ON_MARKED_FACTORS(next_fun, args, kwargs, context)
        except Exception:
            self.place = self.place or "/".join(context.module.path)
            raise


def _why(error: Exception) -> str:
    if isinstance(error, _Differentiated):
        return _reads("derivatives by it")
    return f"the model does not run on its factors ({type(error).__name__})"


def _followed(call: ModelCall, variables: Any, pairs: dict[str, LowRankKernel], interceptor: Any) -> dict[str, str]:
    def with_pairs(pairs: dict[str, LowRankKernel], variables: Any) -> Any:
        return {**variables, "params": map_named(lambda name, leaf: pairs.get(name, leaf), variables["params"], is_low_rank)}

    jaxpr = call.trace(with_pairs, interceptor, pairs, variables).jaxpr
    if _DERIVATIVE in programs.marks(jaxpr):
        raise _Differentiated
    names = [f"{name}:{index}" for name in sorted(pairs) for index in range(2)]  # in the order of a dict's leaves
    found: dict[str, str] = {}
    for factor in filter(None, _follow(jaxpr, programs.labelled(jaxpr.invars, names), found)):
        found.setdefault(_kernel_of(factor), _reads("it is returned"))
    return found


def _marked(pair: LowRankKernel) -> LowRankKernel:
    u, v = programs.mark_together(_ARRIVAL, _DERIVATIVE)(pair.u, pair.v)
    return dataclasses.replace(pair, u=u, v=v)


_ON_MARKED_FACTORS = on_factors(_marked)


def _follow(jaxpr: Any, factors: programs.Labels, found: dict[str, str]) -> list[str | None]:
    """Follows factors through a program, and notes in `found` what reads them.

    Args:
      factors: by variable the factor, as its kernel's name and its index.

    Returns:
      For each output of the program the factor that it is, if any.
    """
    for eqn in jaxpr.eqns:
        operands = programs.labels_of(eqn.invars, factors)
        if not any(operands):
            continue
        if programs.is_copy(eqn):
            outputs: Sequence[str | None] = operands
        elif programs.mark_of(eqn) is not None:
            outputs = _unless_read(eqn, [] if _is_pair(operands) else operands, found)
        elif bodies := programs.bodies(eqn, operands):
            returned = [_follow(body, programs.labelled(body.invars, given), found) for body, given in bodies]
            outputs = _returned(eqn, returned, found)
        else:
            outputs = _unless_read(eqn, operands, found)
        factors |= programs.labelled(eqn.outvars, outputs)
    return programs.labels_of(jaxpr.outvars, factors)


def _is_pair(operands: Sequence[str | None]) -> bool:
    """Whether both factors of one kernel arrive together."""
    kernel = _kernel_of(operands[0] or "")
    return list(operands) == [f"{kernel}:0", f"{kernel}:1"]


def _returned(eqn: Any, bodies: list[list[str | None]], found: dict[str, str]) -> list[str | None]:
    """What an operation returns of what its bodies return: branches may differ, and loops return what they computed last."""
    same = [outputs[0] if len(set(outputs)) == 1 else None for outputs in zip(*bodies, strict=False)]
    passes = eqn.primitive.name not in ("scan", "while")
    _unless_read(
        eqn, [out for outputs in bodies for out, kept in zip(outputs, same, strict=False) if not (passes and kept)], found
    )
    return same if passes else []


def _unless_read(eqn: Any, operands: Sequence[str | None], found: dict[str, str]) -> list[str | None]:
    """Notes that an operation reads factors."""
    for factor in filter(None, operands):
        found.setdefault(_kernel_of(factor), _reads(eqn.primitive.name))
    return []


def _reads(what: str) -> str:
    return f"something besides its layer reads it ({what})"


def _kernel_of(factor: str) -> str:
    return factor.rpartition(":")[0]
