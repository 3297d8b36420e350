"""Who reads a kernel on its way to its layer, found by following the factors through the traced program.

A layer on factors is right only if it gets them as they are stored.  A wrapper may halve, mask or normalise the leaves
of the layer inside, and runs on factors all the same: it halves each of them.  So the model is traced with factors in it, every
layer marks those that reach it, and a pair is untouched if nothing but calls, loops and marks has its factors as operands.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Var

from lowrank_jax.kernel import LowRankKernel, is_low_rank
from lowrank_jax.linen.known import find
from lowrank_jax.linen.layers import factored_kernels, on_kernels
from lowrank_jax.linen.model_call import ModelCall
from lowrank_jax.paths import map_named

_MARK = "lowrank_jax.factor:"
_COPIES = ("sharding_constraint", "copy", "device_put", "optimization_barrier", "pvary")
_CALLS = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint")


def foreign_readers(call: ModelCall, variables: Any, pairs: dict[str, LowRankKernel]) -> dict[str, str]:
    """Of the kernels that shall become pairs, those that something besides their layer reads: what, by the kernel's name.

    Args:
      call: of the model, which runs while nothing is factored.
      variables: the model's variables as shapes.
      pairs: by the kernel's name the factor pair that it will become, as shapes.
    """
    if not pairs:
        return {}
    try:
        return _followed(call, variables, pairs)
    except Exception as error:  # whatever somebody's module may raise where a kernel is a pair
        if len(pairs) == 1:
            return dict.fromkeys(pairs, _reads(type(error).__name__))
    names = list(pairs)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    first, second = ({name: pairs[name] for name in half} for half in halves)
    return foreign_readers(call, variables, first) | foreign_readers(call, variables, second)


def _followed(call: ModelCall, variables: Any, pairs: dict[str, LowRankKernel]) -> dict[str, str]:
    def with_pairs(pairs: dict[str, LowRankKernel], variables: Any) -> Any:
        return {**variables, "params": map_named(lambda name, leaf: pairs.get(name, leaf), variables["params"], is_low_rank)}

    jaxpr = call.trace(with_pairs, _mark_arrivals, pairs, variables).jaxpr
    names = [f"{name}:{index}" for name in sorted(pairs) for index in range(2)]  # in the order of a dict's leaves
    factors = dict(zip(jaxpr.invars, names, strict=False))
    found: dict[str, str] = {}
    for factor in filter(None, _follow(jaxpr, factors, found)):
        found.setdefault(_kernel_of(factor), _reads("it is returned"))
    return found


def _mark_arrivals(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
    layer = context.module
    known = find(layer) if context.method_name == "__call__" else None
    kernels = factored_kernels(layer, known) if known else {}
    if not kernels:
        return next_fun(*args, **kwargs)
    for name, pair in kernels.items():
        for index, factor in enumerate((pair.u, pair.v)):
            checkpoint_name(factor, f"{_MARK}{'/'.join((*layer.path, name))}:{index}")
    dense = {name: jnp.zeros(pair.shape, pair.dtype) for name, pair in kernels.items()}
    return on_kernels(layer, dense, args, kwargs)


def _follow(jaxpr: Any, factors: dict[Any, str], found: dict[str, str]) -> list[str | None]:
    """Follows factors through a program, and notes in `found` what reads them.

    Args:
      factors: by variable the factor, as its kernel's name and its index.

    Returns:
      For each output of the program the factor that it is, if any.
    """
    for eqn in jaxpr.eqns:
        operands = [factors.get(var) if isinstance(var, Var) else None for var in eqn.invars]
        if not any(operands):
            continue
        if eqn.primitive.name in _COPIES:
            outputs = operands
        elif bodies := _bodies(eqn, operands):
            returned = [_follow(body, _known(body.invars, given), found) for body, given in bodies]
            loops = eqn.primitive.name in ("scan", "while")
            outputs = _unless_read(eqn, returned[-1], found) if loops else returned[-1]
        else:
            outputs = _unless_read(eqn, operands, found)
        factors |= _known(eqn.outvars, outputs)
    return [factors.get(var) if isinstance(var, Var) else None for var in jaxpr.outvars]


def _known(variables: Sequence[Any], factors: Sequence[str | None]) -> dict[Any, str]:
    return {var: factor for var, factor in zip(variables, factors, strict=False) if factor}


def _unless_read(eqn: Any, operands: Sequence[str | None], found: dict[str, str]) -> list[str | None]:
    """Notes that an operation reads factors, unless it marks their arrival."""
    for factor in filter(None, operands):
        if eqn.params.get("name") != _MARK + factor:
            found.setdefault(_kernel_of(factor), _reads(eqn.primitive.name))
    return []


def _bodies(eqn: Any, operands: list[str | None]) -> list[tuple[Any, list[str | None]]]:
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
        bodies = [
            (params["cond_jaxpr"].jaxpr, operands[:tests] + carry),
            (params["body_jaxpr"].jaxpr, operands[tests:consts] + carry),
        ]
        return [] if any(carry) else bodies
    if kind not in _CALLS:
        return []
    body = params.get("jaxpr", params.get("call_jaxpr"))
    return [(getattr(body, "jaxpr", body), operands)]


def _reads(what: str) -> str:
    return f"something besides its layer reads it ({what})"


def _kernel_of(factor: str) -> str:
    return factor.rpartition(":")[0]
