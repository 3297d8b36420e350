"""A model's kernels, the layers that use them and the work that each does, found by tracing the model once."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from lowrank_jax.kernel import MatrixView, is_low_rank
from lowrank_jax.linen import known
from lowrank_jax.linen.model_call import ModelCall
from lowrank_jax.paths import named_leaves
from lowrank_jax.planning.kernel_use import KernelUse

_MARK = "lowrank_jax.kernel_use:"


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """One traced call of a layer: the kernel's name, and the sizes that determine the work."""

    name: str
    output_size: int
    positions: int
    widened: int
    inputs: int


def trace(call: ModelCall) -> tuple[dict[str, Any], dict[str, KernelUse]]:
    """Traces a model on abstract values.

    Returns:
      The shapes of the model's variables, without boxes, and by its name the use of every kernel.
    """
    uses: dict[str, KernelUse] = {}
    calls: list[LayerCall] = []

    def observe(next_fun, args, call_kwargs, context):
        layer, y = context.module, next_fun(*args, **call_kwargs)
        if context.method_name != "__call__":
            return y
        for below in known.kernels_of(layer):
            kernel, name = known.kernel_of(layer, below), "/".join((*layer.path, below))
            if kernel is None or is_low_rank(kernel):
                continue
            use = KernelUse(
                type(layer).__name__,
                tuple(kernel.shape),
                known.rows_of(layer),
                known.refusal(layer),
                known.has_own_run(layer),
            )
            if name not in uses or "/" in below:  # of a module inside, which the outer one uses
                uses[name] = use
            if isinstance(y, jax.Array) and known.is_measured(layer):
                x = args[0] if args else next(iter(call_kwargs.values()))
                calls.append(LayerCall(name, y.size, *_positions(use, x, y), x.size))
                y = checkpoint_name(y, f"{_MARK}{len(calls) - 1}")
        return y

    variables = nn.meta.unbox(call.init())
    jaxpr = call.trace(lambda variables: variables, observe, variables)
    for index, times in _executions(jaxpr.jaxpr, 1):
        # Under vmap the mark has the mapped axis, which the module itself does not see.
        seen = calls[index]
        uses[seen.name].positions += times * seen.positions // seen.output_size
        uses[seen.name].widened += times * seen.widened // seen.output_size
        uses[seen.name].inputs += times * seen.inputs // seen.output_size
    own = named_leaves(variables.get("params", {}), is_leaf=is_low_rank)
    # A module that another one applies outside the model's tree has no parameters in it.
    return variables, {name: use for name, use in uses.items() if name in own}


def _positions(use: KernelUse, x: jax.Array, y: jax.Array) -> tuple[int, int]:
    if use.rows is not None:
        return y.size // MatrixView(use.shape, use.rows).m, 0
    positions = y.size // y.shape[-1]
    return positions, positions // y.shape[-2] * x.shape[-2]


def _executions(jaxpr: Any, times: int):
    """Pairs of a mark's index and the number of elements that pass it in a run; a scan's body counts once per turn."""
    for eqn in jaxpr.eqns:
        name = eqn.params.get("name")
        if isinstance(name, str) and name.startswith(_MARK):
            yield int(name.removeprefix(_MARK)), times * eqn.outvars[0].aval.size
        turns = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _executions(inner, times * turns)
