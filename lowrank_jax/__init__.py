"""Low-rank neural networks in JAX: the same Flax model, with some kernels replaced by factor pairs."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowrank_jax import config as config
    from lowrank_jax import inputs, projection, theory
    from lowrank_jax import models as models
    from lowrank_jax.comparison import Fidelity
    from lowrank_jax.decay import add_frobenius_decay, add_nuclear_decay, frobenius_penalty, nuclear_penalty
    from lowrank_jax.exchange.load import load
    from lowrank_jax.flat import flatten, unflatten
    from lowrank_jax.kernel import LowRankKernel
    from lowrank_jax.linen.factorize import factorize, merge
    from lowrank_jax.linen.fidelity import fidelity
    from lowrank_jax.linen.known import register_layer
    from lowrank_jax.linen.layers import LowRankConv, LowRankDense, apply, factored
    from lowrank_jax.linen.plan import plan
    from lowrank_jax.linen.sensitivity import sensitivity
    from lowrank_jax.planning import chips
    from lowrank_jax.planning.allocate import allocate
    from lowrank_jax.planning.execution import choose_execution, rest_of_step
    from lowrank_jax.planning.plans import Plan
    from lowrank_jax.planning.relabel import with_execution
    from lowrank_jax.planning.rules import Rule
    from lowrank_jax.projection import activations
    from lowrank_jax.projection.sampled import function_approximation

__version__ = "0.1.0"

__all__ = [
    "Fidelity",
    "LowRankConv",
    "LowRankDense",
    "LowRankKernel",
    "Plan",
    "Rule",
    "activations",
    "add_frobenius_decay",
    "add_nuclear_decay",
    "allocate",
    "apply",
    "chips",
    "choose_execution",
    "factored",
    "factorize",
    "fidelity",
    "flatten",
    "frobenius_penalty",
    "function_approximation",
    "inputs",
    "load",
    "merge",
    "nuclear_penalty",
    "plan",
    "projection",
    "register_layer",
    "rest_of_step",
    "sensitivity",
    "theory",
    "unflatten",
    "with_execution",
]

# Names are loaded when they are first used: `lowrank --help` has no need of jax.  The same as above, which type checkers read.
_MODULES = {
    "activations": "projection.activations",
    "chips": "planning.chips",
    "config": "config",
    "inputs": "inputs",
    "models": "models",
    "projection": "projection",
    "theory": "theory",
}
_HOMES = {
    "Fidelity": "comparison",
    "LowRankConv": "linen.layers",
    "LowRankDense": "linen.layers",
    "LowRankKernel": "kernel",
    "Plan": "planning.plans",
    "Rule": "planning.rules",
    "add_frobenius_decay": "decay",
    "add_nuclear_decay": "decay",
    "allocate": "planning.allocate",
    "apply": "linen.layers",
    "choose_execution": "planning.execution",
    "factored": "linen.layers",
    "factorize": "linen.factorize",
    "fidelity": "linen.fidelity",
    "flatten": "flat",
    "frobenius_penalty": "decay",
    "function_approximation": "projection.sampled",
    "load": "exchange.load",
    "merge": "linen.factorize",
    "nuclear_penalty": "decay",
    "plan": "linen.plan",
    "register_layer": "linen.known",
    "rest_of_step": "planning.execution",
    "sensitivity": "linen.sensitivity",
    "unflatten": "flat",
    "with_execution": "planning.relabel",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    elif name in _HOMES:
        importlib.import_module(f"{__name__}.linen")  # whoever has a factor pair can give it to flax.serialization
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # once is enough
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_HOMES})
