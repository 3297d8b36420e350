"""A model's kernels, the layers that use them and the work that each does, found by tracing the model once."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from lowrank_jax.kernel import is_low_rank
from lowrank_jax.paths import named_leaves
from lowrank_jax.planning.kernel_use import KernelUse

SUPPORTED = (nn.Dense, nn.DenseGeneral, nn.Conv)
_MARK = "lowrank_jax.kernel_use:"


@dataclasses.dataclass(frozen=True)
class Call:
    """One traced call of a module: the kernel's name, and the sizes that determine the work."""

    name: str
    output_size: int
    positions: int
    widened: int
    inputs: int


def trace(model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, KernelUse]]:
    """Traces `model.init` on abstract values.

    Returns:
      The shapes of the model's variables, and the use of every parameter called "kernel" by its name.
    """
    uses: dict[str, KernelUse] = {}
    calls: list[Call] = []

    def observe(next_fun, args, call_kwargs, context):
        module, y = context.module, next_fun(*args, **call_kwargs)
        if context.method_name != "__call__" or not module.has_variable("params", "kernel"):
            return y
        kernel = nn.meta.unbox(module.get_variable("params", "kernel"))
        if is_low_rank(kernel):
            return y
        name = "/".join((*module.path, "kernel"))
        uses.setdefault(name, _describe(module, kernel.shape))
        if not isinstance(y, jax.Array):
            return y
        x = args[0] if args else next(iter(call_kwargs.values()))
        calls.append(Call(name, y.size, *_positions(uses[name], x, y), x.size))
        return checkpoint_name(y, f"{_MARK}{len(calls) - 1}")

    def init(inputs):
        with nn.intercept_methods(observe):
            return model.init(jax.random.key(0), *inputs, **kwargs)

    jaxpr, variables = jax.make_jaxpr(init, return_shape=True)(inputs)
    for index, times in _executions(jaxpr.jaxpr, 1):
        # Under vmap the mark has the mapped axis, which the module itself does not see.
        call = calls[index]
        uses[call.name].positions += times * call.positions // call.output_size
        uses[call.name].widened += times * call.widened // call.output_size
        uses[call.name].inputs += times * call.inputs // call.output_size
    variables = nn.meta.unbox(variables)
    own = named_leaves(variables.get("params", {}), is_leaf=is_low_rank)
    # A module that another one applies outside the model's tree has no parameters in it.
    return variables, {name: use for name, use in uses.items() if name in own}


def _describe(module: nn.Module, shape: tuple[int, ...]) -> KernelUse:
    contracted = None
    if isinstance(module, nn.Dense):
        contracted = 1
    elif isinstance(module, nn.DenseGeneral):
        contracted = 1 if isinstance(module.axis, int) else len(module.axis)
    return KernelUse(type(module).__name__, tuple(shape), contracted, _refusal(module))


def _refusal(module: nn.Module) -> str:
    base = next((cls for cls in SUPPORTED if isinstance(module, cls)), None)
    if base is None:
        return f"{type(module).__name__} is not nn.Dense, nn.DenseGeneral or nn.Conv"
    if type(module).__call__ is not base.__call__:
        return f"{type(module).__name__} overrides __call__"
    if isinstance(module, nn.DenseGeneral) and module.batch_dims != ():  # 0 names an axis
        return "batch_dims is not supported"
    if isinstance(module, nn.Conv) and module.feature_group_count > 1:
        depthwise = module.feature_group_count == module.features
        return "depthwise convolution" if depthwise else f"grouped convolution ({module.feature_group_count} groups)"
    if isinstance(module, nn.Conv) and module.mask is not None:
        return "masked convolution"
    if isinstance(module, nn.Conv) and (module.conv_general_dilated or module.conv_general_dilated_cls):
        return "overrides conv_general_dilated"  # which the 1x1 stage, a product, would not call
    return ""


def _positions(use: KernelUse, x: jax.Array, y: jax.Array) -> tuple[int, int]:
    if use.contracted is not None:
        outputs = math.prod(use.shape[use.contracted :])
        return y.size // outputs, 0
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
